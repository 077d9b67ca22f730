"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import InputError


def write_atomically(path: Path, content: str) -> None:
    """Writes a text file so that a reader sees the old one or the new one, never half.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(content, encoding="utf-8", errors="replace")


def read_json(path: Path, kind: type[dict[str, Any]] | type[list[Any]], step: str, again: str | None = None) -> Any:
    """JSON that a command wrote.

    Args:
        path: the file.
        kind: dict or list, what it must be.
        step: command that writes it.
        again: command that writes it where a damaged one is there; None for `step`.

    Raises:
        InputError: it is missing or something else; the line names the file and the command.
    """
    repeat = f"run {again or f'{step} again'}."
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} must exist, got no such file; run {step}.") from None
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read, got: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be valid JSON, got: {error}; {repeat}") from error
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise InputError(f"{path} must be a JSON {wanted}, got {type(value).__name__}; {repeat}")
    return value


class replacing:
    """A context that gives a temporary path beside `path` and renames it on success."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        try:
            handle, name = tempfile.mkstemp(prefix=f".{self._path.name}-", suffix=self._path.suffix, dir=self._path.parent)
        except OSError as error:
            raise InputError(f"output must be in a folder that can be written, got {self._path}: {error.strerror}.") from error
        os.close(handle)
        self._partial = Path(name)
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            return
        mask = os.umask(0)
        os.umask(mask)
        self._partial.chmod(0o666 & ~mask)  # mkstemp's 0600 would hide the file from others
        try:
            os.replace(self._partial, self._path)
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            raise InputError(f"output must be a file that can be written, got {self._path}: {error.strerror}.") from error
