"""Perplexity of a converted SmolLM2-135M against the number of key blocks that it reads.

    .venv/bin/python benchmarks/dyn_nsa_budget.py            about an hour on two cores
    .venv/bin/python benchmarks/dyn_nsa_budget.py --quick    a trial run of a few minutes; writes nothing

The weights of the original model stay frozen. For each budget and each arm, perplexity is measured after a common shift of all thresholds
that meets the budget on the calibration text ("before"), and after tuning thresholds, gates and compression on other text ("after"). The
arms are the sources of tau, and a static top-n without thresholds, tuned in the same way. In training and over whole rows, tau from the
output is one number, a running mean; it distinguishes tokens only in decoding. Training, calibration and evaluation texts are different
modules of Python's standard library. Each result is saved to docs/dyn_nsa_budget.json at once, and an interrupted run continues from it.
Writes docs/dyn_nsa_budget.md and docs/dyn_nsa_budget.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tinyonn.cli.demo.smollm2 import prepare_smollm2
from tinyonn.hf.dyn_nsa import collected_budget_loss, convert_attention, cores, statistics

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("attention", "output", "constant")
STATIC = "static top-n"
EVALUATION = ("argparse.py", "statistics.py", "ipaddress.py", "zipfile.py", "tarfile.py", "typing.py")
CALIBRATION = ("inspect.py",)
TRAINING = (
    "ast.py", "calendar.py", "cgi.py", "cmd.py", "codecs.py", "configparser.py", "copy.py", "csv.py", "datetime.py", "dataclasses.py",
    "difflib.py", "doctest.py", "enum.py", "fractions.py", "ftplib.py", "functools.py", "gettext.py", "gzip.py", "heapq.py", "imaplib.py",
    "locale.py", "mailbox.py", "mimetypes.py", "optparse.py", "os.py", "pathlib.py", "pdb.py", "pickle.py", "platform.py", "random.py",
)  # fmt: skip


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
    """Perplexity, and mean number of key blocks per query, layer and head; NaN for an unconverted model."""
    model.eval()
    statistics(model, reset=True)
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in rows]
    counts = [found["mean_count"] for found in statistics(model, reset=True).values()]
    return math.exp(sum(losses) / len(losses)), sum(counts) / len(counts) if counts else math.nan


def set_all(model: PreTrainedModel, **options: Any) -> None:
    for core in cores(model):
        for name, value in options.items():
            setattr(core.options, name, value)


def shift(model: PreTrainedModel, price: float) -> None:
    for core in cores(model):
        core.price.fill_(price)


def calibrate(model: PreTrainedModel, rows: list[Tensor], budget: float, steps: int = 9) -> None:
    """Adds one shift to all thresholds such that the calibration text reads `budget` blocks."""
    low, high = -8.0, 8.0
    for _ in range(steps):
        middle = (low + high) / 2
        shift(model, middle)
        low, high = (middle, high) if evaluate(model, rows)[1] > budget else (low, middle)
    shift(model, (low + high) / 2)


def tune(model: PreTrainedModel, rows: list[Tensor], budget: float | None, steps: int) -> None:
    """Tunes thresholds, gates and compression; the budget loss controls the number of blocks. Without a budget, thresholds stay fixed.

    The gates start at (0, 1, 0), which reproduces the trained model, and Adam moves every gate weight by about the learning rate. The rate
    that suits thresholds, in nats, is too large for gates.
    """
    if budget is not None:
        set_all(model, budget_weight=0.5)
        for core in cores(model):
            core.budget_target.fill_(budget)
    model.train()
    if budget is None:
        for core in cores(model):
            core.base.requires_grad_(False)
            core.slope.requires_grad_(False)
    own = [parameter for core in cores(model) for parameter in core.parameters() if parameter.requires_grad]
    thresholds = [parameter for core in cores(model) for parameter in (core.base, core.slope) if parameter.requires_grad]
    chosen = {id(parameter) for parameter in thresholds}
    rest = [parameter for parameter in own if id(parameter) not in chosen]
    optimiser = torch.optim.Adam([{"params": part, "lr": rate} for part, rate in ((thresholds, 0.03), (rest, 3e-4)) if part])
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=steps)
    for step in range(steps):
        ids = rows[step % len(rows)]
        output = model(input_ids=ids, use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:]) + collected_budget_loss(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    set_all(model, budget_weight=0.0)
    model.eval()


@contextmanager
def converted(folder: Path, **options: Any) -> Iterator[PreTrainedModel]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    rule: dict[str, Any] = {"importance": "relative", "temperature": 1.0, "slope": 1.0, "compress_query": False}  # which the page measures
    convert_attention(model, **rule, **options)
    for core in cores(model):
        core.requires_grad_(True)
    yield model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--budgets", type=float, nargs="+", default=[3.5, 5, 7])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--arms", nargs="+", choices=(STATIC, *SOURCES), default=(STATIC, *SOURCES))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.budgets, options.steps = 512, [4], 2
    results = Results(None if options.quick else ROOT / "docs" / "dyn_nsa_budget.json", {"tokens": options.tokens, "steps": options.steps})
    folder = prepare_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    evaluation, calibration, training = (rows_of(tokenizer, names, options.tokens) for names in (EVALUATION, CALIBRATION, TRAINING))
    if options.quick:
        evaluation = evaluation[:1]
    if DENSE not in results:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        results.note(DENSE, None, (evaluate(plain, evaluation)[0], (options.tokens // 64 + 1) / 2))
        del plain
    if ALL_BLOCKS not in results:
        with converted(folder, compress_size=32) as model:
            results.note(ALL_BLOCKS, None, evaluate(model, evaluation))
    for arm in options.arms:
        before, after = (STATIC, f"{STATIC}, tuned") if arm == STATIC else (f"tau from {arm}, before", f"tau from {arm}, after")
        for budget in options.budgets:
            if results.has(before, budget) and results.has(after, budget):
                continue
            with converted(folder, compress_size=32, **({} if arm == STATIC else {"tau_source": arm})) as model:
                if arm == STATIC:
                    set_all(model, max_blocks=max(3, round(budget)))
                else:
                    calibrate(model, calibration, budget, steps=3 if options.quick else 9)
                results.note(before, budget, evaluate(model, evaluation))
                tune(model, training, None if arm == STATIC else budget, options.steps)
                results.note(after, budget, evaluate(model, evaluation))
    if not options.quick:
        write(ROOT / "docs", results, len(evaluation))


DENSE, ALL_BLOCKS = "dense, unconverted", "converted, all blocks"


class Results:
    """Rows of (name, budget, perplexity, mean blocks), saved to a file one by one."""

    def __init__(self, path: Path | None, settings: dict[str, int]) -> None:
        self.path, self.settings = path, settings
        self.rows: list[tuple[str, float | None, float, float]] = []
        if path is not None and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["settings"] == settings:
                self.rows = [tuple(row) for row in stored["rows"]]

    def __contains__(self, name: str) -> bool:
        return any(row[0] == name for row in self.rows)

    def has(self, name: str, budget: float) -> bool:
        return any(row[:2] == (name, budget) for row in self.rows)

    def note(self, name: str, budget: float | None, found: tuple[float, float]) -> None:
        self.rows = [row for row in self.rows if row[:2] != (name, budget)] + [(name, budget, *found)]
        print(f"{name}, budget {budget}: perplexity {found[0]:.3f}, {found[1]:.2f} blocks", flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")


def write(folder: Path, results: Results, texts: int) -> None:
    lines = [
        "# Perplexity against key blocks",
        "",
        f"This page shows what a converted model loses when a query reads fewer key blocks. `benchmarks/dyn_nsa_budget.py` wrote it on"
        f" {platform.machine()} with torch {torch.__version__}.",
        "",
        "- **Model**: SmolLM2-135M-Instruct (4-bit weights, Q4_1, dequantised). Its own weights are frozen.",
        f"- **Text**: {texts} modules of Python's standard library, {results.settings['tokens']} tokens each.",
        "- **Conversion**: blocks of 64 keys, compression of 32 positions, a window of 512. The gates of the compressed and of the"
        " window branch are 0 before tuning.",
        '- **Rule**: that of earlier versions, `importance="relative"` with a slope of 1 on tau and a temperature of 1 nat.',
        f"- **Tuning**: {results.settings['steps']} steps of Adam on thresholds, gates and compression, one text a step, from other"
        " modules.",
        "",
        "The rows compare learned thresholds with a fixed number of blocks (static top-n). A threshold depends on tau, a number from 0 to 1"
        " that says how uncertain the model is ([what is computed](dyn_nsa.md#what-is-computed)). Tau comes from one of three sources: the"
        " entropy of the attention, the entropy of the model's output, or a constant. *Before* means that only the price is set, one number"
        " that is added to all thresholds: the one with which another text reads the budget. `tinyonn.hf.calibrate` would also set the"
        " thresholds of each head, and was not used. *After* means tuned too.",
        "",
        "- **Budget** is the requested mean number of key blocks per query, **mean blocks** the mean on the evaluation texts.",
        "- For the static top-n, n is the budget, rounded (3.5 to 4). Its mean is lower than n because the first queries of a text have"
        " fewer than n blocks.",
        "- Before tuning, tau from output gives the same values as a constant tau. It is one number for a text that is read in one pass,"
        " and the price, which is added to all thresholds, cancels it. In tuning tau changes from step to step.",
        "",
        "![Perplexity against mean key blocks per query](dyn_nsa_budget.png)",
        "",
        "| | budget | mean blocks | perplexity |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {'' if budget is None else f'{budget:g}'} | {count:.2f} | {perplexity:.3f} |"
        for name, budget, perplexity, count in results.rows
    ]
    (folder / "dyn_nsa_budget.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    styles = {"attention": "C0", "output": "C1", "constant": "C2"}
    for name in dict.fromkeys(row[0] for row in results.rows if row[1] is not None):
        points = sorted((count, perplexity) for other, budget, perplexity, count in results.rows if other == name)
        source = next((source for source in SOURCES if source in name), None)
        style = {
            "color": styles[source] if source else "0.3",
            "linestyle": "--" if "before" in name or name == STATIC else "-",
            "marker": "o",
            "markersize": 4,
        }
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.axhline(next(row[2] for row in results.rows if row[0] == DENSE), color="0.6", linewidth=1, label="dense, unconverted")
    axes.set(xlabel="mean key blocks a query", ylabel="perplexity", title="SmolLM2-135M, held-out Python modules")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "dyn_nsa_budget.png", dpi=150)


if __name__ == "__main__":
    main()
