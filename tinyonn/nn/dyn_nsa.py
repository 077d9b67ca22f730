"""Learned parameters of DynNSA around `ops.dyn_nsa`, and its budget loss.

    gates = bias + weight · q / rms(q)          one weight and one bias per head and branch; linear, so gradients never vanish
    θ     = (base + opening) − slope · τ        a schedule sets `opening`: −30 selects every block, 0 has no effect
    L     = weight · (mean soft count / target − 1)²

B batch, T queries of Tk positions, H query heads, K key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..ops import DynNSAOutput, dyn_nsa
from ..ops._checks import check_choice, check_flag, check_number, check_size
from ..ops._dispatch import autocast_dtype, autocast_off, check_impl, statistics_dtype
from ..ops.nsa._checks import check_max_blocks, check_sizes, check_temperature
from .block_compression import BlockCompression, block_starts

OPEN = -30.0
"""Opening of a threshold at which every block is selected: importance is never below -20."""
MAX_TEMPERATURE = 10.0  # with a higher one, the gates of an open model would not all be 1
MIN_MAX_BLOCKS = 3
OUTPUT_TAU_MOMENTUM = 0.05  # of the running mean of output entropies

TauSource = Literal["attention", "output", "constant"]
STATISTICS = ("mean_count", "overflow", "tau", "share_compressed", "share_selected", "share_window")


@dataclass
class DynNSAOptions:
    """Options of a DynNSA layer.

    Attributes:
        compress_size: positions of a compressed key: 16, 32 or 64, dividing block_size.
        block_size: positions of a key block.
        window: keys of the window branch.
        temperature: width of the smooth step above the threshold, in nats; a normal float32 of at most 10.
        max_blocks: maximum key blocks per query, at least 3; None for all blocks.
        detach_scores: whether to stop the gradient through the importance of blocks.
        learnable_compression: whether compression is learned; False for the mean of a block.
        start_gates: initial weights of the compressed, selected and window branch.
        base, slope: initial thresholds, in nats, and in nats per unit of tau.
        tau_source: "attention" for the entropy of the compressed branch; "output" for the entropy of the model's output; "constant".
        tau: the constant, in [0, 1].
        budget_weight: weight of the budget loss; 0 for none.
        budget_target: initial target of the budget loss, in key blocks per query; a schedule may change it.
        impl: implementation of `ops.dyn_nsa`.
    """

    compress_size: int = 64
    block_size: int = 64
    window: int = 512
    temperature: float = 1.0
    max_blocks: int | None = 32
    detach_scores: bool = False
    learnable_compression: bool = True
    start_gates: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    base: float = 0.0
    slope: float = 1.0
    tau_source: TauSource = "attention"
    tau: float = 0.5
    budget_weight: float = 0.0
    budget_target: float = 16.0
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("base", "slope", "tau"):
            check_number(name, getattr(self, name))
        check_number("temperature", self.temperature, above=0, at_most=MAX_TEMPERATURE)
        check_number("budget_weight", self.budget_weight, at_least=0)
        check_number("budget_target", self.budget_target, above=0)
        for name in ("detach_scores", "learnable_compression"):
            check_flag(name, getattr(self, name))
        if not isinstance(self.start_gates, (list, tuple)):
            raise TypeError(f"start_gates must be a tuple of 3 numbers, got {type(self.start_gates).__name__}.")
        for gate in self.start_gates:
            if isinstance(gate, bool) or not isinstance(gate, (int, float)):
                raise TypeError(f"start_gates must be 3 numbers, got {type(gate).__name__} among them.")
            check_number("start_gates", gate)
        check_sizes(self.block_size, self.compress_size)
        check_size("window", self.window)
        check_temperature(self.temperature)
        if self.max_blocks is not None:
            check_max_blocks(self.max_blocks)
        check_impl(self.impl)
        self.start_gates = tuple(self.start_gates)  # type: ignore[assignment]  # JSON gives a list
        check_choice("tau_source", self.tau_source, get_args(TauSource))
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be in [0, 1], got {self.tau}.")
        if len(self.start_gates) != 3:
            raise ValueError(f"start_gates must have 3 weights, got {len(self.start_gates)}.")


def budget_loss(soft_counts: Tensor, target: Tensor | float, *, weight: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Pulls the mean number of selected blocks towards a target: weight · (mean / target − 1)².

    Args:
        soft_counts: (B, T, K), from `ops.dyn_nsa`; carries the gradient, also for blocks under the threshold.
        target: blocks per query, above 0.
        weight: weight of the loss.
        mask: (B, T, K), which rows count; None for all.

    Returns:
        0-d.
    """
    if not isinstance(target, Tensor) and not target > 0:
        raise ValueError(f"target must be above 0, got {target}.")
    mean = soft_counts.mean() if mask is None else (soft_counts * mask).sum() / mask.sum().clamp(min=1)
    there = soft_counts.numel() > 0 if mask is None else mask.any()
    return weight * torch.where(torch.as_tensor(there, device=mean.device), mean / target - 1, 0).square()


