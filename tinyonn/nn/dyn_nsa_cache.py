"""Caches of DynNSA for decoding: keys, values and their compressed blocks.

B batch, n new positions of Tk, K key/value heads, D head dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops._checks import check_same_device
from .dyn_nsa import DynNSACore


class CompressedCache:
    """Compressed keys and values of growing rows. A block is compressed when all its positions are there."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []  # keys and values, with room to grow

    @torch.no_grad()
    def extend(
        self, core: DynNSACore, key: Tensor, value: Tensor, begin: int | Tensor, count: int, key_start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Adds `count` positions from `begin` on, without gradients.

        Args:
            core: module that compresses them.
            key, value: (B, Tk, K, D), all positions so far; later entries of the buffer are not read.
            begin: first new position; a 0-d tensor needs key_start.
            count: number of new positions.
            key_start: (B,) first position of each row that is not padding; None for 0.

        Returns:
            Compressed keys and values, each (B, Tk // compress_size, K, D), views of the cache.
        """
        size = core.options.compress_size
        self._tensors = [_with_room(key, key.shape[1] // size + 1, old) for old in self._tensors or (None, None)]
        for source, maps, target in zip((key, value), (core.compress_key, core.compress_value), self._tensors, strict=True):
            if key_start is None:
                assert isinstance(begin, int)
                first, last = begin // size, (begin + count) // size
                if last > first:
                    target[:, first:last] = maps(source[:, first * size : last * size])
                continue
            # Blocks end at different positions in each row, so each row writes the blocks that these positions may have completed. No
            # query reads an incomplete block, and it is written again later.
            number = (begin - key_start).clamp(min=0)[:, None] // size + torch.arange(-(-count // size), device=key.device)
            rows = torch.arange(len(key), device=key.device)[:, None]
            target[rows, number.long()] = maps(source, key_start[:, None] + number * size)
        whole = key.shape[1] // size
        return self._tensors[0][:, :whole], self._tensors[1][:, :whole]

    def select_rows(self, index: Tensor) -> None:
        """Replaces the rows by those of an index, (n,)."""
        self._tensors = [tensor.index_select(0, index) for tensor in self._tensors]


class DynNSACache:
    """Keys, values and compressed blocks of one layer, for decoding.

    A copied or unpickled cache may be used with another layer.

    Args:
        key_start: (B,) int32 or int64, first position of each row that is not padding; None for 0.

    Raises:
        TypeError: key_start has the wrong type.
    """

    def __init__(self, key_start: Tensor | None = None) -> None:
        self.key_start = checked_key_start(key_start)
        self.length = 0
        self._core: DynNSACore | None = None
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._compressed = CompressedCache()

    @torch.no_grad()
    def append(self, core: DynNSACore, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Appends n positions, without gradients.

        Args:
            core: module that compresses them.
            key, value: (B, n, K, D).

        Returns:
            All keys and values so far, (B, Tk, K, D), and all compressed, (B, Tk // compress_size, K, D): views of the cache.

        Raises:
            ValueError: the layer, the number of rows or heads, dtype or device differs from the cache, which is not changed.
        """
        self._check(core, key)
        self._core = core
        begin, count = self.length, key.shape[1]
        self._key, self._value = _with_room(key, begin + count, self._key), _with_room(value, begin + count, self._value)
        self.length += count
        self._key[:, begin : self.length] = key
        self._value[:, begin : self.length] = value
        keys, values = self._key[:, : self.length], self._value[:, : self.length]
        return keys, values, *self._compressed.extend(core, keys, values, begin, count, self.key_start)

    @torch.no_grad()
    def select_rows(self, index: Tensor) -> None:
        """Replaces the rows by those of an index, (n,), which may reorder, repeat or drop them."""
        if self.key_start is not None:
            self.key_start = self.key_start.index_select(0, index.to(self.key_start.device))
        if self._key is not None and self._value is not None:
            index = index.to(self._key.device)
            self._key, self._value = self._key.index_select(0, index), self._value.index_select(0, index)
            self._compressed.select_rows(index)

    def crop(self, length: int) -> None:
        """Forgets all positions but the first `length`.

        Raises:
            ValueError: the cache has fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be 0 … {self.length}, got {length}.")
        self.length = length

    def check_rows(self, rows: int) -> None:
        """ValueError if the cache has another number of rows."""
        if self.key_start is not None and tuple(self.key_start.shape) != (rows,):
            raise ValueError(f"key_start of the cache must have shape ({rows},), got {tuple(self.key_start.shape)}.")
        if self._key is not None and len(self._key) != rows:
            raise ValueError(f"the cache holds {len(self._key)} row(s), got {rows}: begin another.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_core": None}  # a copy has the keys and values, not the layer

    def _check(self, core: DynNSACore, key: Tensor) -> None:
        if self._core is not None and self._core is not core:
            raise ValueError("cache belongs to another layer; use one DynNSACache per layer.")
        self.check_rows(len(key))
        if self.key_start is not None:
            check_same_device("key_start", self.key_start, key.device)
        held = self._key
        if held is not None and (held.shape[2:] != key.shape[2:] or held.dtype != key.dtype or held.device != key.device):
            raise ValueError(
                f"the cache holds keys of {tuple(held.shape[2:])} in {held.dtype} on {held.device}, got {tuple(key.shape[2:])} in "
                f"{key.dtype} on {key.device}: begin another."
            )


def _with_room(like: Tensor, room: int, old: Tensor | None) -> Tensor:
    """`old`, or a longer tensor that starts with it, with at least `room` positions."""
    if old is not None and old.shape[1] >= room:
        return old
    with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside of it
        new = like.new_zeros((like.shape[0], 2 * room, *like.shape[2:])).detach()
    if old is not None:
        new[:, : old.shape[1]] = old
    return new


def checked_key_start(key_start: Tensor | None) -> Tensor | None:
    """TypeError if the first positions of rows are no tensor of int32 or int64."""
    if key_start is not None and not isinstance(key_start, Tensor):
        raise TypeError(f"key_start must be a torch.Tensor, got {type(key_start).__name__}.")
    if key_start is not None and key_start.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_start must be int32 or int64, got {key_start.dtype}.")
    return key_start
