"""`select_blocks`: checks, registration, dispatch."""

from __future__ import annotations

from types import ModuleType
from typing import get_args

from torch import Tensor

from ... import reference
from ...reference import BlockSelection
from ...reference.nsa.dyn_nsa import Importance
from .._attention import checked_heads, checked_softcap, scale_of
from .._checks import check_choice, check_flag, check_tensor
from .._dispatch import refuse_tangents, statistics_dtype
from . import _torch_select, _triton_nsa
from ._checks import (
    Bounds,
    check_bound_values,
    check_compressed,
    check_max_blocks,
    check_sizes,
    check_temperature,
    checked_bounds,
    empty_lists,
)
from ._register import register_differentiable
from ._tuples import SelectInputs, SelectOptions, SelectSaved


def select_blocks(
    query: Tensor,
    key_compressed: Tensor,
    lse: Tensor,
    threshold: Tensor,
    *,
    temperature: float = 1.0,
    block_size: int = 64,
    compress_size: int = 64,
    max_blocks: int = 32,
    importance: Importance = "share",
    forced_first: int = 1,
    forced_local: int = 2,
    detach_scores: bool = False,
    num_keys: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: str = "auto",
) -> BlockSelection:
    """Key blocks whose importance passes a threshold.

    z[t, b] = log of a block's share of the query's compressed attention, mean over the group's heads, at least -20;
    c = clamp((z - threshold) / temperature, 0, 1); gate = c²(3 - 2c), a smoothstep: exactly 0 at and below the threshold.
    Each query selects the past blocks with a gate above 0, and the forced blocks, whose gate is 1: by default the first block of the
    sequence, the previous and its own block. If more than max_blocks pass, the forced ones and those with the highest z are kept; ties go
    to the lower index.

    Shares add up to at most 1. At most e^(-threshold) blocks therefore pass a threshold of at least -20, whatever the length of the
    sequence, and a max_blocks of at least forced_first + forced_local + e^(-threshold) never overflows.

    Differentiable: threshold and, unless detach_scores, query, key_compressed and lse; bias and soft_counts carry gradients.

    Args:
        query: (B, T, H, D), the last T of `num_keys` positions.
        key_compressed, lse: (B, M, K, D) and (B, T, H), the argument and the result of `compressed_attention` with the same
            softcap. Sinks act through lse.
        threshold: (B, T, K), in nats.
        temperature: width of the gate's slope, in nats; a normal float32.
        block_size: positions of a key block, a power of two of at least 16.
        compress_size: positions of a compressed key, a divisor of block_size.
        max_blocks: maximum number of blocks of a query, forced blocks included; at least forced_first + forced_local.
        importance: "share" for z as above; "relative" for z = log(share / share if attention were uniform), with which the number of
            blocks that pass can grow with the length of a sequence.
        forced_first: number of blocks at the start of the sequence that every query reads, at least 0.
        forced_local: number of blocks up to and including the query's own that it reads, at least 1.
        detach_scores: no gradient through z into query, key_compressed and lse.
        num_keys, scale, softcap, cu_seqlens, key_start, key_end, impl: as in `compressed_attention`.

    Returns:
        BlockSelection(indices, counts, bias, soft_counts, overflow): indices (B, T, K, max_blocks) and counts (B, T, K), int32; bias like
        indices, soft_counts like counts, and overflow 0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a dtype, shape, device or size that is not accepted.
        RuntimeError: impl="triton" cannot run here; a forward-mode tangent, as in `compressed_attention`.
    """
    query, key_compressed = checked_heads(impl, query, key_compressed=key_compressed)
    check_sizes(block_size, compress_size)
    check_max_blocks(max_blocks, forced_first, forced_local)
    check_flag("detach_scores", detach_scores)
    temperature = check_temperature(temperature)
    check_choice("importance", importance, get_args(Importance))
    num_keys = query.shape[1] if num_keys is None else num_keys
    bounds = checked_bounds(query, key_compressed, num_keys, cu_seqlens, key_start, key_end)
    check_compressed(query, key_compressed, num_keys, compress_size)
    check_tensor("lse", lse, query.device, tuple(query.shape[:3]))
    check_tensor("threshold", threshold, query.device, (*query.shape[:2], key_compressed.shape[2]))
    if detach_scores:
        query, key_compressed, lse = query.detach(), key_compressed.detach(), lse.detach()
    scale, softcap = scale_of(query, scale), checked_softcap(softcap)
    if impl == "reference":
        check_bound_values(num_keys, bounds)
        found = reference.select_blocks(
            query, key_compressed, lse, threshold, temperature=temperature, block_size=block_size, compress_size=compress_size,
            max_blocks=max_blocks, importance=importance, forced_first=forced_first, forced_local=forced_local, num_keys=num_keys,
            scale=scale, softcap=softcap, **bounds._asdict(),
        )  # fmt: skip
        dtype = statistics_dtype(query.dtype)
        return found._replace(**{name: getattr(found, name).to(dtype) for name in ("bias", "soft_counts", "overflow")})
    refuse_tangents("select_blocks", query, key_compressed, lse, threshold)
    rule = (importance, forced_first, forced_local)
    options = SelectOptions(temperature, block_size, compress_size, max_blocks, *rule, num_keys, scale, softcap)
    return BlockSelection(*_forward_op(query, key_compressed, lse, threshold, *options, *bounds, impl))


def _forward(inputs: SelectInputs, options: SelectOptions, bounds: Bounds, module: ModuleType) -> BlockSelection:
    check_bound_values(options.num_keys, bounds)
    return BlockSelection(*module.select_forward(inputs, options, bounds))


def _fake(inputs: SelectInputs, options: SelectOptions) -> BlockSelection:
    query = inputs.query
    return BlockSelection(
        *empty_lists(query, inputs.key.shape[2], options.max_blocks), query.new_empty((), dtype=statistics_dtype(query.dtype))
    )


def _backward(
    inputs: SelectInputs, saved: SelectSaved, options: SelectOptions, bounds: Bounds, needed: list[bool], module: ModuleType
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and lse, if any of them is needed, and of threshold."""
    grad_threshold, *others = module.select_backward(inputs, saved, options, bounds, any(needed[:3]))
    return *others, grad_threshold


_forward_op = register_differentiable(
    "select_blocks", (_torch_select, _triton_nsa), _forward, _fake, _backward,
    tensors=SelectInputs, options=SelectOptions, results=BlockSelection, saved=SelectSaved,
)  # fmt: skip
