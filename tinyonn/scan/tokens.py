"""From corpus items to token ids, and from tokens to batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .._io.folders import check_vocabulary
from ..errors import InputError, reason
from .corpus.corpus import CorpusItem

# Sequences are sorted by length within so many batches: little padding, and still an order that follows the corpus.
WINDOW_BATCHES = 16

TOO_SHORT = "shorter than 2 tokens"
EMPTY_PROMPT = "empty prompt"
LONG_PROMPT = "prompt longer than {} tokens"
NO_TEMPLATE_FIT = "refused by the chat template"
CALLS_DROPPED = "it leaves out the tool calls"


@dataclass(frozen=True)
class TokenSequence:
    """One text as the model reads it.

    Attributes:
        token_ids: (tokens,) int64.
        answer_mask: (tokens,) uint8, 1 for tokens that the model generated; None where it generated none.
    """

    sequence_id: str
    token_ids: NDArray[np.int64]
    text: str
    answer_mask: NDArray[np.uint8] | None = None


@dataclass
class TokenCounts:
    """Counts of the corpus items so far."""

    sequences: int = 0
    tokens: int = 0
    truncated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Encoder:
    """Tokenises items one at a time and counts those that it cuts or leaves out. A prompt is never cut, since the model answers its end.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens kept of each text, and largest length of a prompt.
        prompts: whether the texts are prompts. A chat then ends with an open turn of the assistant, and one token is enough.
        skip_bad: whether to count chats that the template refuses rather than raise an error.
        vocabulary: number of tokens with embeddings in the model; None to leave ids unchecked.
        model: name of the model in error messages.
    """

    tokenizer: Any
    max_length: int
    prompts: bool
    skip_bad: bool
    vocabulary: int | None
    model: str

    def encode_all(self, items: Iterable[CorpusItem], counts: TokenCounts) -> Iterator[TokenSequence]:
        """The items that are long enough, in order.

        Raises:
            InputError: chat records, and the tokenizer has no chat template or its template refuses them.
        """
        for item in items:
            if (sequence := self.encode(item, counts)) is not None:
                yield sequence

    def encode(self, item: CorpusItem, counts: TokenCounts) -> TokenSequence | None:
        """One item, or None if it is left out; `counts` has the reason."""
        chat = item.messages is not None
        text = self._render(item) if chat else item.text
        if text is None:
            counts.skipped[NO_TEMPLATE_FIT] += 1
            return None
        # One token more than wanted tells a cut text from one that just fits; a chat template brings its own special tokens.
        ids = self.tokenizer(
            text, add_special_tokens=not chat, truncation=True, max_length=self.max_length + 1, return_attention_mask=False, verbose=False
        )["input_ids"]
        if self.vocabulary is not None and ids:
            check_vocabulary(self.vocabulary, max(ids), self.model, item.sequence_id)
        if len(ids) < (1 if self.prompts else 2):
            counts.skipped[EMPTY_PROMPT if self.prompts else TOO_SHORT] += 1
            return None
        if len(ids) > self.max_length:
            if self.prompts:
                counts.skipped[LONG_PROMPT.format(self.max_length)] += 1
                return None
            counts.truncated += 1
            ids = ids[: self.max_length]
            text = self.tokenizer.decode(ids)
        counts.sequences += 1
        counts.tokens += len(ids)
        return TokenSequence(item.sequence_id, np.asarray(ids, np.int64), text)

    def _render(self, item: CorpusItem) -> str | None:
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"dataset_path must hold plain text where the tokenizer has no chat template, got messages in {item.sequence_id}."
            )
        messages = list(item.messages or ())
        if self.prompts and messages and messages[-1].get("role") == "assistant":
            messages.pop()  # the model gives its own answer
        try:
            text = self._templated(messages, item.tools)
            fault = CALLS_DROPPED if self._drops_calls(text, messages, item.tools) else None
        except Exception as error:  # templates are programs: jinja's errors, and whatever their own code raises
            if self.skip_bad:
                return None
            raise self._refused(item, reason(error, 100)) from error
        if fault is None:
            return text
        if self.skip_bad:
            return None
        raise self._refused(item, fault)

    def _templated(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        options = {"tokenize": False, "add_generation_prompt": self.prompts, **({"tools": tools} if tools else {})}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except Exception:
            if not any("tool_calls" in turn for turn in messages):
                raise
        # Most templates take the arguments of a call as an object, some (DeepSeek's) as its JSON.
        return str(self.tokenizer.apply_chat_template([_with_json_arguments(turn) for turn in messages], **options))

    def _drops_calls(self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None) -> bool:
        """Whether a template gives the same text without the calls."""
        if not any("tool_calls" in turn for turn in messages):
            return False
        try:
            return text == self._templated([{k: v for k, v in turn.items() if k != "tool_calls"} for turn in messages], tools)
        except Exception:  # it wants the calls
            return False

    def _refused(self, item: CorpusItem, why: str) -> InputError:
        return InputError(
            f"dataset_path must hold chats that the tokenizer's template takes, got {item.sequence_id}: {why.rstrip('.')}; "
            "--skip-bad leaves it out."
        )


def _with_json_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in turn["tool_calls"]
    ]
    return {**turn, "tool_calls": calls}


def padded(sequences: list[TokenSequence], padding: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (sequences, tokens) int64, with `padding` on one side of shorter rows."""
    ids = [torch.from_numpy(sequence.token_ids) for sequence in sequences]
    return pad_sequence(ids, True, padding, side), pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)


def plan_batches(sequences: Iterable[TokenSequence], batch_size: int) -> Iterator[list[TokenSequence]]:
    """Batches of similar lengths, longest first within a window of WINDOW_BATCHES.

    The plan depends on the sequences and `batch_size` alone, so a resumed scan computes the very batches of the first run.
    """
    window: list[TokenSequence] = []
    for sequence in sequences:
        window.append(sequence)
        if len(window) == batch_size * WINDOW_BATCHES:
            yield from _split(window, batch_size)
            window = []
    yield from _split(window, batch_size)


def _split(window: list[TokenSequence], batch_size: int) -> Iterator[list[TokenSequence]]:
    ordered = sorted(window, key=lambda sequence: -len(sequence.token_ids))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]
