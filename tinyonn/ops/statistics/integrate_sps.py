"""`integrate_sps`: checks, registration, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from .._checks import check_flag, check_float, check_mask, check_out, check_same_device, check_tensor
from .._dispatch import check_impl, choose_impl, register_statistic, statistics_dtype
from ._torch_sps import integrate


def integrate_sps(
    activation: Tensor,
    grad_norm: Tensor,
    group_offsets: Tensor | np.ndarray | Sequence[int],
    *,
    token_mask: Tensor | None = None,
    out: Tensor | None = None,
    return_per_token: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """∫SPS: the synergistic prediction score (SPS) of every block, summed over tokens.

    SPS = z(activation norm) - z(grad norm). z standardises the blocks of one layer for one token by their mean and population standard
    deviation; z is 0 if the standard deviation is at most 1e-6 of the mean. A block that is NaN in one plane counts as missing in both. An
    infinity makes the scores of its layer and token NaN, and so the sums. Computed in float64; each plane is read once; the same bits on
    every run. Not differentiable.

    Args:
        activation: (tokens, blocks), float16, bfloat16, float32 or float64, any strides; NaN for a missing block.
        grad_norm: (tokens, blocks) of the same dtype.
        group_offsets: (layers + 1,) integers: 0, the first block of each further layer, then `blocks`. A tensor may be on the CPU or on the
            planes' device. Values on a GPU are checked under `tinyonn.debug()` only.
        token_mask: (tokens,) bool; False ignores a token, and its scores are NaN.
        out: (blocks,) float64 of any stride, overwritten with the sum.
        return_per_token: whether the scores of every token are returned too.
        impl: "auto", "triton", "torch" or "reference"; an explicit choice never falls back.

    Returns:
        (blocks,) float64, `out` if given, 0 for a block that is missing in every token. With return_per_token also (tokens, blocks)
        float32, or float64 for float64 planes, NaN for missing blocks.

    Raises:
        TypeError: a dtype or type that is not accepted.
        ValueError: shapes or devices differ; offsets do not ascend from 0 to `blocks`; `out` is given although an input requires grad; a
            negative or infinite norm under `tinyonn.debug()`.
        RuntimeError: impl="triton" cannot run here.
    """
    check_impl(impl)
    check_flag("return_per_token", return_per_token)
    check_float("activation", activation)
    if activation.dim() != 2:
        raise ValueError(f"activation must have shape (tokens, blocks), got {tuple(activation.shape)}.")
    check_tensor("grad_norm", grad_norm, activation.device, activation.shape, activation.dtype)
    if not isinstance(group_offsets, Tensor):
        if isinstance(group_offsets, str) or not isinstance(group_offsets, (np.ndarray, Sequence)):
            raise TypeError(f"group_offsets must be a tensor, array or list of integers, got {type(group_offsets).__name__}.")
        offsets = np.asarray(group_offsets)
        if offsets.dtype.kind not in "iu" or (offsets.size and not -(2**63) <= int(offsets.min()) <= int(offsets.max()) < 2**63):
            raise TypeError(f"group_offsets must be int32 or int64, got {offsets.dtype}.")
        group_offsets = torch.from_numpy(offsets.astype(np.int64))
    if group_offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"group_offsets must be int32 or int64, got {group_offsets.dtype}.")
    if group_offsets.dim() != 1 or group_offsets.shape[0] < 1:
        raise ValueError(f"group_offsets must have shape (layers + 1,), got {tuple(group_offsets.shape)}.")
    if group_offsets.device.type != "cpu":
        check_same_device("group_offsets", group_offsets, activation.device)
    check_mask("token_mask", token_mask, activation.shape[:1], activation.device)
    if out is not None:
        check_out(out, tuple(activation.shape[1:]), torch.float64, activation.device, activation, grad_norm)
    total, per_token = _integrate_sps(activation.detach(), grad_norm.detach(), group_offsets, token_mask, return_per_token, impl)
    if out is not None:
        total = out.copy_(total)
    return (total, per_token) if return_per_token else total


def _compute(
    activation: Tensor, grad_norm: Tensor, group_offsets: Tensor, token_mask: Tensor | None, return_per_token: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """Sum and scores; without return_per_token the scores have 0 rows, because a registered op has a fixed number of outputs."""
    if group_offsets.device.type == "cpu" or debug_enabled():
        _check_offsets(group_offsets, activation.shape[1])
    if debug_enabled():
        for name, plane in (("activation", activation), ("grad_norm", grad_norm)):
            wrong = plane[(plane < 0) | plane.isinf()]
            if wrong.numel():
                raise ValueError(f"{name} must contain only NaN and finite norms of at least 0, got {wrong[0].item()}.")
    num_tokens, num_blocks = activation.shape
    dtype = statistics_dtype(activation.dtype)
    per_token = torch.empty((num_tokens if return_per_token else 0, num_blocks), dtype=dtype, device=activation.device)
    match choose_impl(impl, activation):
        case "triton":
            from tinyonn_kernels.statistics.integrate_sps import integrate_sps_fwd

            offsets = group_offsets.to(activation.device)
            with torch.cuda.device_of(activation):
                total = integrate_sps_fwd(activation, grad_norm, offsets, token_mask, per_token if return_per_token else None)
        case "torch":
            total = integrate(activation, grad_norm, group_offsets, token_mask, per_token if return_per_token else None)
        case "reference":
            total, scores = reference.integrate_sps(activation, grad_norm, group_offsets, token_mask=token_mask)
            if return_per_token:
                per_token.copy_(scores)
    return total, per_token


def _fake(
    activation: Tensor, grad_norm: Tensor, group_offsets: Tensor, token_mask: Tensor | None, return_per_token: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    num_tokens, num_blocks = activation.shape
    per_token = activation.new_empty((num_tokens if return_per_token else 0, num_blocks), dtype=statistics_dtype(activation.dtype))
    return activation.new_empty((num_blocks,), dtype=torch.float64), per_token


def _check_offsets(group_offsets: Tensor, num_blocks: int) -> None:
    first, last = int(group_offsets[0]), int(group_offsets[-1])
    if first != 0 or last != num_blocks or bool((group_offsets.diff() < 0).any()):
        raise ValueError(f"group_offsets must ascend from 0 to {num_blocks}, got {group_offsets.tolist()}.")


_integrate_sps = register_statistic("integrate_sps", _compute, _fake)
