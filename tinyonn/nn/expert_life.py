"""What each expert of a layer did over its life, and what the layer needs to recycle and to wake experts.

A forward in training mode adds the numbers of its tokens to `pending`, a tensor of this process alone: buffers would be overwritten, as
DistributedDataParallel sends those of the first process to the others. `train.ExpertLifecycle` adds what all processes have in `pending` to
the buffers after each step. Nothing is read on the host, and a layer that runs again in backward is not counted again.

N tokens, F features, E experts, K slots per token
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..ops import Routing
from ..ops.experts.threshold_route import unit_vectors
from .surprise_capture import CapturedCall


class ExpertLife(nn.Module):
    """Numbers of the experts of one layer. Buffers are saved with the model, and stay int64 and float64 in a model of half precision.

    Attributes:
        birth_step: (E,) int64, the lifecycle's step at which the expert began, by birth or recycling; -1 for a slot that never lived.
        lives: (E,) int64, number of experts that the slot has had.
        activations: (E,) int64, tokens that went to the expert since it began.
        surprise: (E,) float64, sum over these tokens of the surprise of the layer's `surprise_kind`, where it was recorded.
        window: (E + 2 + F,) float64, sums over the tokens since the last decision: the tokens of each expert, their number, the number of
            unserved ones, and x / rms(x) of the unserved ones. A token is unserved if it passes no threshold.
        over: 0-d int64, windows in a row in which the share of unserved tokens was above the limit.
        credit: (2,) float64, what is left of the rates of birth and recycling; see `train.ExpertLifecycle`.
        pending: (2 E + 2 + F,) float64, no buffer: the surprise of each expert, then as `window`, of this process since the last merge.
    """

    birth_step: Tensor
    lives: Tensor
    activations: Tensor
    surprise: Tensor
    window: Tensor
    over: Tensor
    credit: Tensor

    def __init__(self, num_experts: int, hidden_size: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        for name in ("birth_step", "lives", "activations"):
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.int64, device=device))
        self.register_buffer("surprise", torch.zeros(num_experts, dtype=torch.float64, device=device))
        self.register_buffer("window", torch.zeros(num_experts + 2 + hidden_size, dtype=torch.float64, device=device))
        self.register_buffer("over", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("credit", torch.zeros(2, dtype=torch.float64, device=device))
        self.pending = torch.zeros(2 * num_experts + 2 + hidden_size, dtype=torch.float64, device=device)
        self.reset()

    def reset(self) -> None:
        """Forgets everything, as if no expert had lived."""
        for tensor in (*self.buffers(), self.pending):
            tensor.zero_()
        self.birth_step.fill_(-1)

    def unserved_share(self) -> float | None:
        """Share of the tokens since the last decision that passed no threshold; None before the first token. Waits for the device."""
        tokens, unserved = self.window[self.num_experts : self.num_experts + 2].tolist()
        return unserved / tokens if tokens else None

    def record(self, hidden_states: Tensor, routing: Routing, token_mask: Tensor | None) -> None:
        """Adds the tokens of a call, (N, F), to `pending`; those outside the mask, (N,) bool, and with NaN do not count."""
        self._follow(hidden_states.device)
        index, weights, _, scores = (part.detach() for part in routing)
        record_life(hidden_states.detach(), index, weights, scores, token_mask, self.pending)

    def add_surprise(self, call: CapturedCall, scale: float) -> None:
        """Adds the surprise of a call after its backward, divided by the scale of the loss, to `pending`. Values that are not finite, and
        tokens outside the call's mask, do not count."""
        slots = call.by_slot()
        if slots is None:
            return
        self._follow(slots.device)
        kept = slots.isfinite() & (call.top_k_index < self.num_experts)
        if call.token_mask is not None:
            kept = kept & call.token_mask.unsqueeze(-1)
        values = torch.where(kept, slots, 0).double() / scale
        index = torch.where(kept, call.top_k_index, 0)
        self.pending[: self.num_experts].scatter_add_(0, index.flatten(), values.flatten())

    def merge(self, numbers: Tensor, live: Tensor, step: int) -> None:
        """Adds numbers like `pending`, of all processes, to the buffers; live experts without a birth begin at this step."""
        experts = self.num_experts
        self.surprise += numbers[:experts]
        self.activations += numbers[experts : 2 * experts].long()
        self.window += numbers[experts:]
        unborn = live & (self.birth_step < 0)
        self.birth_step.masked_fill_(unborn, step)
        self.lives += unborn

    def begin(self, expert: int, step: int) -> None:
        """A new expert in this slot."""
        self.birth_step[expert] = step
        self.lives[expert] += 1
        self.activations[expert] = 0
        self.surprise[expert] = 0

    def _follow(self, device: torch.device) -> None:
        if self.pending.device != device:
            self.pending = self.pending.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = moved.to(buffer.dtype) if moved.is_meta or buffer.is_meta else buffer.to(moved.device)
        if self.pending.is_meta:
            self.pending = torch.zeros(self.pending.shape, dtype=self.pending.dtype, device=self.window.device)
        else:
            self.pending = self.pending.to(self.window.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state of a model whose life was not recorded has none of the keys, which is no error."""
        if any(prefix + name in state_dict for name in self._buffers):
            self.reset()
            super()._load_from_state_dict(state_dict, prefix, *args)


@torch.library.custom_op("tinyonn::record_life", mutates_args=("pending",))
def record_life(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, scores: Tensor, token_mask: Tensor | None, pending: Tensor
) -> None:
    """Adds a call's tokens to `pending` of `ExpertLife`. A call within backward adds nothing.

    Args:
        hidden_states: (N, F).
        top_k_index: (N, K), E in unused slots.
        top_k_weights: (N, K); a token with NaN does not count.
        scores: (N, E), margins over the thresholds, -inf for experts that are not live.
        token_mask: (N,) bool; None for all.
        pending: (2 E + 2 + F,).
    """
    if torch._C._current_graph_task_id() != -1:
        return
    experts = scores.shape[-1]
    kept = ~top_k_weights.isnan().any(-1)
    if token_mask is not None:
        kept = kept & token_mask
    flat = torch.where(kept.unsqueeze(-1), top_k_index, experts).flatten()
    counts = torch.zeros(experts + 1, dtype=pending.dtype, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=pending.dtype))
    unserved = kept & ~(scores > 0).any(-1)
    x = unit_vectors(torch.where(unserved.unsqueeze(-1), hidden_states, 0).float())
    total = x.sum(0, dtype=pending.dtype) * x.shape[-1] ** 0.5
    pending[experts:].add_(torch.cat([counts[:experts], torch.stack([kept.sum(), unserved.sum()]).to(pending.dtype), total]))


@record_life.register_fake
def _(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, scores: Tensor, token_mask: Tensor | None, pending: Tensor
) -> None:
    return None
