"""The page and the figure of the study of converted MLPs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from _study import Results, crossed_difference, table

DENSE, ALL_TUNED = "dense, unconverted", "all experts, tuned"
TOP_K, SIZES = "top-k by cosine", "top-k by size"
EQUAL, PRICE = "thresholds, equal layers", "thresholds, one price"
SURPRISE, DIVERSITY = "one price, surprise", "one price, diversity"
ARMS = (TOP_K, SIZES, EQUAL, PRICE, SURPRISE, DIVERSITY)
ONE_PRICE = (PRICE, SURPRISE, DIVERSITY)


def cells_of(results: Results, settings: Any, arm: str, budget: int) -> list[dict[str, Any]]:
    """One for each seed, at the arm's learning rate."""
    rate = best_rate(results, settings, arm)
    return [results.cells[f"{arm} | {rate:g} | {budget} | {seed}"] for seed in settings.seeds]


def best_rate(results: Results, settings: Any, arm: str) -> float:
    """Learning rate of routers of the lowest loss with the first seed and budget, on texts that are for this choice alone."""
    where = f"{settings.budgets[0]} | {settings.seeds[0]}"
    return min(settings.rates, key=lambda rate: results.cells[f"{arm} | {rate:g} | {where}"]["choice"])


def page(results: Results, settings: Any) -> list[str]:
    """Lines of the page."""
    seeds = settings.seeds
    arms = {(arm, budget): cells_of(results, settings, arm, budget) for arm in ARMS for budget in settings.budgets}
    all_tuned = [results.cells[f"{ALL_TUNED} | {seed}"] for seed in seeds]
    dense = results.cells[DENSE]
    lines = [
        "# Converted MLPs",
        "",
        "`benchmarks/studies/converted.py` wrote this page. It shows what a dense model loses when its MLPs are split into experts and"
        " each token uses only some of them ([DynMoE](../dyn_moe.md)).",
        "",
        "- **Model**: SmolLM2-135M-Instruct (4-bit weights, Q4_1, dequantised). Attention and embeddings are frozen.",
        f"- **Text**: modules of Python's standard library, {settings.tokens} tokens each. {settings.texts} are for the evaluation; for"
        f" each of {len(seeds)} seeds, {settings.sample} others are drawn as the sample, and the rest are for training.",
        f"- **Conversion**: each MLP becomes {settings.experts} experts of {1536 // settings.experts} neurons, split and calibrated on the"
        " sample.",
        f"- **Tuning**: {settings.steps} steps of Adam on experts and routers, one text a step, with matrix products in bfloat16."
        f" With seed {seeds[0]} and k = {settings.budgets[0]}, each arm tries {' and '.join(f'{rate:g}' for rate in settings.rates)} as"
        " the routers' learning rate, and keeps the one of lower loss on other modules, which are for this choice alone.",
        "- **Equal numbers of experts**: thresholds choose another number of experts on other texts. Before the evaluation, one shift for"
        " each layer restores the mean on the evaluation texts. *As is* is without this shift.",
        f"- **Measured** on {results.origin()}.",
        "",
        "Arms:",
        "",
        f"- *{TOP_K}* and *{SIZES}*: exactly k experts per token, tuned with the load-balancing loss of Switch Transformer. The"
        " routers of the first start as those of all arms below; those of the second are linear and predict the log of the norm of each"
        " expert's output, by ridge regression on the sample.",
        f"- *{EQUAL}*: every layer has a mean of k experts per token; tuned by the language loss alone.",
        f'- *{PRICE}*: k is the mean over layers, and one price, `calibrate_experts(price="gradient")`, decides each layer\'s part; tuned'
        f" by the language loss alone. *{SURPRISE}* and *{DIVERSITY}* add the loss on [surprise](../dyn_moe.md#what-the-surprise-is)"
        " or `sparse_diversity_loss`, in `HyperStep`.",
        "",
        "*Before* means calibrated only, *after* means tuned too. *Mean experts* is counted on the evaluation texts, after tuning. The last"
        f" column is the paired difference of the loss after tuning to *{SIZES}*, in nats, with a 95 % interval for other seeds and texts.",
        "",
        "![Perplexity against mean experts per token](converted.png)",
        "",
        "| | k | router rate | mean experts | perplexity before | perplexity after | as is: experts, perplexity | difference of loss |",
        "|---|---|---|---|---|---|---|---|",
        f"| {DENSE} | | | | {math.exp(dense['loss dense']):.2f} | | | |",
        f"| {ALL_TUNED} | | | {settings.experts} | | {perplexity(all_tuned, 'after'):.2f} | | |",
    ]
    for budget in settings.budgets:
        for arm in ARMS:
            cells, gap = arms[arm, budget], ""
            if arm != SIZES:
                gap = interval(cells, arms[SIZES, budget])
            experts, as_is = (math.fsum(cell[f"k after{how}"] for cell in cells) / len(cells) for how in ("", ", as is"))
            before, after, other = (perplexity(cells, when) for when in ("before", "after", "after, as is"))
            rate = best_rate(results, settings, arm)
            lines.append(f"| {arm} | {budget} | {rate:g} | {experts:.2f} | {before:.2f} | {after:.2f} | {as_is:.2f}, {other:.2f} | {gap} |")
    lines += ["", "Differences of the loss after tuning among thresholds:", ""]
    pairs = ((PRICE, EQUAL), (SURPRISE, PRICE), (DIVERSITY, PRICE))
    head = ["", *(f"{budget} of {settings.experts} experts" for budget in settings.budgets)]
    rows: list[list[object]] = [
        [f"{one} less {other}", *(interval(arms[one, budget], arms[other, budget]) for budget in settings.budgets)] for one, other in pairs
    ]
    return [*lines, *table(head, rows)]


def interval(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    return "{:+.3f} ({:+.3f} … {:+.3f})".format(*crossed_difference(*([one["losses after"] for one in arm] for arm in (ours, theirs))))


def perplexity(cells: list[dict[str, Any]], when: str) -> float:
    return math.exp(math.fsum(cell[f"loss {when}"] for cell in cells) / len(cells))


def draw_figure(results: Results, settings: Any, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for colour, arm in zip(("C3", "C1", "0.3", "C0", "C2", "C4"), ARMS, strict=True):
        for when, line in (("before", "--"), ("after", "-")):
            by_budget = [cells_of(results, settings, arm, budget) for budget in settings.budgets]
            points = sorted((math.fsum(cell[f"k {when}"] for cell in cells) / len(cells), perplexity(cells, when)) for cells in by_budget)
            if when == "after" or arm in (TOP_K, SIZES, EQUAL, PRICE):  # the others start from the same model as one price
                axes.plot(*zip(*points, strict=True), label=f"{arm}, {when}", color=colour, linestyle=line, marker="o", markersize=4)
    tuned = [results.cells[f"{ALL_TUNED} | {seed}"] for seed in settings.seeds]
    for name, height, line in ((DENSE, math.exp(results.cells[DENSE]["loss dense"]), "-"), (ALL_TUNED, perplexity(tuned, "after"), ":")):
        axes.axhline(height, color="0.7", linestyle=line, linewidth=1, label=name)
    axes.set(xlabel=f"mean experts per token, of {settings.experts}", ylabel="perplexity", yscale="log")
    axes.set_title("SmolLM2-135M, held-out Python modules", fontsize=10)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
