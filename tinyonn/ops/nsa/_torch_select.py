"""Selection of key blocks in plain torch: importance from the scores of the compressed keys, gates, lists.

n queries of a tile, m compressed keys, K key/value heads, G = H / K, NB key blocks
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import statistics_dtype, without_autocast
from ._checks import Bounds, empty_lists
from ._torch_nsa import (
    Compressed,
    Tile,
    broken_rows,
    cap_slope,
    finite,
    grouped_numbers,
    grouped_rows,
    heads_first,
    row_scores,
    spans_of,
    ungrouped,
)
from ._tuples import SelectInputs, SelectOptions, SelectSaved

Z_FLOOR = -20.0


class Importance(NamedTuple):
    """Inputs of the gates of one tile, for the blocks up to the own block of its last query."""

    probabilities: Tensor  # (K, G * n, m)
    slope: Tensor | None  # likewise, the derivative of the softcap, where there is one
    mass: Tensor  # (K, n, NB)
    floor: Tensor  # (n, 1) or (), the mass at which z is Z_FLOOR
    gap: Tensor  # (K, n, NB), (z - threshold) / temperature
    past: Tensor  # (n, NB)
    forced: Tensor  # (n, NB)


def importance_of(inputs: SelectInputs, k: Tensor, tile: Tile, batch: int, options: SelectOptions) -> Importance:
    """Importance of each block for the queries of a tile; k (K, m, D) are the compressed keys of the span."""
    query, _, lse, threshold = inputs
    temperature, block_size, compress_size, _, importance, forced_first, forced_local, _, scale, softcap = options
    n, ratio, num_kv = tile.num_queries, block_size // compress_size, k.shape[0]
    chunk, rows = tile.chunk, (batch, tile.rows)
    q, row_lse = grouped_rows(query[rows], num_kv, k.dtype), grouped_numbers(lse[rows], num_kv, k.dtype)
    limit = threshold[rows].to(k.dtype).T
    group = query.shape[2] // num_kv
    device, dtype = q.device, q.dtype
    place = chunk.positions(device)
    own = (place // block_size)[:, None]
    block = torch.arange(int(chunk.position + n - 1) // block_size + 1, device=device)
    past = (block + 1) * block_size <= place[:, None] + 1
    forced = (block <= own) & ((block < forced_first) | (block > own - forced_local))
    scores = row_scores(q, k[:, : tile.high], tile.bias(group, dtype), scale, softcap)
    slope = None if softcap is None else cap_slope(scores, softcap)
    probabilities = scores.sub_(finite(row_lse).unsqueeze(-1)).exp_()
    mean = probabilities.view(num_kv, group, n, tile.high).mean(1)
    mass = torch.nn.functional.pad(mean, (0, len(block) * ratio - mean.shape[-1])).unflatten(-1, (len(block), ratio)).sum(-1)
    if importance == "relative":
        uniform = ((place + 1) // (block_size // ratio)).to(dtype).div_(ratio).clamp_(min=1 / ratio)[:, None]
        floor = math.exp(Z_FLOOR) / uniform
        z = torch.maximum(mass, floor).mul_(uniform).log_()
    else:
        floor = mass.new_tensor(math.exp(Z_FLOOR))
        z = torch.maximum(mass, floor).log_()
    return Importance(probabilities, slope, mass, floor, (z - limit.unsqueeze(-1)) / temperature, past, forced)


def smallest_step(dtype: torch.dtype) -> float:
    """Smallest c whose gate, about 3c², is a normal number. A smaller c counts as 0, because the logarithm of its gate is not accurate."""
    return math.sqrt(torch.finfo(dtype).tiny)


@without_autocast
def select_forward(inputs: SelectInputs, options: SelectOptions, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """indices, counts, bias, soft_counts, overflow; see `select_blocks`."""
    query, key, max_blocks = inputs.query, inputs.key, options.max_blocks
    dtype, device = statistics_dtype(query.dtype), query.device
    indices, counts, bias, soft_counts = empty_lists(query, key.shape[2], max_blocks)
    overflowing = torch.zeros((), dtype=torch.int64, device=device)
    branch = Compressed(query.shape[2], options.compress_size, device)
    smallest = smallest_step(dtype)
    for span in spans_of(query, options.num_keys, options.compress_size, bounds):
        k = heads_first(key[span.batch, branch.rows(span)], dtype)
        for tile in branch.tiles(span, broken_rows(k)):
            begin, rows = tile.chunk.begin, (span.batch, tile.rows)
            found = importance_of(inputs, k, tile, span.batch, options)
            c = found.gap.clamp(0, 1)
            wanted = ((c > smallest) & found.past) | found.forced
            number = wanted.sum(-1)
            over = number > max_blocks
            if bool(over.any()):
                overflowing += over.sum()
                wanted = _best(wanted, found, over, max_blocks)
                number = wanted.sum(-1)
            # The slot of a kept block is the number of kept blocks before it.
            head, row, block = wanted.nonzero(as_tuple=True)
            slot = (wanted.cumsum(-1) - 1)[head, row, block]
            chosen = c[head, row, block]
            log_gate = torch.where(found.forced[row, block], 0, (chosen * chosen * (3 - 2 * chosen)).log())
            indices[span.batch, begin + row, head, slot] = block.to(torch.int32)
            bias[span.batch, begin + row, head, slot] = log_gate
            counts[rows] = number.T.to(torch.int32)
            soft = torch.where(found.forced, 1, found.gap.sigmoid() * found.past).sum(-1)
            soft_counts[rows] = soft.T
    overflow = overflowing.to(dtype) / (counts > 0).sum().clamp(min=1)
    return indices, counts, bias, soft_counts, overflow


@without_autocast
def select_backward(
    inputs: SelectInputs, saved: SelectSaved, options: SelectOptions, bounds: Bounds, scores_too: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of threshold and, with `scores_too`, of query, key and lse."""
    query, key, lse, threshold = inputs
    indices, counts, grad_bias, grad_soft = saved
    heads, num_kv = query.shape[2], key.shape[2]
    dtype, device = lse.dtype, query.device
    branch = Compressed(heads, options.compress_size, device)
    grad_threshold = torch.zeros(threshold.shape, dtype=dtype, device=device)
    if scores_too:
        grad_query, grad_key = (torch.zeros(x.shape, dtype=dtype, device=device) for x in (query, key))
        grad_lse = torch.zeros_like(lse)
    ratio, smallest = options.block_size // options.compress_size, smallest_step(dtype)
    slots = torch.arange(indices.shape[-1], device=device)
    for span in spans_of(query, options.num_keys, options.compress_size, bounds):
        k = heads_first(key[span.batch, branch.rows(span)], dtype)
        for tile in branch.tiles(span, broken_rows(k)):
            rows = (span.batch, tile.rows)
            found = importance_of(inputs, k, tile, span.batch, options)
            n, num_blocks = found.past.shape
            # grad of log(gate): d log(c² (3 − 2c)) / dc = 6 (1 − c) / (c (3 − 2c)), for the kept blocks alone.
            listed = slots < counts[rows].unsqueeze(-1)
            place = indices[rows].long().clamp(min=0)
            grad_gate = torch.zeros((n, num_kv, num_blocks), dtype=dtype, device=device)
            grad_gate.scatter_add_(-1, place, grad_bias[rows].to(dtype) * listed)
            c = found.gap.clamp(0, 1)
            inside = (c > smallest) & (c < 1) & found.past & ~found.forced
            slope = torch.where(inside, 6 * (1 - c) / torch.where(inside, c * (3 - 2 * c), 1), 0)
            grad_gap = grad_gate.transpose(0, 1) * slope
            sigmoid = found.gap.sigmoid()
            grad_gap += sigmoid * (1 - sigmoid) * (found.past & ~found.forced) * grad_soft[rows].to(dtype).T.unsqueeze(-1)
            grad_z = grad_gap.div_(options.temperature)
            grad_threshold[rows] = -grad_z.sum(-1).T
            if not scores_too or k.shape[1] == 0:
                continue
            above = found.mass > found.floor
            grad_mass = torch.where(above, grad_z / torch.where(above, found.mass, 1), 0)
            seen = found.probabilities.shape[-1]
            per_key = grad_mass.repeat_interleave(ratio, -1)[..., :seen].mul_(num_kv / heads)
            grad_scores = found.probabilities.view(num_kv, heads // num_kv, n, seen).mul(per_key.unsqueeze(1)).flatten(1, 2)
            grad_lse[rows] = -ungrouped(grad_scores.sum(-1), n)
            grad_scores.mul_(options.scale)
            if found.slope is not None:
                grad_scores.mul_(found.slope)
            grad_query[rows] = ungrouped(torch.bmm(grad_scores, k[:, :seen]), n)
            into = grad_key[span.batch, span.compressed : span.compressed + seen]
            into += torch.bmm(grad_scores.transpose(1, 2), grouped_rows(query[rows], num_kv, dtype)).transpose(0, 1)
    return (grad_threshold, grad_query, grad_key, grad_lse) if scores_too else (grad_threshold, None, None, None)


def _best(wanted: Tensor, found: Importance, over: Tensor, max_blocks: int) -> Tensor:
    """Keeps, in the rows that overflow, the forced blocks and the most important others; ties go to the lower index."""
    forced = found.forced.expand_as(wanted)[over]
    # Not by the gap, in which a low threshold or temperature would round differences away.
    rank_by = torch.maximum(found.mass, found.floor)[over].masked_fill(forced, math.inf).masked_fill(~wanted[over], -math.inf)
    best = rank_by.sort(dim=-1, descending=True, stable=True).indices[:, :max_blocks]
    kept = torch.zeros_like(rank_by, dtype=torch.bool).scatter_(-1, best, True)
    wanted = wanted.clone()
    wanted[over] = kept
    return wanted
