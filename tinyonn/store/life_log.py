"""The log of a life: an append-only file of JSON lines that survives crashes.

Each line is one record, with its keys in this order:

    number   1, 2, 3, …
    time     UTC in ISO 8601 with microseconds
    event    what happened
    step     step over the whole life
    clock    seconds by which the clock went back since the record before; only if it did
    …        fields of the event
    crc      CRC-32 over the lines so far, in 8 hexadecimal digits

A line without its `crc` is `{…}`. The checksum continues that of the line before over these bytes, so it is the running CRC-32 of the log
without checksums and newlines. A line that is changed, removed, inserted or swapped breaks the chain at its place.

The format is text, so that grep, jq and every language can read it, also in many years. A binary framing would save a few bytes a record
and need a program of its own. It would be no safer: a newline ends a record, JSON strings contain none, and the checksum covers the rest.

A record is written by one `write`, so a crash can only leave a part of the last line. Opening the log drops that part. Damage
anywhere else is an error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import stat
import subprocess
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .._io.files import sync
from ..errors import InputError, shown

LOG = "life.jsonl"  # in the folder of a store
RESERVED = ("number", "time", "event", "step", "clock", "crc")
# Events of training. A restore to an earlier step undoes them; all others are history.
TRAINING = frozenset({"metrics", "evaluation", "birth", "recycling", "save"})
PACKAGES = ("tinyonn", "torch", "transformers", "safetensors", "numpy")

_END = len(', "crc": "00000000"}\n')
_CRC = re.compile(rb', "crc": "([0-9a-f]{8})"\}\n?$')
# Where another record begins. One record has no such bytes: its newlines are escaped, and a comma and a space stand between its objects.
_NEXT = re.compile(rb'(?:\n|\}.)\{"number": ', re.DOTALL)


class LifeLogError(InputError):
    """A life log is damaged in another place than its end.

    Args:
        path: the file.
        line: the first damaged line, from 1.
        rule: the broken rule and the value found.
    """

    def __init__(self, path: str | os.PathLike[str], line: int, rule: str) -> None:
        self.path, self.line, self.rule = os.fspath(path), line, rule
        before = "" if line == 1 else "; the line before it is whole" if line == 2 else f"; the {line - 1:,} lines before it are whole"
        super().__init__(f"{self.path}, line {line}: {rule}{before}.")
        self._given = self.path, line, rule

    def __reduce__(self) -> Any:
        """Errors are sent from one process to another, and have more arguments than a message."""
        return type(self), self._given


class LogEnd(NamedTuple):
    """Where a record of a life log ends.

    Attributes:
        size: bytes of the file up to there.
        number, crc, time: of the record; 0, 0 and None before the first one.
    """

    size: int = 0
    number: int = 0
    crc: int = 0
    time: datetime | None = None


START = LogEnd()


class LifeLog:
    """A life log that is open for appending. Threads may share it; one process at a time may have it open.

    Args:
        path: the file; created with its folders if it does not exist.
        checked: where an earlier check ended; what comes after is checked. The whole file is checked if no record ends there, or if there
            is damage after it.

    Attributes:
        path: the file.
        dropped: text of a torn last record, which was removed from the file; None if there was none.

    Raises:
        InputError: the file cannot be opened or written.
        LifeLogError: a record is damaged and is not the last one.
    """

    def __init__(self, path: str | os.PathLike[str], checked: LogEnd | None = None) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._torn = False  # whether a failed write left bytes behind
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            self._file: int | None = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"path must be a life log that can be written, got {self.path}: {error.strerror}.") from error
        try:
            _check_regular(self.path, os.fstat(self._file))
            with open(self._file, "rb", closefd=False) as file:
                found = None
                if checked is not None and _ends_at(file, checked):
                    with contextlib.suppress(LifeLogError):  # whose message tells what of the whole file is whole
                        found = _scan(self.path, file, None, checked)
                file.seek(0)
                self._end, self.dropped = found or _scan(self.path, file, None)
            if self.dropped is not None:
                os.ftruncate(self._file, self._end.size)
                os.fsync(self._file)
            if new:
                sync(self.path.parent)
        except BaseException:
            self.close()
            raise

    @property
    def number(self) -> int:
        """Number of the last record; 0 in an empty log."""
        return self._end.number

    def append(self, event: str, step: int, durable: bool = False, **fields: Any) -> dict[str, Any]:
        """Writes one record, whole or not at all.

        Args:
            event: what happened.
            step: step over the whole life.
            durable: whether to return only when this record and all before it are on the disk (fsync).
            fields: JSON values; NaN and infinities become null.

        Returns:
            The record as written, without its checksum.

        Raises:
            TypeError: a field is no JSON value.
            ValueError: a field has a reserved name, or the log is closed.
            InputError: the record cannot be written, as on a full disk; the log is as before.
            LifeLogError: another process wrote into the file.
        """
        _check_event(event, step)
        for name in RESERVED:
            if name in fields:
                raise ValueError(f"fields must not be named {', '.join(RESERVED)}, got {name}.")
        values = {name: _plain(name, value) for name, value in fields.items()}
        with self._lock:
            if self._file is None:
                raise ValueError(f"log must be open, got {self.path}, which is closed.")
            before = self._end
            now = datetime.fromtimestamp(time.time(), UTC)
            record = {"number": before.number + 1, "time": now.isoformat(timespec="microseconds"), "event": event, "step": step}
            if before.time is not None and now < before.time:
                record["clock"] = (now - before.time).total_seconds()
            record |= values
            body = json.dumps(record, allow_nan=False).encode("ascii")
            crc = zlib.crc32(body, before.crc)
            line = body[:-1] + _ending(crc)
            self._check_size(self._file)
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    raise OSError(0, "no room for a whole line")
                if durable:
                    os.fsync(self._file)
                self._end = LogEnd(before.size + len(line), before.number + 1, crc, now)
            except BaseException as error:  # also an exception that a signal handler raises
                self._end = before
                self._torn = True
                self._remove_torn(self._file)
                if isinstance(error, OSError):
                    raise InputError(f"log {self.path} cannot be written: {error.strerror or error}.") from error
                raise
        return record

    def sync(self) -> LogEnd:
        """Waits until all records are on the disk. Returns where they end.

        Raises:
            ValueError: the log is closed.
            OSError: the disk has an error.
        """
        with self._lock:
            if self._file is None:
                raise ValueError(f"log must be open, got {self.path}, which is closed.")
            os.fsync(self._file)
            return self._end

    def close(self) -> None:
        """Closes the file; a second call has no effect."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def __enter__(self) -> LifeLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_size(self, file: int) -> None:
        if self._torn:
            self._remove_torn(file)
        if self._torn:
            raise InputError(f"log {self.path} cannot be written: a part of a record cannot be removed.")
        size = os.fstat(file).st_size
        if size != self._end.size:
            rule = f"the file must have {self._end.size:,} bytes, got {size:,}; another process writes into it"
            raise LifeLogError(self.path, self._end.number + 1, rule)

    def _remove_torn(self, file: int) -> None:
        try:
            os.ftruncate(file, self._end.size)
            self._torn = False
        except OSError:
            pass  # before the next record it is tried again