def normalised_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) over the last dimension, divided by its maximum: 0 … 1, float32, detached."""
    log_probs = torch.log_softmax(logits.detach().float(), -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return entropy / torch.log(torch.tensor(float(max(logits.shape[-1], 2)), device=logits.device))


def common_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in one dtype: autocast's if it is on, else the last one's. After normalisation queries and keys are wider than values."""
    dtype = autocast_dtype(tensors[0]) or tensors[-1].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


class DynNSACore(nn.Module):
    """DynNSA without projections: compression, branch gates, thresholds, and running statistics.

    The inputs are projected queries, keys and values. Buffers are `opening` and `budget_target`, which a schedule sets, and `output_tau`,
    the running mean of output entropies. These three are saved; the statistics are not.

    Args:
        num_heads: H.
        num_kv_heads: K.
        head_dim: D.
        options: options of the layer; not copied, so layers may share them and change together.
        opening: offset of base; `OPEN` selects every block.
    """

    opening: Tensor
    budget_target: Tensor
    output_tau: Tensor
    observed: Tensor
    sums: Tensor
    calls: Tensor

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        options: DynNSAOptions | None = None,
        *,
        opening: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.options = options = DynNSAOptions() if options is None else options
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.start_opening = opening

        def compression() -> BlockCompression:
            learnable = options.learnable_compression
            return BlockCompression(num_kv_heads, head_dim, options.compress_size, learnable=learnable, device=device, dtype=dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.compress_key, self.compress_value = compression(), compression()
        self.gate_weight, self.gate_bias = parameter(num_heads, head_dim, 3), parameter(num_heads, 3)
        self.base, self.slope = parameter(num_kv_heads), parameter(num_kv_heads)
        for name in ("opening", "budget_target", "output_tau", "observed"):
            self.register_buffer(name, torch.empty((), device=device, dtype=torch.float32))
        self.register_buffer("sums", torch.empty(len(STATISTICS), device=device, dtype=torch.float32), persistent=False)
        self.register_buffer("calls", torch.empty((), device=device, dtype=torch.int64), persistent=False)
        self.previous_tau: Tensor | None = None
        self.collecting = False
        self.collected: Tensor | None = None
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynNSACore:
        sums = self.sums
        super()._apply(fn, recurse)
        if not sums.is_meta and not self.sums.is_meta:
            self.sums = sums.to(self.sums.device)  # stay float32 if the model is converted; half precision is too narrow
        return self

    def reset_parameters(self) -> None:
        """Initialises parameters and buffers from the options."""
        options = self.options
        with torch.no_grad():
            self.compress_key.reset_parameters()
            self.compress_value.reset_parameters()
            self.gate_weight.zero_()
            self.gate_bias.copy_(self.gate_bias.new_tensor(options.start_gates).expand(self.num_heads, 3))
            self.base.fill_(options.base)
            self.slope.fill_(options.slope)
            self.opening.fill_(self.start_opening)
            self.budget_target.fill_(options.budget_target)
            self.output_tau.fill_(1.0)
            self.observed.zero_()
        self.reset_statistics()

    def reset_statistics(self) -> None:
        self.sums.zero_()
        self.calls.zero_()

    def statistics(self) -> dict[str, float]:
        """Mean statistics of the calls since the last reset.

        Returns:
            mean_count, key blocks per query; overflow, share of rows for which more than max_blocks passed; tau; share_compressed,
            share_selected, share_window, of |gate|. Padding does not count. NaN before the first call.
        """
        return dict(zip(STATISTICS, (self.sums / self.calls).tolist(), strict=True))

    def gates(self, gate_input: Tensor) -> Tensor:
        """Branch gates of queries: (B, T, H, D) -> (B, T, H, 3)."""
        wide = gate_input.float() if gate_input.dtype in (torch.float16, torch.bfloat16) else gate_input
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return torch.einsum("bthd,hdg->bthg", unit, self.gate_weight.to(wide.dtype)) + self.gate_bias.to(wide.dtype)

    def compress(self, key: Tensor, value: Tensor, key_start: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compressed keys and values: (B, Tk, K, D) -> (B, Tk // compress_size, K, D) for each."""
        starts = block_starts(key.shape[1], self.options.compress_size, key_start, cu_seqlens)
        return self.compress_key(key, starts), self.compress_value(value, starts)

    def tau_of(self, tau: Tensor | float | None, query: Tensor, decoding: bool) -> Tensor | None:
        """The tau for `ops.dyn_nsa`, (B, T, K), or None for the entropy of the compressed branch.

        Args:
            tau: tau of the caller, of shape (), (B,), (B, T) or (B, T, K); None for the tau of `tau_source`.
            query: (B, T, H, D).
            decoding: whether the first query follows a token whose output was observed.

        Raises:
            TypeError, ValueError: tau has the wrong type or shape, or is outside [0, 1].
        """
        batch, tokens = query.shape[:2]
        if tau is None:
            match self.options.tau_source:
                case "attention":
                    return None
                case "constant":
                    tau = self.options.tau
                case "output":
                    tau = self.output_tau.expand(batch, tokens).clone()
                    if decoding and not self.training and self.previous_tau is not None and len(self.previous_tau) == batch:
                        tau[:, 0] = self.previous_tau
        rows = (batch, tokens, self.num_kv_heads)
        return tau_of_rows(_as_tau(tau, rows), rows, query)

    @torch.no_grad()
    def observe_output(self, entropy: Tensor, mask: Tensor | None = None) -> None:
        """Stores the entropies of the model's output for later calls with tau_source="output".

        In training they update the running mean; otherwise each row's last entropy is kept for the next token.

        Args:
            entropy: (B, T), from `normalised_entropy`.
            mask: (B, T), which tokens count; None for all.
        """
        if not self.training:
            self.previous_tau = entropy[:, -1].clone()
            return
        mean = entropy.mean() if mask is None else (entropy * mask).sum() / mask.sum().clamp(min=1)
        # The first observation replaces the initial value of the running mean.
        step = torch.where(self.observed > 0, OUTPUT_TAU_MOMENTUM, 1.0)
        self.output_tau.lerp_(mean.to(self.output_tau.dtype), step.to(self.output_tau.dtype))
        self.observed.fill_(1.0)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Tensor,
        *,
        key_compressed: Tensor | None = None,
        value_compressed: Tensor | None = None,
        tau: Tensor | None = None,
        scale: float | None = None,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> DynNSAOutput:
        """Attention over projected queries, keys and values.

        Args:
            query: (B, T, H, D), the last T of Tk positions.
            key, value: (B, Tk, K, D).
            gates: (B, T, H, 3), from `gates`.
            key_compressed, value_compressed: (B, Tk // compress_size, K, D), from `compress`; None to compress here.
            tau: (B, T, K), from `tau_of`; None for the entropy of the compressed branch.
            scale, key_start, key_end, cu_seqlens: as in `ops.dyn_nsa`.
        """
        if key_compressed is None or value_compressed is None:
            key_compressed, value_compressed = self.compress(key, value, key_start, cu_seqlens)
        base = self.base + self.opening.to(self.base.dtype)
        return attend(
            self.options, query, key, value, key_compressed, value_compressed, gates, base, self.slope, tau=tau, scale=scale,
            key_start=key_start, key_end=key_end, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    def budget_loss(self, result: DynNSAOutput) -> Tensor:
        """The budget loss of a call, 0-d; padding does not count."""
        if not self.options.budget_weight:
            return result.soft_counts.new_zeros(())
        return budget_loss(result.soft_counts, self.budget_target, weight=self.options.budget_weight, mask=result.counts > 0)

    @torch.no_grad()
    def record(self, result: DynNSAOutput, gates: Tensor) -> None:
        """Adds a call to the running statistics."""
        real = result.counts > 0  # padding reads no block
        total = real.sum().clamp(min=1)
        size = gates.abs().float() * real.repeat_interleave(self.num_heads // self.num_kv_heads, -1)[..., None]
        shares = size.sum((0, 1, 2)) / size.sum().clamp(min=1e-20)
        means = [result.counts.sum() / total, result.overflow, (result.tau * real).sum() / total]
        # A call with only padding does not count. In place, without setting attributes, so that a checkpointed region compiles whole.
        there = real.any()
        self.sums.add_(there * torch.cat([torch.stack([mean.to(self.sums.dtype) for mean in means]), shares.to(self.sums.dtype)]))
        self.calls.add_(there)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


def attend(options: DynNSAOptions, *tensors: Tensor, **others: Any) -> DynNSAOutput:
    """`ops.dyn_nsa` of these tensors with the settings of these options."""
    query, key = tensors[:2]
    max_blocks = options.max_blocks
    if max_blocks is None:
        max_blocks = max(MIN_MAX_BLOCKS, -(-key.shape[1] // options.block_size))
    # The op chooses the precision of its own products; autocast would change it.
    with autocast_off(query):
        return dyn_nsa(
            *tensors, window=options.window, temperature=options.temperature, block_size=options.block_size,
            compress_size=options.compress_size, max_blocks=max_blocks, detach_scores=options.detach_scores, impl=options.impl, **others,
        )  # fmt: skip


def tau_of_rows(tau: Tensor, rows: tuple[int, int, int], query: Tensor) -> Tensor:
    """A tau of shape (), (B,), (B, T) or (B, T, K) for each of `rows`, (B, T, K), without gradients."""
    given = tau.detach().to(query.device, statistics_dtype(query.dtype))
    while given.dim() < 3:
        given = given.unsqueeze(-1)
    return given.expand(rows).contiguous()


def _as_tau(tau: Tensor | float, rows: tuple[int, int, int]) -> Tensor:
    """tau as a tensor, whose shape is a prefix of `rows`, (B, T, K)."""
    if isinstance(tau, Tensor):
        shape = tuple(tau.shape)
        if shape != rows[: len(shape)]:
            raise ValueError(f"tau must have shape (), {rows[:1]}, {rows[:2]} or {rows}, got {shape}.")
        return tau
    if not isinstance(tau, (int, float)) or isinstance(tau, bool):
        raise TypeError(f"tau must be a number or a torch.Tensor, got {type(tau).__name__}.")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be in [0, 1], got {tau}.")
    return torch.tensor(tau, dtype=torch.float64)
