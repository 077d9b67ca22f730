"""The output of a scan: one file, or one per process, and what earlier runs left there.

A set of N files is named `name.rank0-of-N.mscan` … and opens as one. Any number of processes can continue it: the set keeps the
larger of its own size and the new one. Process r of W owns the members r, r + W, r + 2W …; it renames them if the set grew, and appends to
the first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, listed, shown
from ..mscan import LayoutEntry, MscanReader, MscanWriter
from ..mscan.opening import RANK
from ..mscan.v1.header import MAGIC
from .config import ScanConfig
from .distributed import World
from .identity import differences

# While one process renames a member, another may look for it under its old name.
_RENAME_RETRIES = 20
_RENAME_WAIT = 0.1
# A file that ends before its prologue does, or before the first chunk that this names, was cut in its first write and holds nothing.
_PROLOGUE_BYTES = 64
_FIRST_CHUNK = slice(40, 48)


class OutputDiffersError(InputError):
    """The output has another configuration; the message names the fields that differ."""


class OutputCompleteError(InputError):
    """The output already holds the whole corpus."""


@dataclass(frozen=True)
class Existing:
    """Files of earlier runs: members of the set by index, ids of their sequences, and their common metadata."""

    members: Mapping[int, Path]
    set_size: int
    sequence_ids: frozenset[str]
    metadata: dict[str, Any] | None

    def is_whole(self, path: Path) -> bool:
        """Whether every member of the set exists under its name, so that `path` opens."""
        expected = {index: member_path(path, index, self.set_size) for index in range(self.set_size)}
        return bool(self.members) and dict(self.members) == expected


NOTHING = Existing({}, 0, frozenset(), None)


def member_path(path: Path, index: int, size: int) -> Path:
    """File of one member; a set of one is the plain file."""
    return path if size == 1 else path.with_name(f"{path.stem}.rank{index}-of-{size}.mscan")


def check_writable(path: Path, dataset: Path | None) -> None:
    """Checks, before any work, that the output can be written and is not the corpus (None if it is no file), and creates its folder.

    Raises:
        InputError: the output cannot be written; the message has the system's reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.path.lexists(path) and not path.is_file():
            raise InputError(f"output_path must be a file, got a {'broken link' if path.is_symlink() else 'pipe or device'}: {path}.")
        if path.is_file() and dataset is not None and dataset.exists() and path.samefile(dataset):
            raise InputError(f"output_path must be another file than dataset_path, got {path}.")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        for member, _ in _list_members(path).values():
            with member.open("ab"):
                pass
    except OSError as error:
        raise InputError(f"output_path must be writable, got {path}: {error.strerror}.") from error


def find_existing(path: Path, metadata: Mapping[str, Any]) -> Existing:
    """Files of earlier runs and the ids in them. A missing member was not begun.

    Raises:
        OutputDiffersError: a file was written with another configuration; the fields that differ are named.
        InputError: two members hold one sequence, as where one was copied over another.
        MscanError: a file is damaged.
    """
    for _ in range(_RENAME_RETRIES - 1):
        with suppress(FileNotFoundError):
            return _read_existing(path, metadata)
        time.sleep(_RENAME_WAIT)
    return _read_existing(path, metadata)


def refuse_existing(path: Path, where: str) -> None:
    """Raises InputError if a scan would continue although it must not; `where` names the situation.

    Raises:
        InputError: any file of the set exists.
    """
    if members := _list_members(path):
        first = next(iter(members.values()))[0]
        raise InputError(f"output_path must not exist {where}, got {first}; use --overwrite to replace it.")


def open_writer(
    config: ScanConfig, world: World, existing: Existing, metadata: dict[str, Any], layout: list[LayoutEntry]
) -> tuple[MscanWriter, Path]:
    """This process's file, created or continued, and every member it looks after put in its place.

    Args:
        config: path, codec, sync, overwrite.
        world: this process's place.
        existing: from `find_existing`, or NOTHING.
        metadata, layout: of new files; where members of the set exist, theirs is taken, since a set has one.
    """
    path = config.output
    if config.overwrite:
        _remove(path, world)
    metadata = existing.metadata or metadata
    size = max(existing.set_size, world.size)
    for index in range(world.rank, size, world.size):
        target, current = member_path(path, index, size), existing.members.get(index)
        if current is not None and current != target:
            current.rename(target)
        elif current is None and index != world.rank:
            # The set opens only when whole, and the process that would have begun this member is not here.
            _writer(config, target, metadata, layout).close()
    target = member_path(path, world.rank, size)
    return _writer(config, target, metadata, layout), target


def _writer(config: ScanConfig, target: Path, metadata: dict[str, Any], layout: list[LayoutEntry]) -> MscanWriter:
    mode = "a" if target.exists() else "x"
    return MscanWriter(target, metadata, layout, mode=mode, codec=config.codec, compression=config.compression, sync=config.sync)


def _remove(path: Path, world: World) -> None:
    """Deletes the members that this process looks after, of a set of any size; none, with an error, if another process is writing one."""
    stale = [path] if world.rank == 0 else []
    stale += [file for file, index, _ in _named_as_members(path) if index % world.size == world.rank]
    with ExitStack() as opened:
        for file in stale:
            if file.is_file():
                try:
                    fcntl.flock(opened.enter_context(file.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise InputError(f"output_path must be no file that another process is writing, got {file}.") from None
        for file in stale:
            file.unlink(missing_ok=True)


def _read_existing(path: Path, metadata: Mapping[str, Any]) -> Existing:
    members = _list_members(path)
    ids: set[str] = set()
    stored: dict[str, Any] | None = None
    for file, _ in members.values():
        with MscanReader(file, whole_set=False) as reader:
            stored = dict(reader.metadata)
            if changed := differences(stored, metadata):
                raise OutputDiffersError(
                    f"output_path must be a scan with the same configuration, {file} differs in {listed(changed)}; "
                    "use --overwrite to replace it, or another --output-path."
                )
            own = {sequence.sequence_id for sequence in reader.sequences}
            if both := sorted(ids & own):
                raise InputError(
                    f"output_path must be a set whose files hold different sequences, got {shown(both[0])} in {file} and in another; "
                    "use --overwrite to replace it."
                )
            ids |= own
    size = max((size for _, size in members.values()), default=0)
    return Existing({index: file for index, (file, _) in members.items()}, size, frozenset(ids), stored)


def _list_members(path: Path) -> dict[int, tuple[Path, int]]:
    """The set's files that were begun: index → (file, size of the set by its name)."""
    found: dict[int, tuple[Path, int]] = {0: (path, 1)} if _is_begun(path) else {}
    for file, index, size in _named_as_members(path):
        if _is_begun(file):
            if index in found:
                raise InputError(
                    f"output_path must have one file for each process, got {found[index][0].name} and {file.name}; remove one."
                )
            found[index] = (file, size)
    return found


def _named_as_members(path: Path) -> Iterator[tuple[Path, int, int]]:
    """Files, begun or not, named as members of the set: file, index, size of the set."""
    for name in sorted(os.listdir(path.parent)) if path.parent.is_dir() else ():
        match = RANK.fullmatch(name)
        if match and match["stem"] == path.stem:
            yield path.with_name(name), int(match["rank"]), int(match["size"])


def _is_begun(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size < _PROLOGUE_BYTES:
        return False
    with path.open("rb") as file:
        prologue = file.read(_PROLOGUE_BYTES)
    cut = int.from_bytes(prologue[_FIRST_CHUNK], "little") > path.stat().st_size
    return not (cut and prologue.startswith(MAGIC + b"\2\0"))
