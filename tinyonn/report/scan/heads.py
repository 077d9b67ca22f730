"""∫SPS of attention heads, from the output blocks of their projections.

    head h:  q(h) + (k(g) + v(g)) / G,    g = h // G, the key/value head that h shares with G − 1 others

A block of 64 features may hold parts of several heads, or a head several blocks, so a block's ∫SPS is divided by the number of
overlapping features. The sum over heads equals the sum over the q, k and v blocks. o_proj is not included: its heads are input
columns, and a scan records output blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .data import Totals
from .grid import FEATURES_PER_BLOCK, BlockGrid, Floats

# Separate projections, by the last part of their module's name.
_SEPARATE = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "query": "q", "key": "k", "value": "v"}
# Projections that hold q, then k, then v in one weight. Interleaved ones (GPT-NeoX, Bloom, Falcon) are not supported.
_FUSED = ("qkv_proj", "c_attn", "Wqkv")


@dataclass(frozen=True)
class HeadScores:
    """∫SPS of every attention head.

    Attributes:
        layers: (rows,) row of the grid of each line.
        query, key, value: (rows, heads) shares of ∫SPS; key and value are already divided by G.
        blocks_per_head: number of blocks of one head; 1 if head and block coincide, below 1 if heads share a block.
    """

    layers: list[int]
    query: Floats
    key: Floats
    value: Floats
    blocks_per_head: float

    @property
    def total(self) -> Floats:
        return self.query + self.key + self.value


def head_scores(grid: BlockGrid, totals: Totals, metadata: Mapping[str, Any]) -> HeadScores | str:
    """∫SPS per head, or the reason why it cannot be computed.

    Args:
        grid: blocks of the file.
        totals: per-block numbers of the file.
        metadata: metadata of the file with `num_attention_heads`, `num_key_value_heads` and `head_dim`.
    """
    heads = _positive(metadata.get("num_attention_heads"))
    groups = _positive(metadata.get("num_key_value_heads")) or heads
    width = _positive(metadata.get("head_dim"))
    if not heads or not groups or not width:
        return "The file's metadata has no num_attention_heads and head_dim, so blocks cannot be assigned to heads."
    if heads % groups:
        return f"{heads} attention heads cannot share {groups} key/value heads evenly."
    share = heads // groups
    found: dict[int, dict[str, Floats]] = {}
    for entry in grid.layout:
        last = entry.name.removesuffix(".weight").rpartition(".")[2]
        if not entry.blocks:
            continue
        row = int(grid.cell[entry.base]) // grid.shape[1]
        feature = _per_feature(totals.integral[entry.base : entry.base + entry.blocks], entry.out_features)
        if last in _SEPARATE:
            part = _SEPARATE[last]
            if len(feature) == width * (heads if part == "q" else groups):
                found.setdefault(row, {})[part] = feature
        elif last in _FUSED and len(feature) == width * (heads + 2 * groups):
            q, k, v = np.split(feature, [width * heads, width * (heads + groups)])
            found.setdefault(row, {}).update(q=q, k=k, v=v)
    rows = sorted(row for row, parts in found.items() if len(parts) == 3)
    if not rows:
        return f"No layer has q, k and v projections with {heads} and {groups} heads of {width} features."
    query = np.stack([found[row]["q"].reshape(heads, width).sum(axis=1) for row in rows])
    key = np.stack([np.repeat(found[row]["k"].reshape(groups, width).sum(axis=1) / share, share) for row in rows])
    value = np.stack([np.repeat(found[row]["v"].reshape(groups, width).sum(axis=1) / share, share) for row in rows])
    return HeadScores(rows, query, key, value, width / FEATURES_PER_BLOCK)


def head_names(num_heads: int) -> tuple[list[str], list[str]]:
    """Full and short column names for a map of heads."""
    short = [str(head) for head in range(num_heads)]
    return [f"head {name}" for name in short], short


def _per_feature(blocks: Floats, features: int) -> Floats:
    """Divides each block's value evenly among its features."""
    width = np.full(len(blocks), FEATURES_PER_BLOCK)
    width[-1] = features - FEATURES_PER_BLOCK * (len(blocks) - 1)
    return np.repeat(blocks / width, width) if width[-1] > 0 else np.empty(0)


def _positive(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
