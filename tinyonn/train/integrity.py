"""Predictive integrity: one number in (0, 1] for how well a model predicts, and how little it would have to change.

    integrity  = exp(-(accuracy + complexity))
    accuracy   = α (1 - γ) loss / τ        the loss in units of the model's own uncertainty
    complexity = α γ surprise              how much the experts that ran would have to change

τ is the mean entropy of the output distribution, in nats, at least 1e-3. A loss of τ is what a calibrated model expects of itself, so a
loss above it means that the model is more certain than it is right. The sum of the two terms reads as a variational free energy, that of
Friston, "The free-energy principle: a unified brain theory?", Nature Reviews Neuroscience 11, 2010: misfit plus the cost of updating.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..nn.expert_statistics import check_token_mask
from ..ops._checks import check_choice, check_float, check_number, check_size

LEAST_TAU = 1e-3  # nats
Over = Literal["token", "sequence", "batch"]


class PredictiveIntegrity(NamedTuple):
    """Predictive integrity and its two terms, all of one shape and at least float32.

    Attributes:
        integrity: exp(-(accuracy + complexity)), above 0 and at most 1.
        accuracy: α (1 - γ) loss / τ.
        complexity: α γ surprise.
    """

    integrity: Tensor
    accuracy: Tensor
    complexity: Tensor


def predictive_integrity(
    loss: Tensor,
    tau: Tensor,
    surprise: Tensor,
    *,
    alpha: float = 1.0,
    gamma: float = 0.5,
    over: Over = "token",
    token_mask: Tensor | None = None,
) -> PredictiveIntegrity:
    """Predictive integrity of each token, of each sequence, or of the batch.

    Every finite input gives a finite result: a sum of the terms beyond what `exp` can represent gives the smallest normal number instead of
    0, and a negative sum, from a negative loss, gives 1. Means are taken of loss, τ and surprise before the formula.

    Args:
        loss: loss of each token in nats, such as a cross-entropy; of any shape that broadcasts with the others.
        tau: entropy of the output distribution at each token, in nats (`output_entropy`). Below 1e-3 it counts as 1e-3.
        surprise: surprise of each token, at least 0. A loss that is a mean over n tokens makes surprises n times smaller than those of its
            tokens' own losses, so multiply them by n.
        alpha: how fast the integrity falls, at least 0.
        gamma: share of the surprise, 0 … 1.
        over: "token": no mean is taken; "sequence": over the last dimension; "batch": over all.
        token_mask: bool or integers, broadcasting with the tokens; which of them count in means. None for all. With over="token" it must
            be left out.

    Returns:
        The integrity and its terms. NaN for a sequence or a batch without a token that counts.

    Raises:
        TypeError, ValueError: a tensor is not of floats, shapes do not broadcast, or an option is out of range.
    """
    for name, x in (("loss", loss), ("tau", tau), ("surprise", surprise)):
        check_float(name, x, min_dim=0)
    check_number("alpha", alpha, at_least=0)
    check_number("gamma", gamma, at_least=0, at_most=1)
    check_choice("over", over, get_args(Over))
    try:
        shape = torch.broadcast_shapes(loss.shape, tau.shape, surprise.shape, () if token_mask is None else token_mask.shape)
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in (loss, tau, surprise, token_mask) if x is not None)
        raise ValueError(f"loss, tau, surprise and token_mask must have shapes that broadcast, got {shapes}.") from None
    kind = torch.promote_types(torch.promote_types(loss.dtype, tau.dtype), torch.promote_types(surprise.dtype, torch.float32))
    wide = [x.to(kind).expand(shape) for x in (loss, tau, surprise)]
    if over == "token":
        if token_mask is not None:
            raise ValueError("token_mask must be left out with over='token', which takes no means.")
    else:
        if token_mask is not None:
            check_token_mask(token_mask)
        wide = _means(wide, token_mask, shape, over)
    loss, tau, surprise = wide
    finite = torch.finfo(kind)
    most = finite.max / 4  # the sum of both terms is finite
    share = (loss / tau.clamp(min=LEAST_TAU)).clamp(-finite.max, finite.max)  # (1 - gamma) may be 0, and infinity times 0 is NaN
    alpha = min(alpha, finite.max)
    accuracy = (alpha * ((1 - gamma) * share)).clamp(-most, most)
    complexity = (alpha * (gamma * surprise)).clamp(-most, most)
    lowest = torch.tensor(finite.tiny, dtype=torch.float64).log().item()
    integrity = (-(accuracy + complexity)).clamp(lowest, 0).exp()
    return PredictiveIntegrity(integrity.clamp(finite.tiny, 1), accuracy, complexity)


def _means(values: list[Tensor], token_mask: Tensor | None, shape: torch.Size, over: Over) -> list[Tensor]:
    """Means over the last dimension or all, of what the mask keeps. Values are divided before they are added, so no sum overflows."""
    kept = torch.ones(shape, dtype=torch.bool, device=values[0].device) if token_mask is None else (token_mask != 0).expand(shape)
    dims = [-1] if over == "sequence" and len(shape) else list(range(len(shape)))
    if not dims:
        return [torch.where(kept, x, torch.nan) for x in values]
    number = kept.sum(dims)
    size = number.clamp(min=1)
    unfolded = size.reshape([*size.shape, *[1] * len(dims)]) if over == "batch" else size.unsqueeze(-1)
    found = [(torch.where(kept, x, 0) / unfolded).sum(dims) for x in values]
    return [torch.where(number > 0, x, torch.nan) for x in found]


@torch.no_grad()
def output_entropy(logits: Tensor, *, chunk: int = 1024) -> Tensor:
    """Entropy of the softmax of logits, (..., V) -> (...), in nats and at least float32; detached.

    It works on `chunk` tokens at a time, so a large vocabulary needs little memory. A logit of -inf is a token that cannot come, and adds
    nothing. NaN, +inf, or only -inf give NaN.

    Raises:
        TypeError, ValueError: logits are not floats, have no dimension or no vocabulary; chunk is below 1.
    """
    check_float("logits", logits)
    check_size("chunk", chunk)
    if not logits.dim() or not logits.shape[-1]:
        raise ValueError(f"logits must have shape (..., V) with V of at least 1, got {tuple(logits.shape)}.")
    rows = logits.reshape(-1, logits.shape[-1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    parts = []
    for part in rows.split(chunk):
        log_p = part.to(wide).log_softmax(-1)
        parts.append(torch.special.entr(log_p.exp()).sum(-1))
    entropy = torch.cat(parts) if parts else rows.new_empty(0, dtype=wide)
    return entropy.reshape(logits.shape[:-1])


def regeneration_rate(integrity: Tensor | float, *, floor: float = 0.0, ceiling: float = 1.0) -> Tensor | float:
    """How eagerly a model regrows its experts: ceiling at an integrity of 0, floor at 1, and a straight line between.

        floor + (ceiling - floor) · (1 - integrity)

    A model that predicts well keeps what it has; one that does not explores. Pass a smoothed integrity, so that one batch decides little.

    Raises:
        TypeError, ValueError: floor and ceiling are not 0 <= floor <= ceiling <= 1; a number `integrity` is not 0 … 1.
    """
    check_number("ceiling", ceiling, at_least=0, at_most=1)
    check_number("floor", floor, at_least=0, at_most=ceiling)
    if not isinstance(integrity, Tensor):
        check_number("integrity", integrity, at_least=0, at_most=1)
    return floor + (ceiling - floor) * (1 - integrity)
