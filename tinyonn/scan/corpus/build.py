"""Cuts a topical corpus from a large source."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..._io.records import BadRecordError
from ...errors import InputError, did_you_mean, listed
from .language import LANGUAGES, guess_language
from .records import CorpusItem, content_id, item_from_record
from .sources import SourceRecord, iter_source, require_source
from .topic import Topic, load_topic

FORMATS = ("auto", "text", "chat")
CODE_BLOCKS = ("keep", "require", "only")

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


@dataclass(frozen=True)
class Limits:
    """Conditions on a sequence besides its topic. See `build_corpus`."""

    format: str = "auto"
    code_blocks: str = "keep"
    min_chars: int = 32
    max_chars: int | None = None
    tokenizer: Any = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (("format", FORMATS), ("code_blocks", CODE_BLOCKS)):
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}")
        if self.language is not None and self.language not in LANGUAGES:
            raise InputError(f"language must be one of {', '.join(LANGUAGES)}, got {self.language!r}.")
        for low, high in (("min_chars", "max_chars"), ("min_tokens", "max_tokens")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and least < 0:
                raise InputError(f"{low} must be at least 0, got {least}.")
            if most is not None and most < max(1, least or 0):
                raise InputError(f"{high} must be at least {max(1, least or 0)}, got {most}.")
        if (self.min_tokens is not None or self.max_tokens is not None) and self.tokenizer is None:
            raise InputError("min_tokens and max_tokens need a tokenizer, got none.")

    def reject_length(self, text: str) -> str | None:
        """Reason to drop a text of so many characters, or None."""
        if len(text) < self.min_chars:
            return f"shorter than {self.min_chars} characters"
        if self.max_chars is not None and len(text) > self.max_chars:
            return f"longer than {self.max_chars} characters"
        return None

    def reject_content(self, text: str) -> str | None:
        """Reason to drop a text for its language or number of tokens, or None."""
        if self.language is not None and (found := guess_language(text)) != self.language:
            return f"not in language {self.language}" if found else "language not recognised"
        if self.tokenizer is not None and (self.min_tokens is not None or self.max_tokens is not None):
            count = len(self.tokenizer(text)["input_ids"])
            if self.min_tokens is not None and count < self.min_tokens:
                return f"fewer than {self.min_tokens} tokens"
            if self.max_tokens is not None and count > self.max_tokens:
                return f"more than {self.max_tokens} tokens"
        return None


def build_corpus(
    source: str | os.PathLike[str],
    topic: str | Topic,
    output: str | os.PathLike[str] | None = None,
    *,
    text_field: str | None = None,
    format: str = "auto",
    code_blocks: str = "keep",
    min_chars: int = 32,
    max_chars: int | None = None,
    cut: bool | None = None,
    tokenizer: Any = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    language: str | None = None,
    dedup: bool = True,
    limit: int | None = None,
    first: bool = False,
    seed: int = 0,
    subset: str | None = None,
    split: str = "train",
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Callable[[CorpusProgress], None] | None = None,
) -> CorpusReport:
    """Writes the sequences of a source that belong to a topic, as JSONL with `id`, `text` or `messages`, and `source`.

    The source is streamed. Memory holds the hashes of the kept texts and, with `limit`, the sample. The output appears whole or not at all.

    Args:
        source: a JSONL, JSON or Parquet file, a text file, compressed or not, a folder of them, "-" for standard input, or a data
            set's name on the hub.
        topic: a Topic, a built-in topic's name, or a YAML file.
        output: output file; None for `data/sft/TOPIC_corpus.jsonl`.
        text_field: field with the text; None to detect it (`records.item_from_record`).
        format: "auto" keeps chats as chats, "text" joins their turns, "chat" drops plain texts.
        code_blocks: "keep" texts whole, "require" at least one fenced block of the topic's languages, or keep "only" those blocks.
        min_chars, max_chars: length limits in characters.
        cut: whether to cut plain texts longer than `max_chars` at paragraphs, lines or words instead of dropping them; None for text files
            only.
        tokenizer: callable like a transformers tokenizer; counts tokens for `min_tokens` and `max_tokens`.
        language: code from `language.LANGUAGES`; texts in another or an unknown language are dropped.
        dedup: whether to drop texts that equal an earlier one apart from case, spacing and Unicode form.
        limit: size of a random sample to keep.
        first: whether to take the first `limit` sequences instead, and stop reading there.
        seed: seed of the sample.
        subset, split: configuration and split of a hub data set.
        skip_bad: whether to count malformed records and unreadable text files and continue. In a folder, files that are not text are always
            skipped.
        overwrite: whether to replace an existing output.
        progress: function called after every record.

    Raises:
        InputError: an option is invalid; the source does not exist; a record is malformed (with its line); the output exists; nothing was
            kept.
    """
    if isinstance(topic, str):
        topic = load_topic(topic)
    limits = Limits(format, code_blocks, min_chars, max_chars, tokenizer, min_tokens, max_tokens, language)
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}.")
    if first and limit is None:
        raise InputError("first needs a limit, got none.")
    if cut and max_chars is None:
        raise InputError("cut needs max_chars, got none.")
    require_source(os.fspath(source))
    path = Path(output) if output is not None else Path("data/sft") / f"{topic.name}_corpus.jsonl"
    _check_output(path, source, overwrite)

    started = time.monotonic()
    run = _Cut(topic, limits, text_field, cut, dedup, skip_bad, os.path.isdir(source), limit, progress)
    sequences = run.sequences(iter_source(os.fspath(source), subset=subset, split=split))
    characters = 0
    with _atomic_text(path) as file:
        chosen: Iterable[_Placed] = itertools.islice(sequences, limit)
        if limit is not None and not first:
            chosen = run.sample(sequences, limit, random.Random(seed))
        kept = 0
        for item, place in chosen:
            kept += 1
            characters += len(item.content)
            record: dict[str, Any] = {"id": item.sequence_id, "text": item.text, "messages": item.messages, "tools": item.tools}
            record["source"] = place
            file.write(json.dumps({key: value for key, value in record.items() if value is not None}, ensure_ascii=False) + "\n")
        if not kept:
            reasons = listed((f"{count} {why}" for why, count in run.dropped.most_common()), 3, width=60, none="it holds none")
            raise InputError(f"source must hold at least one record that fits, got {run.read} records of {source}: {reasons}.")
    dropped = dict(run.dropped.most_common())
    return CorpusReport(path, topic.name, run.read, kept, dropped, characters, run.bad, run.errors, time.monotonic() - started)


def _check_output(path: Path, source: str | os.PathLike[str], overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"output must be a file, got {'the folder' if path.is_dir() else 'a pipe or device:'} {path}.")
    if os.path.exists(source) and path.samefile(source):
        raise InputError(f"output must be another file than the source, got {path}.")
    if not overwrite:
        raise InputError(f"output must not exist yet, got {path}; --overwrite replaces it.")


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
    limits: Limits
    text_field: str | None
    cut: bool | None
    dedup: bool
    skip_bad: bool
    in_folder: bool
    limit: int | None
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
                if (reason := self._reject(piece, record.file_name)) is not None:
                    self.dropped[reason] += 1
                    continue
                self.fitting += 1
                yield self._named(piece), record.place
            if self.progress is not None:
                kept = self.fitting if self.limit is None else min(self.fitting, self.limit)
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
            item = item_from_record(record.located.record, text_field=None if record.file_name else self.text_field)
        except BadRecordError as error:
            self._note_bad(record, str(error))
            return []
        shaped = _shape(item, self.topic, self.limits)
        if isinstance(shaped, str):
            self.dropped[shaped] += 1
            return []
        wants_cut = record.file_name is not None if self.cut is None else self.cut
        if not wants_cut or self.limits.max_chars is None or shaped.text is None or len(shaped.text) <= self.limits.max_chars:
            return [shaped]
        name = shaped.sequence_id
        pieces = enumerate(cut_text(shaped.text, self.limits.max_chars), start=1)
        return [CorpusItem(f"{name}.{number}" if name else "", text=text) for number, text in pieces]

    def _reject(self, item: CorpusItem, file_name: str | None) -> str | None:
        content = item.content
        owned = file_name is not None and self.topic.owns_file(file_name)
        # The cheap tests first.
        reason = (
            self.limits.reject_length(content) or (None if owned else self.topic.reject(content)) or self.limits.reject_content(content)
        )
        if reason is not None:
            return reason
        if self.dedup:
            digest = _normal_hash(content)
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
        if not self.skip_bad:
            raise InputError(f"{record.place}: {error}.")
        self.bad += 1
        self.dropped["malformed"] += 1
        if len(self.errors) < 5:
            self.errors.append(f"{record.place}: {error}")


def _shape(item: CorpusItem, topic: Topic, limits: Limits) -> CorpusItem | str:
    """The sequence in the requested format, or the reason why it cannot have it."""
    if limits.code_blocks != "keep":
        blocks = topic.code_blocks(item.content)
        if not blocks:
            return "no code block"
        if limits.code_blocks == "only":
            item = CorpusItem(item.sequence_id, text="\n\n".join(block.rstrip("\n") for block in blocks) + "\n")
    if limits.format == "chat" and item.messages is None:
        return "not a chat"
    if limits.format == "text" and item.messages is not None:
        return CorpusItem(item.sequence_id, text=item.content)
    return item


def _normal_hash(text: str) -> bytes:
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(normal.encode("utf-8"), digest_size=16).digest()


@contextlib.contextmanager
def _atomic_text(path: Path) -> Iterator[TextIO]:
    """A file that appears under its name only when the block ends without an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise InputError(f"output must be in a writable folder, got {path}: {error.strerror}.") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 is not what a data file should have
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
