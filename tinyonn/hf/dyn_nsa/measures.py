"""What `calibrate` measures on watched calls.

    x[t, b]     log importance of a block that a query may leave out, + slope · tau: it is read where x - base > price
    e²[t, b]    Σ_heads mean_t |∂L/∂o|² · |P_b (v̄_b - o)|²: squared effect on the loss, to first order, of leaving a block out of the
                attention of a key/value head, the same in all directions of ∂L/∂o
    P           share of a block in the attention of a query head; v̄_b its mean value, o the output

T queries, H query heads, K key/value heads, G = H / K, D head dim, n positions of a text or number of pairs, NB key blocks
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import InputError
from ...nn.block_shares import block_shares, compressed_shares, kinds_of_blocks
from ...nn.dyn_nsa import DynNSACore
from ...nn.dyn_nsa_options import DynNSAOptions
from .fitting import HeadPairs
from .observing import Attended
from .shares import chunks, drawn, true_shares

Z_FLOOR = -20.0  # of log importance
QUERIES = 2048  # of a text that effects are measured on, at most
PAIRS = 2**15  # of a query and a block that a head's fit sees, at most: 4 · PAIRS · (H + 3 K) bytes a layer
LEAST_X = -7.0  # of these pairs: far below it lies no threshold, and estimates are at their worst


class PriceSample:
    """x of the blocks that queries may leave out, of one layer or all; a part of the queries where there would be too many.

    Attributes:
        forced, every, rows: over all queries and key/value heads: blocks read at the highest and the lowest price, and queries. Of the
            blocks that a query may leave out, those that `max_blocks` excludes at every price are no part of the sample.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.generator = share, torch.Generator().manual_seed(seed)
        self.values: dict[DynNSACore, list[Tensor]] = {}
        self.forced = self.every = self.rows = 0

    @torch.no_grad()
    def add(self, call: Attended) -> None:
        core, options = call.core, call.core.options
        keys, heads = call.compressed_keys().float(), core.num_kv_heads
        query = call.compressed_query()
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
            if self.share < 1:
                place = place[(torch.rand(length, generator=self.generator) < self.share).to(place.device)]
            own = keys[row, first : first + length // options.compress_size]
            for part, _ in chunks(place, core.num_heads):
                x = compared(call, query[row, begin + part], own, row, begin, part, length)
                kept.append(_within_limit(x, far[part], options).cpu())

    def check(self) -> None:
        """InputError if an importance is NaN, because a weight or an activation of the model is."""
        if any(x.isnan().any() for kept in self.values.values() for x in kept):
            raise InputError("importances over the sample must be finite, got nan: a weight or an activation of the model is not finite.")

    def prices(self) -> Tensor:
        """The prices at which these blocks pass, of all layers, highest first."""
        found = [core.price_of(torch.cat(x, 1).to(core.base.device)).cpu().flatten() for core, x in self.values.items()]
        return torch.cat(found).sort(descending=True).values


def _within_limit(x: Tensor, far: Tensor, options: DynNSAOptions) -> Tensor:
    """x of the blocks that each query reads at the lowest price, the most important ones up to `max_blocks`.

    Args:
        x: (K, t, NB). far: (t, NB), which blocks a query may leave out.

    Returns:
        (K, n), the n blocks of all queries.
    """
    most = far.shape[1] if options.max_blocks is None else options.max_blocks - options.forced  # far blocks follow all forced ones
    if most >= far.shape[1]:
        return x[:, far]
    highest = x.masked_fill(~far, -math.inf).topk(most).values
    return highest[:, torch.arange(most, device=far.device) < far.sum(-1, keepdim=True)]


def compared(call: Attended, query: Tensor, keys: Tensor, row: int, begin: int, place: Tensor, length: int) -> Tensor:
    """x of the blocks of some queries of a sequence, (K, t, NB).

    Args:
        query: (t, H, D), as the compressed branch has it. keys: (M, K, D), compressed keys of the sequence. row, begin: where it starts.
        place: (t,) of the queries in the sequence. length: positions of the sequence.
    """
    core, options = call.core, call.core.options
    shares = block_shares(query, keys, place, length, options, call.scores).mean(1)
    if options.importance == "relative":
        uniform = (place + 1) // options.compress_size * (options.compress_size / options.block_size)
        shares = shares * uniform[:, None]
    x = shares.clamp(min=math.exp(Z_FLOOR)).log()
    return x + _uncertainty(call, query, keys, row, begin, place) if core.slope.any() else x


def _uncertainty(call: Attended, query: Tensor, keys: Tensor, row: int, begin: int, place: Tensor) -> Tensor:
    """slope · tau of some queries, (K, t, 1)."""
    core, options = call.core, call.core.options
    if call.tau is not None:
        tau = call.tau[row, begin + place].float().T
    else:
        visible = (place + 1) // options.compress_size
        shares = compressed_shares(query, keys, place, options, call.scores._replace(sinks=None))
        tau = torch.where(visible > 1, torch.special.entr(shares).sum(-1).mean(1) / visible.clamp(min=2).log(), 0)
    return (core.slope.detach().float()[:, None] * tau)[..., None]


class HeadEffects:
    """x and e² of pairs of a query and a far block in one layer: a sample of at most `PAIRS` for each key/value head, drawn by a seed."""

    def __init__(self, core: DynNSACore) -> None:
        device, self.core, self.queries = core.base.device, core, 0
        self.grad_norm = torch.zeros(core.num_heads, dtype=torch.float64, device=device)  # Σ |∂L/∂o|² over the queries
        # Of each pair: a number drawn for it, x, weight, and |P_b (v̄_b - o)|² of each query head of the group.
        self.kept = torch.empty(core.num_kv_heads, 3 + core.num_heads // core.num_kv_heads, 0, device=device)
        self.generator = torch.Generator().manual_seed(0)

    def watch(self, call: Attended) -> None:
        """Measures when the gradient of this call arrives."""
        held = call._replace(query=call.query.detach(), key=call.key.detach(), value=call.value.detach(), gates=call.gates.detach())
        out, held = call.out, held._replace(out=call.out.detach())
        out.register_hook(lambda grad: self._add(held, grad))

    @torch.no_grad()
    def _add(self, call: Attended, grad: Tensor) -> None:
        options, compressed, scoring = call.core.options, call.compressed_keys().float(), call.compressed_query()
        for row, begin, end, first_key in call.sequences():
            length, size = end - begin, options.block_size
            grad_out = grad[row, begin:end].float() * call.gates[row, begin:end, :, 1, None].float()
            self.grad_norm += grad_out.square().sum((0, 2)).double()
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
            own = compressed[row, first_key : first_key + length // options.compress_size]
            first = 0
            for part, seen in chunks(place, call.core.num_heads):
                shares = true_shares(query[first : first + len(part)], key, part, seen, size, call.scores)
                blocks = shares.shape[3]
                shares = shares.flatten(1, 2).transpose(1, 2)  # (K, NB, G · t, block_size)
                mass, effect = shares.sum(-1), shares @ value[:, :blocks]
                effect = effect.addcmul_(mass[..., None], effect.sum(1, keepdim=True), value=-1)
                power = effect.square().sum(-1).unflatten(2, (-1, len(part))).permute(0, 2, 3, 1)  # (K, G, t, NB)
                which = far[first : first + len(part), :blocks]
                x = compared(call, scoring[row, begin + part], own, row, begin, part, length)[..., :blocks]
                self._keep(x[:, which], power[:, :, which], weight)
                first += len(part)

    def _keep(self, x: Tensor, power: Tensor, weight: float) -> None:
        """Adds pairs, and keeps those with the largest numbers of each head.

        Args:
            x: (K, n). power: (K, G, n).
        """
        number = torch.rand(x.shape[1], generator=self.generator).to(x.device).masked_fill(x <= LEAST_X, -1.0)
        self.kept = torch.cat([self.kept, torch.cat([torch.stack([number, x, torch.full_like(x, weight)], 1), power], 1)], 2)
        if self.kept.shape[2] > PAIRS:
            places = self.kept[:, 0].topk(PAIRS).indices[:, None]
            self.kept = self.kept.gather(2, places.expand(-1, self.kept.shape[1], -1))

    def pairs(self) -> list[HeadPairs]:
        """The pairs of each key/value head."""
        found = []
        for kept, grad_norm in zip(self.kept, (self.grad_norm / self.queries).unflatten(0, (len(self.kept), -1)), strict=True):
            _, x, weight, *power = kept[:, kept[0] >= 0].double().cpu()
            found.append(HeadPairs(x, (grad_norm.cpu()[:, None] * torch.stack(power)).sum(0), weight))
        return found
