"""Decoding: state kept between forwards, for any kind of transformers' cache.

Each block is compressed once. With tau_source="output", each row continues with the uncertainty of its own last token. The state is kept
per thread, because a model may generate in several threads at once.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...nn.dyn_nsa import DynNSACore, common_dtype
from ...nn.dyn_nsa_cache import CompressedCache
from .masks import row_marks
from .parts import core_of


class _Kept:
    """Compressed blocks of one layer for the cache of the last forward, and a check that the cache is unchanged since.

    Operations that reorder, crop or reset a layer of a cache replace its tensor of keys, or write to it, which increments its version.
    """

    def __init__(self, marks: Tensor | None) -> None:
        self.marks = None if marks is None else marks.clone()  # `row_marks`; a copy, because the caller may write to the mask
        self.keys: weakref.ref[Tensor] | None = None
        self.version = -1
        self.compressed = CompressedCache()
        self.ready = True  # for the first call of a forward; a layer may be called again with other values

    def belongs_to(self, keys: Tensor | None, marks: Tensor | None) -> bool:
        if self.keys is None or keys is None or keys is not self.keys() or keys._version != self.version:
            return False
        if marks is None or self.marks is None:
            return marks is self.marks
        if marks.dim() == 2:  # the row has grown
            marks = marks[:, : self.marks.shape[-1]]
        return torch.equal(marks, self.marks)

    def extend(
        self, core: DynNSACore, cached: Tensor, key: Tensor, value: Tensor, num_queries: int, rows: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compressed keys and values of all positions; see `compressed_so_far`."""
        if cached.is_inference() or not self.ready:
            return None, None  # tensors of inference mode have no version
        self.ready = False
        begin: int | Tensor = 0
        count = key.shape[2]
        if self.keys is not None:
            begin = count - num_queries if rows is None or rows.shape[1] < 3 else rows[0, 2] - num_queries
            count = num_queries
        self.keys, self.version = weakref.ref(cached), cached._version
        key, value = (x.transpose(1, 2) for x in common_dtype(key, value))
        return self.compressed.extend(core, key, value, begin, count, None if rows is None else rows[:, 0])


class _Seen(NamedTuple):
    """Key and value of the last token of each row in one layer, and the entropy of the output after it."""

    marks: Tensor  # (B, 2, K, D)
    tau: Tensor  # (B,)


class _State(threading.local):
    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[DynNSACore, _Kept] = weakref.WeakKeyDictionary()  # while a forward with a cache may use it
        self.seen: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()


_state = _State()


def recall(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Prepares each core: it continues from its compressed blocks if the cache is unchanged, and starts anew otherwise."""
    layers = getattr(kwargs.get("past_key_values"), "layers", None)
    if model.training or torch.is_grad_enabled():
        layers = None
    marks = row_marks(kwargs.get("attention_mask"))
    for module in model.modules():
        core = core_of(module)
        if core is None:
            continue
        index = getattr(module, "layer_idx", None)
        if layers is None or index is None:
            _state.kept.pop(core, None)
            continue
        # A module that several layers share has the index of one of them, which may be a layer without keys.
        keys = getattr(layers[index], "keys", None) if 0 <= index < len(layers) else None
        kept = _state.kept.get(core)
        if kept is None or not kept.belongs_to(keys, marks):
            _state.kept[core] = kept = _Kept(marks)
        kept.ready = True


def compressed_so_far(
    core: DynNSACore, cached: Tensor, key: Tensor, value: Tensor, num_queries: int, rows: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Compressed keys and values of the cache of this forward, new positions included; (None, None) if nothing is kept.

    Args:
        cached: the keys as the cache returns them.
        key, value: (B, K, Tk, D), the same keys and their values, after `Compaction` if rows have holes.
        num_queries: number of new positions.
        rows: (B, 2 or 3), bounds from `dyn_nsa_mask`.
    """
    if not core.collecting or torch.compiler.is_compiling() or (kept := _state.kept.get(core)) is None:
        return None, None
    return kept.extend(core, cached, key, value, num_queries, rows)


def note_tau(model: nn.Module, cache: Any, tau: Tensor) -> None:
    """Keeps tau, (B,), the uncertainty after the last token of each row in `cache`, for the next token."""
    marks = _marks(model, cache)
    if marks is None or len(marks) != len(tau):
        _state.seen.pop(model, None)
    else:
        _state.seen[model] = _Seen(marks.clone(), tau.clone())


def noted_tau(model: nn.Module, cache: Any, otherwise: Tensor) -> Tensor:
    """(B,) or 0-d, the tau that `note_tau` kept for each row of `cache`; `otherwise` for rows without one.

    A row is identified by the key and value of its last token in the cache, because beam search reorders rows, another prompt has another
    cache, and rejected guesses are cut off.
    """
    seen, marks = _state.seen.get(model), _marks(model, cache)
    if seen is None or marks is None or marks.shape[1:] != seen.marks.shape[1:] or marks.device != seen.marks.device:
        return otherwise
    # The marks are on the device of the last layer, the noted tau on that of the head, `otherwise` on that of the first layer.
    same = (marks[:, None] == seen.marks[None]).flatten(2).all(-1).to(otherwise.device)
    return torch.where(same.any(-1), seen.tau.to(otherwise.device)[same.int().argmax(-1)], otherwise)


def _marks(model: nn.Module, cache: Any) -> Tensor | None:
    """(B, 2, K, D), key and value of the last position in the last DynNSA layer, where they depend on the whole history."""
    layers = getattr(cache, "layers", None)
    indices = [getattr(module, "layer_idx", None) for module in model.modules() if core_of(module) is not None]
    index = indices[-1] if indices else None
    if not layers or index is None or not 0 <= index < len(layers) or getattr(layers[index], "keys", None) is None:
        return None
    keys, values, length = layers[index].keys, layers[index].values, cache.get_seq_length(index)
    last = torch.as_tensor(length, device=keys.device).reshape(1) - 1
    if not isinstance(length, Tensor) and length == 0:
        return None
    last = last.clamp(min=0)  # an empty buffer holds zeros, which no token has
    return torch.stack([keys.index_select(2, last)[:, :, 0], values.index_select(2, last)[:, :, 0]], 1)
