"""The page and the figure of the study of selection."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from _study import Results, ratio_of_means, table

Arm = tuple[str, str]
FEWEST = 6  # texts of an interval
SHOWN = {  # colour, dashes and marker in the figure
    ("top-n", "mean keys"): ("0.35", "--", "o"),
    ("n per head", "mean keys"): ("0.6", ":", "s"),
    ("old rule", "mean keys"): ("C3", "--", "v"),
    ("price and offsets", "mean keys"): ("C1", "-", "^"),
    ("price and lines", "mean keys"): ("C0", "-", "o"),
    ("oracle: top-n of the true share", ""): ("0.75", "--", "x"),
    ("oracle: one price on the true effect", ""): ("C2", "-", "x"),
}
PAIRS = (  # of arms, compared at equal blocks beside the best static arm
    (("price and lines", "mean keys"), ("n per head", "mean keys")),
    (("price and lines", "distilled keys"), ("n per head", "distilled keys")),
    (("price and lines", "distilled keys"), ("price and lines", "mean keys")),
    (("top-n", "distilled keys"), ("top-n", "mean keys")),
    (("top-p", "mean keys"), ("top-n", "mean keys")),
    (("old rule", "mean keys"), ("top-n", "mean keys")),
)


def name_of(arm: Arm) -> str:
    return ", ".join(part for part in arm if part)


class Cells:
    """Cells of a study by arm, text and budget."""

    def __init__(self, results: Results, budgets: tuple[int, ...], arms: tuple[Arm, ...]) -> None:
        self.results, self.budgets, self.arms = results, budgets, arms
        self.texts: list[str] = results.settings["texts"]

    def get(self, arm: Arm, text: str, budget: int) -> dict[str, Any] | None:
        return self.results.get(name_of(arm), text, budget)

    def having(self, arms: list[Arm], budget: int, kind: str = "") -> list[str]:
        """Texts of a kind on which all these arms were measured."""
        return [text for text in self.texts if text.startswith(kind) and all(self.get(arm, text, budget) for arm in arms)]

    def mean(self, arm: Arm, budget: int, texts: list[str], field: str = "excess") -> float:
        return sum(self.get(arm, text, budget)[field] for text in texts) / len(texts)  # type: ignore[index]

    def static_at(self, static: Arm, text: str, budget: int, blocks: float) -> float:
        """Excess of a static arm on a text at a number of blocks, on the line between the budgets around it."""
        points = sorted((cell["blocks"], cell["excess"]) for other in self.budgets if (cell := self.get(static, text, other)))
        here = self.get(static, text, budget)
        assert here is not None
        for low, high in pairwise(points):
            if low[0] <= blocks <= high[0] or (blocks < points[0][0] and low == points[0]) or high == points[-1]:
                slope = (high[1] - low[1]) / (high[0] - low[0])
                return float(here["excess"] + slope * (blocks - here["blocks"]))
        return float(here["excess"])

    def best_static(self, budget: int) -> Arm | None:
        """The static arm of the least mean excess on the texts that all static arms have."""
        static = [arm for arm in self.arms if arm[0] in ("top-n", "n per head") and self.having([arm], budget)]
        texts = self.having(static, budget) if static else []
        return min(static, key=lambda arm: self.mean(arm, budget, texts)) if texts else None

    def ratio(self, arm: Arm, static: Arm, budget: int, kind: str) -> tuple[float, float, float] | None:
        """Mean excess over that of a static arm at equal blocks, with its interval over texts."""
        texts = self.having([arm, static], budget, kind)
        if len(texts) < 2:
            return None
        cells = [self.get(arm, text, budget) for text in texts]
        ours = [cell["excess"] for cell in cells]  # type: ignore[index]
        theirs = [self.static_at(static, text, budget, cell["blocks"]) for text, cell in zip(texts, cells, strict=True)]  # type: ignore[index]
        return ratio_of_means(ours, theirs)


def write(folder: Path, results: list[Results], budgets: tuple[int, ...], arms: list[tuple[Arm, ...]]) -> None:
    """Writes the page and the figure; the first results are the study's, those of longer texts follow."""
    cells, *longer = [Cells(one, budgets, own) for one, own in zip(results, arms, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "selection.md").write_text("\n".join(_page(cells, longer)) + "\n", encoding="utf-8")
    _figure(cells, folder / "selection.png")


def _page(cells: Cells, longer: list[Cells]) -> list[str]:
    settings = cells.results.settings
    lines = [
        "# Which key blocks to read, without training",
        "",
        "This page compares rules that choose which key blocks a trained model reads. No weight of the model changes."
        f" `benchmarks/studies/selection.py` measured on {cells.results.origin()}.",
        "",
        "- **Model**: SmolLM2-135M-Instruct (4-bit weights, Q4_1, dequantised), 30 layers of 9 query and 3 key/value heads. Its linear"
        " layers compute in bfloat16, attention in float32.",
        f"- **Texts**: {', '.join(settings['texts'])}: modules of Python's standard library, and {settings['tokens']:,} tokens of the"
        " language reference that `help()` prints, from the given token.",
        "- **Blocks** have 64 positions. Every query reads the first block, the previous and its own. The others are *far* blocks.",
        "- **Excess** is the mean loss of a next token over that of dense attention on the same text, in nats.",
        "- **Static arms** read a fixed number of blocks: *top-n* the same number everywhere; *n per head* the numbers that save most on"
        " the calibration texts.",
        "- **Dynamic arms** read the blocks above a threshold. *Top-p* takes the smallest set with a given share of the attention; *one"
        " price* compares the estimated share itself; *offsets* add log √(mean cost) − log √(mean true share²) of each head; *lines*, which"
        " `calibrate` uses, compare the cost that is expected for the estimated share. *More* or *less if uncertain* also moves the"
        f" threshold of a query by {', '.join(f'{-slope:+g}' for slope in settings['slopes'].values())} times its tau, the normalised"
        " entropy of its attention to compressed keys. *Old rule* is that of earlier versions: share relative to a uniform one, slope 1 and"
        " temperature 1.",
        "- **Oracles** know the dense attention. They are bounds, not methods.",
        "- **Calibration** of offsets, lines and numbers per head: `inspect.py` and 2,048 tokens of prose, which are none of the texts.",
        f"- **Compressed keys** stand for 16 positions: means, or distilled in {settings['steps']} steps on five texts.",
        "- **Equal blocks**: the threshold of a dynamic arm is set on the text itself to the mean of top-n, within 0.05 blocks. `calibrate`"
        " sets it on a sample. Ratios compare with the best static arm at the blocks that the dynamic arm has read, between budgets.",
        f"- **Intervals**: 95 %, for other texts; of single arms where there are at least {FEWEST} texts.",
        "",
        "![Excess loss against mean blocks](selection.png)",
        "",
        *_summary(cells),
        *_pairs(cells),
    ]
    for budget in cells.budgets:
        if (best := cells.best_static(budget)) is not None:
            lines += _budget(cells, budget, best)
    for others in longer:
        texts = [text for text in others.texts if others.results.get("dense", text)]
        if texts:
            lines += [
                f"## Texts of {others.results.settings['tokens']:,} tokens",
                "",
                f"The same on {', '.join(texts)}, with fewer arms. Lines and numbers per head come from the calibration texts at this"
                f" length; distilled keys are those of {settings['tokens']:,} tokens.",
                "",
                *_summary(others, level=3),
            ]
        for budget in others.budgets:
            if (best := others.best_static(budget)) is not None:
                lines += _budget(others, budget, best, level=3)
    if check := cells.results.get("check"):
        lines += [
            "## The same thresholds in a converted model",
            "",
            f"A model that `convert_attention` and `calibrate` have set reads {check['blocks of the converted model']:.3f} blocks of"
            f" {settings['texts'][0]} at a loss of {check['converted model']:.5f}. The study's own run with its thresholds reads"
            f" {check['blocks']:.3f} at {check['run of this study']:.5f}.",
        ]
    return lines


def _summary(cells: Cells, level: int = 2) -> list[str]:
    """Ratios of DynNSA's arms to the better top-n and to the best static arm."""
    rows: list[list[object]] = []
    for budget in cells.budgets:
        for ours in (("price and lines", "mean keys"), ("price and lines", "distilled keys")):
            texts = cells.having([arm for arm in cells.arms if arm[0] == "top-n"] + [ours], budget)
            best = cells.best_static(budget)
            if not texts or best is None:
                continue
            top_n = min((arm for arm in cells.arms if arm[0] == "top-n"), key=lambda arm: cells.mean(arm, budget, texts))
            found = [cells.ratio(ours, static, budget, "") for static in (top_n, best)]
            shown = ["" if one is None else f"{one[0]:.2f} ({one[1]:.2f} … {one[2]:.2f})" for one in found]
            rows.append(
                [f"{cells.mean(ours, budget, texts, 'blocks'):.1f}", name_of(ours), name_of(top_n), shown[0], name_of(best), shown[1]]
            )
    if not rows:
        return []
    head = ["blocks", "arm", "the better top-n", "excess, ratio to it", "the best static arm", "excess, ratio to it"]
    return [f"{'#' * level} DynNSA against static arms", "", *table(head, rows), ""]


def _pairs(cells: Cells) -> list[str]:
    """Ratios of some pairs of arms."""
    rows: list[list[object]] = []
    for ours, theirs in PAIRS:
        found = [cells.ratio(ours, theirs, budget, "") for budget in cells.budgets]
        shown = ["" if one is None else f"{one[0]:.2f} ({one[1]:.2f} … {one[2]:.2f})" for one in found]
        rows.append([name_of(ours), name_of(theirs), *shown])
    wanted = [cells.get(("top-n", "mean keys"), cells.texts[0], budget) for budget in cells.budgets]
    head = ["arm", "against", *("" if one is None else f"excess, ratio at {one['blocks']:.1f} blocks" for one in wanted)]
    return ["## Other pairs", "", *table(head, rows), ""]


def _budget(cells: Cells, budget: int, best: Arm, level: int = 2) -> list[str]:
    sparse = [arm for arm in cells.arms if cells.having([arm], budget)]
    first = cells.get(best, cells.having([best], budget)[0], budget)
    assert first is not None
    rows = []
    for arm in sparse:
        texts = cells.having([arm], budget)
        by_kind = [cells.having([arm], budget, kind) for kind in ("prose", "code")]
        row: list[object] = [name_of(arm), len(texts), f"{cells.mean(arm, budget, texts, 'blocks'):.2f}"]
        row += [f"{cells.mean(arm, budget, own):.4f}" if own else "" for own in by_kind]
        row.append(f"{cells.mean(arm, budget, texts, 'late'):.4f}")
        for kind in ("prose", "code", ""):
            found = None if arm == best else cells.ratio(arm, best, budget, kind)
            shown = (
                ""
                if found is None
                else f"{found[0]:.2f}" + (f" ({found[1]:.2f} … {found[2]:.2f})" if len(texts) >= FEWEST and not kind else "")
            )
            row.append("1" if arm == best else shown)
        rows.append(row)
    head = ["arm", "texts", "blocks", "excess, prose", "code", "late half, all", "ratio, prose", "code", "all"]
    title = f"{'#' * level} {first['blocks']:.1f} blocks a query, {first['far']:.1f} of them far"
    return [title, "", f"The best static arm of the table is {name_of(best)}; ratios are to it.", "", *table(head, rows), ""]


def _figure(cells: Cells, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained", sharey=True)
    for panel, kind in zip(panels, ("prose", "code"), strict=True):
        for arm, (colour, dashes, marker) in SHOWN.items():
            points = [
                (cells.mean(arm, budget, texts, "blocks"), cells.mean(arm, budget, texts))
                for budget in cells.budgets
                if (texts := cells.having([arm], budget, kind))
            ]
            if points:
                panel.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, marker=marker, markersize=4, label=name_of(arm))
        panel.set(xlabel="mean blocks a query", title=kind)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("excess loss, nats a token")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("SmolLM2-135M, 2,048 tokens: loss over dense attention at equal blocks", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)
