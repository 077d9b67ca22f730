"""Page and figure of `expert_dispatch.py`; every number on the page comes from its finished cells.

.venv/bin/python benchmarks/expert_dispatch_page.py docs/einsum_or_dispatch.json    rewrites both
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OURS, SURPRISED, CHECKPOINTED = "expert_mlp", "expert_mlp, surprise", "expert_mlp, checkpointed"
DENSE, EINSUM = "dense einsum, weighed first", "surprise alone, by einsum"
SPARSE = (OURS, "step over grouped_mm", "transformers, grouped_mm", "loop over experts", "Liger")
LABELS = dict(zip(SPARSE, ("`expert_mlp`", "`grouped_mm`", "transformers' `grouped_mm`", "loop", "Liger"), strict=True))
OTHERS = ("transformers, eager", "transformers, batched_mm", "dense einsum")
NEAR = 10.0  # the rule is fitted to sizes whose ratio is within this factor of 1


class Cell(NamedTuple):
    experts: int
    neurons: int
    slots: int
    candidates: dict[str, dict[str, float]]

    @property
    def density(self) -> float:
        return self.slots / self.experts

    def ratio(self, measure: str, peer: str = DENSE, subject: str = OURS) -> float | None:
        """`peer` as a multiple of `subject`; None if one of them was not measured."""
        if peer not in self.candidates or subject not in self.candidates:
            return None
        return self.candidates[peer][measure] / self.candidates[subject][measure]


class Rule(NamedTuple):
    """Dense wins where k/E > factor * neurons ** power; `right` of `judged` cells agree."""

    factor: float
    power: float
    right: int
    judged: int


def crossover(points: Iterable[tuple[float, float]]) -> tuple[float | None, float, float]:
    """Density at which the ratio first falls below 1, interpolated (None if it never does), and the lowest and highest density.

    Args:
        points: (density, ratio) pairs; interpolation is in logarithms.
    """
    ordered = sorted(points)
    low, high = ordered[0][0], ordered[-1][0]
    for (density, ratio), (further, smaller) in pairwise(ordered):
        if ratio > 1 >= smaller:
            part = math.log(ratio) / math.log(ratio / smaller)
            return density * (further / density) ** part, low, high
    return None, low, high


def lines_of(cells: list[Cell], measure: str) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """(neurons, experts) -> (density, ratio) points that differ only in the number of slots; lines have at least three points."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for cell in cells:
        ratio = cell.ratio(measure)
        if ratio is not None:
            found.setdefault((cell.neurons, cell.experts), []).append((cell.density, ratio))
    return {key: sorted(points) for key, points in sorted(found.items()) if len(points) >= 3}


def rule_of(cells: list[Cell], measure: str) -> Rule | None:
    """Least-squares fit of log ratio over log density and log neurons; None if the cells do not determine it."""
    judged = [(cell.density, cell.neurons, ratio) for cell in cells if (ratio := cell.ratio(measure)) is not None]
    near = [row for row in judged if 1 / NEAR <= row[2] <= NEAR]
    if len(near) < 4 or len({row[1] for row in near}) < 2 or len({row[0] for row in near}) < 2:
        return None
    logs = np.log(np.array(near))
    (constant, slope, power), *_ = np.linalg.lstsq(np.column_stack([np.ones(len(near)), logs[:, :2]]), logs[:, 2], rcond=None)
    if slope >= 0:
        return None
    factor, exponent = math.exp(-constant / slope), -power / slope
    right = sum((density > factor * neurons**exponent) == (ratio < 1) for density, neurons, ratio in judged)
    return Rule(factor, exponent, right, len(judged))


def safe_density(cells: list[Cell], measure: str) -> tuple[float, float, float] | None:
    """Highest density up to which dense never wins, and the smallest and largest ratio up to it."""
    judged = sorted((cell.density, ratio) for cell in cells if (ratio := cell.ratio(measure)) is not None)
    lost = min((density for density, ratio in judged if ratio < 1), default=math.inf)
    won = [(density, ratio) for density, ratio in judged if density < lost]
    return (won[-1][0], min(ratio for _, ratio in won), max(ratio for _, ratio in won)) if won else None


