"""Learned parameters of DynNSA around `ops.dyn_nsa`, and its budget loss.

    gates = bias + weight · q / rms(q)          one weight and one bias per head and branch; linear, so gradients never vanish
    q'    = q · map                             of the compressed branch and of the selection; one map per head, at first the identity
    θ     = price · gain + base − slope · τ     one price for the layers of a model: −30 selects every block
    L     = weight · (mean soft count / target − 1)²            one mean for the layers of a model

The distillation loss is in `share_distillation`.

B batch, T queries of Tk positions, H query heads, K key/value heads, D head dim

Source: branches and gates after Yuan et al., "Native Sparse Attention", arXiv:2502.11089; thresholds in place of a top-n are tinyonn's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .._debug import debug_enabled
from ..ops import DynNSAOutput, dyn_nsa
from ..ops._checks import check_number
from ..ops._dispatch import autocast_dtype, autocast_off, statistics_dtype
from .block_compression import BlockCompression, block_starts
from .block_shares import Scores
from .dyn_nsa_options import DynNSAOptions
from .share_distillation import sampled_divergence
from .wide_buffers import WideBuffers

OPEN = -30.0
"""Price at which every block is selected: importance is never below -20."""
GAIN_FROM = -10.0  # the price below which every threshold falls as the price does, whatever its gain: `OPEN` stays below every importance
MAX_PRICE = torch.finfo(torch.float32).max  # of a call
START_PRICE = -5.0  # of a layer of one's own: blocks with a share of at least 0.7 % pass
OUTPUT_TAU_MOMENTUM = 0.05  # of the running mean of output entropies
STATISTICS = ("mean_count", "far_count", "overflow", "tau", "share_compressed", "share_selected", "share_window")


def budget_loss(
    soft_counts: Tensor | Sequence[Tensor],
    target: Tensor | float,
    *,
    weight: float = 1.0,
    mask: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """Pulls the mean number of selected blocks towards a target: weight · (mean / target − 1)².

    Args:
        soft_counts: (B, T, K), from `ops.dyn_nsa`; carries the gradient, also for blocks under the threshold. Those of several layers
            share one budget: their mean is one.
        target: blocks per query, above 0.
        weight: weight of the loss.
        mask: (B, T, K), which rows count, for each of soft_counts; None for all.

    Returns:
        0-d.

    Raises:
        ValueError: the target is not above 0, or there is no layer.
    """
    if not isinstance(target, Tensor) and not target > 0:
        raise ValueError(f"target must be above 0, got {target}.")
    counts = [soft_counts] if isinstance(soft_counts, Tensor) else list(soft_counts)
    if not counts:
        raise ValueError("soft_counts must be of at least one layer, got none.")
    masks = [None] * len(counts) if mask is None else [mask] if isinstance(mask, Tensor) else list(mask)
    return loss_of_sums([sums_of(count, which) for count, which in zip(counts, masks, strict=True)], target, weight)


def sums_of(soft_counts: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of the soft counts that count, and how many they are, 0-d each."""
    if mask is None:
        return soft_counts.sum(), soft_counts.new_tensor(soft_counts.numel())
    return (soft_counts * mask).sum(), mask.sum()


def loss_of_sums(sums: Sequence[tuple[Tensor, Tensor]], target: Tensor | float, weight: float) -> Tensor:
    """The budget loss of one mean over all these sums, of `sums_of`, which may lie on several devices."""
    device = sums[0][0].device
    total, number = (torch.stack([pair[part].to(device) for pair in sums]).sum() for part in (0, 1))
    return weight * torch.where(number > 0, total / number.clamp(min=1) / target - 1, 0).square()


def normalised_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) over the last dimension, divided by its maximum: 0 … 1, float32, detached.

    A logit of -inf gives a probability of 0. The entropy is NaN where a logit is NaN or inf.
    """
    log_probs = torch.log_softmax(logits.detach().float(), -1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)  # 0 · -inf would be NaN
    return entropy / torch.log(torch.tensor(float(max(logits.shape[-1], 2)), device=logits.device))


def common_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in one dtype: autocast's if it is on, else the last one's. After normalisation queries and keys are wider than values."""
    dtype = autocast_dtype(tensors[0]) or tensors[-1].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


