"""DynNSA written out: every query against every key, block gates as a dense matrix, float64, differentiable by autograd.

B batch, T queries, H query heads, K key/value heads, G = H / K, D head dim, M compressed keys, NB key blocks, n tokens of one sequence
"""

from __future__ import annotations

import math
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._dense import (
    Sequence,
    attend,
    compressed_keys,
    empty_lse,
    gated,
    gated_by_factor,
    positions,
    probabilities_of,
    scores_of,
    sequences,
)

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
    out, lse, entropy = torch.zeros_like(query), empty_lse(query, sinks), query.new_zeros(query.shape[:3])
    for sequence in sequences(query, num_keys, compress_size, cu_seqlens, key_start, key_end):
        row, rows = sequence.batch, sequence.queries
        k, visible = compressed_keys(keys, sequence, compress_size)
        v, _ = compressed_keys(values, sequence, compress_size)
        scores = scores_of(query[row, rows], k, scale, softcap)
        out[row, rows], lse[row, rows] = attend(scores, visible[:, None], v, sinks)
        probabilities = probabilities_of(scores, attend(scores, visible[:, None], v, None)[1], visible[:, None])
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
    out, lse = torch.zeros_like(query), empty_lse(query, sinks)
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
        out[row, rows], lse[row, rows] = gated(
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
        scores = scores_of(query[row, rows], key[row, columns], scale, softcap)
        out[row, rows], _ = attend(scores, visible[:, None], value[row, columns], sinks)
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
        selected[row, rows] = gated_by_factor(
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

    keys, visible = compressed_keys(key_compressed, sequence, compress_size)
    probabilities = probabilities_of(scores_of(query, keys, scale, softcap), lse, visible[:, None])
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
