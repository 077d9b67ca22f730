"""Checks that all ops of attention share, and their choice of the implementation.

B batch, T queries, H query heads, K key/value heads, D head dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_float, check_number, check_tensor
from ._dispatch import Impl, autocast_dtype, check_impl, choose_impl

MAX_HEAD_DIM = 256
MAX_TRITON_FLOAT32_DIM = 128  # with more, rows of queries, keys and gradients do not fit shared memory
AUTOCAST_FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # dtypes that autocast converts


def choose_attention_impl(impl: str, query: Tensor) -> Impl:
    """`choose_impl`, except that `auto` is torch for tensors that the kernels do not support."""
    wide = query.dtype == torch.float32 and query.shape[-1] > MAX_TRITON_FLOAT32_DIM
    if wide and impl == "auto":
        return "torch"
    if wide and impl == "triton":
        raise ValueError(
            f"query must have at most {MAX_TRITON_FLOAT32_DIM} dimensions a head in float32 with impl='triton', got {query.shape[-1]}: "
            "use float16 or bfloat16 (to 256), or impl='torch'."
        )
    return choose_impl(impl, query)


def checked_heads(impl: str, query: Tensor, **keys: Tensor) -> tuple[Tensor, ...]:
    """The query and its keys in one dtype. `keys` are keys (B, ·, K, D), K dividing H, each followed by its values, if any."""
    check_impl(impl)
    query, *tensors = in_one_dtype(query, *keys.values())
    check_float("query", query)
    if query.dim() != 4:
        raise ValueError(f"query must have shape (B, T, H, D), got {tuple(query.shape)}.")
    batch, _, heads, dim = query.shape
    if not 1 <= dim <= MAX_HEAD_DIM or heads < 1:
        raise ValueError(f"query must have at least one head of 1 … {MAX_HEAD_DIM} dimensions, got shape {tuple(query.shape)}.")
    for number, (name, tensor) in enumerate(zip(keys, tensors, strict=True)):
        if number % 2:
            check_tensor(name, tensor, query.device, tensors[number - 1].shape, query.dtype)
            continue
        check_tensor(name, tensor, query.device, dtype=query.dtype)
        if tensor.dim() != 4 or tensor.shape[0] != batch or tensor.shape[3] != dim:
            raise ValueError(f"{name} must have shape ({batch}, T, K, {dim}), got {tuple(tensor.shape)}.")
        if tensor.shape[2] < 1 or heads % tensor.shape[2]:
            hint = order_hint(query, tensor)
            raise ValueError(f"{name} must have a number of heads that divides query's {heads}, got {tensor.shape[2]}{hint}.")
    return query, *tensors


def in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Converts tensors of different precision to the dtype of autocast, if it is on, as torch's own attention does.

    A projection under autocast returns bfloat16; a rotation or norm after it returns float32.
    """
    if not all(isinstance(tensor, Tensor) and tensor.dtype in AUTOCAST_FLOATS for tensor in tensors):
        return tensors
    dtype = autocast_dtype(tensors[0])
    if dtype is None or all(tensor.dtype == tensors[0].dtype for tensor in tensors):
        return tensors
    return tuple(tensor.to(dtype) for tensor in tensors)


def order_hint(query: Tensor, key: Tensor) -> str:
    """For an error about shapes that would fit if tensors were (B, H, T, D)."""
    wide = query.shape[2] > query.shape[1] or key.shape[2] > key.shape[1]  # more heads than tokens
    if not wide or key.shape[1] < 1 or query.shape[1] % key.shape[1]:
        return ""
    return ": tensors are (B, T, H, D) here; transpose(1, 2) those in scaled_dot_product_attention's order (B, H, T, D)"


def checked_softcap(softcap: float | None) -> float | None:
    """The bound of the scores; None for none."""
    if softcap is None:
        return None
    check_number("softcap", softcap, above=0)
    return float(softcap)


def check_sinks(sinks: Tensor | None, query: Tensor) -> None:
    if sinks is not None:
        check_tensor("sinks", sinks, query.device, query.shape[2:3])


def scale_of(query: Tensor, scale: float | None) -> float:
    """The factor of the scores; None is D ** -0.5."""
    if scale is None:
        return query.shape[-1] ** -0.5
    check_number("scale", scale, above=0)
    return float(scale)
