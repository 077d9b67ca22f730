"""Perplexity of SmolLM2-135M with its MLPs split into experts, against the number of experts per token.

    .venv/bin/python benchmarks/dyn_moe_budget.py            about forty minutes on one core
    .venv/bin/python benchmarks/dyn_moe_budget.py --quick    a trial run of a few minutes; writes nothing

Each MLP of 1,536 neurons is split by co-activation into 16 experts of 96 neurons, all active at first. For each mean number of experts k
and each arm, perplexity is measured with routers calibrated to k ("before"), and after tuning experts and routers on other text with
attention and embeddings frozen ("after"). The arms differ in the router loss beside the language loss, whose gradient is straight-through:

    surprise        thresholds, HyperStep with surprise_min_loss
    diversity       thresholds, HyperStep with sparse_diversity_loss
    top-k, balance  exactly k experts per token, with the load-balance loss of Switch Transformer
    language loss   thresholds and no router loss: the baseline

Thresholds drift during training, so every four steps, and at the end, a common shift restores the mean of k on the training text. "all
experts, tuned" is the dense model after the same tuning. Sample, training and evaluation texts are different modules of Python's standard
library. Each result is saved to docs/dyn_moe_budget.json at once, and an interrupted run continues from it. Writes docs/dyn_moe_budget.md
and docs/dyn_moe_budget.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tinyonn.cli.demo.smollm2 import prepare_smollm2
from tinyonn.hf.dyn_moe import calibrate_experts, convert_mlp_to_dynmoe, expert_statistics
from tinyonn.nn import DynMoE
from tinyonn.nn.dyn_moe import Visit
from tinyonn.train import HyperStep, capture

ROOT = Path(__file__).resolve().parent.parent
EVALUATION = ("argparse.py", "statistics.py", "ipaddress.py", "zipfile.py", "tarfile.py", "typing.py")
TRAINING = (
    "ast.py", "calendar.py", "cgi.py", "cmd.py", "codecs.py", "configparser.py", "copy.py", "csv.py", "datetime.py", "dataclasses.py",
    "difflib.py", "doctest.py", "enum.py", "fractions.py", "ftplib.py", "functools.py", "gettext.py", "gzip.py", "heapq.py", "imaplib.py",
    "locale.py", "mailbox.py", "mimetypes.py", "optparse.py", "os.py", "pathlib.py", "pdb.py", "pickle.py", "platform.py", "random.py",
)  # fmt: skip
DENSE, ALL_EXPERTS, ALL_TUNED = "dense, unconverted", "converted, all experts", "all experts, tuned"
SURPRISE, DIVERSITY, TOP_K, LANGUAGE = "surprise", "diversity", "top-k, balance", "language loss"
ARMS = (SURPRISE, DIVERSITY, TOP_K, LANGUAGE)
SAMPLE_TEXTS = 8  # number of training texts for the split and the routers; the others are for tuning
EXPERT_RATE, ROUTER_RATE = 3e-4, 1e-3  # Adam's learning rate
SCALE = 4.0  # scale of the routers' sigmoids; at 1 the scores of all experts are nearly equal
BALANCE = 0.01  # weight of the load-balance loss, as in Switch Transformer
SHIFT_EVERY = 4


def rows_of(tokenizer: Any, names: tuple[str, ...], length: int) -> list[Tensor]:
    """(1, length) token ids of the start of each module that is long enough."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for name in names:
        path = root / name
        if path.is_file():
            ids = tokenizer(path.read_text(encoding="utf-8"), truncation=True, max_length=length)["input_ids"]
            if len(ids) == length:
                found.append(torch.tensor([ids]))
    return found


@torch.no_grad()
def evaluate(model: PreTrainedModel, rows: list[Tensor]) -> tuple[float, float]:
    """Perplexity, and mean number of experts per token and layer; NaN for an unconverted model."""
    model.eval()
    expert_statistics(model, reset=True)
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in rows]
    means = [found["mean_k"] for found in expert_statistics(model, reset=True).values()]
    return math.exp(sum(losses) / len(losses)), sum(means) / len(means) if means else math.nan


