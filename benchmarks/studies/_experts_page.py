"""The page and the figure of the study of experts from scratch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from _experts_model import ARMS, BALANCE, BLIND, DENSE, LEARNED, LOSS_FREE, OURS, QUANTILES, RELU, SWITCH, Settings, new_model
from _study import Results, crossed_difference, table

TOP_K = (SWITCH, LOSS_FREE)


def page(results: Results, settings: Settings) -> list[str]:
    """Lines of the page."""
    arms = {arm: [cell(results, arm, best_rate(results, settings, arm), seed) for seed in settings.seeds] for arm in ARMS}
    whole, active = parameters(settings)
    best = min(TOP_K, key=lambda arm: mean_of(arms[arm], "loss"))
    lines = [
        "# Experts from scratch",
        "",
        "`benchmarks/studies/experts.py` wrote this page. It trains a small language model from scratch, with its MLPs split into many"
        " small experts, and compares ways to choose each token's experts ([DynMoE](../dyn_moe.md)).",
        "",
        f"- **Model**: a Llama of {settings.layers} layers and {settings.width} features, with {settings.experts} experts of"
        f" {settings.neurons} neurons in each layer; {whole / 1e6:.1f} million parameters, {active / 1e6:.1f} million of them active at"
        f" {settings.k} experts per token. All arms start from the same weights of attention and experts for a seed.",
        f"- **Training**: {settings.steps:,} steps of {settings.batch} rows of {settings.tokens} bytes, source of the standard library,"
        f" with AdamW. Each arm trains with seed {settings.seeds[0]} at the learning rates"
        f" {' and '.join(f'{rate:g}' for rate in settings.first_rates)}, then at neighbours of the best until both are tried, and with the"
        " other seeds at the best: the one of lowest loss on text that is for this choice alone.",
        f"- **Evaluation**: {settings.rows} rows from other modules, {len(settings.seeds)} seeds. For arms that choose by thresholds, all"
        f" thresholds are shifted by one number so that the mean is {settings.k} experts per token on this text too; *k as trained* is the"
        " mean before the shift, with its range over seeds. Dead experts get no token of the evaluation, over all layers, as trained.",
        f"- **Measured** on {results.origin()}.",
        "",
        "The arms:",
        "",
        f"- *{DENSE}*: an MLP with the neurons of {settings.k} experts.",
        f"- *{SWITCH}*: weights are the softmax over the chosen experts; load-balancing loss of Switch Transformer, weight {BALANCE:g}.",
        f"- *{LOSS_FREE}*: sigmoid scores with a bias that steps towards equal load (DeepSeek-V3); weights sum to 1.",
        f'- *{QUANTILES}*: `DynMoE(thresholds="quantile", combine="sigmoid", level=0, demand=0)`: each threshold is a running quantile of'
        " its expert's scores.",
        f"- *{RELU}*: weights are ReLUs of the scores, with an adaptive L1 loss that also balances load (ReMoE).",
        f"- *{OURS}*: `DynMoE` with its defaults; predicted surprise decides how many experts a token gets. In *{BLIND}*, `demand=0`,"
        f' scores alone decide. *{LEARNED}* is the rule of earlier versions, `thresholds="learned"`, with surprise as the routers\' loss'
        " in `HyperStep`.",
        "",
        "![Loss of each arm](experts.png)",
        "",
        "## Results",
        "",
        f"Loss in nats per byte, mean over seeds. The last column is the paired difference to {best}, the better top-k, with a 95 %"
        " interval for other seeds and rows. Rows are random parts of the same files.",
        "",
    ]
    head = ["arm", "learning rate", "loss", "k", "k as trained", "dead experts", "load, least … most", "difference"]
    rows: list[list[object]] = []
    for arm, cells in arms.items():
        gap = "" if arm == best else "{:+.4f} ({:+.4f} … {:+.4f})".format(*crossed_difference(losses(cells), losses(arms[best])))
        mixture = ["", "", "", ""]
        if arm != DENSE:
            dead = sum(cell["dead"] for cell in cells)
            trained = [cell["k as trained"] for cell in cells]
            mixture = [f"{mean_of(cells, 'k'):.2f}",
                       f"{mean_of(cells, 'k as trained'):.2f} ({min(trained):.2f} … {max(trained):.2f})",
                       f"{dead} of {len(cells) * settings.layers * settings.experts}",
                       f"{min(cell['least load'] for cell in cells):.2f} … {max(cell['most load'] for cell in cells):.2f}"]  # fmt: skip
        rows.append([arm, f"{best_rate(results, settings, arm):g}", f"{mean_of(cells, 'loss'):.4f}", *mixture, gap])
    lines += [*table(head, rows), ""]
    gap, low, high = crossed_difference(losses(arms[OURS]), losses(arms[BLIND]))
    lines += [
        f"What predicted surprise adds: `DynMoE` with its defaults has a loss {gap:+.4f} ({low:+.4f} … {high:+.4f}) beside `demand=0`.",
        "",
        f"Loss of each seed, and of seed {settings.seeds[0]} at each learning rate:",
        "",
    ]
    first = settings.seeds[0]
    rates = [rate for rate in settings.rates if any(results.get(arm, rate, first) for arm in ARMS)]
    head = ["arm", *(f"seed {seed}" for seed in settings.seeds), *(f"rate {rate:g}" for rate in rates)]
    tried = {arm: [results.get(arm, rate, first) for rate in rates] for arm in ARMS}
    rows = [[arm, *(f"{one['loss']:.4f}" if one else "" for one in (*cells, *tried[arm]))] for arm, cells in arms.items()]
    return [*lines, *table(head, rows)]


def cell(results: Results, arm: str, rate: float, seed: int) -> dict[str, Any]:
    return results.cells[f"{arm} | {rate:g} | {seed}"]


def best_rate(results: Results, settings: Settings, arm: str) -> float:
    """Learning rate of the lowest loss with the first seed, on text that is for this choice alone."""
    tried = [rate for rate in settings.rates if results.get(arm, rate, settings.seeds[0])]
    return min(tried, key=lambda rate: cell(results, arm, rate, settings.seeds[0])["choice"])


def losses(cells: list[dict[str, Any]]) -> list[list[float]]:
    return [cell["losses"] for cell in cells]


def mean_of(cells: list[dict[str, Any]], key: str) -> float:
    return math.fsum(cell[key] for cell in cells) / len(cells)


def parameters(settings: Settings) -> tuple[int, int]:
    """Numbers of all parameters of a mixture, and of those active for a token."""
    whole = sum(weight.numel() for weight in new_model(settings, SWITCH, 0).parameters())
    expert = 3 * settings.width * settings.neurons
    return whole, whole - settings.layers * (settings.experts - settings.k) * expert


def draw_figure(results: Results, settings: Settings, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for place, arm in enumerate(reversed(ARMS)):
        found = torch.tensor([cell(results, arm, best_rate(results, settings, arm), seed)["loss"] for seed in settings.seeds])
        colour = "C0" if arm in (OURS, BLIND) else "C1" if arm in TOP_K else "0.45"
        axes.plot(found, [place] * len(found), "o", color=colour, alpha=0.5)
        axes.plot([found.mean()] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
    axes.set(yticks=range(len(ARMS)), yticklabels=list(reversed(ARMS)), xlabel="loss, nats per byte")
    axes.set_title(f"{settings.k} of {settings.experts} experts per token (dots: seeds, line: mean)", fontsize=10)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
