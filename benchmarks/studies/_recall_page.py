"""The page and the figure of the study of recall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _recall_task import DEMANDS, FORCED, VALUES, Settings, new_model
from _study import Results, crossed_difference, table

DENSE, STATIC, PRICE = ARMS = ("dense", "static top-n", "one price")


def page(results: Results, settings: Settings) -> list[str]:
    """Lines of the page."""
    arms = {arm: [results.cells[f"{arm} | {seed}"] for seed in settings.seeds] for arm in ARMS}
    blocks = settings.tokens // settings.block
    accuracy = [f"accuracy {demand}" for demand in DEMANDS]
    lines = [
        "# Recall from scratch",
        "",
        "`benchmarks/studies/recall.py` wrote this page. It trains a model from scratch with few key blocks per query and measures how well"
        " the model recalls facts that lie in one block or in several ([DynNSA](../dyn_nsa.md)).",
        "",
        f"- **Task**: rows of {settings.tokens:,} tokens. They consist of text of the standard library, byte by byte, with facts scattered"
        " in the first 5/8 and questions in the last 5/16. A key has 1, 2, 4 or 8 facts, each in another block. Of 4 or 8 facts, half"
        " hold the right value, and each of the others holds another value. Two facts of a key hold the same value, so one is enough.",
        f"- **Model**: a Llama of {settings.layers} layers, {settings.width} features, 4 query heads and 2 key/value heads, about"
        f" {parameters(settings) / 1e6:.1f} million parameters. Key blocks have {settings.block} tokens, compressed keys 16.",
        f"- **Training**: {settings.steps} steps of {settings.batch} rows with AdamW. In the first {settings.dense_steps} steps, which all"
        f" arms share, attention is plain; the first {round(settings.steps * settings.short_share)} have more rows of"
        f" {settings.short} tokens."
        f" Both sparse arms get the same distillation of compressed keys: {settings.distil_steps} steps when attention"
        f" becomes sparse, and {settings.again_steps} more every {settings.again_every} steps."
        " Both read fewer blocks step by step, from all to the budget over the first 30 % of the sparse steps.",
        f"- **Arms**: dense reads every block. Static top-n reads the {settings.top_n} blocks with the highest shares; the {FORCED} forced"
        " ones are among them. One price reads the blocks whose share passes a learned threshold. Its budget is the mean number of blocks"
        f" of static top-n, {settings.target:.2f} of {(blocks + 1) / 2:g}, as one mean over layers, heads and tokens.",
        f"- **Evaluation**: {settings.rows} rows of text from other modules, {len(settings.seeds)} seeds. Intervals are 95 %"
        " intervals of the paired difference, for other seeds and rows. The price is set again until the evaluation rows read as many far"
        " blocks as with static top-n, within one percent.",
        f"- **Measured** on {results.origin()}.",
        "",
        "![Accuracy by demand, and far blocks by kind of query](recall.png)",
        "",
        "## Results",
        "",
        "Far blocks are those beyond the forced ones, a mean over layers, heads and tokens.",
        "",
    ]
    head = ["arm", "far blocks", *(f"accuracy, {demand} block{'s' * (demand > 1)}" for demand in DEMANDS), "answer loss", "text loss"]
    rows: list[list[object]] = []
    for arm, cells in arms.items():
        answer = sum(mean_of(cells, f"loss {demand}") for demand in DEMANDS) / len(DEMANDS)
        rows.append([arm, f"{mean_of(cells, 'far'):.2f}", *(f"{mean_of(cells, name):.3f}" for name in accuracy), f"{answer:.3f}",
                     f"{mean_of(cells, 'text'):.3f}"])  # fmt: skip
    lines += [*table(head, rows), "", "One price less static top-n, with the interval:", ""]
    pairs = [(f"accuracy, {demand} block{'s' * (demand > 1)}", f"accuracy {demand}") for demand in DEMANDS]
    pairs += [(f"answer loss, {demand} block{'s' * (demand > 1)}", f"loss {demand}") for demand in DEMANDS] + [("text loss", "text")]
    lines += table(["", "difference", "interval"], ([name, f"{gap:+.3f}", f"{low:+.3f} … {high:+.3f}"] for name, key in pairs
                   for gap, low, high in [difference(arms[PRICE], arms[STATIC], key)]))  # fmt: skip
    lines += [
        "",
        "Far blocks by layer; and, in the layer where questions read most, by the query: text, or a question by blocks with facts:",
        "",
    ]
    head = ["arm", *(f"layer {number + 1}" for number in range(settings.layers)), "text", *(f"question, {demand}" for demand in DEMANDS)]
    rows = []
    for arm, cells in arms.items():
        rows.append([arm, *(f"{value:.2f}" for value in by_layer(cells)), *(f"{value:.2f}" for value in by_demand(cells).values())])
    return [*lines, *table(head, rows)]


def parameters(settings: Settings) -> int:
    return sum(parameter.numel() for parameter in new_model(settings, 0).parameters())


def mean_of(cells: list[dict[str, Any]], key: str) -> float:
    """Mean over seeds, and rows where there are some."""
    return torch.tensor([cell[key] for cell in cells]).mean().item()


def by_layer(cells: list[dict[str, Any]]) -> list[float]:
    found: list[float] = torch.tensor([cell["far by layer"] for cell in cells]).mean(0).tolist()
    return found


def by_demand(cells: list[dict[str, Any]]) -> dict[int, float]:
    """Far blocks of a query of text (0) and of questions, in the layer where questions read most; mean over seeds."""
    found = torch.tensor([[cell["far by demand"][str(demand)] for demand in (0, *DEMANDS)] for cell in cells])  # (seeds, kinds, layers)
    chosen = found[:, 1:].mean(1).argmax(-1)
    kinds = found[torch.arange(len(cells)), :, chosen].mean(0).tolist()
    return dict(zip((0, *DEMANDS), kinds, strict=True))


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """Mean paired difference and its interval, over seeds and over rows."""
    return crossed_difference([cell[key] for cell in ours], [cell[key] for cell in theirs])


def draw_figure(results: Results, settings: Settings, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = {arm: [results.cells[f"{arm} | {seed}"] for seed in settings.seeds] for arm in ARMS}
    colours = {DENSE: "0.45", STATIC: "C1", PRICE: "C0"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for arm, cells in arms.items():
        for cell in cells:
            values = [torch.tensor(cell[f"accuracy {demand}"]).mean().item() for demand in DEMANDS]
            left.plot(range(len(DEMANDS)), values, ".", color=colours[arm], alpha=0.5)
        left.plot(range(len(DEMANDS)), [mean_of(cells, f"accuracy {demand}") for demand in DEMANDS], color=colours[arm], label=arm)
        if arm != DENSE:
            kinds = by_demand(cells)
            right.plot(range(len(kinds)), list(kinds.values()), "o-", color=colours[arm], label=arm)
    left.axhline(1 / VALUES, color="0.8", linewidth=1, zorder=0)
    left.set(xticks=range(len(DEMANDS)), xticklabels=DEMANDS, xlabel="blocks that hold facts of the key", ylabel="accuracy", ylim=(0, 1.03))
    left.set_title("Recall (line: mean, dots: seeds)", fontsize=10)
    names = ["text", *map(str, DEMANDS)]
    right.set(
        xticks=range(len(names)), xticklabels=names, xlabel="query: text, or a question by blocks", ylabel="far blocks", ylim=(0, None)
    )
    right.set_title("Far blocks read, layer where questions read most", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