def balance_loss(visits: dict[DynMoE, list[Visit]]) -> Tensor:
    """E · Σ share of slots · mean probability, summed over layers: Fedus et al., "Switch Transformers", arXiv:2101.03961, equation 4."""
    losses = []
    for calls in visits.values():
        for visit in calls:
            scores = visit.routing.scores
            experts = scores.shape[1]
            share = torch.bincount(visit.routing.top_k_index.flatten(), minlength=experts)[:experts] / visit.routing.top_k_index.numel()
            losses.append(experts * (share * scores.softmax(-1).mean(0)).sum())
    return torch.stack(losses).sum()


def calibrate(model: PreTrainedModel, sample: Tensor, arm: str, budget: float, shift: bool = False) -> None:
    bounds = {"min_experts": int(budget), "max_experts": int(budget)} if arm == TOP_K else {}
    calibrate_experts(model, sample, budget, shift=shift, price="none", **bounds)


def tune(model: PreTrainedModel, rows: list[Tensor], arm: str, budget: float | None, steps: int) -> None:
    """Tunes experts and routers; without a budget, only experts."""
    model.requires_grad_(False)
    routers, experts = [], []
    for module in model.modules():
        if isinstance(module, DynMoE):
            module.gating_loss_kind = "sdl" if arm == DIVERSITY else "surprise"
            for name, parameter in module.named_parameters():
                (routers if name.startswith("router.") else experts).append(parameter.requires_grad_(True))
    if budget is None:
        for parameter in routers:
            parameter.requires_grad_(False)
    groups = [{"params": experts, "lr": EXPERT_RATE}, {"params": [] if budget is None else routers, "lr": ROUTER_RATE}]
    optimiser = torch.optim.Adam([group for group in groups if group["params"]])
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=steps)
    hyper_step = HyperStep(model, optimiser) if arm in (SURPRISE, DIVERSITY) else None
    for step in range(steps):
        ids = rows[step % len(rows)]
        model.train()

        def language_loss(ids: Tensor = ids) -> Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

        if hyper_step is not None:
            hyper_step(language_loss)
        else:
            with capture(model) as visits:
                loss = language_loss()
                (loss + BALANCE * balance_loss(visits) if arm == TOP_K else loss).backward()
            optimiser.step()
            optimiser.zero_grad()
        decay.step()
        if budget is not None and arm != TOP_K and (step + 1) % SHIFT_EVERY == 0 and step + 1 < steps:
            calibrate(model, ids, arm, budget, shift=True)
    if budget is not None and arm != TOP_K:
        calibrate(model, torch.cat(rows[-4:]), arm, budget, shift=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 12, 6])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.budgets, options.steps = 128, [8], 2
    settings = {name: getattr(options, name) for name in ("tokens", "experts", "steps")}
    results = Results(None if options.quick else ROOT / "docs" / "dyn_moe_budget.json", settings)
    folder = prepare_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    evaluation, others = (rows_of(tokenizer, names, options.tokens) for names in (EVALUATION, TRAINING))
    sample, training = torch.cat(others[:SAMPLE_TEXTS]), others[SAMPLE_TEXTS:]
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not results.has(DENSE):
        results.note(DENSE, None, evaluate(start, evaluation))
    convert_mlp_to_dynmoe(start, num_experts=options.experts, sample=sample, scale=SCALE)
    if not results.has(ALL_EXPERTS):
        results.note(ALL_EXPERTS, None, evaluate(start, evaluation))
    if not results.has(ALL_TUNED):
        model = copy.deepcopy(start)
        tune(model, training, LANGUAGE, None, options.steps)
        results.note(ALL_TUNED, None, evaluate(model, evaluation))
    for budget in options.budgets:
        for arm in options.arms:
            before = "top-k, before" if arm == TOP_K else "thresholds, before"
            if results.has(before, budget) and results.has(f"{arm}, after", budget):
                continue
            model = copy.deepcopy(start)
            calibrate(model, sample, arm, budget)
            if not results.has(before, budget):
                results.note(before, budget, evaluate(model, evaluation))
            tune(model, training, arm, budget, options.steps)
            results.note(f"{arm}, after", budget, evaluate(model, evaluation))
    if not options.quick:
        write(ROOT / "docs", results, len(evaluation), len(sample))


