"""A folder that one run at a time writes into."""

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
    """Within the block no other process or thread is in such a block with this folder; the same thread may enter again.

    The operating system gives the folder back when the process ends, however it ends. The file `LOCK` is there meanwhile.

    Args:
        folder: made if it is not there.
        name: of the option that gave it, for messages.

    Raises:
        InputError: another run is in the folder, or it cannot be written.
    """
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        key = (threading.get_ident(), root.resolve())
        file = None if key in _held else _lock(key[1] / LOCK)
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
        (key[1] / LOCK).unlink(missing_ok=True)  # before it is closed: afterwards it may be the next run's
        os.close(file)


def _lock(path: Path) -> int:
    """The file's descriptor, locked. One that its holder removed after it was opened here is no lock: then again."""
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
