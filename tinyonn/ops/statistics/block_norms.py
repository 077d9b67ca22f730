"""`block_norms`: checks, registration, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from .._checks import check_float, check_no_nan, check_out, check_same_device, check_size
from .._dispatch import check_impl, choose_impl, refuse_tangents, statistics_dtype
from .._torch_norms import norms_into


def block_norms(
    x: Tensor, block_size: int = 64, *, row_scale: Tensor | None = None, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """L2 norm of each block of `block_size` consecutive features: `out[..., b] = row_scale[...] * ||x[..., block b]||`.

    A norm is accurate if it is a normal number of the output's dtype, even if squares overflow or underflow. NaN gives NaN, infinity gives
    infinity. `x` and `row_scale` have first and second derivatives in reverse mode; the gradient of a norm of 0 is 0.

    Args:
        x: (..., F), float16, bfloat16, float32 or float64, any strides.
        block_size: features per block; the last block of a row may be shorter.
        row_scale: (...,), factor of each row's norms, for instance the norm of the layer's input.
        out: (..., ceil(F / block_size)) of the result's dtype; may be a strided column slice of a larger tensor, and may overlap an input.
        impl: "auto", "triton", "torch" or "reference"; an explicit choice never falls back.

    Returns:
        (..., ceil(F / block_size)) float32, or float64 for a float64 `x`; `out` if given.

    Raises:
        TypeError: a dtype or type that is not accepted.
        ValueError: shapes or devices differ; `out` is given although an input requires grad; NaN under `tinyonn.debug()`.
        RuntimeError: impl="triton" cannot run here; forward-mode differentiation.
    """
    check_impl(impl)
    check_float("x", x)
    check_size("block_size", block_size)
    if row_scale is not None:
        check_float("row_scale", row_scale, min_dim=0)
        check_same_device("row_scale", row_scale, x.device)
        if row_scale.shape != x.shape[:-1]:
            rows = x.shape[:-1].numel()
            if row_scale.numel() != rows:
                raise ValueError(f"row_scale must have {rows} rows, got {row_scale.numel()}.")
            raise ValueError(f"row_scale must have shape {tuple(x.shape[:-1])}, got {tuple(row_scale.shape)}.")
    refuse_tangents("block_norms", x, row_scale, remedy="use backward or vjp")
    if out is None:
        return _block_norms(x, row_scale, block_size, impl)
    check_out(out, blocks_of(x, block_size), statistics_dtype(x.dtype), x.device, x, row_scale)
    _block_norms_out(x, row_scale, out, block_size, impl)
    return out


def blocks_of(x: Tensor, block_size: int) -> tuple[int, ...]:
    """Shape of the norms of all blocks."""
    return (*x.shape[:-1], -(-x.shape[-1] // block_size))


@torch.library.custom_op("tinyonn::block_norms", mutates_args=())
def _block_norms(x: Tensor, row_scale: Tensor | None, block_size: int, impl: str) -> Tensor:
    out = torch.empty(blocks_of(x, block_size), dtype=statistics_dtype(x.dtype), device=x.device)
    _write(x, row_scale, out, block_size, impl)
    return out


@torch.library.custom_op("tinyonn::block_norms_out", mutates_args=("out",))
def _block_norms_out(x: Tensor, row_scale: Tensor | None, out: Tensor, block_size: int, impl: str) -> None:
    # An input in the same storage may overlap `out`, so the result is computed completely before `out` is written.
    place = out.untyped_storage().data_ptr()
    shared = any(tensor is not None and tensor.untyped_storage().data_ptr() == place for tensor in (x, row_scale))
    target = torch.empty_like(out) if shared else out
    _write(x, row_scale, target, block_size, impl)
    if shared:
        out.copy_(target)


def _write(x: Tensor, row_scale: Tensor | None, out: Tensor, block_size: int, impl: str) -> None:
    if debug_enabled():
        check_no_nan("x", x)
        if row_scale is not None:
            check_no_nan("row_scale", row_scale)
    match choose_impl(impl, x):
        case "triton":
            from tinyonn_kernels.statistics.block_norms import block_norms_fwd

            with torch.cuda.device_of(x):
                block_norms_fwd(x, row_scale, out, block_size)
        case "torch":
            norms_into(x, block_size, out)
            if row_scale is not None:
                out.mul_(row_scale.to(out.dtype).unsqueeze(-1))
        case "reference":
            out.copy_(reference.block_norms(x, block_size, row_scale=row_scale))


@_block_norms.register_fake
def _(x: Tensor, row_scale: Tensor | None, block_size: int, impl: str) -> Tensor:
    return x.new_empty(blocks_of(x, block_size), dtype=statistics_dtype(x.dtype))


@_block_norms_out.register_fake
def _(x: Tensor, row_scale: Tensor | None, out: Tensor, block_size: int, impl: str) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, int, str], output: Tensor) -> None:
    x, row_scale, ctx.block_size, ctx.impl = inputs
    # Without a row_scale the output is the norms. With one, division by it would fail at 0, so backward recomputes the norms.
    ctx.save_for_backward(x, row_scale, output if row_scale is None else None)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, row_scale, norms = ctx.saved_tensors
    if norms is None:
        norms = _block_norms(x, None, ctx.block_size, ctx.impl)
    grad_x = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_norms = grad_out if row_scale is None else grad_out * row_scale.to(grad_out.dtype).unsqueeze(-1)
        nonzero = norms != 0  # includes NaN, which must reach the gradient
        safe = torch.where(nonzero, norms, 1)
        # x / norm is in [-1, 1], whereas grad / norm may overflow.
        direction = x.to(norms.dtype) / _per_feature(safe, ctx.block_size, x.shape[-1])
        grad_x = (direction * _per_feature(torch.where(nonzero, grad_norms, 0), ctx.block_size, x.shape[-1])).to(x.dtype)
    if row_scale is not None and ctx.needs_input_grad[1]:
        grad_scale = (grad_out * norms).sum(-1).to(row_scale.dtype)
    return grad_x, grad_scale, None, None


def _per_feature(blocks: Tensor, block_size: int, num_features: int) -> Tensor:
    # Not expand, flatten and slice: on the CPU, the inductor of torch 2.13 would write only the first block.
    return blocks.index_select(-1, torch.arange(num_features, device=blocks.device) // block_size)


_block_norms.register_autograd(_backward, setup_context=_setup_context)
