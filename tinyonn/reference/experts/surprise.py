"""Losses of a router, in float64.

N tokens, E experts, F features
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Among = Literal["all", "chosen"]


def surprise_min_loss(
    scores: Tensor,
    surprise: Tensor,
    *,
    w_ce: float = 1.0,
    w_kl: float = 1.0,
    temperature: float = 1.0,
    among: Among = "all",
    token_mask: Tensor | None = None,
) -> Tensor:
    """Loss that pulls a router's scores towards the experts with the lowest surprise.

        S' = surprise / (mean of |surprise| over the token's finite pairs) / temperature
        w_ce · CE(scores, argmin S') + w_kl · KL(softmax(−S') ‖ softmax(scores))

    Args:
        scores: (N, E), scores of all experts.
        surprise: (N, E), infinite for experts that did not see the token, whose target is 0; NaN makes the loss NaN. Not differentiable.
        among: "all", softmax of the scores of all experts; "chosen", of those that saw the token, so that no other score gets a gradient.
        token_mask: (N,), True for tokens that count; tokens whose surprise is 0 or infinite for every expert never count.

    Returns:
        0-d float64, mean over the tokens that count; 0 if no token counts.
    """
    total, tokens = torch.zeros((), dtype=torch.float64, device=scores.device), 0
    for i, row in enumerate(surprise.detach().double()):
        finite = row.isfinite()
        if ((row == torch.inf) | (row == 0)).all() or (token_mask is not None and not bool(token_mask[i])):
            continue
        if row.isnan().any():
            return scores.double().sum() * torch.nan
        scaled = row[finite] / row[finite].abs().mean() / temperature
        target = torch.softmax(-scaled, -1)
        given = scores[i].double()
        log_q = torch.log_softmax(given[finite], -1) if among == "chosen" else torch.log_softmax(given, -1)[finite]
        total = total + w_kl * (target * (target.log() - log_q)).sum() - w_ce * log_q[scaled.argmin()]
        tokens += 1
    return total / max(1, tokens)


def sparse_diversity_loss(prototypes: Tensor, count: Tensor, target_k: float) -> Tensor:
    """Loss that keeps prototypes apart and short, and the mean number of experts per token at a target.

        ‖cos(P, P) − I‖_F + mean ‖P_e‖ + |mean count − target_k|

    Args:
        prototypes: (E, F).
        count: (N,), `Routing.count`, whose gradient is straight-through.
        target_k: target number of experts per token.

    Returns:
        0-d float64.
    """
    p = prototypes.double()
    unit = torch.nn.functional.normalize(p, dim=-1)
    apart = unit @ unit.T - torch.eye(len(p), dtype=p.dtype, device=p.device)
    return apart.norm() + p.norm(dim=-1).mean() + (count.double().mean() - target_k).abs()
