"""How many experts a token needs: a linear head that predicts the token's surprise, taught in backward.

    u_t = a · x_t / rms(x_t) + b        predicts log q_t
    q_t = mean over the token's experts of (w_te · ∂L/∂w_te)²

w_te is the weight of an expert in the token's output, and ∂L/∂w_te = ⟨∂L/∂out_t, out_te⟩, so q_t is what leaving an expert out costs to
second order (Fisher information). Its first-order part, the signed saving, averages to 0 where the scale of an expert's output is at its
optimum, so it says nothing about cost. The head follows the deviance of a gamma distribution, q / (q̄ exp u) + u with q̄ the mean of a batch,
by Adam with a rate of its own; the scale of the loss has no effect. A threshold falls by `demand` · spread · (u_t − mean u), so the number
of experts of a token grows like (predicted q_t) ^ demand; with 1/2, like the norm of its gradient. The mean of u is a · (running mean of
x / rms(x)) + b, so a step of the head hardly moves the mean number of experts.

Backward only records: a layer that runs again in it must choose the same experts. N tokens, F features, K slots
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from ..ops.experts.threshold_route import unit_vectors
from .wide_buffers import WideBuffers

RATE = 0.1  # of Adam, divided by √F
MOMENTS = (0.9, 0.999)
MOST = 6.0  # largest q / (q̄ exp u) that counts
REACH = 3.0  # largest |u − mean u| that counts

_places = itertools.count()
_by_place: weakref.WeakValueDictionary[int, Demand] = weakref.WeakValueDictionary()


class Demand(WideBuffers):
    """The head of one router. All of its state is in buffers.

    Args:
        hidden_size: F.
        dtype: of the buffers.

    Attributes:
        head: (F + 1,), a and b.
        centre: (F,), running mean of x / rms(x).
        moments: (2, F + 1), of Adam.
        pending: (2 F + 3,), sums over recorded tokens: of the gradient of `head`, their number, of x / rms(x), and the number of these.
    """

    head: Tensor
    centre: Tensor
    moments: Tensor
    pending: Tensor

    def __init__(self, hidden_size: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        for name, size in {
            "head": (hidden_size + 1,),
            "centre": (hidden_size,),
            "moments": (2, hidden_size + 1),
            "pending": (2 * hidden_size + 3,),
        }.items():
            self.register_buffer(name, torch.zeros(size, device=device, dtype=dtype))
        self._register()

    def _register(self) -> None:
        self.place = next(_places)
        _by_place[self.place] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()  # a copy learns by itself

    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """u − mean u of tokens (N, F), within ±3; (N,)."""
        x = normalised(hidden_states.detach().to(self.head.dtype))
        return ((x - self.centre) * self.head[:-1]).sum(-1).clamp(-REACH, REACH)


def normalised(hidden_states: Tensor) -> Tensor:
    """x / rms(x), (N, F)."""
    return unit_vectors(hidden_states) * hidden_states.shape[-1] ** 0.5


@torch.library.custom_op("tinyonn::apply_demand", mutates_args=("head", "centre", "moments", "pending"))
def apply_demand(head: Tensor, centre: Tensor, moments: Tensor, pending: Tensor, updates: Tensor, ready: Tensor, decay: float) -> None:
    """One step of Adam by what was recorded, and of the running mean, if `ready`; see `apply_thresholds`. Not within backward."""
    if torch._C._current_graph_task_id() != -1:
        return
    gradient, number, total, tokens = pending.split([len(head), 1, len(centre), 1])
    step = (1 / (updates + 1)).clamp(min=1 - decay).to(head.dtype)
    centre.copy_(torch.where(ready & (tokens > 0), torch.lerp(centre, total / tokens.clamp(min=1), step), centre))
    learns = ready & (number > 0)
    gradient = gradient / number.clamp(min=1)
    first, second = MOMENTS
    moved = torch.stack([torch.lerp(moments[0], gradient, 1 - first), torch.lerp(moments[1], gradient.square(), 1 - second)])
    moments.copy_(torch.where(learns, moved, moments))
    age = (updates + 1).to(head.dtype)
    unbiased = moments[0] / (1 - first**age) / ((moments[1] / (1 - second**age)).sqrt() + 1e-8)
    head.copy_(torch.where(learns, head - RATE * (len(head) - 1) ** -0.5 * unbiased, head))
    pending.copy_(torch.where(ready, 0, pending))


@apply_demand.register_fake
def _(head: Tensor, centre: Tensor, moments: Tensor, pending: Tensor, updates: Tensor, ready: Tensor, decay: float) -> None:
    return None


@torch.library.custom_op("tinyonn::record_demand", mutates_args=("pending",))
def record_demand(hidden_states: Tensor, kept: Tensor, pending: Tensor) -> None:
    """Adds the sum of x / rms(x) over kept tokens (N,) and their number to `pending`. A call within backward does nothing."""
    if torch._C._current_graph_task_id() == -1:
        x = torch.where(kept.unsqueeze(-1), normalised(hidden_states.to(pending.dtype)), 0)
        pending[-x.shape[-1] - 1 :].add_(torch.cat([x.sum(0), kept.sum().to(x.dtype).unsqueeze(0)]))


@record_demand.register_fake
def _(hidden_states: Tensor, kept: Tensor, pending: Tensor) -> None:
    return None


def record_gradient(place: int, grad: Tensor, weights: Tensor, hidden_states: Tensor, kept: Tensor) -> None:
    """Adds the gradient of a head to what it recorded, from the gradient of the weights (N, K); in backward.

    Tokens that no loss depends on, and those with NaN or infinity, do not count.
    """
    module = _by_place.get(place)
    if module is None:
        return
    used = weights != 0
    q = torch.where(used, weights * grad, 0).to(module.head.dtype).square().sum(-1) / used.sum(-1).clamp(min=1)
    kept = kept & q.isfinite() & (q > 0)
    q = torch.where(kept, q, 0)
    number = kept.sum().to(q.dtype)
    mean = q.sum() / number.clamp(min=1)
    x = normalised(torch.where(kept.unsqueeze(-1), hidden_states, 0).to(q.dtype))
    ratio = q / torch.where(mean > 0, mean, 1) * (-(x @ module.head[:-1] + module.head[-1])).exp()
    error = torch.where(kept, 1 - ratio.clamp(max=MOST), 0)
    module.pending[: x.shape[-1] + 2].add_(torch.cat([error @ x, torch.stack([error.sum(), number])]))
