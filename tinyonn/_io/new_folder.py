"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError
from .files import sync
from .locks import LOCK, lock_file


@contextmanager
def new_folder(path: str | os.PathLike[str], name: str = "target") -> Iterator[Path]:
    """Yields a hidden folder beside `path`, and renames it to `path` on success; after an error it is removed.

    A process that is killed leaves the hidden folder, `.NAME.unfinished`, and the next call with the same path removes it.

    Args:
        path: the new folder; must not exist, or be empty.
        name: name of the option that holds the path, for messages.

    Raises:
        InputError: path is not empty, cannot be written, or another process is making it.
    """
    final = Path(os.path.abspath(path))
    partial = final.parent / f".{final.name}.unfinished"
    try:
        if final.is_file() or (final.is_dir() and any(final.iterdir())):
            raise InputError(f"{name} must be a new or empty folder, got {path}.")
        partial.mkdir(parents=True, exist_ok=True)
        lock = lock_file(partial / LOCK)
    except BlockingIOError:
        raise InputError(f"{name} must be a folder that no other process is making, got {path}.") from None
    except OSError as error:
        raise InputError(f"{name} must be a folder that can be written, got {path}: {error.strerror}.") from error
    try:
        for rest in partial.iterdir():  # of a process that was killed
            if rest.name != LOCK:
                shutil.rmtree(rest) if rest.is_dir() and not rest.is_symlink() else rest.unlink()
        yield partial
        for folder, _, files in os.walk(partial, topdown=False):
            for file in files:
                sync(Path(folder, file))
            sync(Path(folder))
        os.rename(partial, final)
        (final / LOCK).unlink()
        sync(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{name} must be a folder that can be written, got {path}: {error.strerror or error}.") from error
        raise
    finally:
        os.close(lock)