class Results:
    """Rows of (name, budget, perplexity, mean experts), saved to a file one by one."""

    def __init__(self, path: Path | None, settings: dict[str, int]) -> None:
        self.path, self.settings, self.started = path, settings, time.monotonic()
        self.rows: list[tuple[str, int | None, float, float | None]] = []
        if path is not None and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["settings"] == settings:
                self.rows = [tuple(row) for row in stored["rows"]]

    def has(self, name: str, budget: int | None = None) -> bool:
        return any(row[:2] == (name, budget) for row in self.rows)

    def note(self, name: str, budget: int | None, found: tuple[float, float]) -> None:
        perplexity, mean = found[0], None if math.isnan(found[1]) else found[1]
        self.rows.append((name, budget, perplexity, mean))
        print(
            f"{time.monotonic() - self.started:.0f} s: {name}, k {budget}: perplexity {perplexity:.3f}, mean k {found[1]:.2f}", flush=True
        )
        if self.path is not None:
            self.path.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")


def write(folder: Path, results: Results, texts: int, sample_texts: int) -> None:
    settings = results.settings
    lines = [
        "# Perplexity against experts",
        "",
        "This page shows what a dense model loses when its MLPs are split into experts and each token uses only some of them."
        f" `benchmarks/dyn_moe_budget.py` wrote it on {platform.machine()} with torch {torch.__version__}.",
        "",
        "- **Model**: SmolLM2-135M-Instruct (4-bit weights, Q4_1, dequantised). Attention and embeddings are frozen.",
        f"- **Text**: {texts} modules of Python's standard library, {settings['tokens']} tokens each.",
        f"- **Conversion**: each MLP becomes {settings['experts']} experts of {1536 // settings['experts']} neurons, split and calibrated"
        f" on {sample_texts} other modules.",
        f"- **Tuning**: {settings['steps']} steps of Adam on experts and routers, one text a step, from yet other modules.",
        "",
        "Thresholds are tuned in three ways: with the router loss on [surprise](dyn_moe.md#what-the-surprise-is), with the router loss"
        " *sparse diversity*, and with the language loss alone. They are compared with a plain top-k, which is tuned with the"
        " load-balancing loss of Switch Transformer (*balance*). *Before* means calibrated only, *after* means tuned too.",
        "",
        "k is the requested mean number of experts per token, and *mean experts* the mean on the evaluation texts.",
        "",
        "![Perplexity against mean experts per token](dyn_moe_budget.png)",
        "",
        "| | k | mean experts | perplexity |",
        "|---|---|---|---|",
    ]
    rows = sorted(results.rows, key=lambda row: (row[1] is not None, row[1] or 0))
    lines += [
        f"| {name} | {'' if budget is None else budget} | {'' if mean is None else f'{mean:.2f}'} | {perplexity:.3f} |"
        for name, budget, perplexity, mean in rows
    ]
    (folder / "dyn_moe_budget.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    colours = {SURPRISE: "C0", DIVERSITY: "C1", TOP_K: "C3", LANGUAGE: "0.3"}
    for name in dict.fromkeys(row[0] for row in results.rows if row[1] is not None):
        points = sorted((mean, perplexity) for other, budget, perplexity, mean in results.rows if other == name and mean is not None)
        arm = next((arm for arm in ARMS if name.startswith(arm)), None)
        colour = colours[arm] if arm else ("C3" if name.startswith("top-k") else "0.6")
        style = {"color": colour, "linestyle": "--" if "before" in name else "-", "marker": "o", "markersize": 4}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    for name, line in ((DENSE, "-"), (ALL_TUNED, ":")):
        height = next(row[2] for row in results.rows if row[0] == name)
        axes.axhline(height, color="0.7", linestyle=line, linewidth=1, label=name)
    axes.set(
        xlabel=f"mean experts a token, of {settings['experts']}",
        ylabel="perplexity", yscale="log",
        title="SmolLM2-135M, held-out Python modules"
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "dyn_moe_budget.png", dpi=150)


if __name__ == "__main__":
    main()