def _where(points: list[tuple[float, float]]) -> str:
    """The density at which dense begins to win."""
    found, low, high = crossover(points)
    return f"{found:.2g}" if found else (f"not up to {high:.2g}" if points[0][1] > 1 else f"{low:.2g} or less")


def _crossovers(cells: list[Cell]) -> list[str]:
    """Table of the densities at which dense begins to win."""
    time, peak = lines_of(cells, "min"), lines_of(cells, "peak")
    lines = ["| experts | dense is faster from k/E | dense needs less memory from k/E |", "|---|---:|---:|"]
    for neurons, experts in time:
        where = (_where(time[neurons, experts]), _where(peak[neurons, experts]))
        lines.append(f"| {experts} of {neurons} neurons | {where[0]} | {where[1]} |")
    return lines


def _short(value: float, digits: int = 2) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.{digits}g}"


def _times(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{_short(statistics.median(values), digits)} times ({_short(min(values), digits)} to {_short(max(values), digits)})"


def _ratios(cells: list[Cell], measure: str, peer: str = DENSE, subject: str = OURS) -> list[float]:
    return [ratio for cell in cells if (ratio := cell.ratio(measure, peer, subject)) is not None]


def _answer(cells: list[Cell]) -> list[str]:
    """Page text: the answer, a table of crossovers, then a paragraph per measure."""
    safe = [safe_density(cells, measure) for measure in ("min", "peak")]
    found, headline = [], []
    if safe[0] and safe[1]:
        few = math.ceil(1 / min(safe[0][0], safe[1][0]))
        headline = [
            f"**Sparse dispatch is faster and needs less memory as long as at most one expert in {few} is active. The dense form can be"
            " better if there are few experts and a large share of them is active. The smaller the experts, the smaller the share from"
            " which the dense form is better.**"
        ]
    measures = (("min", "Time", "is faster"), ("peak", "Peak memory", "needs less memory"))
    for (measure, title, better), least in zip(measures, safe, strict=True):
        text = f"- **{title}.**"
        if least:
            text += f" Up to k/E = {least[0]:.2g} `expert_mlp` {better} at every size, by {least[1]:.2g}× to {least[2]:.3g}×."
        rule = rule_of(cells, measure)
        if rule:
            text += (
                f" Rule of thumb: dense {better} if k/E > {rule.factor:.2g} · I<sup>{rule.power:.2g}</sup>. It is right at {rule.right} of"
                f" the {rule.judged} sizes at which dense was measured."
            )
        if least or rule:
            found.append(text)
    found.append(
        "- **Memory kept from forward to backward**, which adds up over the layers of a model: dense keeps"
        f" {_times(_ratios(cells, 'kept'))} as much as `expert_mlp`. Under `torch.utils.checkpoint`, `expert_mlp` keeps"
        f" {_times(_ratios(cells, 'kept', CHECKPOINTED))} as much as without, and takes"
        f" {_times(_ratios(cells, 'min', CHECKPOINTED))} as long."
    )
    best = [min((name for name in SPARSE if name in cell.candidates), key=lambda name: cell.candidates[name]["min"]) for cell in cells]
    behind = max(cell.candidates[OURS]["min"] / cell.candidates[name]["min"] for cell, name in zip(cells, best, strict=True))
    found.append(
        f"- **Sparse forms.** Number of sizes at which each is the fastest: {_counts(best)}."
        " `grouped_mm` is our layer written with torch's `grouped_mm`, transformers' `grouped_mm` the implementation that transformers uses"
        f" under this name. `expert_mlp` takes at most {behind:.2g}"
        " times as long as the fastest."
    )
    text = (
        f"- **Surprise.** Forward and backward with surprise take {_times(_ratios(cells, 'min', SURPRISED), 3)} as long as without; values"
        " below 1 are noise."
    )
    if einsum := _ratios(cells, "min", EINSUM, SURPRISED):
        text += (
            " An einsum over the gradient of each (token, expert) pair computes only the"
            " [surprise](dyn_moe.md#what-the-surprise-is). It takes"
            f" {_times(einsum)} as long as forward and backward with surprise, and needs"
            f" {_times(_ratios(cells, 'peak', EINSUM, SURPRISED))} as much peak memory."
        )
    lines = [*_wrapped(*headline), ""] if headline else []
    lines += [*_crossovers(cells), ""]
    lines += _wrapped(
        "Below, a number such as 1.5 times (0.9 to 3) is the median over the sizes measured, with the smallest and the largest value in"
        " parentheses."
    )
    lines.append("")
    for part in [*found, text]:
        lines += _wrapped(part, "  ")
    return lines


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 140, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _counts(names: list[str]) -> str:
    return ", ".join(f"{LABELS[name]} {names.count(name)}" for name in SPARSE if name in names)


def _number(cell: Cell, name: str, measure: str) -> str:
    if name not in cell.candidates:
        return ""
    scale = 1e3 if measure == "min" else 1e-6
    number = cell.candidates[name][measure] * scale
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _table(cells: list[Cell], columns: list[tuple[str, str, str]]) -> list[str]:
    """Table with the columns (title, candidate, measure); a cell that was not measured is empty."""
    lines = ["| E | I | k | k/E | " + " | ".join(title for title, *_ in columns) + " |", "|" + "---:|" * (4 + len(columns))]
    for cell in cells:
        numbers = " | ".join(_number(cell, name, measure) for _, name, measure in columns)
        lines.append(f"| {cell.experts} | {cell.neurons} | {cell.slots} | {cell.density:.2g} | {numbers} |")
    return lines


def page_of(content: dict[str, Any], stem: str) -> str:
    settings = content["settings"]
    cells = [Cell(cell["experts"], cell["neurons"], cell["slots"], cell["candidates"]) for cell in content["cells"]]
    on_gpu = "cuda" in stem
    liger = any("Liger" in cell.candidates for cell in cells)
    rounds = sorted({int(row["rounds"]) for cell in cells for row in cell.candidates.values()})
    absent = sum(DENSE not in cell.candidates for cell in cells)
    columns = [
        ("`expert_mlp`", OURS, "min"),
        ("with surprise", SURPRISED, "min"),
        ("dense", DENSE, "min"),
        ("`grouped_mm`", "step over grouped_mm", "min"),
        ("transformers' `grouped_mm`", "transformers, grouped_mm", "min"),
        ("loop", "loop over experts", "min"),
        *([("Liger", "Liger", "min")] if liger else []),
    ]
    memory = [
        (f"{title}, {word}", name, measure)
        for title, name in (("`expert_mlp`", OURS), ("checkpointed", CHECKPOINTED), ("dense", DENSE), ("`grouped_mm`", SPARSE[1]))
        for word, measure in (("peak", "peak"), ("kept", "kept"))
    ]
    others = [cell for cell in cells if any(name in cell.candidates for name in OTHERS)]
    measured = [cell for cell in cells if EINSUM in cell.candidates]
    lines = [
        "# Dense einsum or sparse dispatch",
        "",
        *_wrapped(
            "A mixture has E small experts of I neurons, and each token uses k of them. It can be computed in two ways. The dense form"
            " computes all experts for every token, and scales them by routing weights that are mostly zero. Sparse dispatch computes"
            " only the k experts of each token. The dense form does E/k times the arithmetic, in large products. Sparse dispatch sorts and"
            " gathers tokens, multiplies small matrices, and adds the results. `expert_mlp` is tinyonn's sparse dispatch. All figures are"
            f" for forward and backward with {settings['tokens']} tokens of {settings['features']} features, {settings['dtype']}."
        ),
        "",
        *_answer(cells),
        "",
        f"![Dense einsum as multiples of expert_mlp against k/E]({stem}.png)",
        "",
        "Above the line at 1 `expert_mlp` is better, below it the dense einsum. Lines join sizes that differ only in k.",
        "",
        "## What was measured",
        "",
        f"`python benchmarks/expert_dispatch.py{' --device cuda' if on_gpu else ''}` on {settings['device']}, {settings['threads']} torch"
        f" thread{'s' if settings['threads'] > 1 else ''}, torch {settings['torch']}.",
        *_wrapped(
            "The experts of each token are drawn at random, so all experts get about the same number of tokens. The output and all"
            " gradients of every form are compared before time is measured. The forms are timed in turn,"
            f" {rounds[0]} to {rounds[-1]} rounds. The tables show minimum times, because other work on the machine only adds to them;"
            f" medians are in `{stem}.json`. Memory is measured by allocation events, without weights and input. *Peak* is the largest"
            " amount during forward and backward, gradients included. *Kept* is the amount that remains between them."
        ),
        "",
        *_wrapped(
            "The dense form is the fastest that we know. It has one product for the gate and one for up, over all experts. The"
            " routing weights are applied to the hidden values before the last product, which also sums over experts (`nei,efi->nf`). It"
            f" computes no surprise. It was not measured at {absent} of {len(cells)} sizes, where it would take more than"
            f" {settings['dense_operations'] / 1e9:.0f} billion operations."
        ),
        "",
        *_wrapped(
            "The column *loop* is a loop over experts. The table of memory has a column *checkpointed*, `expert_mlp` under"
            " `torch.utils.checkpoint`."
        ),
        "",
        f"Not measured: {'other GPUs' if on_gpu else 'a GPU'}, other numbers of tokens and features, unevenly loaded experts.",
        "",
        "## Milliseconds",
        "",
        *_table(cells, columns),
        "",
        "## Megabytes",
        "",
        *_table(cells, memory),
    ]
    if others:
        titles = {"dense einsum": "naive einsum `nei,efi,ne->nf`"}
        lines += ["", "## Other forms, milliseconds and peak megabytes", ""]
        timed = ", ".join(str(slots) for slots in sorted({cell.slots for cell in others}))
        lines += [f"These forms were timed only at k = {timed}. A cell is empty where a form would need too much time or memory.", ""]
        lines += _table(
            others,
            [(f"{titles.get(name, name)}, {unit}", name, measure) for name in OTHERS for unit, measure in (("ms", "min"), ("MB", "peak"))],
        )
    if measured:
        lines += ["", "## Surprise, milliseconds and peak megabytes", ""] + _table(
            measured,
            [
                ("step, ms", OURS, "min"),
                ("step with surprise, ms", SURPRISED, "min"),
                ("surprise alone by einsum, ms", EINSUM, "min"),
                ("step, MB", OURS, "peak"),
                ("step with surprise, MB", SURPRISED, "peak"),
                ("surprise alone by einsum, MB", EINSUM, "peak"),
            ],
        )
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    cells = [Cell(cell["experts"], cell["neurons"], cell["slots"], cell["candidates"]) for cell in content["cells"]]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), sharex=True, layout="constrained")
    sizes = sorted({cell.neurons for cell in cells})
    for axes, measure, title in zip(panels, ("min", "peak"), ("time", "peak memory"), strict=True):
        for number, neurons in enumerate(sizes):
            points = [(cell.density, ratio) for cell in cells if cell.neurons == neurons and (ratio := cell.ratio(measure)) is not None]
            if points:
                axes.scatter(*zip(*points, strict=True), color=f"C{number}", s=22, label=f"{neurons}")
        for (neurons, _), points in lines_of(cells, measure).items():
            axes.plot(*zip(*points, strict=True), color=f"C{sizes.index(neurons)}", linewidth=1)
        axes.axhline(1, color="0.4", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="active share of experts, k/E", ylabel=f"{title}, dense / expert_mlp")
        for words, shift, side in (("expert_mlp better", 3, "bottom"), ("dense better", -3, "top")):
            where = {"xytext": (0, shift), "textcoords": "offset points", "va": side, "fontsize": 8}
            axes.annotate(words, (0.02, 1), xycoords=("axes fraction", "data"), **where)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if axis is axes.yaxis else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(f"Forward and backward, {title}", fontsize=10)
    panels[0].legend(title="neurons of an expert", frameon=False, fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=150)


def write_page(content: dict[str, Any], folder: Path, stem: str) -> None:
    (folder / f"{stem}.md").write_text(page_of(content, stem), encoding="utf-8")
    draw(content, folder / f"{stem}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    results = parser.parse_args().results
    write_page(json.loads(results.read_text(encoding="utf-8")), results.parent, results.stem)