class LossSums(NamedTuple):
    """What a call adds to the losses of a model, 0-d each; 0 for a loss whose weight is 0."""

    soft_counts: Tensor
    rows: Tensor
    divergence: Tensor
    pairs: Tensor


def loss_of_calls(calls: Sequence[LossSums], options: DynNSAOptions, target: Tensor) -> Tensor:
    """Budget loss and distillation loss of the calls of a model, 0-d; each of one mean over them all. They may be on several devices."""
    device, loss = calls[0].rows.device, calls[0].rows.new_zeros(())
    if options.budget_weight:
        loss = loss_of_sums([(call.soft_counts, call.rows) for call in calls], target.to(device), options.budget_weight)
    if options.distil_weight:
        divergence = torch.stack([call.divergence.to(device) for call in calls]).sum()
        pairs = torch.stack([call.pairs.to(device) for call in calls]).sum()
        loss = loss + options.distil_weight * divergence / pairs.clamp(min=1)
    return loss


class DynNSACore(WideBuffers):
    """DynNSA without projections: compression, branch gates, thresholds, and running statistics.

    The inputs are projected queries, keys and values. Buffers are `price`, the level of all thresholds; `gain` (K,), how far each threshold
    moves with it, 1 until `calibrate` sets it; `budget_target`, which a schedule sets; and `output_tau`, the running mean of output
    entropies. These four are saved; the statistics are not.

    Args:
        num_heads: H.
        num_kv_heads: K.
        head_dim: D.
        options: options of the layer; not copied, so layers may share them and change together.
        price: initial price; None for -5, or 0 with importance="relative". `OPEN` selects every block.
    """

    ADDED: ClassVar = {"gain": 1.0}  # buffers that weights of earlier versions lack, and what they mean without them

    price: Tensor
    gain: Tensor
    budget_target: Tensor
    output_tau: Tensor
    observed: Tensor
    sums: Tensor
    rows: Tensor

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        options: DynNSAOptions | None = None,
        *,
        price: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if options is not None and not isinstance(options, DynNSAOptions):
            raise TypeError(f"options must be DynNSAOptions, got {type(options).__name__}.")
        self.options = options = DynNSAOptions() if options is None else options
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.start_price = (START_PRICE if options.importance == "share" else 0.0) if price is None else price

        def compression() -> BlockCompression:
            learnable = options.learnable_compression
            return BlockCompression(num_kv_heads, head_dim, options.compress_size, learnable=learnable, device=device, dtype=dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.compress_key, self.compress_value = compression(), compression()
        self.query_map = parameter(num_heads, head_dim, head_dim) if options.compress_query else None
        self.gate_weight, self.gate_bias = parameter(num_heads, head_dim, 3), parameter(num_heads, 3)
        self.base, self.slope = parameter(num_kv_heads), parameter(num_kv_heads)
        for name in ("price", "budget_target", "output_tau", "observed"):
            self.register_buffer(name, torch.empty((), device=device, dtype=torch.float32))
        self.register_buffer("gain", torch.empty(num_kv_heads, device=device, dtype=torch.float32))
        self.register_buffer("sums", torch.empty(len(STATISTICS), device=device, dtype=torch.float32), persistent=False)
        self.register_buffer("rows", torch.empty((), device=device, dtype=torch.int64), persistent=False)
        self._unset = self.rows.is_meta  # whether buffers that no file holds may have any value, once they have one
        self.previous_tau: Tensor | None = None
        self.watch: Callable[[Any], None] | None = None  # of calls that are plain causal attention while a sample is measured
        self.collecting = False
        self.collected: list[LossSums] = []  # of each call of the last forward
        # Blocks that queries read in training, those not forced, and number of rows, for a schedule that takes them. No buffer: DDP would
        # overwrite it.
        self.counted: Tensor | None = None
        self.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}price" not in state_dict and f"{prefix}opening" in state_dict:  # its name in earlier versions
            state_dict[f"{prefix}price"] = state_dict.pop(f"{prefix}opening")
        if f"{prefix}base" in state_dict:
            for name, value in self.ADDED.items():
                state_dict.setdefault(f"{prefix}{name}", torch.full_like(getattr(self, name), value, device="cpu"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "collected": []}  # losses of the last forward, with their graph, are no part of a copy

    def _set_buffers(self) -> None:
        """Sets what no file holds, once, in a module that was made without data: `from_pretrained` leaves it as memory was."""
        if self._unset and not self.rows.is_meta:
            self._unset = False
            self.reset_statistics()

    def reset_parameters(self) -> None:
        """Initialises parameters and buffers from the options."""
        options = self.options
        with torch.no_grad():
            self.compress_key.reset_parameters()
            self.compress_value.reset_parameters()
            if self.query_map is not None:
                self.query_map.copy_(torch.eye(self.head_dim, dtype=self.query_map.dtype).expand_as(self.query_map))
            self.gate_weight.zero_()
            self.gate_bias.copy_(self.gate_bias.new_tensor(options.start_gates).expand(self.num_heads, 3))
            self.base.fill_(options.base)
            self.slope.fill_(options.slope)
            self.price.fill_(self.start_price)
            self.gain.fill_(1.0)
            self.budget_target.fill_(options.budget_target)
            self.output_tau.fill_(1.0)
            self.observed.zero_()
        self.reset_statistics()

    def reset_statistics(self) -> None:
        self.sums.zero_()
        self.rows.zero_()

    def statistics(self) -> dict[str, float]:
        """Means over the queries and key/value heads of all calls since the last reset, training and evaluation alike.

        Returns:
            mean_count, key blocks per query; far_count, those beyond the forced ones; overflow, share of rows for which more than
            max_blocks passed; tau; share_compressed, share_selected, share_window, of |gate|. Padding does not count. NaN before the
            first call.
        """
        self._set_buffers()
        return dict(zip(STATISTICS, (self.sums / self.rows).tolist(), strict=True))

    def gates(self, gate_input: Tensor) -> Tensor:
        """Branch gates of queries: (B, T, H, D) -> (B, T, H, 3)."""
        wide = gate_input.float() if gate_input.dtype in (torch.float16, torch.bfloat16) else gate_input
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return torch.einsum("bthd,hdg->bthg", unit, self.gate_weight.to(wide.dtype)) + self.gate_bias.to(wide.dtype)

    def compressed_query(self, query: Tensor) -> Tensor | None:
        """Queries of the compressed branch and of the selection, (B, T, H, D); None where they are the queries themselves."""
        return None if self.query_map is None else torch.einsum("bthd,hde->bthe", query, self.query_map.to(query.dtype))

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
            entropy: (B, T), from `normalised_entropy`; on any device.
            mask: (B, T), which tokens count; None for all. Entropies of others may be NaN.
        """
        if not self.training:
            self.previous_tau = entropy[:, -1].to(self.output_tau.device, copy=True)
            return
        if mask is None:
            mean = entropy.mean()
        else:
            real = mask.to(entropy.device) != 0
            mean = torch.where(real, entropy, 0).sum() / real.sum().clamp(min=1)
        # The first observation replaces the initial value of the running mean.
        step = torch.where(self.observed > 0, OUTPUT_TAU_MOMENTUM, 1.0)
        self.output_tau.lerp_(mean.to(self.output_tau), step.to(self.output_tau))
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
        price: Tensor | float | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
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
            price: price of this call, 0-d; None for the layer's.
            scale, softcap, sinks, key_start, key_end, cu_seqlens: as in `ops.dyn_nsa`.

        Returns:
            As `ops.dyn_nsa`.

        Raises:
            TypeError, ValueError: as `ops.dyn_nsa`.
        """
        self._set_buffers()
        if key_compressed is None or value_compressed is None:
            key_compressed, value_compressed = self.compress(key, value, key_start, cu_seqlens)
        return attend(
            self.options, query, key, value, key_compressed, value_compressed, gates, self.threshold_base(price), self.slope, tau=tau,
            query_compressed=self.compressed_query(query), scale=scale, softcap=softcap, sinks=sinks, key_start=key_start,
            key_end=key_end, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    def threshold_base(self, price: Tensor | float | None = None) -> Tensor:
        """price · gain + base, (K,): the thresholds at tau 0; of half precision in float32, whose digits the price has.

        Below a price of -10, thresholds fall by the price itself, not by gain times as much.
        """
        base = self.base.to(torch.promote_types(self.base.dtype, torch.float32))
        price = self.price if price is None else price
        price = price.detach().to(base) if isinstance(price, Tensor) else base.new_full((), price)
        return base + self.price_part(price)

    def price_part(self, price: Tensor) -> Tensor:
        """What a price adds to the thresholds, (K,)."""
        return price + (self.gain.to(price) - 1) * price.clamp(min=GAIN_FROM)

    def price_of(self, importance: Tensor) -> Tensor:
        """The highest price at which blocks of this importance pass, at tau 0: the inverse of `threshold_base`.

        Args:
            importance: (K, …).
        """
        shape = (-1, *[1] * (importance.dim() - 1))
        base, gain = (part.detach().to(importance).view(shape) for part in (self.base, self.gain))
        above = (importance - base) / gain
        return torch.where(above >= GAIN_FROM, above, importance - base - (gain - 1) * GAIN_FROM)

    def budget_loss(self, result: DynNSAOutput) -> Tensor:
        """The budget loss of a call, 0-d; padding does not count."""
        if not self.options.budget_weight:
            return result.soft_counts.new_zeros(())
        return budget_loss(result.soft_counts, self.budget_target, weight=self.options.budget_weight, mask=result.counts > 0)

    def estimate_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the estimate of a block's share, by name."""
        own = {} if self.query_map is None else {"query_map": self.query_map}
        return {**dict(self.compress_key.named_parameters()), **own}

    def divergence(
        self,
        query: Tensor,
        key: Tensor,
        scores: Scores | None = None,
        *,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`sampled_divergence` of a call; zeros without a distil_weight, and in evaluation.

        Args:
            query: (B, T, H, D), the last T of Tk positions.
            key: (B, Tk, K, D).
            scores: scale, softcap and sinks of the call; None for the scale of D and nothing else.
            key_start, key_end: (B,), as the call was given them. cu_seqlens: (sequences + 1,), likewise.
        """
        if not self.options.distil_weight or not self.training:
            zero = query.new_zeros((), dtype=torch.promote_types(query.dtype, torch.float32))
            return zero, zero
        scores = Scores(query.shape[-1] ** -0.5) if scores is None else scores
        return sampled_divergence(self, query, key, scores, key_start=key_start, key_end=key_end, cu_seqlens=cu_seqlens)

    def distillation_loss(self, query: Tensor, key: Tensor, scores: Scores | None = None, **bounds: Tensor | None) -> Tensor:
        """The distillation loss of a call, 0-d, in nats times distil_weight. Arguments are as of `divergence`."""
        total, pairs = self.divergence(query, key, scores, **bounds)
        return self.options.distil_weight * total / pairs.clamp(min=1)

    def loss_sums(self, result: DynNSAOutput, query: Tensor, key: Tensor, scores: Scores, **bounds: Tensor | None) -> LossSums:
        """What a call adds to the losses of a model. Arguments are as of `divergence`."""
        zero = result.soft_counts.new_zeros(())
        counts = sums_of(result.soft_counts, result.counts > 0) if self.options.budget_weight else (zero, zero)
        return LossSums(*counts, *self.divergence(query, key, scores, **bounds))

    @torch.no_grad()
    def record(
        self, result: DynNSAOutput, gates: Tensor, num_keys: int, *, key_start: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> None:
        """Adds a call to the running statistics, and in training to `counted`.

        Args:
            result: of the call.
            gates: (B, T, H, 3), of the call.
            num_keys: Tk.
            key_start: (B,), as the call was given it. cu_seqlens: (sequences + 1,), likewise.
        """
        real = result.counts > 0  # padding reads no block
        rows = real.sum()
        forced = forced_counts(self.options, result.counts.shape[1], num_keys, real.device, key_start, cu_seqlens)
        blocks, far = result.counts.sum(), ((result.counts - forced) * real).sum()
        size = torch.where(real.repeat_interleave(self.num_heads // self.num_kv_heads, -1)[..., None], gates.abs().float(), 0)
        shares = size.sum((0, 1, 2)) / size.sum().clamp(min=1e-20)
        sums = [blocks, far, result.overflow * rows, torch.where(real, result.tau, 0).sum()]
        # In place, without setting attributes, so that a checkpointed region compiles whole.
        self.sums.add_(torch.cat([torch.stack([one.to(self.sums.dtype) for one in sums]), (shares * rows).to(self.sums.dtype)]))
        self.rows.add_(rows)
        if self.training and self.counted is not None:
            self.counted.add_(torch.stack([blocks, far, rows]))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


def forced_counts(
    options: DynNSAOptions,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    key_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Forced blocks of the last `num_queries` of `num_keys` positions, (B or 1, T, 1); of padding, any number."""
    place = torch.arange(num_keys - num_queries, num_keys, device=device)[None]
    if cu_seqlens is not None:
        place = place - cu_seqlens[torch.searchsorted(cu_seqlens.long(), place, right=True) - 1]
    elif key_start is not None:
        place = (place - key_start[:, None]).clamp(min=0)
    return (place // options.block_size + 1).clamp(max=options.forced)[..., None]


def attend(options: DynNSAOptions, *tensors: Tensor, **others: Any) -> DynNSAOutput:
    """`ops.dyn_nsa` of these tensors with the settings of these options."""
    query, key = tensors[:2]
    # Lists have max_blocks places, so no more than there are blocks.
    blocks = max(1, -(-key.shape[1] // options.block_size))
    forced_first, forced_local = min(options.forced_first, blocks), min(options.forced_local, blocks)
    max_blocks = max(forced_first + forced_local, blocks)
    if options.max_blocks is not None:
        max_blocks = min(options.max_blocks, max_blocks)
    # The op chooses the precision of its own products; autocast would change it.
    with autocast_off(query):
        return dyn_nsa(
            *tensors, window=options.window, temperature=options.temperature, block_size=options.block_size,
            compress_size=options.compress_size, max_blocks=max_blocks, importance=options.importance, forced_first=forced_first,
            forced_local=forced_local, detach_scores=options.detach_scores, impl=options.impl, **others,
        )  # fmt: skip


def checked_price(name: str, price: Tensor | float) -> Tensor | float:
    """A price of a call.

    Raises:
        TypeError, ValueError: anything but a finite number or 0-d tensor that float32 holds; the value of a tensor on another device than
            the CPU is checked within `tinyonn.debug()` only.
    """
    if not isinstance(price, Tensor):
        check_number(name, price, at_least=-MAX_PRICE, at_most=MAX_PRICE)
        return price
    if price.dim():
        raise ValueError(f"{name} must be a number or 0-d, one for all layers and rows, got {tuple(price.shape)}.")
    _check_real(name, price)
    if _is_readable(price):
        check_number(name, price.item(), at_least=-MAX_PRICE, at_most=MAX_PRICE)
    return price


def check_tau(tau: Tensor) -> None:
    """TypeError for a dtype of no numbers, ValueError for values outside [0, 1]; these are checked where `checked_price` checks them."""
    _check_real("tau", tau)
    if _is_readable(tau) and not bool(((tau >= 0) & (tau <= 1)).all()):
        raise ValueError(f"tau must be in [0, 1], got {tau.item() if tau.dim() == 0 else 'others'}.")


def _check_real(name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{name} must be of real numbers, got {tensor.dtype}.")


def _is_readable(tensor: Tensor) -> bool:
    """Whether a check may look at the values of a tensor."""
    return not torch.compiler.is_compiling() and not tensor.is_meta and (tensor.device.type == "cpu" or debug_enabled())


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
