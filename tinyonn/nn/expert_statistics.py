"""Statistics of a mixture: the number of tokens of each expert, and the mask of the tokens that count.

N tokens, E experts, K slots per token
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._surrounding import held, places_of


@contextmanager
def token_mask_of(model: nn.Module, token_mask: Tensor) -> Iterator[None]:
    """Limits the statistics of the model's mixtures to the tokens of this mask, within the block and in this thread.

        with token_mask_of(model, attention_mask):
            logits = model(input_ids)

    `train.HyperStep` does this with its own `token_mask`. An inner context overrides an outer one, and an argument of the mixture's own
    call overrides both. Only the statistics depend on the mask.

    Args:
        model: a model with any number of `nn.DynMoE` and `nn.DynSMHA`, or one such layer.
        token_mask: bool or integers, of the leading shape of the mixtures' inputs.

    Raises:
        TypeError: the mask is not a tensor of bool or integers. The mixture's call raises the error for a wrong shape.
    """
    check_token_mask(token_mask)
    with held((place, token_mask) for place in places_of(model, "surrounding_mask")):
        yield


def check_token_mask(token_mask: Any) -> None:
    """TypeError if the mask is not a tensor of bool or integers."""
    if not isinstance(token_mask, Tensor) or token_mask.is_floating_point():
        given = token_mask.dtype if isinstance(token_mask, Tensor) else type(token_mask).__name__
        raise TypeError(f"token_mask must be a tensor of bool or integers, got {given}.")


def check_mask_shape(token_mask: Tensor, shape: torch.Size) -> None:
    """ValueError if the mask does not fit tokens of this leading shape."""
    # If only one of both shapes is flattened, the order is the same; (4, 5) does not fit (5, 4).
    if token_mask.shape != shape and (token_mask.numel() != shape.numel() or min(token_mask.dim(), len(shape)) != 1):
        raise ValueError(f"token_mask must have the shape of the tokens a mixture is given, {tuple(shape)}, got {tuple(token_mask.shape)}.")


@torch.library.custom_op("tinyonn::count_experts", mutates_args=("counts", "seen"))
def count_experts(top_k_index: Tensor, top_k_weights: Tensor, token_mask: Tensor | None, counts: Tensor, seen: Tensor) -> None:
    """Adds the number of tokens of each expert to `counts`, (E,), and the number of tokens to `seen`, 0-d.

    Tokens outside the mask, and tokens whose weights are NaN, are not counted. A call within backward counts nothing, because a
    checkpointed region runs again there. An operator does this for compiled code and torch.func as well.

    Args:
        top_k_index: (N, K), E in unused slots.
        top_k_weights: (N, K).
        token_mask: (N,) bool; None for all.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    kept = ~top_k_weights.isnan().any(-1)
    if token_mask is not None:
        kept = kept & token_mask
    experts = counts.shape[0]
    flat = torch.where(kept.unsqueeze(-1), top_k_index, experts).flatten()
    counts.add_(torch.zeros(experts + 1, dtype=counts.dtype, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))[:experts])
    seen.add_(kept.sum())


@count_experts.register_fake
def _(top_k_index: Tensor, top_k_weights: Tensor, token_mask: Tensor | None, counts: Tensor, seen: Tensor) -> None:
    return None


@count_experts.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Any) -> tuple[None, None]:
    """Counts all batches at once, or one by one if the statistics are batched too, as those of stacked models are."""

    def batched(x: Any, dim: int | None) -> Any:
        if x is None:
            return None
        return x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    index, weights, mask = (batched(x, dim) for x, dim in zip(tensors[:3], in_dims[:3], strict=True))
    counts, seen = tensors[3:]
    if in_dims[3] is None and in_dims[4] is None:
        count_experts(index.flatten(0, 1), weights.flatten(0, 1), None if mask is None else mask.flatten(0, 1), counts, seen)
        return None, None
    if in_dims[3] is None or in_dims[4] is None:
        raise RuntimeError("expert_counts and tokens_seen must both be batched under vmap, or neither.")
    for number in range(info.batch_size):
        part = None if mask is None else mask[number]
        count_experts(index[number], weights[number], part, counts.select(in_dims[3], number), seen.select(in_dims[4], number))
    return None, None
