"""Bytes of a data set from a file, a compressed file or standard input."""

from __future__ import annotations

import importlib
import io
import os
import re
import stat
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, cast

from ..errors import InputError, needs, reason

STDIN = "-"
_HEAD = 4096
_PIECE = 1 << 17
# Suffixes of compressed files. The first bytes alone determine the compression.
SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


class Content(NamedTuple):
    """An opened data set.

    Attributes:
        file: its uncompressed bytes, from the first.
        head: the first 4 KiB of them, or all if there are fewer.
        plain: whether `file` is the file itself, so that offsets in it are valid later.
    """

    file: BinaryIO
    head: bytes
    plain: bool


class ForeignFileError(InputError):
    """A file of a recognised kind that is not supported.

    Args:
        rule: rule and the kind found, for the message.
        kind: kind of the file, such as "UTF-16" or "a zip archive".
        remedy: way to convert it to a supported file.
    """

    def __init__(self, rule: str, kind: str, remedy: str) -> None:
        self.kind = kind
        self.remedy = remedy
        super().__init__(f"{rule}; {remedy}.")


def is_stdin(path: str | os.PathLike[str]) -> bool:
    """Whether a path stands for standard input."""
    return os.fspath(path) == STDIN


def place(path: str | os.PathLike[str]) -> str:
    """Name of a data set in messages."""
    return "standard input" if is_stdin(path) else os.fspath(path)


def own_suffix(name: str) -> str:
    """Suffix of a file name in lower case, without that of the compression: ".jsonl" of "a.jsonl.gz"."""
    stem, last = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if last in SUFFIXES else last


def open_data(path: str | os.PathLike[str], name: str = "data_path") -> BinaryIO:
    """A file, opened in binary mode.

    Raises:
        InputError: the file is missing, empty, unreadable or not a regular file.
    """
    try:
        status = os.stat(path)  # before it is opened, because opening a pipe waits for a writer
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{name} must be a file, got the folder {os.fspath(path)}.")
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            found = "an empty file" if stat.S_ISREG(status.st_mode) else "a pipe or device"
            raise InputError(f"{name} must be a file of records, got {found}: {os.fspath(path)}.")
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{name} must be an existing file, got {os.fspath(path)}.") from None
    except OSError as error:
        raise InputError(f"{name} must be a readable file, got {os.fspath(path)}: {error.strerror}.") from error


def open_content(path: str | os.PathLike[str], name: str = "data_path") -> Content:
    """A data set, decompressed while it is read: gzip, bzip2, xz, and zstd with the package zstandard. "-" is standard input.

    Standard input can be opened once.

    Raises:
        InputError: as for `open_data`; standard input is empty; the compression, archive or encoding is not supported. Reading raises it
            if a compressed file is damaged or incomplete.
    """
    file = _stdin(name) if is_stdin(path) else open_data(path, name)
    head = _first(file)
    if not head:
        raise InputError(f"{name} must hold records, got nothing on {place(path)}.")
    opener = _opener(head)
    if opener is None:
        _refuse_foreign(head, path, name)
        if is_stdin(path):
            return Content(_joined(head, file), head, False)
        file.seek(0)
        return Content(file, head, True)
    unpacked = _unpacked(opener(_joined(head, file)), f"{name} must be a whole compressed file, got {place(path)}")
    start = _first(unpacked)
    if _opener(start) is not None:
        raise InputError(f"{name} must be compressed once, got a compressed file within another: {place(path)}; unpack it first.")
    _refuse_foreign(start, path, name)
    return Content(_joined(start, unpacked), start, False)


def _opener(head: bytes) -> Callable[[BinaryIO], Any] | None:
    return next((opener for magic, opener in _OPENERS.items() if re.match(magic, head)), None)


