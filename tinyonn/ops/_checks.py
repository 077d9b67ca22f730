"""Checks of arguments: TypeError for a type or dtype, ValueError for a shape or value. Shared by all layers above."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import shown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_FLOAT = sys.float_info.max
_COMPARED = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def check_float(name: str, tensor: Tensor, min_dim: int = 1) -> None:
    """TypeError or ValueError unless `tensor` is a dense floating-point tensor of at least `min_dim` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be dense, got {'a nested tensor' if tensor.is_nested else tensor.layout}.")
    if tensor.dim() < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimension(s), got shape {tuple(tensor.shape)}.")


def check_same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}.")


def check_tensor(
    name: str, tensor: Tensor, device: torch.device, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> None:
    """`check_float`, and TypeError or ValueError unless the tensor is on the device and has the shape and the dtype, where given."""
    check_float(name, tensor)
    check_same_device(name, tensor, device)
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}.")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")


def check_mask(name: str, mask: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """TypeError or ValueError unless `mask` is None or a bool tensor of this shape on the device."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}.")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}.")
    check_same_device(name, mask, device)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:  # an array, compared to a string, is an array
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}.")


def check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}.")


def check_size(name: str, value: int, least: int = 1) -> None:
    check_int(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_number(name: str, value: Any, **bounds: float) -> None:
    """TypeError or ValueError for anything but a finite number within the bounds: at_least, above, at_most, below."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if isinstance(value, int) and not -MAX_FLOAT <= value <= MAX_FLOAT:
        raise ValueError(f"{name} must be a number that a float holds, got {shown(value)}.")
    if not -math.inf < value < math.inf:  # not `isfinite`, which torch.compile cannot trace
        raise ValueError(f"{name} must be finite, got {value}.")
    if not all(_COMPARED[rule](value, bound) for rule, bound in bounds.items()):
        rules = " and ".join(f"{rule.replace('_', ' ')} {bound:g}" for rule, bound in bounds.items())
        raise ValueError(f"{name} must be {rules}, got {value}.")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}.")


def check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *inputs: Tensor | None) -> None:
    """TypeError or ValueError unless `out` can hold the result and no gradient is needed."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}.")
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out must have shape {tuple(shape)}, got {tuple(out.shape)}.")
    if out.dtype != dtype:
        raise TypeError(f"out must be {dtype}, got {out.dtype}.")
    check_same_device("out", out, device)
    if out.numel() and _may_overlap_itself(out):
        raise ValueError(f"out must not overlap itself in memory, got shape {tuple(out.shape)} with strides {out.stride()}.")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (out, *inputs)):
        raise ValueError("out is not differentiable, but it or an input requires grad: detach the tensor or use torch.no_grad().")


def _may_overlap_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory: False if each stride is larger than the span of all dimensions with smaller strides."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_no_nan(name: str, tensor: Tensor) -> None:
    """ValueError if the tensor contains NaN. Reads the whole tensor: for `tinyonn.debug()`."""
    count = int(tensor.isnan().sum())
    if count:
        raise ValueError(f"{name} must not contain NaN, got NaN in {count} of {tensor.numel()} values.")
