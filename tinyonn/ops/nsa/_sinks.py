"""Attention sinks: an additional key of each query head, with a learned score and the value 0, that every query sees.

    lse' = log(e^lse + e^sink)    out' = out · e^(lse - lse')

A branch runs without its sinks, and its result is scaled. Backward of the branch takes lse' in place of lse: its probabilities
e^(s - lse') and its gradients are then those of attention with sinks. The share of a sink is e^(sink - lse').
"""

from __future__ import annotations

import torch
from torch import Tensor


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> None:
    """Adds the sinks (H,), if any, to the results of a branch, out (B, T, H, D) and lse (B, T, H), in place."""
    if sinks is None:
        return
    joined = torch.logaddexp(lse, sinks.to(lse.dtype))
    out.mul_((lse - joined).exp_().unsqueeze(-1))
    lse.copy_(joined)


def sinks_gradient(sinks: Tensor, lse: Tensor, shift: Tensor) -> Tensor:
    """Gradient of the sinks (H,); `shift` (B, T, H) is the product of out and its gradient, less the gradient of lse."""
    return -((sinks.to(lse.dtype) - lse).exp_() * shift).sum((0, 1))
