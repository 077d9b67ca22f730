"""Losses that train a router, written out.

N tokens, E experts, F features
"""

from __future__ import annotations

import torch
from torch import Tensor


def surprise_min_loss(
    scores: Tensor,
    surprise: Tensor,
    *,
    w_ce: float = 1.0,
    w_kl: float = 1.0,
    temperature: float = 1.0,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Pulls a router's scores towards the experts that were least surprised.

        S' = surprise / (mean over the token's finite pairs) / temperature
        w_ce · CE(scores, argmin S') + w_kl · KL(softmax(−S') ‖ softmax(scores))

    Args:
        scores: (N, E), of all experts.
        surprise: (N, E), infinite where a token did not go: target mass 0 there; NaN makes the loss NaN. No gradient flows to it.
        token_mask: (N,), which tokens count; those whose surprise is infinite, or 0 where it is finite, never do.

    Returns:
        0-d float64, mean over the tokens that count; 0 where there is none.
    """
    total, tokens = torch.zeros((), dtype=torch.float64, device=scores.device), 0
    for i, row in enumerate(surprise.detach().double()):
        finite = row.isfinite()
        if ((row == torch.inf) | (row == 0)).all() or (token_mask is not None and not bool(token_mask[i])):
            continue
        if row.isnan().any():
            return scores.double().sum() * torch.nan
        scaled = row[finite] / row[finite].mean() / temperature
        target = torch.softmax(-scaled, -1)
        log_q = torch.log_softmax(scores[i].double(), -1)[finite]
        total = total + w_kl * (target * (target.log() - log_q)).sum() - w_ce * log_q[scaled.argmin()]
        tokens += 1
    return total / max(1, tokens)


def sparse_diversity_loss(prototypes: Tensor, count: Tensor, target_k: float) -> Tensor:
    """Prototypes apart and short, and as many experts a token as wanted: ‖cos(P, P) − I‖_F + mean ‖P_e‖ + |mean count − target_k|.

    Args:
        prototypes: (E, F).
        count: (N,), of `threshold_route`: its gradient is straight-through.
        target_k: experts a token.

    Returns:
        0-d float64.
    """
    p = prototypes.double()
    unit = torch.nn.functional.normalize(p, dim=-1)
    apart = unit @ unit.T - torch.eye(len(p), dtype=p.dtype, device=p.device)
    return apart.norm() + p.norm(dim=-1).mean() + (count.double().mean() - target_k).abs()
