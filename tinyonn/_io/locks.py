"""A lock on a folder, so that one run at a time writes into it."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError

LOCK = ".lock"
_held: set[tuple[int, Path]] = set()  # threads of this process and their folders


@contextmanager
def locked(folder: str | os.PathLike[str], name: str = "output_dir") -> Iterator[None]:
    """Locks a folder against other processes and threads for the duration of the block; the same thread may enter it again.

    The operating system releases the lock when the process ends, however it ends. The folder contains the file `LOCK` meanwhile.

    Args:
        folder: folder to lock; created if missing.
        name: name of the option that holds the folder, for messages.

    Raises:
        InputError: another run has locked the folder, or it cannot be written.
    """
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        key = (threading.get_ident(), root.resolve())
        file = None if key in _held else lock_file(key[1] / LOCK)
    except BlockingIOError:
        raise InputError(f"{name} must be a folder that no other run is writing into, got {root}.") from None
    except OSError as error:
        raise InputError(f"{name} must be a folder that can be written, got {root}: {error.strerror}.") from error
    if file is None:
        yield
        return
    _held.add(key)
    try:
        yield
    finally:
        _held.remove(key)
        (key[1] / LOCK).unlink(missing_ok=True)  # before it is closed; after that, it may belong to the next run
        os.close(file)


def lock_file(path: Path) -> int:
    """Descriptor of the locked file. If its holder removed the file after it was opened here, opens a new file."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(file)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def unlock_file(file: int) -> None:
    """Releases a lock; also if a process that was forked meanwhile, such as a worker of a DataLoader, still has the descriptor open."""
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)
