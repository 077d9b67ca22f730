"""Thresholds of a router that follow its own scores, with a price that holds the mean number of experts.

    "quantile"  c_e: running mean, over training steps, of the score that a share target_k / E of a batch's tokens exceed for expert e
    "balanced"  c_e += STEP · spread · sign(load of e − mean load), centred: an expert with more tokens than the mean becomes dearer; one
                with less than an eighth falls so far that an eighth of this share would choose it
    price       price += RATE · spread · (experts per token / target_k − 1), after each step
    θ_te        c_e + price + level · (the token's own level) − demand

By quantiles every expert gets about the same number of tokens by construction; by steps it gets there slowly, and may keep more or less
than the others for a while. Neither lets an expert starve. The price holds the mean: running means lag behind scores that move, and bounds
of the number of experts change the mean. `spread` is the change of a threshold per unit of the logarithm of the number of tokens above it,
so neither step needs tuning to the scale of the scores.

A forward in training mode only records: a layer that runs again in backward must choose the same experts. What was recorded is applied by
the first forward after a backward has passed a router, once no earlier forward of the same router waits for its own backward (`Graphs`).
Nothing is read on the host.

N tokens, E experts

Source: steps of a fixed size towards equal load after Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
arXiv:2408.15664.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .demand import record_gradient

DECAY = 0.95  # of the running means; they start as plain means of the first steps
RATE = 0.2  # share of the deviation of the mean number of experts that one step corrects
FLOOR = 0.01  # least spread
STEP = 0.01  # of a balanced threshold
LEAST = 1 / 8  # of the mean load, that a balanced threshold leaves to its expert
PATIENCE = 100  # calls for which a forward may wait for its backward before a warning
EXTRA = 3  # values after those of the experts in `pending`: spread, deviation, tokens

_passes: dict[torch.device, Tensor] = {}


def _passes_on(device: torch.device) -> Tensor:
    """Number of backwards through routers on this device so far, kept on the device."""
    if device not in _passes:
        with torch.inference_mode(False):  # backward could not count with an inference tensor
            _passes[device] = torch.zeros((), dtype=torch.int64, device=device)
    return _passes[device]


class Graphs:
    """Graphs of a router's forwards that no backward has passed yet. Graphs that are dropped or compiled do not count.

    Attributes:
        waiting: their number.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self._blocked = 0  # calls in a row; negative after the warning

    def is_blocked(self) -> bool:
        """Whether a forward waits; warns, once, after a hundred calls in a row."""
        if not self.waiting:
            self._blocked = min(self._blocked, 0)
            return False
        if self._blocked >= 0:
            self._blocked += 1
        if self._blocked > PATIENCE:
            self._blocked = -1
            warnings.warn(
                f"running thresholds of a router have not moved for {PATIENCE} calls, because the graph of an earlier forward in training "
                "mode still waits for its backward; run forwards without a backward under torch.no_grad() or in eval mode.",
                stacklevel=2,
            )
        return True

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()  # a copy of a router has no graphs

    def watch(self, weights: Tensor) -> None:
        """Counts the graph of `weights` until a backward passes it."""
        node = weights.grad_fn
        assert node is not None
        waiting = _Waiting(self)
        metadata: Any = node.metadata  # torch annotates a property as a method
        metadata["tinyonn.nn.graphs"] = waiting  # it lives as long as the graph
        node.register_prehook(waiting.end)


class _Waiting:
    """One graph of `Graphs`."""

    def __init__(self, graphs: Graphs) -> None:
        self.graphs: Graphs | None = graphs
        graphs.waiting += 1

    def end(self, *_: object) -> None:
        if self.graphs is not None:
            self.graphs.waiting -= 1
            self.graphs = None

    __del__ = end


