"""Measurements on the layers of a converted model while a sample of text runs through it, one layer and some hundreds of queries at a time.

    x[t, b]     log importance of a block that a query may leave out, + slope · tau: it is read where x - base > price
    offset      log √(mean e²) - log √(mean p²) of a key/value head,  e²[t, b] = Σ_heads mean_t |∂L/∂o|² · |P_b (v̄_b - o)|²
    p, P        share of a block in the attention, estimated from the compressed keys, and true; p is the mean over a group's heads

B batch, T queries, H query heads, K key/value heads, G = H / K, D head dim, n positions of a sequence, NB key blocks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from ...nn.block_compression import block_starts
from ...nn.dyn_nsa import DynNSACore
from ...nn.dyn_nsa_options import DynNSAOptions
from ...ops import DynNSAOutput
from ..interfaces import gradients_kept
from .options import open_price
from .parts import cores

ELEMENTS = 2**23  # of the largest tensor of a chunk of queries
Z_FLOOR = -20.0  # of log importance


class Attended(NamedTuple):
    """What one call of a core was given, and gave."""

    core: DynNSACore
    query: Tensor  # (B, T, H, D)
    key: Tensor  # (B, T, K, D)
    value: Tensor
    gates: Tensor  # (B, T, H, 3)
    key_compressed: Tensor | None
    scale: float
    key_start: Tensor | None
    key_end: Tensor | None
    cu_seqlens: Tensor | None
    result: DynNSAOutput


def attended(core: DynNSACore, args: tuple[Any, ...], kwargs: dict[str, Any], result: DynNSAOutput) -> Attended:
    """The arguments of a forward hook of a core."""
    query, key, value, gates = args
    scale = query.shape[-1] ** -0.5 if kwargs.get("scale") is None else kwargs["scale"]
    start, end, sequences = (kwargs.get(name) for name in ("key_start", "key_end", "cu_seqlens"))
    return Attended(core, query, key, value, gates, kwargs.get("key_compressed"), scale, start, end, sequences, result)


@contextmanager
def watched(found: list[DynNSACore], watch: Callable[[Attended], None]) -> Iterator[None]:
    """Within the block, each call of a core is watched."""
    with ExitStack() as stack:
        for core in found:
            stack.callback(core.register_forward_hook(lambda *call: watch(attended(*call)), with_kwargs=True).remove)
        yield


def checked_sample(model: PreTrainedModel, sample: Iterable[Tensor | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The batches of a sample, as keyword arguments of the model.

    Raises:
        InputError: the model is not converted, or there is no batch.
    """
    if next(cores(model), None) is None:
        raise InputError(f"model must be converted by convert_attention, got an unconverted {type(model).__name__}.")
    batches = [{"input_ids": batch} if isinstance(batch, Tensor) else dict(batch) for batch in sample]
    if not batches:
        raise InputError("sample contains no batch.")
    return batches


