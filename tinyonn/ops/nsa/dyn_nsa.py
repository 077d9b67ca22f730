"""`dyn_nsa`: checks, registration, dispatch; the three branches and their gates as one function."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import get_args

from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from ...reference import DynNSAOutput
from ...reference.nsa.dyn_nsa import Importance
from .._attention import check_sinks, checked_heads, checked_softcap, in_one_dtype, order_hint, scale_of
from .._checks import check_choice, check_flag, check_no_nan, check_size, check_tensor
from .._dispatch import refuse_tangents, statistics_dtype
from . import _torch_dyn_nsa, _triton_dyn_nsa
from ._checks import (
    Bounds,
    check_bound_values,
    check_compressed,
    check_max_blocks,
    check_sizes,
    check_tau_values,
    check_temperature,
    checked_bounds,
    empty_lists,
)
from ._register import register_differentiable
from ._tuples import DynNSAInputs, DynNSANumbers, DynNSAResults, DynNSASaved


def dyn_nsa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
    gates: Tensor,
    base: Tensor,
    slope: Tensor,
    *,
    tau: Tensor | None = None,
    query_compressed: Tensor | None = None,
    window: int = 512,
    temperature: float = 1.0,
    block_size: int = 64,
    compress_size: int = 64,
    max_blocks: int = 32,
    importance: Importance = "share",
    forced_first: int = 1,
    forced_local: int = 2,
    detach_scores: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: str = "auto",
) -> DynNSAOutput:
    """Native sparse attention with a learnable, uncertainty-driven threshold in place of a fixed number of blocks.

    gates[..., 0] · compressed + gates[..., 1] · selected + gates[..., 2] · window, over one query. The selected branch reads the blocks
    whose importance z passes base - slope · tau (`select_blocks`). The gate of a block is exactly 0 where it is not selected, so below
    max_blocks the sparse result *is* dense gated attention, and every gradient is exact for the tau that was used.

    Tensors are (B, T, H, D). Differentiable: query, key, value, key_compressed, value_compressed, gates, base, slope, query_compressed,
    sinks; out and soft_counts carry gradients. tau receives no gradient. No value affects an earlier query. Exception: with impl="triton",
    NaN and infinity in a value can spread within its tile.

    Sinks join the softmax of every branch. The shares of blocks, which the selection reads, are then those of the whole attention, sinks
    included.

    base = -30 selects all blocks, if the slope is at least 0, the temperature at most 10 and max_blocks at least the number of key blocks.
    With max_blocks = n it selects a fixed number of n blocks, and every longer row counts as overflowing. At most e^(-threshold) blocks
    pass a threshold of at least -20, and each query also reads the forced blocks.

    Args:
        query: (B, T, H, D), the last T of Tk positions.
        key, value: (B, Tk, K, D), K dividing H.
        key_compressed, value_compressed: (B, Tk // compress_size, K, D); see `compressed_attention`.
        gates: (B, T, H, 3), any reals.
        base, slope: (K,), in nats, and nats per unit of tau; a slope above 0 selects more blocks where tau is high.
        tau: (B, T, K) in [0, 1], which `tinyonn.debug()` checks; None for the mean over a group's heads of
            entropy / log(visible compressed keys), 0 where fewer than two are.
        query_compressed: (B, T, H, D), the query of the compressed branch and of the selection; None for `query`. `detach_scores` cuts its
            gradient through the selection alone.
        window: keys of the window branch.
        temperature, block_size, compress_size, max_blocks, importance, forced_first, forced_local, detach_scores: as in `select_blocks`.
        scale, softcap, sinks, cu_seqlens, key_start, key_end, impl: as in `compressed_attention`.

    Returns:
        DynNSAOutput(out, counts, tau, overflow, soft_counts): out (B, T, H, D); counts int32, tau and soft_counts (B, T, K); overflow 0-d.

    Raises:
        TypeError, ValueError: a dtype, shape, device or size that is not accepted.
        RuntimeError: impl="triton" cannot run here; a forward-mode tangent, as in `compressed_attention`.

    Source: Yuan et al., "Native sparse attention", arXiv:2502.11089, for the three branches.
    """
    if query_compressed is not None:
        query, key, value, key_compressed, value_compressed, query_compressed = in_one_dtype(
            query, key, value, key_compressed, value_compressed, query_compressed
        )
    query, key, value, key_compressed, value_compressed = checked_heads(
        impl, query, key=key, value=value, key_compressed=key_compressed, value_compressed=value_compressed
    )
    if key_compressed.shape[2] != key.shape[2]:
        hint = order_hint(query, key)
        raise ValueError(f"key_compressed must have key's {key.shape[2]} heads, got {key_compressed.shape[2]}{hint}.")
    check_sizes(block_size, compress_size)
    if query_compressed is not None:
        check_tensor("query_compressed", query_compressed, query.device, tuple(query.shape), query.dtype)
    check_max_blocks(max_blocks, forced_first, forced_local)
    check_size("window", window)
    check_choice("importance", importance, get_args(Importance))
    check_flag("detach_scores", detach_scores)
    bounds = checked_bounds(query, key, key.shape[1], cu_seqlens, key_start, key_end)
    check_compressed(query, key_compressed, key.shape[1], compress_size)
    rows = (*query.shape[:2], key.shape[2])
    check_tensor("gates", gates, query.device, (*query.shape[:3], 3))
    for name, tensor in (("base", base), ("slope", slope)):
        check_tensor(name, tensor, query.device, rows[2:])
    if tau is not None:
        check_tensor("tau", tau, query.device, rows)
        tau = tau.detach()
    check_sinks(sinks, query)
    numbers = (window, check_temperature(temperature), block_size, compress_size, max_blocks)
    options = DynNSANumbers(
        *numbers, importance, forced_first, forced_local, detach_scores, scale_of(query, scale), checked_softcap(softcap)
    )
    inputs = DynNSAInputs(query, key, value, key_compressed, value_compressed, gates, base, slope, tau, query_compressed, sinks)
    if debug_enabled():
        for name, given in inputs._asdict().items():
            if given is not None:
                check_no_nan(name, given)
        if tau is not None:
            check_tau_values(tau)
    if impl == "reference":
        check_bound_values(key.shape[1], bounds)
        found = reference.dyn_nsa(**inputs._asdict(), **options._asdict(), **bounds._asdict())
        dtype = statistics_dtype(query.dtype)
        statistics = {name: getattr(found, name).to(dtype) for name in ("tau", "overflow", "soft_counts")}
        found = found._replace(out=found.out.to(query.dtype), **statistics)
    else:
        refuse_tangents("dyn_nsa", *inputs)
        results = DynNSAResults(*_forward_op(*inputs, *options, *bounds, impl))
        found = DynNSAOutput(results.out, results.counts, results.own_tau, results.overflow, results.soft_counts)
    return found if tau is None else found._replace(tau=tau)


def _forward(inputs: DynNSAInputs, options: DynNSANumbers, bounds: Bounds, module: ModuleType) -> DynNSAResults:
    check_bound_values(inputs.key.shape[1], bounds)
    return DynNSAResults(*module.dyn_nsa_forward(inputs, options, bounds))


def _backward(
    inputs: DynNSAInputs, saved: DynNSASaved, options: DynNSANumbers, bounds: Bounds, _: list[bool], module: ModuleType
) -> Sequence[Tensor | None]:
    inputs = inputs._replace(tau=saved.own_tau if inputs.tau is None else inputs.tau)
    grads: Sequence[Tensor | None] = module.dyn_nsa_backward(inputs, saved, options, bounds)
    return grads


def _fake(inputs: DynNSAInputs, options: DynNSANumbers) -> DynNSAResults:
    query = inputs.query
    dtype = statistics_dtype(query.dtype)
    indices, counts, bias, soft_counts = empty_lists(query, inputs.key.shape[2], options.max_blocks)
    lse_compressed, lse_selected, lse_window = (query.new_empty(query.shape[:3], dtype=dtype) for _ in range(3))
    return DynNSAResults(
        out=query.new_empty(query.shape),
        soft_counts=soft_counts,
        own_tau=query.new_empty(soft_counts.shape if inputs.tau is None else (0,), dtype=dtype),
        overflow=query.new_empty((), dtype=dtype),
        counts=counts,
        lse_compressed=lse_compressed,
        lse_selected=lse_selected,
        lse_window=lse_window,
        indices=indices,
        bias=bias,
        selected=query.new_empty(query.shape),
    )


_forward_op = register_differentiable(
    "dyn_nsa", (_torch_dyn_nsa, _triton_dyn_nsa), _forward, _fake, _backward,
    tensors=DynNSAInputs, options=DynNSANumbers, results=DynNSAResults, saved=DynNSASaved, constants=("tau",),
)  # fmt: skip
