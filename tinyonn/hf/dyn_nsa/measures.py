"""What `calibrate` measures on watched calls.

    x[t, b]     log importance of a block that a query may leave out, + slope · tau: it is read where x - base > price
    offset      log √(mean e²) - log √(mean P²) of a key/value head,  e²[t, b] = Σ_heads mean_t |∂L/∂o|² · |P_b (v̄_b - o)|²
    P           share of a block in the attention, in the mean over a group's heads where it stands alone

T queries, H query heads, K key/value heads, G = H / K, D head dim, n positions of a text, NB key blocks
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import InputError
from ...nn.dyn_nsa import DynNSACore
from .observing import Attended
from .shares import block_shares, chunks, compressed_shares, drawn, kinds_of_blocks, true_shares

Z_FLOOR = -20.0  # of log importance
QUERIES = 2048  # of a text that effects are measured on, at most; with a quarter of its queries, offsets move by 0.02 nats (rms)


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
        keys, heads = call.compressed_keys().float(), core.num_kv_heads
        query = core.compressed_query(call.query)
        query = (call.query if query is None else query).detach().float()
        kept = self.values.setdefault(core, [])
        for row, begin, end, first in call.sequences():
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
            own = keys[row, first : first + length // options.compress_size]
            for part, _ in chunks(place, core.num_heads):
                shares = block_shares(query[row, begin + part], own, part, length, options, call.scores).mean(1)
                if options.importance == "relative":
                    uniform = (part + 1) // options.compress_size * (options.compress_size / options.block_size)
                    shares = shares * uniform[:, None]
                x = shares.clamp(min=math.exp(Z_FLOOR)).log()
                if core.slope.any():
                    x = x + self._uncertainty(call, query[row, begin + part], own, row, begin, part)
                kept.append(x[:, far[part]].cpu())

    def _uncertainty(self, call: Attended, query: Tensor, keys: Tensor, row: int, begin: int, place: Tensor) -> Tensor:
        """slope · tau of some queries, (K, t, 1)."""
        core, options = call.core, call.core.options
        if call.tau is not None:
            tau = call.tau[row, begin + place].float().T
        else:
            visible = (place + 1) // options.compress_size
            shares = compressed_shares(query, keys, place, options, call.scores._replace(sinks=None))
            tau = torch.where(visible > 1, torch.special.entr(shares).sum(-1).mean(1) / visible.clamp(min=2).log(), 0)
        return (core.slope.detach().float()[:, None] * tau)[..., None]

    def above_base(self) -> Tensor:
        """x - base of all layers, highest first.

        Raises:
            InputError: one is NaN, because a weight or an activation of the model is.
        """
        found = torch.cat([(torch.cat(x, 1) - core.base.detach().float().cpu()[:, None]).flatten() for core, x in self.values.items()])
        if found.isnan().any():
            raise InputError("importances over the sample must be finite, got nan: a weight or an activation of the model is not finite.")
        return found.sort(descending=True).values


class HeadEffects:
    """Sums from which the offset of each key/value head of one layer follows."""

    def __init__(self, core: DynNSACore) -> None:
        device = core.base.device
        self.effect = torch.zeros(core.num_heads, dtype=torch.float64, device=device)  # Σ |P_b (v̄_b - o)|² over the far blocks
        self.slope = torch.zeros(core.num_heads, dtype=torch.float64, device=device)  # Σ |∂L/∂o|² over the queries
        self.mass = torch.zeros(core.num_kv_heads, dtype=torch.float64, device=device)  # Σ P²
        self.queries = 0
        self.generator = torch.Generator().manual_seed(0)

    def watch(self, call: Attended) -> None:
        """Measures when the gradient of this call arrives."""
        held = call._replace(query=call.query.detach(), key=call.key.detach(), value=call.value.detach(), gates=call.gates.detach())
        out, held = call.out, held._replace(out=call.out.detach())
        out.register_hook(lambda grad: self._add(held, grad))

    @torch.no_grad()
    def _add(self, call: Attended, grad: Tensor) -> None:
        options = call.core.options
        for row, begin, end, _ in call.sequences():
            length, size = end - begin, options.block_size
            slope = grad[row, begin:end].float() * call.gates[row, begin:end, :, 1, None].float()
            self.slope += slope.square().sum((0, 2)).double()
            self.queries += length
            least = options.forced * size  # tokens before it leave out no block
            if length <= least:
                continue
            place = drawn(length, least, QUERIES, self.generator).to(call.key.device)
            weight = (length - least) / len(place)
            far, _ = kinds_of_blocks(place, length, options)
            query, key = call.query[row, begin + place].float(), call.key[row, begin:end].float()
            value = torch.nn.functional.pad(call.value[row, begin:end].float(), (0, 0, 0, 0, 0, -length % size))
            value = value.unflatten(0, (-1, size)).permute(2, 0, 1, 3)  # (K, NB, block_size, D)
            first = 0
            for part, seen in chunks(place, call.core.num_heads):
                shares = true_shares(query[first : first + len(part)], key, part, seen, size, call.scores)
                blocks = shares.shape[3]
                shares = shares.flatten(1, 2).transpose(1, 2)  # (K, NB, G · t, block_size)
                mass, effect = shares.sum(-1), shares @ value[:, :blocks]
                effect = effect.addcmul_(mass[..., None], effect.sum(1, keepdim=True), value=-1)
                which = far[first : first + len(part), :blocks].T[:, None]  # (NB, 1, t)
                mass, power = (x.unflatten(2, (-1, len(part))) for x in (mass, effect.square().sum(-1)))
                self.effect += weight * (power * which).sum((1, 3)).flatten().double()
                self.mass += weight * (mass.mean(2).square() * which[:, 0]).sum((1, 2)).double()
                first += len(part)

    def offsets(self) -> Tensor:
        """log √(mean e²) - log √(mean P²), (K,): how much more than another head's mass this one's matters; -inf where it does not."""
        effect = (self.effect * self.slope / self.queries).unflatten(0, (len(self.mass), -1)).sum(1)
        return 0.5 * (effect.log() - self.mass.log()).cpu()
