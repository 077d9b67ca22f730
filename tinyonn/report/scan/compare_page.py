"""Page of a comparison: verdict, difference maps, blocks with intervals, volcano and scatter plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._io.units import counted
from ..html import charts
from ..html.maps import HeatMap
from ..html.page import card, facts, group, maps_data, maps_section, notices, page, section, table, terms, text
from .grid import PLACE_COLUMNS, even_sample, outside_terms, short_names
from .samples import TopicSample
from .statistics import MIN_SEQUENCES, BlockDifferences

# Maximum number of points; of more blocks, the specific ones and a sample of the others are drawn.
_MAX_POINTS = 20_000

_SETTING_TERMS = {
    "block": "64 output features of one weight, the unit of the comparison.",
    "SPS": "synergistic prediction score: activation norm minus gradient norm of a block, each relative to the other blocks of its layer "
    "(in standard deviations).",
    "topic-specific": "a block whose mean SPS differs between the topics by more than chance explains.",
    "bootstrap draws": "number of random samples of the measured sequences, which show how much the differences vary by chance.",
    "interval": "range of the true difference: this many standard errors to either side. A standard error is the typical variation of the "
    "difference by chance.",
    "rank correlation": "agreement of the topics on the order of the blocks from low to high SPS: 1 the same, 0 unrelated, −1 reversed.",
    "halves of A, of B": "the same between random halves of one topic, which is about the value for topics that do not differ.",
}


@dataclass(frozen=True)
class Comparison:
    """Data of the page. `ranked` holds all blocks in order of interest, the specific ones first."""

    a: TopicSample
    b: TopicSample
    topics: tuple[str, str]
    differences: BlockDifferences
    ranked: np.ndarray
    maps: Sequence[HeatMap]
    rank_correlation: float
    split_half_a: float
    split_half_b: float
    resamples: int
    confidence: float
    seed: int
    notes: Sequence[str]

    def shown(self, top: int) -> np.ndarray:
        """Blocks to draw: the first specific ones, or the first tested ones if none is specific."""
        wanted = self.differences.specific if self.differences.specific.any() else self.differences.tested
        return np.array([block for block in self.ranked if wanted[block]][:top], dtype=np.int64)

    def block_name(self, block: int) -> str:
        place = self.a.grid.block_place(block)
        where = f"layer {place.layer} {place.module}" if place.layer.isdigit() else place.parameter.removesuffix(".weight")
        return f"{where} {place.first}–{place.last}"


def comparison_page(found: Comparison, top: int) -> str:
    """The whole document."""
    grid, numbers = found.a.grid, found.differences
    maps_lead = (
        "SPS is z(activation norm) − z(gradient norm) within a layer, averaged over a sequence's tokens and then over sequences, so "
        "longer texts and larger files have no more weight."
    )
    body = [
        f'<p class="verdict">{text(verdict(found))}</p>',
        notices(found.notes),
        section("setting", "What was compared", _sides(found) + facts(_setting(found)) + terms(_SETTING_TERMS)),
        maps_section("Where the topics differ", found.maps, below=terms(outside_terms(grid)), lead=maps_lead),
        _blocks(found, top),
        _points(found),
    ]
    data = {"maps-data": maps_data(found.maps, grid.layers, grid.modules, short_names(grid.modules)), "points-data": _point_payload(found)}
    model = found.a.metadata.get("model") or "One model"
    subtitle = f"{model}; {len(found.a.sps):,} and {len(found.b.sps):,} sequences, {len(numbers.tested):,} blocks."
    return page(f"{found.topics[0]} against {found.topics[1]}", subtitle, body, data, "scatter.js")


def verdict(found: Comparison) -> str:
    """The finding in one sentence."""
    specific, tested = int(found.differences.specific.sum()), int(found.differences.tested.sum())
    level = f"{100 * found.confidence:g} % intervals that hold for all blocks together"
    if not tested:
        return f"No block has {MIN_SEQUENCES} sequences on both sides, so no block can be tested."
    if not specific:
        return f"No block is topic-specific: with {level}, none of {tested:,} intervals excludes a difference of 0."
    return f"{specific:,} of {tested:,} blocks ({100 * specific / tested:.3g} %) are topic-specific, by {level}."


def _sides(found: Comparison) -> str:
    """One row per side."""
    sides = (("A", found.a, found.topics[0]), ("B", found.b, found.topics[1]))
    rows = [(letter, topic, side.name, len(side.sps), side.tokens) for letter, side, topic in sides]
    return table(["", "topic", "file", "sequences", "tokens"], rows, caption="Sides of the comparison", numeric=(3, 4))


def _setting(found: Comparison) -> dict[str, object]:
    numbers = found.differences
    return {
        "credit": found.a.metadata.get("credit"),
        "blocks tested": int(numbers.tested.sum()),
        "bootstrap draws": found.resamples,
        "seed": found.seed,
        "confidence, all blocks": f"{100 * found.confidence:g} %",
        "interval, standard errors": f"± {numbers.critical:.3g}",
        "rank correlation A, B": found.rank_correlation,
        "halves of A": found.split_half_a,
        "halves of B": found.split_half_b,
    }


def _blocks(found: Comparison, top: int) -> str:
    numbers = found.differences
    shown = found.shown(top)
    head = ["#", *PLACE_COLUMNS, found.topics[0], found.topics[1], "difference", "low", "high", "adjusted p"]
    rows: list[list[object]] = []
    for rank, block in enumerate(shown.tolist(), start=1):
        planes = (numbers.mean_a, numbers.mean_b, numbers.difference, numbers.low, numbers.high)
        p = f"< {numbers.smallest_p:.1g}" if numbers.p_value[block] <= numbers.smallest_p else numbers.p_value[block]
        rows.append([rank, *found.a.grid.block_place(block).cells, *(plane[block] for plane in planes), p])
    any_specific = bool(numbers.specific.any())
    title = "Most topic-specific blocks" if any_specific else "Largest differences, none beyond chance"
    bars = charts.interval_bars(
        title,
        [found.block_name(block) for block in shown.tolist()],
        numbers.difference[shown],
        numbers.low[shown],
        numbers.high[shown],
        x_title=f"difference of mean SPS per token: higher on {found.topics[1]} ← 0 → higher on {found.topics[0]}",
        muted=not any_specific,
    )
    listing = table(head, rows, caption=f"{title}, {counted(len(rows), 'block')}", numeric=(0, 4, 5, 6, 7, 8, 9))
    lead = (
        f"Bars are differences, lines their intervals: {100 * found.confidence:g} % for all blocks together, from {found.resamples:,} "
        "bootstrap draws. The adjusted p is the share of draws in which the largest deviation of any block was as large."
    )
    meanings = {
        f"{found.topics[0]}, {found.topics[1]}": "mean SPS per token of the block on that topic.",
        "difference": f"{found.topics[0]} minus {found.topics[1]}.",
        "low, high": "ends of the interval. If 0 lies between them, chance may explain the difference.",
        "adjusted p": "how often chance alone makes the largest difference of any block as large as this one.",
    }
    body = f'<div class="card">{bars}</div><div class="card below">{listing}{terms(meanings)}</div>'
    return section("blocks", title, body, lead=lead)


def _points(found: Comparison) -> str:
    legends = {
        "scatter": "Each point is the mean SPS of a block on both topics. The topics agree on the diagonal.",
        "volcano": "The difference, and its distance from 0 in standard errors. Blocks above the dashed line are topic-specific.",
    }
    titles = {"scatter": "Block by block", "volcano": "Size and certainty"}
    cards = [card(title, f'<figure data-points="{key}"></figure>', legend=legends[key]) for key, title in titles.items()]
    halves = [(found.split_half_a, found.topics[0]), (found.split_half_b, found.topics[1])]
    within = ", ".join(f"{value:.3f} for {topic}" for value, topic in halves if np.isfinite(value))
    lead = f"Spearman's rank correlation between the topics is {found.rank_correlation:.3f}; between random halves of one topic, {within}."
    if len(found.ranked) > _MAX_POINTS:
        lead += f" Of {len(found.ranked):,} blocks, {_MAX_POINTS:,} are drawn: the specific ones, then an even sample of the others."
    return section("points", "All blocks", group("grid2", cards), lead=lead)


def _point_payload(found: Comparison) -> dict[str, Any]:
    numbers = found.differences
    blocks = found.ranked
    if len(blocks) > _MAX_POINTS:
        specific = blocks[: min(int(numbers.specific.sum()), _MAX_POINTS)]
        others = blocks[len(specific) :]
        blocks = np.concatenate([specific, others[even_sample(len(others), _MAX_POINTS - len(specific))]])
    blocks = blocks[numbers.tested[blocks]]
    names = [entry.name.removesuffix(".weight") for entry in found.a.grid.layout]
    bases = [entry.base for entry in found.a.grid.layout]
    entry = found.a.grid.entry[blocks]
    return {
        "topics": list(found.topics),
        "names": names,
        "entry": entry,
        "index": blocks - np.asarray(bases, dtype=np.int64)[entry],
        "a": numbers.mean_a[blocks],
        "b": numbers.mean_b[blocks],
        "difference": numbers.difference[blocks],
        "statistic": np.abs(numbers.statistic[blocks]),
        "specific": numbers.specific[blocks].astype(np.int64),
        "critical": numbers.critical,
    }
