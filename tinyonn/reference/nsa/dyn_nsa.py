"""DynNSA written out: every query against every key, block gates as a dense matrix, float64, differentiable by autograd.

B batch, T queries, H query heads, K key/value heads, G = H / K, D head dim, M compressed keys, NB key blocks, n tokens of one sequence
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Z_FLOOR = -20.0

Importance = Literal["share", "relative"]
Where = tuple[Tensor | None, Tensor | None, Tensor | None]  # cu_seqlens, key_start, key_end


class Options(NamedTuple):
    """Options of the selection; see `ops.select_blocks`."""

    temperature: float
    block_size: int
    compress_size: int
    max_blocks: int
    detach_scores: bool
    scale: float
    importance: Importance
    forced_first: int
    forced_local: int
    softcap: float | None


class Sequence(NamedTuple):
    """One sequence: the rows of its queries and keys, its first compressed key's row, the position of its first query."""

    batch: int
    queries: slice
    keys: slice
    compressed: int
    first: int


def sequences(
    query: Tensor,
    num_keys: int,
    compress_size: int,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Iterator[Sequence]:
    """Packed sequences, or one a batch row without its padding; queries are a row's last."""
    batch, num_queries = query.shape[:2]
    if cu_seqlens is not None:
        for begin, end in pairwise(cu_seqlens.tolist()):
            yield Sequence(0, slice(begin, end), slice(begin, end), begin // compress_size, 0)
        return
    before = num_keys - num_queries
    for row in range(batch):
        start = 0 if key_start is None else int(key_start[row])
        end = num_keys if key_end is None else int(key_end[row])
        first = max(start, before)
        yield Sequence(row, slice(first - before, max(end, first) - before), slice(start, end), 0, first - start)


def positions(sequence: Sequence, device: torch.device) -> Tensor:
    """(n,) place of each query in its sequence."""
    return torch.arange(sequence.queries.stop - sequence.queries.start, device=device) + sequence.first


def compressed_attention(
    query: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
    *,
    compress_size: int,
    num_keys: int,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to compressed keys c with (c + 1) * compress_size <= t + 1.

    Args:
        query: (B, T, H, D).
        key_compressed, value_compressed: (B, M, K, D); sequence i of a packed batch begins at row cu[i] // compress_size.
        num_keys: keys of a row before compression.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: (H,), score of one more key, whose value is 0 and which every query sees.

    Returns:
        out (B, T, H, D); lse (B, T, H), of scores and sink, -inf where nothing is visible and there is no sink; entropy (B, T, H) in nats,
        of the visible keys alone, 0 where there are none.
    """
    query, keys, values = query.double(), key_compressed.double(), value_compressed.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse, entropy = torch.zeros_like(query), _empty_lse(query, sinks), query.new_zeros(query.shape[:3])
    for sequence in sequences(query, num_keys, compress_size, cu_seqlens, key_start, key_end):
        row, rows = sequence.batch, sequence.queries
        k, visible = _compressed_keys(keys, sequence, compress_size)
        v, _ = _compressed_keys(values, sequence, compress_size)
        scores = _scores(query[row, rows], k, scale, softcap)
        out[row, rows], lse[row, rows] = _attend(scores, visible[:, None], v, sinks)
        probabilities = _probabilities(scores, _attend(scores, visible[:, None], v, None)[1], visible[:, None])
        entropy[row, rows] = -torch.special.xlogy(probabilities, probabilities).sum(-1).detach()
    return out, lse, entropy


class BlockSelection(NamedTuple):
    """Key blocks that each query reads, with their gates.

    Attributes:
        indices: (B, T, K, max_blocks) int32, ascending, counted from the start of the query's sequence; -1 behind the last.
        counts: (B, T, K) int32.
        bias: (B, T, K, max_blocks) float32 (float64 for float64), log of the gate, 0 for forced blocks and behind the last.
        soft_counts: (B, T, K) like bias, the forced blocks plus, for every other past block, sigmoid((z - threshold) / temperature).
        overflow: 0-d like bias, fraction of (token, head) rows for which more than max_blocks passed; padding is not counted.
    """

    indices: Tensor
    counts: Tensor
    bias: Tensor
    soft_counts: Tensor
    overflow: Tensor


def select_blocks(
    query: Tensor,
    key_compressed: Tensor,
    lse: Tensor,
    threshold: Tensor,
    *,
    temperature: float = 1.0,
    block_size: int = 64,
    compress_size: int = 64,
    max_blocks: int = 32,
    importance: Importance = "share",
    forced_first: int = 1,
    forced_local: int = 2,
    detach_scores: bool = False,
    num_keys: int,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> BlockSelection:
    """Key blocks whose importance passes the threshold; see `ops.select_blocks`. Statistics are float64."""
    query, keys, lse, threshold = query.double(), key_compressed.double(), lse.double(), threshold.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = Options(
        temperature, block_size, compress_size, max_blocks, detach_scores, scale, importance, forced_first, forced_local, softcap
    )
    where = (cu_seqlens, key_start, key_end)
    found, counts, soft_counts, overflow = _selections(query, keys, lse, threshold, num_keys, where, options)
    indices = torch.full((*counts.shape, max_blocks), -1, dtype=torch.int32, device=query.device)
    bias = query.new_zeros(indices.shape)
    for sequence, gate, kept in found:
        for t, head in product(range(gate.shape[0]), range(gate.shape[1])):
            chosen = kept[t, head].nonzero()[:, 0]
            place = (sequence.batch, sequence.queries.start + t, head)
            indices[place][: len(chosen)] = chosen.int()
            bias[place][: len(chosen)] = gate[t, head][chosen].log()
    return BlockSelection(indices, counts, bias, soft_counts, overflow)


def _selections(
    query: Tensor, key_compressed: Tensor, lse: Tensor, threshold: Tensor, num_keys: int, where: Where, options: Options
) -> tuple[list[tuple[Sequence, Tensor, Tensor]], Tensor, Tensor, Tensor]:
    """Each sequence, its gates (n, K, NB) and which of its blocks are kept; of all, counts, soft counts, overflow."""
    found = []
    counts = torch.zeros((*query.shape[:2], key_compressed.shape[2]), dtype=torch.int32, device=query.device)
    soft_counts = query.new_zeros(counts.shape)
    overflowing = torch.zeros(counts.shape, dtype=torch.bool, device=query.device)
    for sequence in sequences(query, num_keys, options.compress_size, *where):
        row, rows = sequence.batch, sequence.queries
        gate, kept, soft_counts[row, rows], overflowing[row, rows] = _gates(
            sequence, query[row, rows], key_compressed, lse[row, rows], threshold[row, rows], options
        )
        counts[row, rows] = kept.sum(-1).int()
        found.append((sequence, gate, kept))
    # Rows that see anything read their own block at least.
    return found, counts, soft_counts, overflowing.double().sum() / (counts > 0).sum().clamp(min=1)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    bias: Tensor | None = None,
    *,
    block_size: int = 64,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention to the listed key blocks, `bias` added to all scores of a block.

    Returns:
        out (B, T, H, D); lse (B, T, H), of scores and sink, -inf where nothing is visible and there is no sink.
    """
    query, key, value = query.double(), key.double(), value.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = torch.zeros_like(query), _empty_lse(query, sinks)
    for sequence in sequences(query, key.shape[1], block_size, cu_seqlens, key_start, key_end):
        row, rows, columns = sequence.batch, sequence.queries, sequence.keys
        num_blocks = -(-(columns.stop - columns.start) // block_size)
        listed = torch.arange(indices.shape[-1], device=indices.device) < counts[row, rows][..., None]
        slots = indices[row, rows].long().clamp(min=0)
        # One slot per block: the sums are of single terms.
        one_hot = torch.nn.functional.one_hot(slots, max(num_blocks, 1)).double() * listed[..., None]
        selected = one_hot.sum(-2) > 0
        block_bias = 0.0 if bias is None else (one_hot * bias[row, rows].double()[..., None]).sum(-2)
        log_gate = torch.where(selected, block_bias, -math.inf)
        out[row, rows], lse[row, rows] = _gated(
            query[row, rows], key[row, columns], value[row, columns], log_gate, sequence, block_size, scale, softcap, sinks
        )
    return out, lse


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """Attention to keys j with 0 <= t - j < window; (B, T, H, D)."""
    query, key, value = query.double(), key.double(), value.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(query)
    for sequence in sequences(query, key.shape[1], 1, cu_seqlens, key_start, key_end):
        row, rows, columns = sequence.batch, sequence.queries, sequence.keys
        distance = positions(sequence, query.device)[:, None] - torch.arange(columns.stop - columns.start, device=query.device)
        visible = (distance >= 0) & (distance < window)
        scores = _scores(query[row, rows], key[row, columns], scale, softcap)
        out[row, rows], _ = _attend(scores, visible[:, None], value[row, columns], sinks)
    return out


class DynNSAOutput(NamedTuple):
    """Results of `dyn_nsa`.

    Attributes:
        out: (B, T, H, D).
        counts: (B, T, K) int32, number of key blocks that the selected branch reads.
        tau: (B, T, K), uncertainty used for the threshold: the caller's, or that of the compressed branch.
        overflow: 0-d, fraction of (token, head) rows for which more than max_blocks passed; padding is not counted.
        soft_counts: (B, T, K), as in `BlockSelection`; input of a budget loss.
    """

    out: Tensor
    counts: Tensor
    tau: Tensor
    overflow: Tensor
    soft_counts: Tensor


def dyn_nsa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
    gates: Tensor,
    base: Tensor,
    slope: Tensor,
    *,
    tau: Tensor | None = None,
    query_compressed: Tensor | None = None,
    window: int = 512,
    temperature: float = 1.0,
    block_size: int = 64,
    compress_size: int = 64,
    max_blocks: int = 32,
    importance: Importance = "share",
    forced_first: int = 1,
    forced_local: int = 2,
    detach_scores: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> DynNSAOutput:
    """Dense gated attention: gates weigh the compressed, the selected and the window branch. Statistics are float64."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    where = {"cu_seqlens": cu_seqlens, "key_start": key_start, "key_end": key_end}
    num_keys, num_kv = key.shape[1:3]
    query_compressed = query if query_compressed is None else query_compressed
    compressed, lse, entropy = compressed_attention(
        query_compressed,
        key_compressed,
        value_compressed,
        compress_size=compress_size,
        num_keys=num_keys,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        **where,
    )
    if tau is None:
        tau = attention_tau(entropy, query, num_keys, num_kv, compress_size, **where)
    threshold = base.double() - slope.double() * tau.double()
    near = sliding_window_attention(query, key, value, window, scale=scale, softcap=softcap, sinks=sinks, **where)
    query, key, value = query.double(), key.double(), value.double()
    options = Options(
        temperature, block_size, compress_size, max_blocks, detach_scores, scale, importance, forced_first, forced_local, softcap
    )
    bounds = (cu_seqlens, key_start, key_end)
    scored = (query_compressed.double(), key_compressed.double(), lse, threshold)
    found, counts, soft_counts, overflow = _selections(*scored, num_keys, bounds, options)
    selected = torch.zeros_like(query)
    for sequence, gate, _ in found:
        row, rows, columns = sequence.batch, sequence.queries, sequence.keys
        selected[row, rows] = _gated_by_factor(
            query[row, rows], key[row, columns], value[row, columns], gate, sequence, block_size, scale, softcap, sinks
        )
    branches = torch.stack([compressed, selected, near], -1)
    out = (branches * gates.double()[:, :, :, None]).sum(-1)
    return DynNSAOutput(out, counts, tau.double(), overflow, soft_counts)


def attention_tau(
    entropy: Tensor,
    query: Tensor,
    num_keys: int,
    num_kv: int,
    compress_size: int,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """Mean over a group's heads of entropy / log(visible compressed keys); 0 where at most one is visible. (B, T, K)"""
    tau = entropy.new_zeros((*entropy.shape[:2], num_kv))
    for sequence in sequences(query, num_keys, compress_size, cu_seqlens, key_start, key_end):
        row, rows = sequence.batch, sequence.queries
        visible = ((positions(sequence, query.device) + 1) // compress_size).double()[:, None]
        mean = entropy[row, rows].unflatten(-1, (num_kv, -1)).mean(-1)
        tau[row, rows] = torch.where(visible > 1, mean / visible.clamp(min=2).log(), 0.0)
    return tau


def _gates(
    sequence: Sequence, query: Tensor, key_compressed: Tensor, lse: Tensor, threshold: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one sequence: gate (n, K, NB), which blocks are kept (n, K, NB), soft counts (n, K), which rows overflow (n, K)."""
    temperature, block_size, compress_size, max_blocks, detach_scores, scale, importance, forced_first, forced_local, softcap = options
    place = positions(sequence, query.device)
    num_kv = key_compressed.shape[2]
    length = sequence.keys.stop - sequence.keys.start
    block = torch.arange(-(-length // block_size), device=query.device)
    past = ((block + 1) * block_size <= place[:, None] + 1)[:, None]
    own = (place // block_size)[:, None]
    forced = ((block <= own) & ((block < forced_first) | (block > own - forced_local)))[:, None]

    keys, visible = _compressed_keys(key_compressed, sequence, compress_size)
    probabilities = _probabilities(_scores(query, keys, scale, softcap), lse, visible[:, None])
    if detach_scores:
        probabilities = probabilities.detach()
    ratio = block_size // compress_size
    pooled = torch.nn.functional.pad(probabilities, (0, len(block) * ratio - probabilities.shape[-1]))
    mass = pooled.unflatten(-1, (len(block), ratio)).sum(-1).unflatten(1, (num_kv, -1)).mean(2)
    if importance == "relative":
        mass = mass.clamp(min=0) * ((place + 1) // compress_size * compress_size / block_size).clamp(min=1e-300)[:, None, None]
    z = mass.clamp(min=math.exp(Z_FLOOR)).log()

    gap = (z - threshold[..., None]) / temperature
    c = gap.clamp(0, 1)
    gamma = c * c * (3 - 2 * c)
    wanted = (past & (gamma > 0)) | forced
    kept = wanted & _fits(torch.where(forced, math.inf, z).expand(wanted.shape), wanted, max_blocks)
    gate = torch.where(forced, 1.0, gamma) * kept
    soft = torch.where(forced, 1.0, torch.sigmoid(gap) * past).sum(-1)
    return gate, kept, soft, wanted.sum(-1) > max_blocks


def _fits(rank_by: Tensor, wanted: Tensor, max_blocks: int) -> Tensor:
    """Whether a wanted block is among the `max_blocks` highest of its row; ties go to the lower index."""
    order = torch.where(wanted, rank_by, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(-1) < max_blocks


def _compressed_keys(compressed: Tensor, sequence: Sequence, compress_size: int) -> tuple[Tensor, Tensor]:
    """A sequence's compressed keys (m, K, D), and which of them each query sees (n, m)."""
    m = (sequence.keys.stop - sequence.keys.start) // compress_size
    keys = compressed[sequence.batch, sequence.compressed : sequence.compressed + m]
    ends = (torch.arange(m, device=compressed.device) + 1) * compress_size
    return keys, ends <= positions(sequence, compressed.device)[:, None] + 1


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """(·, K, ·) -> (·, H, ·)."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def _scores(query: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """(n, H, D) and (m, K, D) -> (n, H, m)."""
    scores = torch.einsum("nhd,mhd->nhm", query, _per_query_head(keys, query.shape[1])) * scale
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def _probabilities(scores: Tensor, lse: Tensor, visible: Tensor) -> Tensor:
    """exp(score - lse), 0 where not visible."""
    any_visible = visible.any(-1, keepdim=True)
    return torch.where(visible, (scores - torch.where(any_visible, lse[..., None], 0.0)).masked_fill(~visible, 0.0).exp(), 0.0)


def _empty_lse(query: Tensor, sinks: Tensor | None) -> Tensor:
    """(B, T, H), lse of queries that see no key."""
    lse = query.new_full(query.shape[:3], -math.inf)
    return lse if sinks is None else sinks.double().expand(lse.shape).clone()


def _attend(scores: Tensor, visible: Tensor, values: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the visible (n, H, m), and the sinks (H,), of values (m, K or H, D): out (n, H, D), lse (n, H)."""
    values = _per_query_head(values, scores.shape[1])
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None].expand(len(scores), -1, 1)], -1)
        visible = torch.cat([visible, visible.new_ones((*visible.shape[:2], 1))], -1)
        values = torch.cat([values, values.new_zeros((1, *values.shape[1:]))])
    any_visible = visible.any(-1, keepdim=True)
    # Rows that see nothing keep their scores until the end: a softmax over nothing has no gradient.
    masked = scores.masked_fill(~visible & any_visible, -math.inf)
    if scores.shape[-1] == 0:
        return scores.new_zeros((*scores.shape[:2], values.shape[-1])), scores.new_full(scores.shape[:2], -math.inf)
    lse = masked.logsumexp(-1)
    out = _mixed((masked - lse[..., None]).exp(), values, visible)
    return torch.where(any_visible, out, 0.0), torch.where(any_visible[..., 0], lse, -math.inf)


def _mixed(weights: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Weights (n, H, m), 0 where not visible, times values (m, H, D): (n, H, D)."""
    if values.isfinite().all():
        return torch.einsum("nhm,mhd->nhd", weights, values)
    # 0 times NaN is NaN: what a query does not see must not be in its product.
    seen = visible.transpose(1, 2).unsqueeze(-1)
    return torch.stack([torch.einsum("hm,mhd->hd", row, values.masked_fill(~own, 0)) for row, own in zip(weights, seen, strict=True)])


def _per_key(gate: Tensor, sequence: Sequence, query: Tensor, num_keys: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Gates of blocks (n, K, NB) as those of their keys (n, H, m), and which keys are not after a query (n, 1, m)."""
    causal = torch.arange(num_keys, device=query.device) <= positions(sequence, query.device)[:, None]
    return _per_query_head(gate.repeat_interleave(block_size, -1)[..., :num_keys], query.shape[1]), causal[:, None]


def _gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    sequence: Sequence,
    block_size: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Causal attention with log_gate (n, K, NB) added to the scores of each block; -inf leaves a block out."""
    bias, causal = _per_key(log_gate, sequence, query, key.shape[0], block_size)
    visible = causal & (bias > -math.inf)
    return _attend(_scores(query, key, scale, softcap) + torch.where(visible, bias, 0.0), visible, value, sinks)


def _gated_by_factor(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    sequence: Sequence,
    block_size: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same with the gate as a factor, the form of the definition: gate * exp(score)."""
    factor, causal = _per_key(gate, sequence, query, key.shape[0], block_size)
    visible = causal & (factor > 0)
    scores = _scores(query, key, scale, softcap)
    top = scores.detach().masked_fill(~visible, -math.inf).amax(-1, keepdim=True) if len(key) else scores.new_zeros((*scores.shape[:2], 1))
    weight = torch.where(visible, factor * (scores - torch.where(top.isfinite(), top, 0.0)).masked_fill(~visible, 0.0).exp(), 0.0)
    total = weight.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.double()[:, None] - torch.where(top.isfinite(), top, 0.0)).exp()
    mixed = _mixed(weight, _per_query_head(value, query.shape[1]), visible)
    return torch.where(total > 0, mixed / torch.where(total > 0, total, 1.0), 0.0)
