"""Prompts: a question and its choices as text and as tokens, with the span of the question.

The characters of the question are known from writing the prompt, and its tokens from the offsets of a fast tokenizer; no text is searched.
A chat model reads the same plain text. Chat templates are not applied, because they would add tokens around every span.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...errors import InputError, did_you_mean, listed, reason, shown
from ..fields import Fields

PLACES = ("question", "choices", "context")
DEFAULT_TEMPLATE = "Question: {question}\nChoices:\n{choices}\nAnswer:"
# Characters per token of max_length that are tokenized at first. About 4 are usual; a tokenizer also builds the tokens that it cuts.
FIRST_CHARACTERS = 64
DEFAULT_CONTEXT_TEMPLATE = "Context: {context}\n" + DEFAULT_TEMPLATE


@dataclass(frozen=True)
class Prompt:
    """A prompt, with the question at its characters [start, end)."""

    text: str
    start: int
    end: int


class PromptTemplate:
    """Text with `{question}`, `{choices}` and `{context}`; `{{` and `}}` are braces. Choices become lines "A. text".

    Args:
        text: text of the template.
        source: origin of the template, for messages.

    Raises:
        InputError: `{question}` does not occur exactly once, another placeholder is unknown or repeated, or braces do not match.
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
        """Template from a UTF-8 file, without the line break at its end.

        Raises:
            InputError: the file cannot be read, or is not a valid template.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"prompt_template must be a UTF-8 file, got {path}.") from None
        except OSError as error:
            raise InputError(f"prompt_template must be a readable file, got {path}: {error.strerror}.") from error
        return cls(text.removesuffix("\n").removesuffix("\r"), f"prompt_template {path}")

    def render(self, question: Fields) -> Prompt:
        """Prompt of one question.

        Raises:
            InputError: the template has a placeholder for the context, and the question has no context.
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
    """Prompts of questions. The default template begins with the context, if a question has one."""
    plain, long = PromptTemplate(DEFAULT_TEMPLATE), PromptTemplate(DEFAULT_CONTEXT_TEMPLATE)
    return [(template or (plain if question.context is None else long)).render(question) for question in questions]


@dataclass(frozen=True)
class EncodedPrompt:
    """Tokens of a prompt.

    Attributes:
        token_ids: token ids, special tokens included.
        span: for each token, whether it covers a character of the question; None if the question was lost.
        truncated: whether the prompt was truncated.
    """

    token_ids: tuple[int, ...]
    span: tuple[bool, ...] | None
    truncated: bool


class PromptEncoder:
    """Tokens of prompts, cut on the right.

    A token belongs to the question if it covers one of its characters. This includes a byte-level token " do" that begins with the
    preceding space, and each of several tokens for one character. The question is lost if one of its tokens was cut off, or if the
    tokenizer has no token for it.

    Args:
        tokenizer: fast transformers tokenizer; slow ones have no offsets.
        max_length: maximum number of tokens of a prompt.

    Raises:
        InputError: the tokenizer is slow, or max_length is not larger than its number of special tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"model_path must hold a fast tokenizer (tokenizer.json), whose offsets locate the question, "
                f"got {type(tokenizer).__name__}."
            )
        special = tokenizer.num_special_tokens_to_add(pair=False)
        if max_length <= special:
            raise InputError(f"max_length must be more than the {special} special tokens of each text, got {max_length}.")
        self._tokenizer = tokenizer
        self._max_length = max_length
        tokenizer.truncation_side = "right"

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Tokens of one prompt. Of a long text, only as much is tokenized as determines them, plus a further max_length."""
        characters = FIRST_CHARACTERS * self._max_length
        encoding = self._encoded(prompt.text[:characters])
        while characters < len(prompt.text) and len(encoding["input_ids"]) < 3:  # the last row may end where the text was cut
            characters *= 2
            encoding = self._encoded(prompt.text[:characters])
        inside, *cut = [
            # With trimmed offsets, the token of a space has a position but no width; special tokens are at 0.
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
            return_overflowing_tokens=True,  # one further row per max_length tokens
            verbose=False,
        )


@dataclass(frozen=True)
class PromptBatch:
    """Batch of prompts with padding at the end, so that default positions are right and causal models ignore it.

    Attributes:
        input_ids, attention_mask: (B, T) int64.
        span_mask: (B, T) bool, True for tokens of the question; all False in a row whose question was lost.
    """

    input_ids: Tensor
    attention_mask: Tensor
    span_mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[EncodedPrompt], padding: int, device: torch.device | str = "cpu") -> PromptBatch:
        """Batch of at least one prompt. `padding` is the token id for padding."""

        def padded(rows: Iterable[Sequence[int]], value: int) -> Tensor:
            return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=value).to(device)

        ids = padded((prompt.token_ids for prompt in prompts), padding)
        mask = padded(([1] * len(prompt.token_ids) for prompt in prompts), 0)
        span = padded((prompt.span or [0] * len(prompt.token_ids) for prompt in prompts), 0)
        return cls(ids, mask, span.bool())
