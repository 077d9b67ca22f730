"""Sums over one sequence's tokens: ∫SPS and the moments of each block."""

from __future__ import annotations

import torch
from torch import Tensor

from ...mscan.types import Integral
from ...ops import integrate_sps


def sequence_integral(activation: Tensor, grad_norm: Tensor, group_offsets: Tensor) -> Integral:
    """Integral of one sequence.

    Args:
        activation, grad_norm: (tokens, blocks) float32, NaN where missing.
        group_offsets: (groups + 1,) int64, first column of each layer.

    Returns:
        Integral on the CPU over the tokens and blocks with both norms, without `lost_tokens`.
    """
    missing = activation.isnan() | grad_norm.isnan() | lost_tokens(activation, grad_norm)[:, None]
    activation, grad_norm = activation.masked_fill(missing, torch.nan), grad_norm.masked_fill(missing, torch.nan)
    sps = integrate_sps(activation, grad_norm, group_offsets)
    assert isinstance(sps, Tensor)
    count, activation_mean, activation_m2 = _moments(activation)
    _, grad_mean, grad_m2 = _moments(grad_norm)
    columns = (sps, count, activation_mean, activation_m2, grad_mean, grad_m2)
    return Integral(*torch.stack(columns).cpu().numpy())


def lost_tokens(activation: Tensor, grad_norm: Tensor) -> Tensor:
    """(tokens,) bool, tokens whose values overflowed: an infinite norm, or one plane that is all NaN while the other is not.

    Standard scores of a layer are meaningless beside an infinity, so no block counts such a token.
    """
    infinite = (activation.isinf() | grad_norm.isinf()).any(1)
    return infinite | (activation.isnan().all(1) != grad_norm.isnan().all(1))


def _moments(plane: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and summed squared deviation of each column's values that are not NaN, (blocks,) float64."""
    present = ~plane.isnan()
    count = present.sum(0, dtype=torch.float64)
    values = plane.double().masked_fill_(~present, 0)
    mean = values.sum(0) / count.clamp(min=1)
    values.sub_(mean).masked_fill_(~present, 0)
    return count, mean, values.square_().sum(0)
