"""Launches over tensors without data that cover every configuration of the kernels for statistics, for the resources tool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .._tune import compiled_for
from .attention_stats import attention_stats_fwd
from .block_norms import block_norms_fwd
from .integrate_sps import integrate_sps_fwd
from .token_grad_norms import token_grad_norms_fwd

TOKENS = 512
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention_stats(dtype: torch.dtype, dim: int, whole: bool) -> None:
    """Plain, or with all options."""
    query, key = _empty(1, 4096, 32, dim, dtype=dtype), _empty(1, 4096, 2, dim, dtype=dtype)
    entropy, mask = _empty(1, 4096, 32), _empty(1, 4096, dtype=torch.bool)
    extra = (mask, mask, _empty(32, dtype=dtype), _empty(1, 1, 4096, 4096, dtype=dtype)) if whole else (mask, None, None, None)
    attention_stats_fwd(query, key, entropy, entropy, *extra, 0.1, True, 512 if whole else 0, 30.0 if whole else 0.0)


def _block_norms(dtype: torch.dtype, features: int, block_size: int, scaled: bool) -> None:
    out = _empty(TOKENS, -(-features // block_size))
    block_norms_fwd(_empty(TOKENS, features, dtype=dtype), _empty(TOKENS) if scaled else None, out, block_size)


def _token_grad_norms(dtype: torch.dtype, in_features: int, features: int, block_size: int) -> None:
    out = _empty(TOKENS, -(-features // block_size))
    token_grad_norms_fwd(_empty(TOKENS, in_features, dtype=dtype), _empty(TOKENS, features, dtype=dtype), out, block_size)


def _integrate_sps(dtype: torch.dtype, num_blocks: int, layers: int, extras: bool) -> None:
    mask, scores = (_empty(TOKENS, dtype=torch.bool), _empty(TOKENS, num_blocks)) if extras else (None, None)
    planes = [_empty(TOKENS, num_blocks, dtype=dtype) for _ in range(2)]
    integrate_sps_fwd(*planes, _empty(layers + 1, dtype=torch.int64), mask, scores)


def offered(arch: int) -> dict[str, Callable[[], None]]:
    """The same launches on every architecture, with its configurations."""
    launches: dict[str, Callable[[], None]] = {}
    for dtype, dims in ((torch.bfloat16, (64, 128, 256)), (torch.float32, (64, 128))):
        for dim in dims:
            launches[f"{_name(dtype)}-D{dim}-whole"] = partial(_attention_stats, dtype, dim, True)
            launches[f"{_name(dtype)}-D{dim}-plain"] = partial(_attention_stats, dtype, dim, False)
    for dtype in FLOATS:
        launches[f"{_name(dtype)}-F4096-block64-scaled"] = partial(_block_norms, dtype, 4096, 64, True)
        launches[f"{_name(dtype)}-in4096-out4096-block64"] = partial(_token_grad_norms, dtype, 4096, 4096, 64)
        launches[f"{_name(dtype)}-3198blocks-31layers-mask-scores"] = partial(_integrate_sps, dtype, 3198, 31, True)
    for dtype in (torch.float32, torch.bfloat16):
        launches[f"{_name(dtype)}-F100-block64"] = partial(_block_norms, dtype, 100, 64, False)
        launches[f"{_name(dtype)}-F4096-block4096-scaled"] = partial(_block_norms, dtype, 4096, 4096, True)
        launches[f"{_name(dtype)}-in100-out40-block64"] = partial(_token_grad_norms, dtype, 100, 40, 64)
        launches[f"{_name(dtype)}-in4096-out4096-block4096"] = partial(_token_grad_norms, dtype, 4096, 4096, 4096)
    for num_blocks, layers in ((3198, 31), (65536, 32)):
        launches[f"float32-{num_blocks}blocks-{layers}layers"] = partial(_integrate_sps, torch.float32, num_blocks, layers, False)
    return compiled_for(arch, launches)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
