"""Segments: safetensors files with the chunks that changed in a step, and a checksum of each in the header.

    __metadata__   format, step, rank; digests: JSON, XXH3-128 of each chunk by its name; aliases: JSON, chunks with the content of others
    tensors        a chunk each; JSON texts are U8

A segment is never changed after it is written. The checksum of its header is in the manifest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .._io.files import sync
from .errors import DamagedStoreError, StoreError
from .layout import Digest, digest, from_hex, hex_digest

SUFFIX = ".safetensors"
FORMAT = "tinyonn.segment.1"
_HEADER = 8  # bytes of its length


class Entry(NamedTuple):
    """A chunk in a segment. offset counts from the begin of the file."""

    name: str
    offset: int
    size: int
    digest: Digest


class Segment(NamedTuple):
    """A file of a store.

    Attributes:
        number: of the file, in its name.
        size: bytes.
        digest: of its header.
        entries: the chunks in it.
    """

    number: int
    size: int
    digest: Digest
    entries: list[Entry]


def file_name(number: int) -> str:
    return f"{number:08d}{SUFFIX}"


def write_segment(
    folder: Path,
    number: int,
    step: int,
    rank: int,
    tensors: Mapping[str, Tensor],
    digests: Mapping[str, Digest],
    aliases: Mapping[str, str],
) -> Segment:
    """Writes a segment and waits for the disk. On an error no part of it is left.

    Args:
        tensors: chunks by name, contiguous and on the CPU.
        digests: of the chunks.
        aliases: chunks that have the content of another one in `tensors`.

    Raises:
        StoreError: the disk is full, or the file cannot be written.
    """
    path = folder / file_name(number)
    texts = {name: hex_digest(digests[name]) for name in tensors}
    metadata = {"format": FORMAT, "step": str(step), "rank": str(rank), "digests": json.dumps(texts, separators=(",", ":"))}
    if aliases:
        metadata["aliases"] = json.dumps(dict(aliases), separators=(",", ":"))
    try:
        save_file(dict(tensors), path, metadata)
        sync(path)
    except Exception as error:  # safetensors raises its own class on a full disk
        path.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise StoreError(f"{path} cannot be written: {why}.") from error
    return read_segment(folder, number)


def read_segment(folder: Path, number: int, expected: Digest | None = None, size: int | None = None) -> Segment:
    """Reads the header of a segment.

    Args:
        expected, size: what the manifest has; None for no check.

    Raises:
        DamagedStoreError: the file is missing, its size or its header is another.
    """
    path = folder / file_name(number)
    try:
        with path.open("rb") as file:
            have = os.fstat(file.fileno()).st_size
            if size is not None and have != size:
                raise DamagedStoreError(f"{path} must have {size:,} bytes, got {have:,}.")
            length = int.from_bytes(file.read(_HEADER), "little")
            header = file.read(length) if _HEADER + length <= have else b""
    except OSError as error:
        raise DamagedStoreError(f"{path} cannot be read: {error.strerror}.") from error
    found = digest(header)
    if not header or (expected is not None and found != tuple(expected)):
        raise DamagedStoreError(f"{path} has a damaged header.")
    try:
        parts = json.loads(header)
        metadata = parts.pop("__metadata__")
        digests, aliases = json.loads(metadata["digests"]), json.loads(metadata.get("aliases", "{}"))
        entries = []
        for name, part in parts.items():
            begin, end = part["data_offsets"]
            entries.append(Entry(name, _HEADER + length + begin, end - begin, from_hex(digests[name])))
        by_name = {entry.name: entry for entry in entries}
        entries += [by_name[target]._replace(name=name) for name, target in aliases.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(f"{path} has a damaged header.") from error
    return Segment(number, have, found, entries)


class Files:
    """Open segments of a store, mapped into memory.

    Args:
        folder: of the segments.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[int, memoryview] = {}

    def data(self, number: int, offset: int, size: int) -> memoryview:
        """Bytes of a segment.

        Raises:
            DamagedStoreError: the file is missing or too short.
        """
        if not size:
            return memoryview(b"")
        found = self._maps.get(number)
        if found is None:
            found = self._maps[number] = self._mapped(number)
        if offset + size > len(found):
            path = self._folder / file_name(number)
            raise DamagedStoreError(f"{path} must have {offset + size:,} bytes or more, got {len(found):,}.")
        return found[offset : offset + size]

    def _mapped(self, number: int) -> memoryview:
        path = self._folder / file_name(number)
        try:
            length = path.stat().st_size
            if not length:
                raise DamagedStoreError(f"{path} cannot be read: it is empty.")
            # Private memory, which PyTorch may write; unlike `mmap`, it keeps no descriptor of the file.
            return torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8).numpy().data
        except OSError as error:
            raise DamagedStoreError(f"{path} cannot be read: {error.strerror}.") from error
        except RuntimeError as error:
            raise DamagedStoreError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from error

    def checked(self, place: np.void, name: str) -> memoryview:
        """Bytes of a chunk, whose checksum is right.

        Args:
            place: `PLACE` of the chunk.
            name: of the chunk, for the message.

        Raises:
            DamagedStoreError: they are not what was written.
        """
        number = int(place["file"])
        data = self.data(number, int(place["offset"]), int(place["size"]))
        if digest(data) != tuple(place["digest"].tolist()):
            raise DamagedStoreError(f"{self._folder / file_name(number)}: {name} is damaged.")
        return data


def bytes_of(tensor: Tensor) -> memoryview:
    """Bytes of a contiguous tensor on the CPU, without a copy."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def damaged_entries(folder: Path, segment: Segment) -> Iterator[Entry]:
    """The chunks of a segment that are damaged."""
    files = Files(folder)
    for entry in segment.entries:
        if digest(files.data(segment.number, entry.offset, entry.size)) != entry.digest:
            yield entry


def free_bytes(folder: Path) -> int:
    """Bytes that the disk of a folder has left.

    Raises:
        StoreError: the folder is gone.
    """
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror}.") from error
