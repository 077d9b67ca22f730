"""Files that are written completely or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError


def write_atomically(path: Path, content: str) -> None:
    """Writes a text file atomically: a reader sees the old content or the new, never a part.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(content, encoding="utf-8", errors="replace")


def check_output(path: Path, sources: Iterable[str | os.PathLike[str]], overwrite: bool) -> None:
    """Checks that a command may write its output here.

    Raises:
        InputError: `path` exists and `overwrite` is False, is not a regular file, or is one of `sources`.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"output must be a file, got {'the folder' if path.is_dir() else 'a pipe or device:'} {path}.")
    if any(os.path.exists(source) and path.samefile(source) for source in sources):
        raise InputError(f"output must be another file than the source, got {path}.")
    if not overwrite:
        raise InputError(f"output must not exist yet, got {path}; --overwrite replaces it.")


def digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes a hard link to a file that never changes, or a copy where there can be no link, as on another disk.

    Raises:
        OSError: the source is missing, or the copy cannot be written.
    """
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


class replacing:
    """A context manager that yields a temporary path beside `path`, and renames it to `path` on success.

    Args:
        path: the file.
        make_folder: whether to create the folders above it that do not exist.
    """

    def __init__(self, path: Path, *, make_folder: bool = False) -> None:
        self._path = path
        self._make_folder = make_folder

    def __enter__(self) -> Path:
        try:
            if self._make_folder:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{self._path.name}-", suffix=self._path.suffix, dir=self._path.parent)
        except OSError as error:
            raise InputError(f"output must be in a folder that can be written, got {self._path}: {error.strerror}.") from error
        os.close(handle)
        self._partial = Path(name)
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            if isinstance(value, OSError):  # the error of a failed write does not name the file
                raise InputError(f"output {self._path} cannot be written: {value.strerror or value}.") from value
            return
        mask = os.umask(0)
        os.umask(mask)
        self._partial.chmod(0o666 & ~mask)  # mkstemp's 0600 would hide the file from others
        try:
            os.replace(self._partial, self._path)
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            raise InputError(f"output must be a file that can be written, got {self._path}: {error.strerror}.") from error
