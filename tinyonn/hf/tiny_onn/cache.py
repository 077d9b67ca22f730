"""Layers of transformers' caches for the sparse kinds of attention.

`generate` makes a `DynamicCache`, whose layers hold all keys and values as two tensors. `fitted` puts the layers of these kinds in their
place. B batch
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ...errors import InputError
from ...nn import DynNSACache, DynSMHACache


class SparseCacheLayer(CacheLayerMixin):
    """A layer of a cache that holds a `nn.DynNSACache` or `nn.DynSMHACache`, which the attention itself extends."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.held: Any = None
        self.rows = 0

    def started(self, key_start: Tensor | None, rows: int) -> Any:
        """The held cache; a new one begins with this first position of each row, (B,), which is not padding."""
        if self.held is None:
            self.held, self.rows, self.is_initialized = self.kind(key_start), rows, True
        return self.held

    @property
    def key_start(self) -> Tensor | None:
        return None if self.held is None else self.held.key_start

    def get_seq_length(self) -> int:
        return 0 if self.held is None else self.held.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` in earlier versions of transformers."""
        return -1

    def reset(self) -> None:
        self.held, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, whose number is given below 0; above 0, as in earlier versions of transformers, it is what is left."""
        if self.held is not None:
            left = tokens_to_remove if tokens_to_remove > 0 else self.held.length + tokens_to_remove
            self.held.crop(min(max(0, left), self.held.length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.rows).repeat_interleave(repeats))

    def _select(self, index: Tensor) -> None:
        if self.held is not None:
            self.held.select_rows(index)
            self.rows = len(index)

    def offload(self) -> None:
        raise InputError("a cache that is offloaded needs attention='full'.")

    def prefetch(self) -> None:
        raise InputError("a cache that is offloaded needs attention='full'.")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the attention extends this layer of the cache itself.")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the attention extends this layer of the cache itself.")


def kind_of(attention: str) -> type:
    """Class of the cache that a layer with a sparse kind of attention takes."""
    return DynNSACache if attention == "dyn_nsa" else DynSMHACache


def fitted(cache: Any, attention: str, num_layers: int) -> list[SparseCacheLayer]:
    """The layers of a cache for a sparse kind of attention; empty ones of a `DynamicCache` are replaced.

    Raises:
        InputError: the cache is of another kind, is offloaded, or holds keys of another model.
    """
    if not isinstance(cache, Cache):
        raise InputError(f"past_key_values must be a Cache of transformers, got {type(cache).__name__}.")
    if cache.offloading:
        raise InputError(f"past_key_values must not be offloaded with attention={attention!r}.")
    kind, layers = kind_of(attention), cache.layers
    found = []
    for index in range(num_layers):
        layer = layers[index] if index < len(layers) else None
        if layer is None or (type(layer) is DynamicLayer and not layer.is_initialized):
            layer = SparseCacheLayer(kind)
            layers[index : index + 1] = [layer]
        if not isinstance(layer, SparseCacheLayer) or layer.kind is not kind:
            raise InputError(
                f"past_key_values must be a DynamicCache, empty or of this model, with attention={attention!r}, got a layer "
                f"{type(layer).__name__}."
            )
        found.append(layer)
    return found