@dataclass(frozen=True)
class LifeRecords:
    """Records of a life log.

    Attributes:
        path: the file.
        records: all whole records in order.
        torn: text of a torn last record; None if there is none.
    """

    path: Path
    records: list[dict[str, Any]]
    torn: str | None

    def effective(self) -> list[dict[str, Any]]:
        """Records that still hold.

        A `restore` with step S undoes training after step S. Earlier records of `metrics`, `evaluation`, `birth`, `recycling` and `save`
        with a step above S are left out. All other records stay as history, the restore itself too. Order is by number.
        """
        kept: list[dict[str, Any]] = []
        limit = math.inf  # the earliest step to which a later record restores
        for record in reversed(self.records):
            if record["event"] not in TRAINING or record["step"] <= limit:
                kept.append(record)
            if record["event"] == "restore":
                limit = min(limit, record["step"])
        return kept[::-1]


def read_life_log(path: str | os.PathLike[str]) -> LifeRecords:
    """Reads a life log and checks every record. The file is not changed, and another process may append to it meanwhile.

    Args:
        path: the file.

    Raises:
        InputError: the file cannot be read.
        LifeLogError: a record is damaged and is not the last one.
    """
    records: list[dict[str, Any]] = []
    try:
        _check_regular(path, os.stat(path))  # before it is opened: a pipe would wait for its writer
        with open(path, "rb") as file:
            _, torn = _scan(path, file, records)
    except OSError as error:
        raise InputError(f"path must be a life log, got {os.fspath(path)}: {error.strerror}.") from error
    return LifeRecords(Path(path), records, torn)