@torch.no_grad()
def run(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    with gradients_kept(model):
        model(**{**batch, "use_cache": False})


def set_price(found: list[DynNSACore], price: float) -> None:
    for core in found:
        core.price.fill_(price)


def price_of_all(found: list[DynNSACore]) -> float:
    """Price at which every block of every layer passes, also where an earlier calibration or training has moved the thresholds."""
    return min(open_price(replace(core.options, base=core.base.max().item(), slope=core.slope.min().item())) for core in found)


class Sequence(NamedTuple):
    """One text: a row without its padding, or one of several packed in a row."""

    row: int
    begin: int
    end: int
    compressed: int  # place of its first compressed key


def sequences_of(call: Attended) -> Iterator[Sequence]:
    batch, total = call.key.shape[:2]
    if call.cu_seqlens is not None:
        size = call.core.options.compress_size
        yield from (Sequence(0, begin, end, begin // size) for begin, end in pairwise(call.cu_seqlens.tolist()) if end > begin)
        return
    starts = [0] * batch if call.key_start is None else call.key_start.tolist()
    ends = [total] * batch if call.key_end is None else call.key_end.tolist()
    yield from (Sequence(row, begin, end, 0) for row, (begin, end) in enumerate(zip(starts, ends, strict=True)) if end > begin)


def compressed_keys(call: Attended) -> Tensor:
    """(B, M, K, D), without gradients."""
    if call.key_compressed is not None:
        return call.key_compressed.detach()
    starts = block_starts(call.key.shape[1], call.core.options.compress_size, call.key_start, call.cu_seqlens)
    found: Tensor = call.core.compress_key(call.key, starts).detach()
    return found


def kinds_of_blocks(place: Tensor, length: int, options: DynNSAOptions) -> tuple[Tensor, Tensor]:
    """Which blocks of a sequence a query at each place may leave out, (t, NB), and how many it reads anyway, (t,)."""
    own = place // options.block_size
    block = torch.arange(-(-length // options.block_size), device=place.device)
    forced = (block < options.forced_first) | (block > own[:, None] - options.forced_local)
    far = (block < own[:, None]) & ~forced
    return far, (own + 1).clamp(max=options.forced)


def block_shares(query: Tensor, keys: Tensor, place: Tensor, length: int, options: DynNSAOptions, scale: float) -> Tensor:
    """Estimated share of each block in the attention of each query head, (K, G, t, NB).

    Args:
        query: (t, H, D), as the compressed branch has it. keys: (M, K, D), compressed keys of the sequence. place: (t,) of the queries.
        length: positions of the sequence.
    """
    ratio, blocks = options.block_size // options.compress_size, -(-length // options.block_size)
    whole = length // options.compress_size
    scores = torch.einsum("tkgd,mkd->kgtm", query.unflatten(1, (keys.shape[1], -1)), keys[:whole]) * scale
    visible = (torch.arange(whole, device=place.device) + 1) * options.compress_size <= place[:, None] + 1
    shares = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible
    return torch.nn.functional.pad(shares, (0, blocks * ratio - whole)).unflatten(-1, (blocks, ratio)).sum(-1)


class PriceSample:
    """x of the blocks that queries may leave out, of one layer or all; a part of the queries where there would be too many.

    Attributes:
        forced, every, rows, pairs: over all queries and key/value heads: blocks read at the highest and the lowest price, queries, and
            blocks that may be left out.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.generator = share, torch.Generator().manual_seed(seed)
        self.values: dict[DynNSACore, list[Tensor]] = {}
        self.forced = self.every = self.rows = self.pairs = 0

    @torch.no_grad()
    def add(self, call: Attended) -> None:
        core, options = call.core, call.core.options
        keys, heads = compressed_keys(call).float(), core.num_kv_heads
        query = core.compressed_query(call.query)
        query = (call.query if query is None else query).detach().float()
        slope, kept = core.slope.detach().float(), self.values.setdefault(core, [])
        for row, begin, end, first in sequences_of(call):
            length = end - begin
            place = torch.arange(length, device=keys.device)
            far, forced = kinds_of_blocks(place, length, options)
            most = place // options.block_size + 1
            most = most if options.max_blocks is None else most.clamp(max=options.max_blocks)
            self.forced += heads * int(forced.sum())
            self.every += heads * int(most.sum())
            self.rows += heads * length
            self.pairs += heads * int(far.sum())
            if self.share < 1:
                place = place[(torch.rand(length, generator=self.generator) < self.share).to(place.device)]
            for part in place.split(max(1, ELEMENTS // max(1, core.num_heads * length // options.compress_size))):
                shares = block_shares(query[row, begin + part], keys[row, first:], part, length, options, call.scale).mean(1)
                if options.importance == "relative":
                    uniform = (part + 1) // options.compress_size * (options.compress_size / options.block_size)
                    shares = shares * uniform[:, None]
                tau = call.result.tau[row, begin + part].float().T[..., None]
                x = shares.clamp(min=math.exp(Z_FLOOR)).log() + slope[:, None, None] * tau
                kept.append(x[:, far[part]].cpu())

    def above_base(self) -> Tensor:
        """x - base of all layers, highest first."""
        found = [(torch.cat(x, 1) - core.base.detach().float().cpu()[:, None]).flatten() for core, x in self.values.items()]
        return torch.cat(found).sort(descending=True).values


class HeadEffects:
    """Sums from which the offset of each key/value head of one layer follows."""

    def __init__(self, core: DynNSACore) -> None:
        device = core.base.device
        self.effect = torch.zeros(core.num_heads, dtype=torch.float64, device=device)  # Σ |P_b (v̄_b - o)|² over the far blocks
        self.slope = torch.zeros(core.num_heads, dtype=torch.float64, device=device)  # Σ |∂L/∂o|² over the queries
        self.mass = torch.zeros(core.num_kv_heads, dtype=torch.float64, device=device)  # Σ P²
        self.queries = 0

    def watch(self, call: Attended) -> None:
        """Measures when the gradient of this call arrives."""
        held = call._replace(query=call.query.detach(), key=call.key.detach(), value=call.value.detach(), gates=call.gates.detach())
        call.result.out.register_hook(lambda grad: self._add(held._replace(result=None), grad))  # type: ignore[arg-type]

    @torch.no_grad()
    def _add(self, call: Attended, grad: Tensor) -> None:
        options = call.core.options
        for row, begin, end, _ in sequences_of(call):
            length = end - begin
            slope = grad[row, begin:end].float() * call.gates[row, begin:end, :, 1, None].float()
            self.slope += slope.square().sum((0, 2)).double()
            self.queries += length
            key, value = (x[row, begin:end].float() for x in (call.key, call.value))
            blocks = -(-length // options.block_size)
            size, spare = options.block_size, blocks * options.block_size - length
            value = torch.nn.functional.pad(value, (0, 0, 0, 0, 0, spare)).unflatten(0, (blocks, size))
            index = torch.arange(length, device=key.device)
            for place in index.split(max(1, ELEMENTS // (call.core.num_heads * length))):
                far, _ = kinds_of_blocks(place, length, options)
                query = call.query[row, begin + place].float().unflatten(1, (key.shape[1], -1))
                scores = torch.einsum("tkgd,nkd->kgtn", query, key) * call.scale
                shares = scores.masked_fill_(index > place[:, None], torch.finfo(scores.dtype).min).softmax(-1)
                shares = torch.nn.functional.pad(shares, (0, spare)).unflatten(-1, (blocks, size))
                mass, part = shares.sum(-1), torch.einsum("kgtbj,bjkd->kgtbd", shares, value)
                effect = (part - mass[..., None] * part.sum(-2, keepdim=True)).square().sum(-1)
                self.effect += (effect * far).sum((-1, -2)).flatten().double()
                self.mass += (mass.mean(1).square() * far).sum((-1, -2)).double()

    def offsets(self) -> Tensor:
        """log √(mean e²) - log √(mean P²), (K,): how much more than another head's mass this one's matters; -inf where it does not."""
        effect = (self.effect * self.slope / self.queries).unflatten(0, (len(self.mass), -1)).sum(1)
        return 0.5 * (effect.log() - self.mass.log()).cpu()