@torch.library.custom_op("tinyonn::apply_thresholds", mutates_args=("thresholds", "price", "spread", "pending", "updates", "era"))
def apply_thresholds(
    thresholds: Tensor, price: Tensor, spread: Tensor, pending: Tensor, updates: Tensor, era: Tensor, balanced: bool
) -> None:
    """Applies what was recorded, if a backward has passed a router since. A call within backward does nothing.

    Args:
        thresholds: (E,), c.
        price, spread: 0-d.
        pending: (E + 3,), sums over recorded tokens: of each expert's quantile, of the spread, of the deviation, and their number;
            (2 E + 3,) if `balanced`: of each expert's load relative to the mean load, minus 1, of its threshold if it starves, and of
            these three.
        updates: 0-d int64, number of updates so far.
        era: 0-d int64, `_passes_on` at the last update.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    passes = _passes_on(thresholds.device)
    ready = (era != passes) & (pending[-1] > 0)
    mean = pending[:-1] / pending[-1].clamp(min=1)
    step = (1 / (updates + 1)).clamp(min=1 - DECAY).to(thresholds.dtype)
    found, (width, deviation) = mean[: len(thresholds)], mean[-2:]
    scale = torch.where(updates > 0, spread, width).clamp(min=FLOOR)
    if balanced:
        towards = found.sign()
        moved = towards != 0
        fair = thresholds + STEP * scale * torch.where(moved, towards - towards.sum() / moved.sum().clamp(min=1), 0)
        fair = torch.where(found < LEAST - 1, fair.minimum(mean[len(thresholds) : -2]), fair)
    else:
        fair = torch.lerp(thresholds, found, step)
        # The first quantiles replace thresholds of another origin, so their deviation says nothing about the new ones.
        deviation = torch.where(updates > 0, deviation, 0)
    paid = price + RATE * scale * deviation
    thresholds.copy_(torch.where(ready, fair, thresholds))
    price.copy_(torch.where(ready, paid, price))
    spread.copy_(torch.where(ready, torch.lerp(spread, width, step), spread))
    pending.copy_(torch.where(ready, 0, pending))
    updates.add_(ready)
    era.copy_(passes)


@apply_thresholds.register_fake
def _(thresholds: Tensor, price: Tensor, spread: Tensor, pending: Tensor, updates: Tensor, era: Tensor, balanced: bool) -> None:
    return None


@torch.library.custom_op("tinyonn::record_scores", mutates_args=("pending",))
def record_scores(
    scores: Tensor, top_k_index: Tensor, token_mask: Tensor | None, expert_mask: Tensor, thresholds: Tensor, token_thresholds: Tensor,
    pending: Tensor, target_k: float, max_experts: int, balanced: bool,
) -> None:  # fmt: skip
    """Adds the quantiles or loads of a batch to `pending`; see `apply_thresholds`. A call within backward does nothing.

    Args:
        scores: (N, E), before thresholds, price and demand. Tokens outside the mask or with a score of NaN do not count.
        top_k_index: (N, K), experts of each token, E in unused slots.
        token_mask: (N,) bool; None for all.
        expert_mask: (E,) bool; the thresholds of other experts stay as they are.
        thresholds: (E,).
        token_thresholds: (N,), price and demand.
        target_k, max_experts: mean and largest number of experts per token.
        balanced: whether loads are recorded in place of quantiles.
    """
    if torch._C._current_graph_task_id() != -1 or not len(scores):
        return
    experts = thresholds.shape[0]
    kept = ~scores.isnan().any(-1)
    if token_mask is not None:
        kept = kept & token_mask
    number = kept.sum().to(pending.dtype)
    share = target_k / expert_mask.sum().clamp(min=1)
    most = min(len(scores), int(2 * len(scores) * target_k / experts) + 2)
    known = torch.where(kept.unsqueeze(-1) & expert_mask, scores, -torch.inf).to(pending.dtype)
    highest = known.T.topk(most).values  # (E, most)
    # A share s of n tokens ends in the middle between two of the sorted tokens, at s n - 1/2.
    first, second = ((number * part - 0.5).clamp(min=0).minimum(number - 1).clamp(0, most - 1) for part in (share, 2 * share))
    upper, lower = between(highest, first), between(highest, second)
    there = expert_mask & upper.isfinite()
    rise = ((second + 0.5) / (first + 0.5)).log()
    width = torch.where(expert_mask & lower.isfinite(), upper - lower, 0).sum() / expert_mask.sum().clamp(min=1)
    width = torch.where(rise > 0, width / torch.where(rise > 0, rise, 1), 0)
    mean = torch.where(kept, (top_k_index < experts).sum(-1), 0).sum() / number.clamp(min=1)
    deviation = (mean / target_k - 1).clamp(max=2)
    if balanced:
        flat = torch.where(kept.unsqueeze(-1), top_k_index, experts).flatten()
        load = torch.zeros(experts + 1, dtype=pending.dtype, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat).to(pending))
        load = load[:experts] / number.clamp(min=1)
        fair = mean / expert_mask.sum().clamp(min=1)
        load = torch.where(expert_mask & (fair > 0), load / torch.where(fair > 0, fair, 1) - 1, 0)
        # A token chooses an expert whose margin exceeds the token's threshold, and that of the last expert that there is room for.
        margins = torch.where(kept.unsqueeze(-1) & expert_mask, scores.to(pending.dtype) - thresholds, -torch.inf)
        room = margins.topk(min(max_experts, experts)).values[:, -1]
        least = torch.maximum(token_thresholds.to(pending.dtype), room)
        few = torch.where(known.isfinite(), known - least.unsqueeze(-1), -torch.inf).T.topk(most).values
        starving = between(few, (number * share * LEAST - 0.5).clamp(min=0).minimum(number - 1).clamp(0, most - 1))
        found = torch.cat([load, torch.where(there, starving, torch.inf)])
    else:
        found = torch.where(there, upper, thresholds.to(pending.dtype))
    values = torch.cat([found, torch.stack([width, deviation, torch.ones_like(width)])])
    pending.add_(torch.where(number > 0, values * number, 0))


@record_scores.register_fake
def _(
    scores: Tensor, top_k_index: Tensor, token_mask: Tensor | None, expert_mask: Tensor, thresholds: Tensor, token_thresholds: Tensor,
    pending: Tensor, target_k: float, max_experts: int, balanced: bool,
) -> None:  # fmt: skip
    return None


def between(rows: Tensor, place: Tensor) -> Tensor:
    """Values of each row, (E, M), at a place between two of its elements, 0-d: linear interpolation."""
    low = place.floor().long().expand(len(rows), 1)
    high = place.ceil().long().expand(len(rows), 1)
    a, b = rows.gather(1, low).squeeze(1), rows.gather(1, high).squeeze(1)
    return torch.where(b.isfinite(), torch.lerp(a, torch.where(b.isfinite(), b, a), place - place.floor()), a)


def is_ready(pending: Tensor, era: Tensor) -> Tensor:
    """0-d bool: whether a backward has passed a router since what is in `pending` was recorded."""
    return _is_ready(pending, era)


@torch.library.custom_op("tinyonn::thresholds_are_ready", mutates_args=())
def _is_ready(pending: Tensor, era: Tensor) -> Tensor:
    return (era != _passes_on(era.device)) & (pending[-1] > 0)


@_is_ready.register_fake
def _(pending: Tensor, era: Tensor) -> Tensor:
    return era.new_empty((), dtype=torch.bool)


@torch.library.custom_op("tinyonn::watched_weights", mutates_args=())
def watched_weights(weights: Tensor, hidden_states: Tensor, kept: Tensor, place: int) -> Tensor:
    """The weights (N, K); their backward counts as one that has passed a router, and teaches the head at this place of `demand`, if
    there is one, by tokens in `kept`, (N,) bool.
    """
    return weights.clone()


@watched_weights.register_fake
def _(weights: Tensor, hidden_states: Tensor, kept: Tensor, place: int) -> Tensor:
    return torch.empty_like(weights)


@torch.library.custom_op("tinyonn::watched_weights_backward", mutates_args=())
def _watched_backward(grad: Tensor, weights: Tensor, hidden_states: Tensor, kept: Tensor, place: int) -> Tensor:
    _passes_on(grad.device).add_(1)
    if place >= 0:
        record_gradient(place, grad, weights, hidden_states, kept)
    return grad.clone()


@_watched_backward.register_fake
def _(grad: Tensor, weights: Tensor, hidden_states: Tensor, kept: Tensor, place: int) -> Tensor:
    return torch.empty_like(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.place = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _watched_backward(grad, *ctx.saved_tensors, ctx.place), None, None, None


watched_weights.register_autograd(_backward, setup_context=_save)