def environment() -> dict[str, Any]:
    """What a stretch runs with: versions of Python and the packages, the platform, and the git commit of the code.

    Returns:
        `versions`, package -> version, None where it is not installed; `platform`; `commit`, with "-dirty" where files differ from it,
        None where tinyonn does not run from a checkout. No package is imported for it.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"versions": versions, "platform": platform.platform(), "commit": _commit(Path(__file__).resolve().parents[2])}


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_")
    }  # a hook sets them for its own repository
    try:
        found = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _ends_at(file: BinaryIO, end: LogEnd) -> bool:
    """Whether a record with this checksum ends here; then the file is at that place."""
    file.seek(max(0, end.size - _END))
    return not end.size or file.read(min(_END, end.size)) == _ending(end.crc)


def _ending(crc: int) -> bytes:
    return b', "crc": "%08x"}\n' % crc


def _scan(
    path: str | os.PathLike[str], file: BinaryIO, records: list[dict[str, Any]] | None, begin: LogEnd = START
) -> tuple[LogEnd, str | None]:
    """Checks all lines from the place of the file on.

    Args:
        records: list that takes the records; None if they are not needed.
        begin: the end of the record before.

    Returns:
        The end of the whole records, and the text of a torn last one, if any.
    """
    size, number, crc, time_before = begin
    last = b""
    torn = None
    for line in file:
        found = zlib.crc32(line[:-_END] + b"}", crc)
        if line[-_END:] != _ending(found):
            rest = line + file.read()
            if _NEXT.search(rest):
                raise LifeLogError(path, number + 1, _fault(line, crc))
            torn = rest.decode("utf-8", "replace")
            break
        size, number, crc, last = size + len(line), number + 1, found, line
        if records is not None:
            records.append(_parsed(path, number, line))
    if last:
        time_before = datetime.fromisoformat(_parsed(path, number, last)["time"])
    return LogEnd(size, number, crc, time_before), torn


def _parsed(path: str | os.PathLike[str], number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("number") != number:
        raise LifeLogError(path, number, f"it must be a JSON object with the number {number}, got {shown(line.decode('utf-8', 'replace'))}")
    return record


def _fault(line: bytes, crc: int) -> str:
    found = _CRC.search(line)
    if found is None:
        return f"it must end in a checksum, got {shown(line[-_END:].decode('utf-8', 'replace'))}"
    return f"its checksum must be {zlib.crc32(line[: found.start()] + b'}', crc):08x}, got {found[1].decode()}"


def _check_event(event: object, step: object) -> None:
    if not isinstance(event, str):
        raise TypeError(f"event must be a string, got {type(event).__name__} {shown(event)}.")
    if not event:
        raise ValueError("event must not be empty, got ''.")
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step must be an integer, got {type(step).__name__} {shown(step)}.")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}.")


def _plain(name: str, value: Any) -> Any:
    """A JSON value with null for numbers that are not finite."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{place}]", item) for place, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name} must have strings as keys, got {type(key).__name__} {shown(key)}.")
        return {key: _plain(f"{name}.{key}", item) for key, item in value.items()}
    raise TypeError(f"{name} must be a JSON value, got {type(value).__name__} {shown(value)}.")


def _check_regular(path: str | os.PathLike[str], found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "pipe or device"
        raise InputError(f"path must be a life log, got {os.fspath(path)}, which is a {kind}.")