def _refuse_foreign(head: bytes, path: str | os.PathLike[str], name: str) -> None:
    """Raises InputError for a kind that is recognised by its first bytes and not supported."""
    kind = next((kind for magic, kind in _NOT_READ.items() if re.match(magic, head, re.DOTALL)), None)
    if kind is not None:
        rule = f"{name} must be plain, or compressed by gzip, bzip2, xz or zstd, got {kind}: {place(path)}"
        raise ForeignFileError(rule, kind, "unpack it first")
    encoding = _wide_encoding(head)
    if encoding is not None:
        rule = f"{name} must be UTF-8, got {encoding}: {place(path)}"
        raise ForeignFileError(rule, encoding, f"`iconv -f {encoding} -t UTF-8` converts it")


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, recognised by a byte order mark or by the zero bytes of ASCII characters; None for others."""
    for mark, encoding in ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if head.startswith(mark):
            return encoding
    for encoding, width, first_byte in (("UTF-32LE", 4, 0), ("UTF-32BE", 4, 3), ("UTF-16LE", 2, 0), ("UTF-16BE", 2, 1)):
        first = head[: 4 * width]
        letters, rest = first[first_byte::width], [byte for i, byte in enumerate(first) if i % width != first_byte]
        if letters and rest and not any(rest) and re.fullmatch(rb"[\t\n\r -~]+", letters):
            return encoding
    return None


def _stdin(name: str) -> BinaryIO:
    if sys.stdin is None or sys.stdin.closed:
        raise InputError(f"{name} - reads standard input, which is closed: pipe records into it, or name a file.")
    if sys.stdin.isatty():
        raise InputError(f"{name} - reads standard input, which is a terminal: pipe records into it, or name a file.")
    return sys.stdin.buffer


def _first(file: BinaryIO) -> bytes:
    """The first 4 KiB or fewer; a pipe may deliver them in several pieces."""
    head = b""
    while len(head) < _HEAD and (piece := file.read(_HEAD - len(head))):
        head += piece
    return head


class _Stream(io.RawIOBase):
    """Bytes from `read`, a function of the number wanted. Closing it closes `file`, unless that is standard input."""

    def __init__(self, read: Callable[[int], bytes], file: Any) -> None:
        self._read, self._file = read, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed and self._file is not getattr(sys.stdin, "buffer", None):
            self._file.close()
        super().close()


def _joined(head: bytes, file: BinaryIO) -> BinaryIO:
    """Bytes that were already read, followed by the rest of their file."""
    start = io.BytesIO(head)
    return cast(BinaryIO, io.BufferedReader(_Stream(lambda size: start.read(size) or file.read(size), file), _PIECE))


def _unpacked(file: Any, rule: str) -> BinaryIO:
    """Output of a decompressor, with its errors as InputError."""

    def read(size: int) -> bytes:
        try:
            piece: bytes = file.read(size)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # every decompressor has types of its own
            raise InputError(f"{rule}: {reason(error)}") from error
        return piece

    return cast(BinaryIO, io.BufferedReader(_Stream(read, file), _PIECE))


class _ZstdFile:
    """Consecutive frames of zstd. An incomplete frame is an error; zstandard's own reader takes it for the end."""

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file, self._module = file, zstandard
        self._frame: Any = None
        self._packed = self._ready = b""

    def read(self, size: int) -> bytes:
        while not self._ready:
            piece = self._packed or self._file.read(_PIECE)
            self._packed = b""
            if not piece:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame.")
                return b""
            if self._frame is None:
                self._frame = self._module.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._ready = self._frame.decompress(piece)
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        piece, self._ready = self._ready[:size], self._ready[size:]
        return piece

    def close(self) -> None:
        self._file.close()


def _opener_of(module: str) -> Callable[[BinaryIO], Any]:
    """Opener of a module of the standard library, imported when it is called: Python can be built without some of them."""
    return lambda file: importlib.import_module(module).open(file)


def _zstd(file: BinaryIO) -> Any:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{needs('a file compressed by zstd', 'zstandard')}.") from None
    return _ZstdFile(file, zstandard)


# A bzip2 stream continues with its first block or its end; "BZh" alone may begin a text. zstd files may begin with a skippable frame.
_OPENERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    rb"\x1f\x8b": _opener_of("gzip"),
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": _opener_of("bz2"),
    rb"\xfd7zXZ": _opener_of("lzma"),
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": _zstd,
}
# A raw LZMA file begins with its properties, the size of its dictionary (2^n or 1.5 * 2^n) and the size of its content.
_NOT_READ: dict[bytes, str] = {
    rb"PK\x03\x04": "a zip archive",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"Rar!\x1a\x07": "a rar archive",
    rb".{257}ustar(\0|  \0)": "a tar archive",
    rb"\x5d\0\0.{2}(\xff{8}|.{5}\0{3})": "LZMA without xz",
    rb"LZIP\x01": "lzip",
    rb"\x04\x22\x4d\x18": "lz4",
    rb"\x1f\x9d": "the output of compress (.Z)",
    rb"\xff\x06\0\0sNaPpY": "snappy",
}
