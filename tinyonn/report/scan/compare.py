"""Comparison of the SPS of two topics: `write_comparison`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..._io.files import write_atomically
from ...errors import InputError
from ...mscan import MscanReader
from ..html.maps import HeatMap, make_map
from . import figures
from .compare_page import Comparison, comparison_page
from .grid import short_names
from .report import check_least, check_output, png_paths
from .samples import TopicSample, check_comparable, comparison_notes, read_sample
from .statistics import compare_blocks, rank_correlation, split_half_correlation

_SPLITS = 20


@dataclass(frozen=True)
class SpecificBlock:
    """A block whose mean SPS differs between the topics beyond chance.

    Attributes:
        block: column in the layout.
        layer, module, parameter: position in the model.
        first, last: first and last output feature.
        mean_a, mean_b: mean SPS per token, averaged over sequences.
        difference: mean_a − mean_b.
        low, high: interval of the difference, simultaneous over all blocks.
        p_value: p-value, adjusted for all blocks.
    """

    block: int
    layer: str
    module: str
    parameter: str
    first: int
    last: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class ComparisonResult:
    """Result of a comparison.

    Attributes:
        html, pngs: the written files.
        specific_blocks: all topic-specific blocks, the largest difference first.
        rank_correlation: Spearman's ρ of mean SPS over blocks between the topics.
        split_half_a, split_half_b: the same between random halves of one topic, which is the ρ of topics without a difference.
        tested_blocks: number of blocks with enough sequences on both sides.
        sequences_a, sequences_b: number of compared sequences.
    """

    html: Path
    pngs: tuple[Path, ...]
    specific_blocks: tuple[SpecificBlock, ...]
    rank_correlation: float
    split_half_a: float
    split_half_b: float
    tested_blocks: int
    sequences_a: int
    sequences_b: int


def write_comparison(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    top: int = 20,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    figures_too: bool = True,
) -> ComparisonResult:
    """Compares two scans of one model and writes a self-contained HTML page, with PNGs next to it.

    The units are sequences, each with its mean SPS per token, so longer texts have no more weight. Intervals hold for all blocks together
    (`tinyonn.report.scan.statistics`).

    Args:
        a, b: `.mscan` files of one model, credit and layout.
        output: the page; the PNGs are named after it, with `-difference.png`, `-blocks.png` and `-scatter.png`.
        top: number of blocks in the bar chart and the table.
        resamples: number of bootstrap draws, at least 200.
        confidence: confidence of all intervals together, between 0.5 and 1.
        seed: seed of the bootstrap sampler.
        figures_too: whether to draw the PNGs; needs matplotlib.

    Raises:
        InputError: wrong option, files that cannot be compared, fewer than 8 sequences per side, missing matplotlib.
        MscanError: a file is damaged.
    """
    check_least(top=(top, 1), resamples=(resamples, 200), seed=(seed, 0))
    if not 0.5 <= confidence < 1:
        raise InputError(f"confidence must be at least 0.5 and below 1, got {confidence}.")
    if confidence * (resamples + 1) > resamples:
        raise InputError(
            f"resamples must be at least {int(np.ceil(confidence / (1 - confidence)))} for confidence {confidence}, got {resamples}."
        )
    target = check_output(output)
    if Path(a).exists() and Path(b).exists() and Path(a).samefile(b):
        raise InputError(f"a and b must be different files, got {os.fspath(a)} twice.")
    if figures_too:
        figures.require_matplotlib("figures_too=False")
    name_a, name_b = Path(a).name, Path(b).name
    if name_a == name_b:
        name_a, name_b = (f"{Path(path).resolve().parent.name}/{Path(path).name}" for path in (a, b))
    with MscanReader(a) as reader_a, MscanReader(b) as reader_b:
        check_comparable(reader_a, reader_b, name_a, name_b)
        sample_a, sample_b = read_sample(reader_a, name_a), read_sample(reader_b, name_b)
    found = compare(sample_a, sample_b, resamples=resamples, confidence=confidence, seed=seed)
    write_atomically(target, comparison_page(found, top))
    drawn = _draw(target, found, top) if figures_too else ()
    return ComparisonResult(
        html=target,
        pngs=drawn,
        specific_blocks=tuple(_specific_block(found, int(block)) for block in found.ranked[: int(found.differences.specific.sum())]),
        rank_correlation=found.rank_correlation,
        split_half_a=found.split_half_a,
        split_half_b=found.split_half_b,
        tested_blocks=int(found.differences.tested.sum()),
        sequences_a=len(sample_a.sps),
        sequences_b=len(sample_b.sps),
    )


def compare(a: TopicSample, b: TopicSample, *, resamples: int, confidence: float, seed: int) -> Comparison:
    """All numbers of a comparison."""
    differences = compare_blocks(a.sps, b.sps, resamples=resamples, confidence=confidence, seed=seed)
    topics = (a.topic, b.topic) if a.topic != b.topic else (f"{a.topic} ({a.name})", f"{b.topic} ({b.name})")
    return Comparison(
        a=a,
        b=b,
        topics=topics,
        differences=differences,
        ranked=rank_blocks(differences.specific, differences.difference, differences.statistic),
        maps=difference_maps(a, differences.difference, differences.specific, differences.tested, topics),
        rank_correlation=rank_correlation(differences.mean_a, differences.mean_b),
        split_half_a=split_half_correlation(a.sps, splits=_SPLITS, seed=seed),
        split_half_b=split_half_correlation(b.sps, splits=_SPLITS, seed=seed + 1),
        resamples=resamples,
        confidence=confidence,
        seed=seed,
        notes=comparison_notes(a, b),
    )


def rank_blocks(specific: np.ndarray, difference: np.ndarray, statistic: np.ndarray) -> np.ndarray:
    """Blocks in order of interest: specific blocks by the size of their difference, then the others by their statistic."""
    size = np.where(specific, np.nan_to_num(np.abs(difference)), np.abs(statistic))
    return np.lexsort((np.arange(len(size)), -size, ~specific))


def difference_maps(
    sample: TopicSample, difference: np.ndarray, specific: np.ndarray, tested: np.ndarray, topics: tuple[str, str]
) -> list[HeatMap]:
    """Mean difference of each layer and module, and the share of its tested blocks that are specific."""
    everywhere = np.ones(len(difference))
    mean = sample.grid.mean(difference, everywhere)
    share = sample.grid.mean(np.where(tested, specific.astype(np.float64), np.nan), everywhere)
    return [
        make_map(
            "difference",
            f"Mean SPS, {topics[0]} − {topics[1]}",
            f"Above 0: the module's blocks score higher on {topics[0]}; below 0: higher on {topics[1]}. "
            "Opposite differences within a module cancel.",
            "standard deviations per token",
            mean,
            signed=True,
        ),
        make_map(
            "share",
            "Topic-specific blocks",
            "Share of the module's tested blocks whose interval excludes 0.",
            "share of blocks",
            share,
            signed=False,
        ),
    ]


def _specific_block(found: Comparison, block: int) -> SpecificBlock:
    names = ("mean_a", "mean_b", "difference", "low", "high", "p_value")
    numbers: dict[str, Any] = {name: float(getattr(found.differences, name)[block]) for name in names}
    return SpecificBlock(block=block, **vars(found.a.grid.block_place(block)), **numbers)


def _draw(target: Path, found: Comparison, top: int) -> tuple[Path, ...]:
    grid, numbers = found.a.grid, found.differences
    title = f"{found.topics[0]} against {found.topics[1]}"
    paths = png_paths(target, "difference", "blocks", "scatter")
    figures.draw_maps(paths[0], title, found.maps, "none", grid.layers, short_names(grid.modules))
    shown = found.shown(top)
    heading = f"{title}: most topic-specific blocks" if numbers.specific.any() else f"{title}: no topic-specific block, largest differences"
    names = [found.block_name(int(block)) for block in shown]
    figures.draw_intervals(
        paths[1], heading, names, numbers.difference[shown], numbers.low[shown], numbers.high[shown], "difference of mean SPS per token"
    )
    labels = (f"mean SPS, {found.topics[0]}", f"mean SPS, {found.topics[1]}")
    figures.draw_scatter(
        paths[2], f"{title}: Spearman {found.rank_correlation:.3f}", numbers.mean_a, numbers.mean_b, numbers.specific, labels
    )
    return paths
