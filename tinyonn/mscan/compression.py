"""Optional zstd compression: the codec shuffles bytes, the `zstandard` package compresses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import MissingPackageError, needs


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingPackageError(f"{needs('a compressed .mscan file', 'zstandard')}.") from error
    return zstandard


def compressor() -> Callable[[memoryview], bytes]:
    """A function from raw bytes to one zstd frame.

    Raises:
        RuntimeError: zstandard is not installed.
    """
    compress: Callable[[memoryview], bytes] = _zstandard().ZstdCompressor(level=3).compress
    return compress


def decompress(frame: memoryview, raw_length: int) -> bytes:
    """Content of the frame; empty unless it expands to exactly `raw_length` bytes, which the codec then reports with the offset.

    Raises:
        RuntimeError: zstandard is not installed.
    """
    zstandard = _zstandard()
    try:
        if zstandard.frame_content_size(frame) != raw_length:
            return b""
        raw: bytes = zstandard.ZstdDecompressor().decompress(frame, max_output_size=raw_length)
    except zstandard.ZstdError:
        return b""
    return raw
