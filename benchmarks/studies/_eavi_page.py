"""The page and the figure of the study of EAVI."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _study import Results, half_width, table

from tinyonn.arc import FAMILIES

if TYPE_CHECKING:
    from eavi import Settings

COLOURS = {"teacher forcing": "0.35", "EAVI, own": "C0", "EAVI, super batch": "C1", "scheduled sampling": "C2"}


def cells_of(results: Results, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """The compared runs of each arm, in the order of the seeds."""
    return {arm: [results.cells[f"run | {arm} | {seed}"] for seed in settings.seeds] for arm in COLOURS}


def page(results: Results, settings: Settings, choices: Mapping[str, tuple[float, tuple[float, float]]]) -> list[str]:
    """Lines of the page."""
    arms = cells_of(results, settings)
    first = next(iter(arms))
    lines = [
        "# EAVI at equal compute",
        "",
        "`benchmarks/studies/eavi.py` wrote this page. It compares [EAVI](../arc.md), which trains along the model's own answers, with"
        " teacher forcing and with scheduled sampling.",
        "",
        f"- **Task**: a grid of {settings.side} × {settings.side} cells is to be transformed by a rule that the prompt names with four"
        f" digits. The rules are those of the {len(FAMILIES)} families of `tinyonn.arc.generate`: {', '.join(FAMILIES)}. Rows of the"
        " evaluation occur neither in training nor in the choice of settings.",
        "- **Model**: TinyOnn, bonsai-1m with full attention, trained with `HyperStep`, AdamW and gradients clipped to 1. The learning rate"
        " falls as a cosine to a tenth, by the compute that is spent.",
        f"- **Compute**: {settings.budget:,} tokens a run. A token that passes forward counts one, generated ones and their prompts"
        f" included, padding not; one that passes forward and backward counts three. A step has {settings.batch} rows.",
        "- **Arms**: teacher forcing; EAVI on the model's own answers, which replace the true ones as inputs for a share of the rows that"
        " rises from 0 to 1; EAVI on own and true answers in one batch; scheduled sampling in two passes, where a share of the answer's"
        " tokens, which rises likewise, is replaced by the model's predictions.",
        f"- **Choice of settings**: each arm chose among {len(settings.choices(first))}, by exact answers to {settings.rows} other rows"
        f" after {settings.choice_budget:,} tokens: teacher forcing among learning rates, the others among two rates and two ramps.",
        f"- **Evaluation**: the share of {settings.rows} rows whose greedy answer in free generation is exact. {len(settings.seeds)}"
        " seeds; intervals are 95 % t intervals over seeds, of differences within seeds, on the same rows.",
        f"- **Measured** on {results.origin()}.",
        "",
        "![Exact answers against compute](eavi.png)",
        "",
        "## Results",
        "",
    ]
    rows: list[list[object]] = []
    for arm, cells in arms.items():
        rate, ramp = choices[arm]
        found = []
        for name in ("exact", "tokens"):
            gaps = [one[name][-1] - other[name][-1] for one, other in zip(cells, arms[first], strict=True)]
            found += [f"{statistics.fmean(cell[name][-1] for cell in cells):.3f}", "" if arm == first else _interval(gaps)]
        own = [cell["own exact"] for cell in cells if cell["own exact"] is not None]
        rows.append([
            arm, f"{rate:g}", "" if arm == first else f"{ramp[0]:g} … {ramp[1]:g}", *found,
            f"{statistics.fmean(cell['forced'] for cell in cells):.4f}", f"{statistics.fmean(own):.3f}" if own else "",
            f"{statistics.fmean(cell['steps'] for cell in cells):,.0f}",
        ])  # fmt: skip
    head = [
        "arm",
        "rate",
        "ramp",
        "exact",
        "difference",
        "tokens right",
        "difference",
        "true tokens ranked first",
        "own answers exact",
        "steps",
    ]
    lines += [*table(head, rows), ""]
    lines += [
        "*Exact* and *tokens right* are of answers in free generation; tokens are compared position by position. Differences are from"
        " teacher forcing. *True tokens ranked first* are those of the true answers that the model finds most likely after the true tokens"
        " before them. *Own answers exact* is a mean over the training.",
        "",
        "A greedy answer is exact if, and only if, each true token is ranked first after the true ones before it. So what a model does"
        " after a mistake of its own, which only training along own answers teaches, cannot change the exact answers. It can change the"
        " tokens right.",
        "",
        "By family, exact answers at the end, means over seeds:",
        "",
    ]
    lines += table(["arm", *FAMILIES], ([arm, *(_mean(cells, f"exact {family}") for family in FAMILIES)] for arm, cells in arms.items()))
    lines += ["", "Settings among which each arm chose, with the exact answers to the rows for the choice:", ""]
    tried = [
        [arm, f"{rate:g}", "" if arm == first else f"{ramp[0]:g} … {ramp[1]:g}",
         f"{results.cells[f'choice | {arm} | {rate:g} {ramp[0]:g} {ramp[1]:g}']['final']:.3f}"]
        for arm in arms for rate, ramp in settings.choices(arm)
    ]  # fmt: skip
    return [*lines, *table(["arm", "rate", "ramp", "exact"], tried)]


def _interval(gaps: list[float]) -> str:
    mean, half = statistics.fmean(gaps), half_width(gaps)
    return f"{mean:+.3f} ({mean - half:+.3f} … {mean + half:+.3f})"


def _mean(cells: list[dict[str, Any]], name: str) -> str:
    return f"{statistics.fmean(cell[name] for cell in cells):.2f}"


def draw_figure(results: Results, settings: Settings, path: Path) -> None:
    """Exact answers, and right tokens, against compute: means over seeds as lines, seeds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axes, name, title in ((left, "exact", "Exact answers"), (right, "tokens", "Right tokens")):
        for arm, cells in cells_of(results, settings).items():
            compute = [share * settings.budget / 1e6 for share in settings.marks]
            means = [statistics.fmean(cell[name][place] for cell in cells) for place in range(len(compute))]
            axes.plot(compute, means, color=COLOURS[arm], label=arm)
            for cell in cells:
                axes.plot([spent / 1e6 for spent in cell["compute"]], cell[name], ".", color=COLOURS[arm], alpha=0.4)
        axes.set(xlabel="compute (million tokens)", ylabel="share in free generation")
        axes.set_title(f"{title} (line: mean, dots: seeds)", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
