"""`compressed_attention`: checks, registration, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import reference
from .._attention import check_sinks, checked_heads, checked_softcap, scale_of
from .._dispatch import refuse_tangents, statistics_dtype
from . import _torch_nsa, _triton_nsa
from ._checks import Bounds, check_bound_values, check_compressed, check_sizes, checked_bounds
from ._register import register_differentiable
from ._sinks import join_sinks, sinks_gradient
from ._tuples import CompressedOptions, CompressedResults, CompressedSaved, QueryKeyValue


def compressed_attention(
    query: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
    *,
    compress_size: int,
    num_keys: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to compressed keys. Each stands for `compress_size` positions and is visible once all of them are in the past.

    Tensors are (B, T, H, D), not scaled_dot_product_attention's (B, H, T, D). Differentiable: query, key_compressed,
    value_compressed, sinks; out and lse carry gradients, entropy does not.

    Args:
        query: (B, T, H, D), the last T of `num_keys` positions.
        key_compressed, value_compressed: (B, num_keys // compress_size, K, D), K dividing H. Key c of a row stands for positions
            c * compress_size … of its sequence, padding not counted; packed sequence i begins at row cu_seqlens[i] // compress_size.
            Rows between packed sequences are not read, but must be finite with impl="triton".
        compress_size: 16, 32 or 64.
        num_keys: positions of a row; None for T.
        scale: factor on the scores; None for D ** -0.5.
        softcap: bound of the scores, softcap * tanh(score / softcap), as in Gemma 2; None for no bound.
        sinks: (H,), score of an additional key of each head, as in gpt-oss. Every query sees it, and its value is 0. The score is finite,
            and neither scaled nor capped. None for no sinks.
        cu_seqlens: (sequences + 1,) int32 or int64, bounds of sequences packed in one row.
        key_start, key_end: (B,) int32 or int64, first position of a row's sequence, and the position after its last.
        impl: "auto", "triton", "torch" or "reference"; an explicit choice never falls back.

    Returns:
        out: (B, T, H, D), 0 where nothing is visible.
        lse: (B, T, H) float32 (float64 for float64), logsumexp of the scores, and of the sink if there is one. Where nothing is
            visible, it is -inf, or the sink alone.
        entropy: (B, T, H) like lse, in nats, of the attention among the visible keys, without the sink; 0 where nothing is visible.

    Raises:
        TypeError, ValueError: a dtype, shape, device or size that is not accepted.
        RuntimeError: impl="triton" cannot run here; an input carries a forward-mode tangent, which only impl="reference" supports.

    Source: Yuan et al., "Native sparse attention", arXiv:2502.11089.
    """
    query, key_compressed, value_compressed = checked_heads(impl, query, key_compressed=key_compressed, value_compressed=value_compressed)
    check_sizes(64, compress_size)
    num_keys = query.shape[1] if num_keys is None else num_keys
    bounds = checked_bounds(query, key_compressed, num_keys, cu_seqlens, key_start, key_end)
    check_compressed(query, key_compressed, num_keys, compress_size)
    check_sinks(sinks, query)
    options = CompressedOptions(compress_size, num_keys, scale_of(query, scale), checked_softcap(softcap))
    if impl == "reference":
        return _reference(QueryKeyValue(query, key_compressed, value_compressed, sinks), options, bounds)
    refuse_tangents("compressed_attention", query, key_compressed, value_compressed, sinks)
    out, lse, entropy = _forward_op(query, key_compressed, value_compressed, sinks, *options, *bounds, impl)
    return out, lse, entropy


def _reference(inputs: QueryKeyValue, options: CompressedOptions, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """Result of the reference in the precision of the op, differentiated by autograd."""
    check_bound_values(options.num_keys, bounds)
    named: dict[str, Any] = {"sinks": inputs.sinks, **options._asdict(), **bounds._asdict()}
    out, lse, entropy = reference.compressed_attention(*inputs[:3], **named)
    dtype = statistics_dtype(inputs.query.dtype)
    return out.to(inputs.query.dtype), lse.to(dtype), entropy.to(dtype)


def _forward(inputs: QueryKeyValue, options: CompressedOptions, bounds: Bounds, module: ModuleType) -> CompressedResults:
    check_bound_values(options.num_keys, bounds)
    results = CompressedResults(*module.compressed_forward(inputs, options, bounds))
    join_sinks(results.out, results.lse, inputs.sinks)
    return results


def _fake(inputs: QueryKeyValue, _: CompressedOptions) -> CompressedResults:
    query = inputs.query
    lse = query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype))
    return CompressedResults(query.new_empty(query.shape), lse, torch.empty_like(lse))


def _backward(
    inputs: QueryKeyValue, saved: CompressedSaved, options: CompressedOptions, bounds: Bounds, _: list[bool], module: ModuleType
) -> Sequence[Tensor | None]:
    *grads, product = module.compressed_backward(inputs, saved, options, bounds)
    if inputs.sinks is None:
        return *grads, None
    shift = product if saved.grad_lse is None else product - saved.grad_lse
    return *grads, sinks_gradient(inputs.sinks, saved.lse, shift)


_forward_op = register_differentiable(
    "compressed_attention", (_torch_nsa, _triton_nsa), _forward, _fake, _backward,
    tensors=QueryKeyValue, options=CompressedOptions, results=CompressedResults, saved=CompressedSaved,
)  # fmt: skip
