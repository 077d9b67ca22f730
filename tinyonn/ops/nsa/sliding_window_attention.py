"""`sliding_window_attention`: checks, registration, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from ... import reference
from .._attention import check_sinks, checked_heads, checked_softcap, scale_of
from .._checks import check_size
from .._dispatch import refuse_tangents
from . import _torch_nsa, _triton_nsa
from ._checks import Bounds, check_bound_values, checked_bounds
from ._register import empty_attended, register_differentiable
from ._sinks import join_sinks, sinks_gradient
from ._tuples import Attended, QueryKeyValue, WindowOptions, WindowSaved


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of token t to keys j with 0 <= t - j < window.

    Tensors are (B, T, H, D). Differentiable: query, key, value, sinks.

    Args:
        query: (B, T, H, D), the last T of Tk positions.
        key, value: (B, Tk, K, D), K dividing H.
        window: keys that a query sees, its own included.
        cu_seqlens: (sequences + 1,) int32 or int64, bounds of sequences packed in one row. Rows after the last bound belong to none.
        scale, softcap, sinks, key_start, key_end, impl: as in `compressed_attention`.

    Returns:
        (B, T, H, D), 0 where nothing is visible.

    Raises:
        TypeError, ValueError: a dtype, shape, device or size that is not accepted.
        RuntimeError: impl="triton" cannot run here; a forward-mode tangent, as in `compressed_attention`.
    """
    query, key, value = checked_heads(impl, query, key=key, value=value)
    check_size("window", window)
    bounds = checked_bounds(query, key, key.shape[1], cu_seqlens, key_start, key_end)
    check_sinks(sinks, query)
    options = WindowOptions(window, scale_of(query, scale), checked_softcap(softcap))
    if impl == "reference":
        check_bound_values(key.shape[1], bounds, tail=True)
        named: dict[str, Any] = {"sinks": sinks, **options._asdict(), **bounds._asdict()}
        return reference.sliding_window_attention(query, key, value, **named).to(query.dtype)
    refuse_tangents("sliding_window_attention", query, key, value, sinks)
    out: Tensor = _forward_op(query, key, value, sinks, *options, *bounds, impl)[0]
    return out


def _forward(inputs: QueryKeyValue, options: WindowOptions, bounds: Bounds, module: ModuleType) -> Attended:
    check_bound_values(inputs.key.shape[1], bounds, tail=True)
    results = Attended(*module.window_forward(inputs, options, bounds))
    join_sinks(*results, inputs.sinks)
    return results


def _backward(
    inputs: QueryKeyValue, saved: WindowSaved, options: WindowOptions, bounds: Bounds, _: list[bool], module: ModuleType
) -> Sequence[Tensor | None]:
    *grads, product = module.window_backward(inputs, saved, options, bounds)
    return *grads, None if inputs.sinks is None else sinks_gradient(inputs.sinks, saved.lse, product)


_forward_op = register_differentiable(
    "sliding_window_attention", (_torch_nsa, _triton_nsa), _forward, empty_attended, _backward,
    tensors=QueryKeyValue, options=WindowOptions, results=Attended, saved=WindowSaved,
)  # fmt: skip
