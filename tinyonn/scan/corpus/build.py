"""Cuts a topical corpus from a large source."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..._io.files import check_output, replacing
from ..._io.records import BadRecordError
from ...errors import InputError, listed
from .config import CorpusConfig
from .language import guess_language
from .records import CorpusItem, content_id, item_from_record
from .sources import SourceRecord, iter_source, require_source
from .topic import Topic, load_topic

_Placed = tuple[CorpusItem, str]  # a sequence and where it came from


@dataclass(frozen=True)
class CorpusReport:
    """Sequences that a cut kept, and the reasons why it dropped others.

    Attributes:
        output: corpus file.
        topic: name of the topic.
        read: number of records and text files read.
        kept: number of sequences written.
        dropped: reason -> number of sequences.
        characters: number of characters of the kept sequences.
        bad: number of malformed records with `skip_bad` (also in `dropped`).
        errors: messages of the first few of them.
        seconds: duration.
    """

    output: Path
    topic: str
    read: int
    kept: int
    dropped: dict[str, int]
    characters: int
    bad: int
    errors: list[str]
    seconds: float


@dataclass(frozen=True)
class CorpusProgress:
    """Progress of a cut: records read, sequences kept, and the fraction of the source if its size is known."""

    read: int
    kept: int
    fraction: float | None


def build_corpus(
    source: str | os.PathLike[str],
    topic: str | Topic,
    output: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    progress: Callable[[CorpusProgress], None] | None = None,
    **options: Any,
) -> CorpusReport:
    """Writes the sequences of a source that belong to a topic, as JSONL with `id`, `text` or `messages`, and `source`.

    The source is streamed. Memory holds the hashes of the kept texts and, with `limit`, the sample. The output appears whole or not at all.

    Args:
        source: a JSONL, JSON or Parquet file, a text file, compressed or not, a folder of them, "-" for standard input, or a data
            set's name on the hub.
        topic: a Topic, a built-in topic's name, or a YAML file.
        output: output file; None for `data/sft/TOPIC_corpus.jsonl`.
        tokenizer: callable like a transformers tokenizer; counts tokens for `min_tokens` and `max_tokens`.
        progress: function called after every record.
        **options: fields of `CorpusConfig`.

    Raises:
        InputError: an option is invalid; the source does not exist; a record is malformed (with its line); the output exists; nothing was
            kept.
        TypeError: `topic` is neither a Topic nor a string.
    """
    config = CorpusConfig.from_mapping(options, source="build_corpus")
    if tokenizer is None and (config.min_tokens is not None or config.max_tokens is not None):
        raise InputError("min_tokens and max_tokens need a tokenizer, got none.")
    if isinstance(topic, str):
        topic = load_topic(topic)
    if not isinstance(topic, Topic):
        raise TypeError(f"topic must be a Topic, the name of a built-in topic or of a YAML file, got {type(topic).__name__}.")
    require_source(os.fspath(source))
    path = Path(output) if output is not None else Path("data/sft") / f"{topic.name}_corpus.jsonl"
    check_output(path, [source], config.overwrite)

    started = time.monotonic()
    run = _Cut(topic, config, tokenizer, os.path.isdir(source), progress)
    sequences = run.sequences(iter_source(os.fspath(source), subset=config.subset, split=config.split))
    kept = characters = 0
    with replacing(path, make_folder=True) as partial, partial.open("w", encoding="utf-8") as file:
        chosen: Iterable[_Placed] = itertools.islice(sequences, config.limit)
        if config.limit is not None and not config.first:
            chosen = run.sample(sequences, config.limit, random.Random(config.seed))
        for item, place in chosen:
            kept += 1
            characters += len(item.content)
            record = {"id": item.sequence_id, "text": item.text, "messages": item.messages, "tools": item.tools, "source": place}
            file.write(json.dumps({key: value for key, value in record.items() if value is not None}, ensure_ascii=False) + "\n")
        if not kept:
            reasons = listed((f"{count} {why}" for why, count in run.dropped.most_common()), 3, width=60, none="it holds none")
            raise InputError(f"source must hold at least one record that fits, got {run.read} records of {source}: {reasons}.")
    dropped = dict(run.dropped.most_common())
    return CorpusReport(path, topic.name, run.read, kept, dropped, characters, run.bad, run.errors, time.monotonic() - started)


def cut_text(text: str, max_chars: int) -> Iterator[str]:
    """Pieces of at most `max_chars`, cut at the best boundary in the second half of each.

    Boundaries, best first: an empty line before text that is not indented (a paragraph, a top-level definition), any empty line, a line,
    the end of a sentence, a space. A text without any is cut at `max_chars`.
    """
    while len(text) > max_chars:
        half, end = max_chars // 2, 0
        for boundary in _BOUNDARIES:
            # One character more, for what a boundary looks ahead at.
            ends = [match.end() for match in boundary.finditer(text, half, max_chars + 1) if match.end() <= max_chars]
            if ends:
                end = ends[-1]
                break
        end = end or max_chars
        piece = text[:end].rstrip()
        if piece.strip():
            yield piece
        text = text[end:].lstrip("\n")
    if text.strip():
        yield text.rstrip()


_BOUNDARIES = [re.compile(pattern) for pattern in (r"\n[ \t]*\n+(?=\S)", r"\n[ \t]*\n", r"\n", r"(?<=[.!?。！？])\s*", r"\s+")]


@dataclass
class _Cut:
    """One run over a source: the tests, and counts of what they drop."""

    topic: Topic
    config: CorpusConfig
    tokenizer: Any
    in_folder: bool
    progress: Callable[[CorpusProgress], None] | None
    read: int = 0
    fitting: int = 0
    bad: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    _hashes: set[bytes] = field(default_factory=set)
    _names: set[str] = field(default_factory=set)

    def sequences(self, records: Iterable[SourceRecord]) -> Iterator[_Placed]:
        """Sequences that pass every test, with their places."""
        for record in records:
            self.read += 1
            for piece in self._pieces(record):
                if (reason := self._reject(piece.content, record.file_name)) is not None:
                    self.dropped[reason] += 1
                    continue
                self.fitting += 1
                yield self._named(piece), record.place
            if self.progress is not None:
                kept = self.fitting if self.config.limit is None else min(self.fitting, self.config.limit)
                self.progress(CorpusProgress(self.read, kept, record.fraction))

    def sample(self, sequences: Iterable[_Placed], limit: int, randomness: random.Random) -> Iterator[_Placed]:
        """A uniform sample in the source's order: a reservoir, one pass, `limit` of them held."""
        reservoir: list[tuple[int, _Placed]] = []
        for index, sequence in enumerate(sequences):
            if index < limit:
                reservoir.append((index, sequence))
                continue
            self.dropped["not in the sample"] += 1
            place = randomness.randrange(index + 1)
            if place < limit:
                reservoir[place] = (index, sequence)
        for _, sequence in sorted(reservoir, key=lambda pair: pair[0]):
            yield sequence

    def _pieces(self, record: SourceRecord) -> list[CorpusItem]:
        try:
            if record.located.record is None:
                raise BadRecordError(record.located.error)
            item = item_from_record(record.located.record, text_field=None if record.file_name else self.config.text_field)
        except BadRecordError as error:
            self._note_bad(record, str(error))
            return []
        shaped = self._shape(item)
        if isinstance(shaped, str):
            self.dropped[shaped] += 1
            return []
        wants_cut, most = record.file_name is not None if self.config.cut is None else self.config.cut, self.config.max_chars
        if not wants_cut or most is None or shaped.text is None or len(shaped.text) <= most:
            return [shaped]
        name = shaped.sequence_id
        pieces = enumerate(cut_text(shaped.text, most), start=1)
        return [CorpusItem(f"{name}.{number}" if name else "", text=text) for number, text in pieces]

    def _shape(self, item: CorpusItem) -> CorpusItem | str:
        """The sequence in the requested format, or the reason why it cannot have it."""
        if self.config.code_blocks != "keep":
            blocks = self.topic.code_blocks(item.content)
            if not blocks:
                return "no code block"
            if self.config.code_blocks == "only":
                item = CorpusItem(item.sequence_id, text="\n\n".join(block.rstrip("\n") for block in blocks) + "\n")
        if self.config.format == "chat" and item.messages is None:
            return "not a chat"
        if self.config.format == "text" and item.messages is not None:
            return CorpusItem(item.sequence_id, text=item.content)
        return item

    def _reject(self, text: str, file_name: str | None) -> str | None:
        """Reason to drop a text, or None. The cheap tests come first."""
        config = self.config
        if len(text) < config.min_chars:
            return f"shorter than {config.min_chars} characters"
        if config.max_chars is not None and len(text) > config.max_chars:
            return f"longer than {config.max_chars} characters"
        owned = file_name is not None and self.topic.owns_file(file_name)
        if not owned and (reason := self.topic.reject(text)) is not None:
            return reason
        if config.language is not None and (found := guess_language(text)) != config.language:
            return f"not in language {config.language}" if found else "language not recognised"
        if config.min_tokens is not None or config.max_tokens is not None:
            count = len(self.tokenizer(text)["input_ids"])
            if config.min_tokens is not None and count < config.min_tokens:
                return f"fewer than {config.min_tokens} tokens"
            if config.max_tokens is not None and count > config.max_tokens:
                return f"more than {config.max_tokens} tokens"
        if config.dedup:
            digest = _normal_hash(text)
            if digest in self._hashes:
                return "duplicate"
            self._hashes.add(digest)
        return None

    def _named(self, item: CorpusItem) -> CorpusItem:
        name = item.sequence_id
        if not name or name in self._names:
            name = content_id(item, self._names)
        self._names.add(name)
        return dataclasses.replace(item, sequence_id=name)

    def _note_bad(self, record: SourceRecord, error: str) -> None:
        # A folder may hold pictures, archives and empty files beside its texts; they are not errors.
        if record.file_name is not None and self.in_folder:
            self.dropped[record.foreign or ("empty" if error == "text must not be empty" else "not a text file")] += 1
            return
        if not self.config.skip_bad:
            raise InputError(f"{record.place}: {error}.")
        self.bad += 1
        self.dropped["malformed"] += 1
        if len(self.errors) < 5:
            self.errors.append(f"{record.place}: {error}")


def _normal_hash(text: str) -> bytes:
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(normal.encode("utf-8"), digest_size=16).digest()
