"""Prompts: a question and its choices as text, that text as tokens, and which of them are the question.

The question's characters are known from writing the prompt, its tokens from the offsets that a fast tokenizer gives: no text is searched.
A chat model reads the same plain text: chat templates are not applied, since they would put tokens of their own around every span.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, did_you_mean, listed, reason, shown
from ..fields import Fields

PLACES = ("question", "choices", "context")
DEFAULT_TEMPLATE = "Question: {question}\nChoices:\n{choices}\nAnswer:"
# Characters for each token of max_length that are tokenized at first: 4 or so are usual, and a tokenizer builds all that it cuts.
FIRST_CHARACTERS = 64
DEFAULT_CONTEXT_TEMPLATE = "Context: {context}\n" + DEFAULT_TEMPLATE


@dataclass(frozen=True)
class Prompt:
    """A prompt and the characters [start, end) of it that are the question."""

    text: str
    start: int
    end: int


class PromptTemplate:
    """Text with `{question}`, `{choices}` and `{context}`; `{{` and `}}` are braces. Choices are lines "A. text".

    Args:
        text: the template.
        source: of it, for messages.

    Raises:
        InputError: `{question}` is not there exactly once, another place is there twice or is unknown, or braces do not match.
    """

    def __init__(self, text: str, source: str = "prompt_template") -> None:
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise InputError(
                f"{source} must write a brace that is text twice ({{{{ or }}}}), got a template where {reason(error)}."
            ) from None
        places = [name + (f"!{conversion}" if conversion else "") for _, name, _, conversion in self._parts if name is not None]
        for place in places:
            if place not in PLACES:
                known = ", ".join(f"{{{name}}}" for name in PLACES)
                raise InputError(f"{source} must have no other places than {known}, got {{{place}}}{did_you_mean(place, PLACES)}")
        if any(spec for _, _, spec, _ in self._parts):
            raise InputError(f"{source} must have places without a format, got {shown(text)}.")
        for place in PLACES:
            if places.count(place) > 1:
                raise InputError(f"{source} must have {{{place}}} once, got it {places.count(place)} times.")
        if "question" not in places:
            raise InputError(f"{source} must have the place {{question}}, got {listed(places, none='no place')}.")
        self.uses_context = "context" in places
        self._source = source

    @classmethod
    def from_file(cls, path: str) -> PromptTemplate:
        """The template in a UTF-8 file; a line break at its end is not of it.

        Raises:
            InputError: the file cannot be read, or is no template.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"prompt_template must be a UTF-8 file, got {path}.") from None
        except OSError as error:
            raise InputError(f"prompt_template must be a readable file, got {path}: {error.strerror}.") from error
        return cls(text.removesuffix("\n").removesuffix("\r"), f"prompt_template {path}")

    def render(self, question: Fields) -> Prompt:
        """The prompt of one question.

        Raises:
            InputError: the template has a place for the context, and the question has none.
        """
        if self.uses_context and question.context is None:
            raise InputError(
                f"{self._source} must not have {{context}} for data without one, got a question without: {question.question!r}."
            )
        choices = "\n".join(f"{label}. {text}" for label, text in zip(question.labels, question.texts, strict=True))
        values = {"question": question.question, "choices": choices, "context": question.context or ""}
        text, start = "", 0
        for literal, place, _, _ in self._parts:
            text += literal
            if place is not None:
                start = len(text) if place == "question" else start
                text += values[place]
        return Prompt(text, start, start + len(question.question))


def render_all(questions: Sequence[Fields], template: PromptTemplate | None = None) -> list[Prompt]:
    """The prompts of questions; without a template, the default one, which begins with the context of those that have one."""
    plain, long = PromptTemplate(DEFAULT_TEMPLATE), PromptTemplate(DEFAULT_CONTEXT_TEMPLATE)
    return [(template or (plain if question.context is None else long)).render(question) for question in questions]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it.

    Attributes:
        token_ids: special tokens included.
        span: for each token whether some of its characters are the question's; None where the question was lost.
        truncated: whether it was longer.
    """

    token_ids: tuple[int, ...]
    span: tuple[bool, ...] | None
    truncated: bool


class PromptEncoder:
    """Tokens of prompts, cut on the right.

    A token belongs to the question if it covers one of its characters: a byte-level token " do" that begins with the space before
    belongs to it, and so does each of several tokens that make up one character. The question is lost, wholly or partly, where one of
    its tokens was cut off, or where the tokenizer has no token for it.

    Args:
        tokenizer: a fast transformers tokenizer, the only kind that knows offsets.
        max_length: most tokens of a prompt.

    Raises:
        InputError: the tokenizer is slow, or max_length leaves no room beside its special tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"model_path must hold a fast tokenizer (tokenizer.json), whose offsets say where the question is, "
                f"got {type(tokenizer).__name__}."
            )
        special = tokenizer.num_special_tokens_to_add(pair=False)
        if max_length <= special:
            raise InputError(f"max_length must be more than the {special} special tokens of each text, got {max_length}.")
        self._tokenizer = tokenizer
        self._max_length = max_length
        tokenizer.truncation_side = "right"

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """One prompt's tokens; of a long one no more of the text is tokenized than tells them, and a whole further max_length."""
        characters = FIRST_CHARACTERS * self._max_length
        encoding = self._encoded(prompt.text[:characters])
        while characters < len(prompt.text) and len(encoding["input_ids"]) < 3:  # the last row ends where the text was cut
            characters *= 2
            encoding = self._encoded(prompt.text[:characters])
        inside, *cut = [
            # A space's own token has no width where offsets are trimmed, but a place; special tokens are at 0.
            tuple(start < prompt.end and end > prompt.start for start, end in offsets)
            for offsets in encoding["offset_mapping"]
        ]
        whole = any(inside) and not any(map(any, cut))
        return EncodedPrompt(tuple(encoding["input_ids"][0]), inside if whole else None, bool(cut))

    def _encoded(self, text: str) -> Any:
        return self._tokenizer(
            text,
            truncation=True,
            max_length=self._max_length,
            padding=False,
            return_offsets_mapping=True,
            return_overflowing_tokens=True,  # one more row for each further max_length tokens
            verbose=False,
        )


@dataclass(frozen=True)
class PromptBatch:
    """Prompts side by side, padding last, so that default positions are right and no causal model sees it.

    Attributes:
        input_ids, attention_mask: (B, T) int64.
        span_mask: (B, T) bool, the question's tokens; none in a row whose question was lost.
    """

    input_ids: Tensor
    attention_mask: Tensor
    span_mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[EncodedPrompt], padding: int, device: torch.device | str = "cpu") -> PromptBatch:
        """A batch of at least one prompt. `padding` is the token id that fills rows."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.full((len(prompts), longest), padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        span = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            length = len(prompt.token_ids)
            ids[row, :length] = torch.tensor(prompt.token_ids)
            mask[row, :length] = 1
            if prompt.span is not None:
                span[row, :length] = torch.tensor(prompt.span)
        return cls(ids.to(device), mask.to(device), span.to(device))
