"""`token_grad_norms`: checks, registration, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from .._checks import check_choice, check_float, check_no_nan, check_same_device, check_size
from .._dispatch import check_impl, choose_impl, register_statistic, statistics_dtype
from .._torch_norms import norms_into, row_norms
from .block_norms import block_norms, blocks_of


def token_grad_norms(
    inputs: Tensor | None, grad_output: Tensor, block_size: int | None = 64, *, wrt: str = "weight", impl: str = "auto"
) -> Tensor:
    """Per-token gradient norm of each feature block of a linear layer's weight.

    The gradient of `weight[block, :]` due to token t alone is the outer product of `grad_output[t, block]` and `inputs[t]`. Its Frobenius
    norm is the product of the two norms, so no per-token gradient is computed. The result is accurate if both norms and their product are
    normal numbers of the output's dtype. Modules that share an input can compute its norm once and use
    `block_norms(grad_output, row_scale=input_norm)`. Not differentiable.

    Args:
        inputs: (..., in_features), the layer's input; may be None for wrt="output".
        grad_output: (..., out_features), gradient of the loss with respect to the layer's output.
        block_size: features per block; None for the whole layer.
        wrt: "weight", or "output" for the norm of `grad_output` alone.
        impl: "auto", "triton", "torch" or "reference"; an explicit choice never falls back.

    Returns:
        (..., ceil(out_features / block_size)), or (...,) for block_size=None; float32, or float64 for a float64 `grad_output`; in units of
        loss per weight, or per output for wrt="output".

    Raises:
        TypeError: a dtype or type that is not accepted.
        ValueError: leading shapes or devices differ; NaN under `tinyonn.debug()`.
        RuntimeError: impl="triton" cannot run here.

    Source: Goodfellow, "Efficient per-example gradient computations", arXiv:1510.01799.
    """
    check_impl(impl)
    check_float("grad_output", grad_output)
    if block_size is not None:
        check_size("block_size", block_size)
    check_choice("wrt", wrt, ("weight", "output"))
    if inputs is not None:
        check_float("inputs", inputs)
        check_same_device("inputs", inputs, grad_output.device)
        if inputs.shape[:-1] != grad_output.shape[:-1]:
            raise ValueError(f"inputs must have leading shape {tuple(grad_output.shape[:-1])}, got {tuple(inputs.shape[:-1])}.")
    # A whole layer is one block, even a layer without features, whose norm is 0.
    width = max(grad_output.shape[-1], 1) if block_size is None else block_size
    if wrt == "output":
        norms = block_norms(grad_output.detach(), width, impl=impl)
    elif inputs is None:
        raise TypeError("inputs must be a torch.Tensor for wrt='weight', got None.")
    else:
        norms = _token_grad_norms(inputs.detach(), grad_output.detach(), width, impl)
    if block_size is not None:
        return norms
    return norms.squeeze(-1) if grad_output.shape[-1] else norms.sum(-1)


def _compute(inputs: Tensor, grad_output: Tensor, block_size: int, impl: str) -> Tensor:
    if debug_enabled():
        check_no_nan("inputs", inputs)
        check_no_nan("grad_output", grad_output)
    out = torch.empty(blocks_of(grad_output, block_size), dtype=statistics_dtype(grad_output.dtype), device=grad_output.device)
    match choose_impl(impl, grad_output):
        case "triton":
            from tinyonn_kernels.statistics.token_grad_norms import token_grad_norms_fwd

            with torch.cuda.device_of(grad_output):
                token_grad_norms_fwd(inputs, grad_output, out, block_size)
        case "torch" if inputs.shape[-1] == 0:
            out.zero_()  # the weight has no elements
        case "torch":
            norms_into(grad_output, block_size, out)
            out.mul_(row_norms(inputs).to(out.dtype).unsqueeze(-1))
        case "reference":
            out.copy_(reference.token_grad_norms(inputs, grad_output, block_size))
    return out


def _fake(inputs: Tensor, grad_output: Tensor, block_size: int, impl: str) -> Tensor:
    return grad_output.new_empty(blocks_of(grad_output, block_size), dtype=statistics_dtype(grad_output.dtype))


_token_grad_norms = register_statistic("token_grad_norms", _compute, _fake)
