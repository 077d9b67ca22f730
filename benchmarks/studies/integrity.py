"""What predictive integrity is worth as a drive: of the life of experts, and of the routers' loss on surprise.

    .venv/bin/python benchmarks/studies/integrity.py            about half an hour on two cores
    .venv/bin/python benchmarks/studies/integrity.py --quick    a trial run of half a minute; writes nothing

A small TinyOnn model with heads as experts learns the bytes of the standard library. Arms differ in one thing, and share seeds, texts and
steps. Writes docs/studies/integrity.json and integrity.md; an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from _study import DOCS, Job, Results, arguments, half_width, measure_all, stdlib_bytes, table
from torch import Tensor

from tinyonn.hf import TinyOnnConfig, TinyOnnForCausalLM
from tinyonn.train import ExpertLifecycle, SurpriseLoss, gating_gradients, output_entropy, predictive_integrity

NO_LIFE, FIXED_LIFE, DRIVEN_LIFE, FIXED_LOSS, DRIVEN_LOSS = (
    "no life", "life, fixed rate", "life, driven", "loss on surprise, fixed", "loss on surprise, driven",
)  # fmt: skip
FIXED_CE, DRIVEN_CE, FIXED_KL, DRIVEN_KL = "w_ce alone, fixed", "w_ce alone, driven", "w_kl alone, fixed", "w_kl alone, driven"
TOLD = {
    NO_LIFE: "experts are neither recycled nor born",
    FIXED_LIFE: "a regeneration rate of 1, whatever the integrity",
    DRIVEN_LIFE: "integrity drives the regeneration rate, as by default",
    FIXED_LOSS: "no life; routers also learn from surprise, with w_ce = w_kl = {weight}",
    DRIVEN_LOSS: "the same, with both weights times the regeneration rate",
    FIXED_CE: "as the fixed loss, with w_kl = 0",
    DRIVEN_CE: "the same, with w_ce times the regeneration rate",
    FIXED_KL: "as the fixed loss, with w_ce = 0",
    DRIVEN_KL: "the same, with w_kl times the regeneration rate",
}
USED = {arm: ("w_ce", "w_kl") for arm in (FIXED_LOSS, DRIVEN_LOSS)}  # the weights of the loss on surprise of an arm
USED |= {arm: ("w_ce",) for arm in (FIXED_CE, DRIVEN_CE)} | {arm: ("w_kl",) for arm in (FIXED_KL, DRIVEN_KL)}
PAIRS = (
    (FIXED_LIFE, NO_LIFE), (DRIVEN_LIFE, FIXED_LIFE), (FIXED_LOSS, NO_LIFE), (DRIVEN_LOSS, FIXED_LOSS), (FIXED_CE, NO_LIFE),
    (DRIVEN_CE, FIXED_CE), (FIXED_KL, NO_LIFE), (DRIVEN_KL, FIXED_KL),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    steps: int = 800
    seeds: int = 3
    batch: int = 8
    context: int = 128
    hidden_size: int = 64
    head_dim: int = 16
    layers: int = 2
    experts: int = 32
    live: int = 24
    learning_rate: float = 2e-3
    pruning_threshold: float = 0.08
    growth_threshold: float = 0.0002
    weight: float = 0.1
    windows: int = 256  # of the held-out text


def cell(settings: Settings, arm: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    on_surprise = arm in USED
    weights = {name: settings.weight for name in USED.get(arm, ())}
    others = dict.fromkeys(("w_ce", "w_kl"), 0.0) | weights
    model = TinyOnnForCausalLM(
        TinyOnnConfig(
            vocab_size=256, hidden_size=settings.hidden_size, head_dim=settings.head_dim, num_hidden_layers=settings.layers,
            init_num_experts=settings.live, max_num_experts=settings.experts, attention="dyn_smha", **weights,
        )
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.1)
    living = arm in (FIXED_LIFE, DRIVEN_LIFE)
    thresholds = {"pruning_threshold": settings.pruning_threshold, "growth_threshold": settings.growth_threshold} if living else {}
    driven = arm in (DRIVEN_LOSS, DRIVEN_CE, DRIVEN_KL)
    lifecycle = ExpertLifecycle(model, optimizer, **thresholds, w_ce=driven, w_kl=driven, seed=seed)
    training, _, held_out = stdlib_bytes()
    generator = torch.Generator().manual_seed(seed)
    losses, integrities, events = [], [], []
    for _ in range(settings.steps):
        batch = _windows(training, settings.batch, settings.context, generator)
        surprise_loss = lifecycle.surprise_loss(SurpriseLoss(**others)) if on_surprise else None
        with gating_gradients(model, surprise_loss=surprise_loss), lifecycle.recording() as surprise:
            out = model(input_ids=batch, labels=batch)
            out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        integrity = _integrity(out, surprise, batch)
        events += lifecycle.step(None if arm == FIXED_LIFE else integrity)
        losses.append(float(out.loss.detach()))
        integrities.append(float(integrity))
    found = {"loss": _held_out(model, held_out, settings), "training_loss": statistics.fmean(losses[-100:])}
    found |= {"integrity": statistics.fmean(integrities[-100:]), "rate": lifecycle.rate}
    found["births"] = sum(event.kind == "birth" for event in events)
    found["recyclings"] = len(events) - found["births"]
    return found


def _windows(text: bytes, number: int, length: int, generator: torch.Generator) -> Tensor:
    begins = torch.randint(len(text) - length, (number,), generator=generator).tolist()
    return torch.stack([torch.frombuffer(bytearray(text[begin : begin + length]), dtype=torch.uint8) for begin in begins]).long()


@torch.no_grad()
def _integrity(out: Any, surprise: Any, batch: Tensor) -> Tensor:
    number = batch[:, 1:].numel()
    tau = output_entropy(out.logits.detach()[:, :-1]).mean()
    mean = torch.stack([matrix[matrix.isfinite()].mean() for matrix in surprise.values()]).mean() * number
    return predictive_integrity(out.loss.detach(), tau, mean).integrity


@torch.no_grad()
def _held_out(model: TinyOnnForCausalLM, text: bytes, settings: Settings) -> float:
    model.eval()
    windows = _windows(text, settings.windows, settings.context, torch.Generator().manual_seed(12345))
    return statistics.fmean(float(model(input_ids=part, labels=part).loss) for part in windows.split(32))


def page(results: Results, settings: Settings) -> list[str]:
    rows = []
    for arm, told in TOLD.items():
        cells = [results.get(arm, seed) for seed in range(settings.seeds)]
        found = {name: [cell[name] for cell in cells if cell] for name in ("loss", "integrity", "rate", "births", "recyclings")}
        middle, half = statistics.fmean(found["loss"]), half_width(found["loss"])
        rest = [
            f"{statistics.fmean(found[name]):.{digits}f}"
            for name, digits in (("integrity", 3), ("rate", 2), ("births", 1), ("recyclings", 1))
        ]
        rows.append([arm, told.format(weight=settings.weight), f"{middle:.4f} ± {half:.4f}", *rest])
    differences = []
    for ours, theirs in PAIRS:
        gaps = [results.get(ours, seed)["loss"] - results.get(theirs, seed)["loss"] for seed in range(settings.seeds)]  # type: ignore[index]
        middle, half = statistics.fmean(gaps), half_width(gaps)
        verdict = "no difference that these seeds show" if abs(middle) <= half else "lower" if middle < 0 else "higher"
        differences.append([f"{ours} − {theirs}", f"{middle:+.4f} ({middle - half:+.4f} … {middle + half:+.4f})", verdict])
    size = f"{settings.layers} layers, {settings.live} of {settings.experts} experts and heads live, {settings.hidden_size} features"
    return [
        "# Predictive integrity as a drive",
        "",
        "[Predictive integrity](../life.md) can drive two things: the regeneration rate, by which experts and heads are recycled and born,",
        "and the weights of the routers' loss on surprise. This page ablates each switch against a fixed value.",
        "`benchmarks/studies/integrity.py` wrote the page.",
        "",
        f"A TinyOnn model with heads as experts ({size}) learns bytes of the standard library:",
        f"{settings.steps:,} steps of {settings.batch} windows of {settings.context} bytes, {settings.seeds} seeds. The loss is that of",
        "held-out modules, in nats a byte. Brackets and ± hold a 95 % interval for other seeds; differences are paired by seed.",
        "",
        *table(["arm", "what it is", "held-out loss", "integrity", "last rate", "births", "recyclings"], rows),
        "",
        *table(["difference of loss", "nats a byte", "verdict"], differences),
        "",
        f"Measured on {results.origin()}.",
    ]


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    settings = replace(Settings(), steps=12, seeds=2, windows=8) if options.quick else Settings()
    results = Results(None if options.quick else DOCS / "integrity.json", asdict(settings))
    jobs = [Job((arm, seed), cell, (settings, arm, seed)) for seed in range(settings.seeds) for arm in TOLD]
    measure_all(results, jobs, options.processes)
    text = "\n".join(page(results, settings)) + "\n"
    if options.quick:
        print(text)
    else:
        (DOCS / "integrity.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
