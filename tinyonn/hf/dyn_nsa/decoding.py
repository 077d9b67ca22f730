"""Decoding: each block is compressed once for a cache of transformers, whichever kind it is."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.dyn_nsa import CompressedCache, DynNSACore, common_dtype
from .masks import row_starts
from .parts import PART


class _Kept:
    """What one layer compressed for the cache of the last forward, and how to tell that cache from a changed one.

    Whatever reorders, crops or resets a layer of a cache either replaces its tensor of keys or writes to it, which counts up its version.
    """

    def __init__(self, starts: Tensor | None) -> None:
        self.starts = starts  # of rows, as the mask tells them
        self.keys: weakref.ref[Tensor] | None = None
        self.version = -1
        self.compressed = CompressedCache()

    def belongs_to(self, keys: Tensor | None, starts: Tensor | None) -> bool:
        if self.keys is None or keys is None or keys is not self.keys() or keys._version != self.version:
            return False
        return starts is self.starts is None or (starts is not None and self.starts is not None and torch.equal(starts, self.starts))

    def extend(
        self, core: DynNSACore, key: Tensor, value: Tensor, num_queries: int, rows: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compressed keys and values of all positions; (B, K, Tk, D) as the cache gives them."""
        if key.is_inference():
            return None, None  # carries no version
        begin: int | Tensor = 0
        count = key.shape[2]
        if self.keys is not None:
            begin = count - num_queries if rows is None or rows.shape[1] < 3 else rows[0, 2] - num_queries
            count = num_queries
        self.keys, self.version = weakref.ref(key), key._version
        key, value = (x.transpose(1, 2) for x in common_dtype(key, value))
        return self.compressed.extend(core, key, value, begin, count, None if rows is None else rows[:, 0])


_kept: weakref.WeakKeyDictionary[DynNSACore, _Kept] = weakref.WeakKeyDictionary()  # only while a forward with a cache may use it


def recall(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Readies each core to go on from what it compressed for this cache, if that is unchanged, or to begin."""
    layers = getattr(kwargs.get("past_key_values"), "layers", None)
    if model.training or torch.is_grad_enabled():
        layers = None
    starts = row_starts(kwargs.get("attention_mask"))
    for module in model.modules():
        core = module._modules.get(PART)
        if not isinstance(core, DynNSACore):
            continue
        index = getattr(module, "layer_idx", None)
        if layers is None or index is None:
            _kept.pop(core, None)
            continue
        keys = layers[index].keys if index < len(layers) else None
        kept = _kept.get(core)
        if kept is None or not kept.belongs_to(keys, starts):
            _kept[core] = _Kept(starts)


def compressed_so_far(
    core: DynNSACore, key: Tensor, value: Tensor, num_queries: int, rows: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What `core` compressed for the cache of this forward, grown by its new positions; None twice where nothing is kept.

    Args:
        key, value: (B, K, Tk, D), as the cache gives them.
        num_queries: new positions.
        rows: (B, 2 or 3), bounds of `dyn_nsa_mask`.
    """
    if not core.collecting or torch.compiler.is_compiling() or (kept := _kept.get(core)) is None:
        return None, None
    return kept.extend(core, key, value, num_queries, rows)
