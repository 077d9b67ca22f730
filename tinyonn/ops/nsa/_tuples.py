"""Named tuples of the registered ops: arguments, results, and tensors that backward reads. They define their order.

B batch, T queries of Tk positions (the last ones), H query heads, K key/value heads, D head dim, M compressed keys, S slots of a list
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class QueryKeyValue(NamedTuple):
    """Tensors of `compressed_attention` and `sliding_window_attention`. The sinks are joined after an implementation (`_sinks`)."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None = None


class CompressedOptions(NamedTuple):
    compress_size: int
    num_keys: int
    scale: float
    softcap: float | None


class CompressedResults(NamedTuple):
    out: Tensor
    lse: Tensor
    entropy: Tensor


class CompressedSaved(NamedTuple):
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


class WindowOptions(NamedTuple):
    window: int
    scale: float
    softcap: float | None


class Attended(NamedTuple):
    """Results of `block_sparse_attention` and `sliding_window_attention`; only backward reads the lse of the latter."""

    out: Tensor
    lse: Tensor


class WindowSaved(NamedTuple):
    lse: Tensor
    grad_out: Tensor


class SparseInputs(NamedTuple):
    """Tensors of `block_sparse_attention`. The sinks are joined after an implementation (`_sinks`)."""

    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor
    counts: Tensor
    bias: Tensor | None
    sinks: Tensor | None = None


class SparseOptions(NamedTuple):
    block_size: int
    scale: float
    softcap: float | None


class SparseSaved(NamedTuple):
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor


class SelectInputs(NamedTuple):
    """Tensors of `select_blocks`; its results are a `BlockSelection`."""

    query: Tensor
    key: Tensor
    lse: Tensor
    threshold: Tensor


class SelectOptions(NamedTuple):
    temperature: float
    block_size: int
    compress_size: int
    max_blocks: int
    importance: str
    forced_first: int
    forced_local: int
    num_keys: int
    scale: float
    softcap: float | None


class SelectSaved(NamedTuple):
    indices: Tensor
    counts: Tensor
    grad_bias: Tensor
    grad_soft_counts: Tensor


class DynNSAInputs(NamedTuple):
    """Tensors of a call; see `dyn_nsa`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_compressed: Tensor
    value_compressed: Tensor
    gates: Tensor
    base: Tensor
    slope: Tensor
    tau: Tensor | None
    query_compressed: Tensor | None
    sinks: Tensor | None


class DynNSANumbers(NamedTuple):
    """Numbers of a call; see `dyn_nsa`."""

    window: int
    temperature: float
    block_size: int
    compress_size: int
    max_blocks: int
    importance: str
    forced_first: int
    forced_local: int
    detach_scores: bool
    scale: float
    softcap: float | None


class DynNSAResults(NamedTuple):
    """Results of the registered op. Only out and soft_counts are differentiable.

    Attributes:
        out: (B, T, H, D).
        soft_counts: (B, T, K).
        own_tau: (B, T, K); empty if the caller gave tau.
        overflow: 0-d.
        counts: (B, T, K) int32.
        lse_compressed, lse_selected, lse_window: (B, T, H), of the three branches, with their sinks.
        indices, bias: (B, T, K, max_blocks), int32 and float.
        selected: (B, T, H, D), output of the selected branch.
    """

    out: Tensor
    soft_counts: Tensor
    own_tau: Tensor
    overflow: Tensor
    counts: Tensor
    lse_compressed: Tensor
    lse_selected: Tensor
    lse_window: Tensor
    indices: Tensor
    bias: Tensor
    selected: Tensor


class DynNSASaved(NamedTuple):
    """Results that backward reads, and the gradients of the differentiable ones."""

    own_tau: Tensor
    counts: Tensor
    lse_compressed: Tensor
    lse_selected: Tensor
    lse_window: Tensor
    indices: Tensor
    bias: Tensor
    selected: Tensor
    grad_out: Tensor
    grad_soft_counts: Tensor
