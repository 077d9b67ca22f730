"""Texts of a life: documents from files, folders and records, a vocabulary learned from them, and sequences of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .._io.records import field_names, read_records, short
from ..errors import InputError, listed

END, PAD = "<|end|>", "<|pad|>"
TURN, CLOSE = "<|turn|>", "<|close|>"  # around the role of a chat's turn, and after its text
RECORDS = (".jsonl", ".json", ".parquet", ".ndjson")
SAMPLE = 20_000  # documents from which the vocabulary is learned
CHAT_TEMPLATE = (
    "{% for message in messages %}" + TURN + "{{ message['role'] }}\n{{ message['content'] }}" + CLOSE + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + TURN + "assistant\n{% endif %}"
)


def documents(data_path: str, *, suffix: str | None = None, text_field: str = "text", without: Path | None = None) -> Iterator[str]:
    """Texts of a file, of the files in a folder in order of their names, or of records.

    Files that are not UTF-8 text, and those in the folder `without`, are left out of a folder. A record has a field `text_field`, or a chat
    in `messages` or `conversations`.

    Raises:
        InputError: the path does not exist, or a record has neither; the message has its line.
    """
    path = Path(data_path).expanduser()
    if path.is_dir():
        own = None if without is None else without.resolve()
        for file in sorted(path.rglob("*")):
            if own is not None and file.resolve().is_relative_to(own):
                continue
            if (
                file.name.endswith(suffix or "")
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            ):
                text = _text_of(file)
                if text is not None:
                    yield text
    elif not path.exists():
        raise InputError(f"data_path must be a file or a folder, got {data_path}, which does not exist.")
    elif path.suffix in RECORDS or any(part in RECORDS for part in path.suffixes):
        yield from _of_records(data_path, text_field)
    else:
        text = _text_of(path)
        if text is None:
            raise InputError(f"data_path must be UTF-8 text, or records named {listed(RECORDS)}, got {data_path}.")
        yield text


def _text_of(file: Path) -> str | None:
    """Text of a file; None if it is not UTF-8, is empty or cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return text if text.strip() and "\0" not in text else None


def _of_records(data_path: str, text_field: str) -> Iterator[str]:
    for one in read_records(data_path):
        where = f"record {one.number} of {data_path}"
        if one.record is None:
            raise InputError(f"{where} {one.error}.")
        chat = one.record.get("messages", one.record.get("conversations"))
        text = one.record.get(text_field)
        if isinstance(text, str) or isinstance(chat, list):
            found = text if isinstance(text, str) else _chat_text(chat, where)
            if max(found, default="") >= "\ud800" and found != found.encode(errors="replace").decode():
                raise InputError(f"{where} must be Unicode text, got half of a surrogate pair.")
            yield found
        else:
            raise InputError(
                f"{where} must have a text in {text_field!r} or a chat in 'messages', got the fields {field_names(one.record)}."
            )


def _chat_text(chat: Sequence[Any], where: str) -> str:
    """A chat in the form of `CHAT_TEMPLATE`."""
    parts = []
    for turn in chat:
        if not isinstance(turn, dict):
            raise InputError(f"{where} must have turns with a role and a content, got {short(turn)}.")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"{where} must have turns with a role and a content, got the fields {field_names(turn)}.")
        parts.append(f"{TURN}{role}\n{content}{CLOSE}\n")
    return "".join(parts)


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of transformers, learned from texts; every text can be encoded, and decodes to itself.

    Returns:
        A `PreTrainedTokenizerFast` with the chat template, of at most `vocab_size` tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, PAD, TURN, CLOSE]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(islice(texts, SAMPLE), trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    found.chat_template = CHAT_TEMPLATE
    return found


def encoded(texts: Iterable[str], tokenizer: Any) -> np.ndarray:
    """Tokens of all texts one after another, each followed by the end token; int32."""
    end = tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    iterator = iter(texts)
    while batch := list(islice(iterator, 256)):
        found = tokenizer(batch, add_special_tokens=False)["input_ids"]
        parts += [np.array([*tokens, end], dtype=np.int32) for tokens in found]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


class Sequences(Dataset[dict[str, Tensor]]):
    """Pieces of one length of a text. Items have `input_ids` and `labels`, both (context,) int64.

    Args:
        tokens: (tokens,) int32, also one that stays in its file.
        context: tokens of a piece.
        places: numbers of the pieces; None for all whole ones.
    """

    def __init__(self, tokens: np.ndarray, context: int, places: np.ndarray | None = None) -> None:
        self._tokens, self._context = tokens, context
        self._places = np.arange(len(tokens) // context) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        begin = int(self._places[number]) * self._context
        row = torch.from_numpy(self._tokens[begin : begin + self._context].astype(np.int64))
        return {"input_ids": row, "labels": row}


def split(tokens: np.ndarray, context: int, held_out: int, name: str) -> tuple[Sequences, Sequences]:
    """Sequences for training, and those held out, from places spread evenly over the text.

    Raises:
        InputError: the text is shorter than one sequence more than is held out.
    """
    whole = len(tokens) // context
    if whole <= held_out:
        raise InputError(
            f"data_path must have more than {held_out * context:,} tokens, eval_size times context, got {len(tokens):,} in {name}: "
            "use more text, or a smaller eval_size or context."
        )
    held = np.linspace(0, whole - 1, held_out).round().astype(int)
    return Sequences(tokens, context, np.setdiff1d(np.arange(whole), held)), Sequences(tokens, context, held)
