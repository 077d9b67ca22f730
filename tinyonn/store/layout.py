"""How the tensors of a training state are cut into chunks.

A chunk is a box of a tensor, and what a store writes or leaves alone: all of an ordinary tensor, a few rows of a pool of experts, the shard
of one process under `fully_shard`. JSON texts are chunks too; their names begin with `@` and their size may change.

C chunks
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

Digest = tuple[int, int]

# Where the bytes of a chunk are. file is -1 for a chunk that was never written; offset counts from the begin of the file.
PLACE = np.dtype([("file", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("digest", "<u8", (2,))])


class Chunk(NamedTuple):
    """A box of a tensor. Offsets and sizes are empty for JSON and for a tensor without dimensions."""

    tensor: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class TensorKind(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """All chunks of a state.

    Args:
        tensors: name -> dtype and shape; without the JSON texts.
        chunks: (C,) in the order of tables.
    """

    tensors: dict[str, TensorKind]
    chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, metadata: Metadata) -> Layout:
        """The layout that a planner of torch.distributed.checkpoint decided on."""
        tensors: dict[str, TensorKind] = {}
        chunks: list[Chunk] = []
        for name, found in metadata.state_dict_metadata.items():
            if isinstance(found, BytesStorageMetadata):
                chunks.append(Chunk(name, (), ()))
                continue
            tensors[name] = TensorKind(found.properties.dtype, tuple(found.size))
            chunks += [Chunk(name, tuple(one.offsets), tuple(one.sizes)) for one in found.chunks]
        return cls(tensors, tuple(chunks))

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """(C,) name of each chunk in segments: that of its tensor, with ranges where it is a part: `experts.down_proj[03:04]`."""
        return tuple(self._name(chunk) for chunk in self.chunks)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Place of a chunk by its name."""
        return {name: number for number, name in enumerate(self.names)}

    @functools.cached_property
    def of_tensor(self) -> dict[str, list[int]]:
        """Chunks of each tensor, in the order of their offsets."""
        found: dict[str, list[int]] = {}
        for number, chunk in enumerate(self.chunks):
            found.setdefault(chunk.tensor, []).append(number)
        for numbers in found.values():
            numbers.sort(key=lambda number: self.chunks[number].offsets)
        return found

    def is_json(self, number: int) -> bool:
        return self.chunks[number].tensor.startswith("@")

    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in self.tensors.values())

    def to_json(self) -> str:
        tensors = {name: [str(kind.dtype).removeprefix("torch."), list(kind.shape)] for name, kind in self.tensors.items()}
        return json.dumps({"tensors": tensors, "chunks": [list(chunk) for chunk in self.chunks]}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        found = json.loads(text)
        tensors = {name: TensorKind(getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in found["tensors"].items()}
        return cls(tensors, tuple(Chunk(name, tuple(offsets), tuple(sizes)) for name, offsets, sizes in found["chunks"]))

    def _name(self, chunk: Chunk) -> str:
        if chunk.tensor.startswith("@") or chunk.sizes == self.tensors[chunk.tensor].shape:
            return chunk.tensor
        shape = self.tensors[chunk.tensor].shape
        widths = [len(str(size)) for size in shape]  # names sort as rows do, so that neighbours stay neighbours in a file
        parts = [
            f"{begin:0{width}d}:{begin + size:0{width}d}" for begin, size, width in zip(chunk.offsets, chunk.sizes, widths, strict=True)
        ]
        while len(parts) > 1 and chunk.sizes[len(parts) - 1] == shape[len(parts) - 1]:
            parts.pop()
        return f"{chunk.tensor}[{','.join(parts)}]"


def empty_table(layout: Layout) -> np.ndarray:
    """(C,) `PLACE`, nothing written."""
    table = np.zeros(len(layout.chunks), PLACE)
    table["file"] = -1
    return table


def moved(table: np.ndarray, before: Layout, after: Layout) -> np.ndarray:
    """A table for another layout; chunks that both have keep their places."""
    found = empty_table(after)
    for number, name in enumerate(after.names):
        old = before.numbers.get(name)
        if old is None:
            continue
        same = after.is_json(number) or before.tensors[before.chunks[old].tensor] == after.tensors[after.chunks[number].tensor]
        if same:
            found[number] = table[old]
    return found


def digest(data: Any) -> Digest:
    """128 bits of XXH3."""
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & 0xFFFFFFFFFFFFFFFF


def hex_digest(value: Sequence[int]) -> str:
    return f"{int(value[0]):016x}{int(value[1]):016x}"


def from_hex(text: str) -> Digest:
    return int(text[:16], 16), int(text[16:], 16)


def runs(layout: Layout, table: np.ndarray, tensor: str) -> Iterator[tuple[Chunk, list[int]]]:
    """Chunks of a tensor, those that follow each other in the tensor's rows and in a file as one, with the numbers of its parts."""
    numbers = layout.of_tensor[tensor]
    begin = 0
    while begin < len(numbers):
        end = begin + 1
        while end < len(numbers) and _follows(layout, table, numbers[end - 1], numbers[end]):
            end += 1
        part = numbers[begin:end]
        first = layout.chunks[part[0]]
        rows = sum(layout.chunks[number].sizes[0] for number in part) if first.sizes else 0
        yield Chunk(tensor, first.offsets, (rows, *first.sizes[1:]) if first.sizes else ()), part
        begin = end


def _follows(layout: Layout, table: np.ndarray, before: int, after: int) -> bool:
    one, two = layout.chunks[before], layout.chunks[after]
    if not one.sizes or one.sizes[1:] != two.sizes[1:] or one.offsets[1:] != two.offsets[1:]:
        return False
    if one.offsets[0] + one.sizes[0] != two.offsets[0] or table["file"][before] != table["file"][after]:
        return False
    return bool(table["offset"][before] + table["size"][before] == table["offset"][after])
