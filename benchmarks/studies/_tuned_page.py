"""The page and the figure of the study of tuned conversions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from _study import Results, crossed_difference, table
from torch import Tensor

DENSE, STATIC, PRICE = "dense", "static top-n", "one price"
ARMS = (DENSE, STATIC, PRICE)
BEFORE = -1  # in place of a seed: the cell of a model that was not tuned
COLOURS = {DENSE: "0.4", STATIC: "C1", PRICE: "C0"}


def name(arm: str, seed: int) -> tuple[str, str]:
    """Key of a cell."""
    return arm, "before" if seed == BEFORE else f"seed {seed}"


class Cells:
    """Cells of a study that has run whole.

    Args:
        settings: the study's, `tuned.Settings`.
    """

    def __init__(self, results: Results, settings: Any) -> None:
        self.results, self.settings = results, settings

    def of(self, arm: str, tuned: bool) -> list[dict[str, Any]]:
        """One for each seed; the same one for all before tuning."""
        found = [self.results.get(*name(arm, seed if tuned else BEFORE)) for seed in self.settings.seeds]
        if None in found:
            raise SystemExit(f"the study must have run whole, got no cell of {arm}.")
        return found  # type: ignore[return-value]

    def losses(self, arm: str, tuned: bool) -> Tensor:
        """(seeds, texts)."""
        return torch.tensor([cell["losses"] for cell in self.of(arm, tuned)], dtype=torch.float64)

    def mean(self, arm: str, tuned: bool, key: str) -> float:
        return sum(cell[key] for cell in self.of(arm, tuned)) / len(self.settings.seeds)

    def excess(self, arm: str, tuned: bool, other: str = DENSE, kind: str | None = None) -> tuple[float, float, float]:
        """Perplexity over another arm's, less 1, with its interval."""
        kinds = self.of(arm, tuned)[0]["kinds"]
        chosen = [place for place, one in enumerate(kinds) if kind in (None, one)]
        return relative(self.losses(arm, tuned)[:, chosen], self.losses(other, tuned)[:, chosen])


def relative(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """exp of the mean difference of two arms' losses, (seeds, texts) in nats, less 1, with an interval for other seeds and texts."""
    middle, low, high = map(math.expm1, crossed_difference(ours.tolist(), theirs.tolist()))
    return middle, low, high


def percent(numbers: tuple[float, float, float]) -> str:
    middle, low, high = (100 * number for number in numbers)
    return f"{middle:+.2f} % ({low:+.2f} … {high:+.2f})"


def page(cells: Cells) -> list[str]:
    settings = cells.settings
    rows: list[list[object]] = []
    for tuned in (False, True):
        for arm in ARMS:
            far = "" if arm == DENSE else f"{cells.mean(arm, tuned, 'far'):.2f}"
            perplexity = f"{math.exp(cells.losses(arm, tuned).mean().item()):.3f}"
            excess = ["", "", ""] if arm == DENSE else [percent(cells.excess(arm, tuned, kind=kind)) for kind in (None, "code", "prose")]
            rows.append([arm, "yes" if tuned else "no", f"{cells.mean(arm, tuned, 'blocks'):.2f}", far, perplexity, *excess])
        shipped = [cell["as shipped"] for cell in cells.of(PRICE, tuned)]
        loss, blocks, far_blocks = (sum(one[key] for one in shipped) / len(shipped) for key in ("loss", "blocks", "far"))
        tuned_word = "yes" if tuned else "no"
        rows.append([f"{PRICE}, as shipped", tuned_word, f"{blocks:.2f}", f"{far_blocks:.2f}", f"{math.exp(loss):.3f}", "", "", ""])
    low = min(settings.numbers(30))
    against = percent(cells.excess(PRICE, True, STATIC))
    return [
        "# A tuned conversion that reads a quarter of the key blocks",
        "",
        "This page shows what a trained model loses when its queries read a quarter of the key blocks and it is tuned to do so. The",
        "budget is spent in one of two ways: on the same number of blocks for every query, or on the blocks whose share of the",
        "attention passes one price. `benchmarks/studies/tuned.py` wrote the page.",
        "",
        f"- **Model**: SmolLM2-135M-Instruct (4-bit weights, dequantised), {settings.tokens:,} tokens, key blocks of 64. A dense query",
        f"  reads {settings.blocks:g} blocks on average.",
        f"- **Tuning**: {settings.steps} steps of one row, {settings.steps * settings.tokens:,} tokens, the same rows for all arms of a",
        "  seed, code and prose of the standard library by turns. AdamW trains LoRA adapters of rank",
        f"  {settings.rank} on the projections of queries, keys, values and outputs; in the sparse arms also gates and compression.",
        f"- **{STATIC.capitalize()}** reads the blocks with the highest shares, {low} or {low + 1} in a layer,",
        f"  {settings.budget(30):.2f} on average.",
        f"- **{PRICE.capitalize()}** is `calibrate`, then tuning with `BudgetSchedule`, then `calibrate` once more without a gradient.",
        f"- **Compressed keys**: `distil_compression` taught them for {settings.distil_steps} steps. Both sparse arms start from the same.",
        f"- **Evaluation**: {settings.rows} other texts, {len(settings.seeds)} seeds of tuning. Excess is the perplexity over that of the",
        "  dense model, tuned alike where the arm is tuned. Brackets hold a 95 % interval for other seeds and texts.",
        "- **Equal blocks**: other texts read more or fewer blocks at the price that the sample set. The price is set again, at most",
        "  twice, until the evaluation texts read as many as static top-n within half a percent. *As shipped* keeps the sample's price.",
        "",
        "![Excess perplexity of the two sparse arms, before and after tuning, and far blocks by layer](tuned.png)",
        "",
        *table(["arm", "tuned", "blocks", "far blocks", "perplexity", "excess", "code", "prose"], rows),
        "",
        f"After tuning, the perplexity with one price differs from that with static top-n by {against}. Three blocks are read whatever an",
        "arm chooses: the first, the previous and a query's own. Far blocks are the others.",
        "",
        f"Measured on {cells.results.origin()}.",
    ]


def figure(cells: Cells, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawing, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for place, arm in ((-0.15, STATIC), (0.15, PRICE)):
        found = [[100 * number for number in cells.excess(arm, tuned)] for tuned in (False, True)]
        middle = [one[0] for one in found]
        bounds = [[one[0] - one[1] for one in found], [one[2] - one[0] for one in found]]
        left.bar([place, 1 + place], middle, 0.28, yerr=bounds, color=COLOURS[arm], ecolor="0.2", capsize=3, label=arm)
        layers = torch.tensor([cell["far by layer"] for cell in cells.of(arm, True)]).mean(0)
        right.plot(range(1, len(layers) + 1), layers.tolist(), "o-", color=COLOURS[arm], markersize=3, label=arm)
    left.axhline(0, color="0.4", linewidth=1)
    left.set(xticks=[0, 1], xticklabels=["before tuning", "after tuning"], ylabel="perplexity over dense, %", xlim=(-0.6, 1.6))
    right.set(xlabel="layer", ylabel="far blocks per query", ylim=(0, None))
    left.set_title("Excess over the dense model, tuned alike where tuned", fontsize=10)
    right.set_title("Where the tuned models read", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def write(folder: Path, results: Results, settings: Any) -> None:
    cells = Cells(results, settings)
    (folder / "tuned.md").write_text("\n".join(page(cells)) + "\n", encoding="utf-8")
    figure(cells, folder / "tuned.png")
