"""Study D: many small experts, trained from scratch, at equal mean number of experts per token.

    .venv/bin/python benchmarks/studies/experts.py            an hour and a half on two cores, one process on each
    .venv/bin/python benchmarks/studies/experts.py --quick    a trial run of a minute; writes nothing

A small language model reads source of the standard library byte by byte. Its MLPs are dense, or mixtures of 64 experts that differ only
in how a token's experts are chosen and weighted; see `_experts_model.py`. Each arm trains with the first seed at two learning rates, then
at neighbours of the best until both are tried, and with the other seeds at the best: the one of lowest loss on text that is for this choice
alone. Trials are whole runs, because shorter ones prefer rates that are too large. Thresholds choose other numbers of experts on other
text, so each run is evaluated as it is, and again with all its thresholds shifted to the mean of the budget on the evaluation text;
comparisons are of the latter. Writes docs/studies/experts.json, experts.md and experts.png. An interrupted study continues from
docs/studies/experts.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from _experts_model import ARMS, CONSTANTS, DYN_MOE, LEARNED, RELU, Mixture, Settings, Texts, new_model, row_losses
from _experts_page import best_rate, draw_figure, page
from _study import DOCS, Job, Results, arguments, measure_all
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from tinyonn.nn import DynMoE
from tinyonn.train import HyperStep

WARM_UP, LAST_RATE = 100, 0.1  # steps; share of the learning rate at the end
EVALUATION_SEED = 7
AT_ONCE = 16  # rows of the evaluation
CLOSE, MOST_SHIFTS, FARTHEST = 0.003, 8, 0.3  # of the search for the budget
SHIFTED = (*DYN_MOE, RELU)  # arms that choose by thresholds


class Run:
    """Training of one arm with one seed."""

    def __init__(self, settings: Settings, arm: str, seed: int, rate: float, steps: int) -> None:
        self.settings, self.arm, self.steps = settings, arm, steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.texts = Texts(settings.tokens)
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.model = new_model(settings, arm, seed).to(self.device)
        self.mixtures = [module for module in self.model.modules() if isinstance(module, (Mixture, DynMoE))]
        matrices = [weight for weight in self.model.parameters() if weight.dim() > 1]
        others = [weight for weight in self.model.parameters() if weight.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
        self.schedule = LambdaLR(self.optimizer, self._rate_at)

    def _rate_at(self, step: int) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * min(1, step / self.steps)))
        return min(1, (step + 1) / WARM_UP) * ((1 - LAST_RATE) * falling + LAST_RATE)

    def train(self) -> None:
        learned = HyperStep(self.model, self.optimizer, max_grad_norm=1.0) if self.arm == LEARNED else None
        for _ in range(self.steps):
            rows = self.texts.draw(self.texts.training, self.settings.batch, self.generator).to(self.device)
            if learned is not None:
                learned(lambda rows=rows: row_losses(self.model, rows).mean())  # type: ignore[misc]
            else:
                loss = row_losses(self.model, rows).mean()
                (loss + sum(mixture.loss for mixture in self.mixtures if isinstance(mixture, Mixture))).backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.schedule.step()

    @torch.no_grad()
    def evaluated(self, rows: int, of: Tensor | None = None) -> tuple[list[float], list[Tensor]]:
        """Loss of each row of other text, and by layer the share of tokens that each expert got, (E,)."""
        self.model.eval()
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        text = self.texts.draw(self.texts.evaluation if of is None else of, rows, generator).to(self.device)
        for mixture in self.mixtures:
            (mixture.counts if isinstance(mixture, Mixture) else mixture.expert_counts).zero_()
        losses = torch.cat([row_losses(self.model, part) for part in text.split(AT_ONCE)])
        counts = [mixture.counts if isinstance(mixture, Mixture) else mixture.expert_counts for mixture in self.mixtures]
        self.model.train()
        return losses.tolist(), [count.cpu() / (rows * self.settings.tokens) for count in counts]

    def _shift(self, by: float) -> None:
        for mixture in self.mixtures:
            if isinstance(mixture, Mixture):
                mixture.least += by
            else:
                router = mixture.router
                (router.thresholds.data if router.price is None else router.price).add_(by)

    def reach_budget(self, mean: float) -> tuple[list[float], list[Tensor]]:
        """Shifts all thresholds until tokens have the mean number of experts of the budget on the evaluation text.

        Args:
            mean: number of experts before.

        Returns:
            What `evaluated` gives then.
        """
        wanted, shift = self.settings.k, 0.02 if mean > self.settings.k else -0.02
        for _ in range(MOST_SHIFTS):  # secant steps in the logarithm of the number
            self._shift(shift)
            before, found = mean, self.evaluated(self.settings.rows)
            mean = mean_experts(found[1])
            if abs(mean / wanted - 1) < CLOSE:
                break
            slope = min((math.log(mean) - math.log(before)) / shift, -0.2)
            shift = max(-FARTHEST, min(FARTHEST, (math.log(wanted) - math.log(mean)) / slope))
        return found

    def measured(self) -> dict[str, Any]:
        chosen_by, _ = self.evaluated(self.settings.rows, self.texts.choice)
        losses, shares = self.evaluated(self.settings.rows)
        found: dict[str, Any] = {"choice": sum(chosen_by) / len(chosen_by), "as trained": sum(losses) / len(losses), "losses": losses}
        if self.mixtures:
            found |= {
                "k as trained": mean_experts(shares), "k by layer": [share.sum().item() for share in shares],
                "dead": sum(int((share == 0).sum()) for share in shares), "least load": min(load(share).min().item() for share in shares),
                "most load": max(load(share).max().item() for share in shares),
            }  # fmt: skip
        if self.arm in SHIFTED:
            found["losses"], shares = self.reach_budget(found["k as trained"])
        found["loss"] = sum(found["losses"]) / len(losses)
        if self.mixtures:
            found["k"] = mean_experts(shares)
        return found


def mean_experts(shares: Iterable[Tensor]) -> float:
    return torch.stack([share.sum() for share in shares]).mean().item()


def load(share: Tensor) -> Tensor:
    """Of each expert, relative to the mean."""
    return share / share.mean()


def run(settings: Settings, arm: str, rate: float, seed: int) -> dict[str, Any]:
    one = Run(settings, arm, seed, rate, settings.steps)
    one.train()
    return one.measured()


def missing(results: Results, settings: Settings, arm: str) -> list[tuple[str, float, int]]:
    """Runs of an arm that can be measured now: learning rates around the best one with the first seed, then the other seeds."""
    first, *others = settings.seeds
    wanted = [(arm, rate, first) for rate in settings.first_rates]
    if all(results.get(*key) for key in wanted):
        best = best_rate(results, settings, arm)
        place = settings.rates.index(best)
        wanted = [(arm, rate, first) for rate in settings.rates[max(0, place - 1) : place + 2]]
        if all(results.get(*key) for key in wanted):
            wanted = [(arm, best, seed) for seed in others]
    return [key for key in wanted if not results.get(*key)]


def all_missing(results: Results, settings: Settings) -> list[tuple[str, float, int]]:
    return [key for arm in ARMS for key in missing(results, settings, arm)]


def measure(results: Results, settings: Settings, processes: int) -> None:
    """Measures the cells that are missing."""
    while keys := all_missing(results, settings):
        measure_all(results, [Job(key, run, (settings, *key)) for key in keys], processes)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else 2)
    parser.add_argument("--page", action="store_true", help="only writes the page and the figure again")
    options = parser.parse_args()
    if options.quick:
        settings = Settings(width=64, layers=2, experts=16, neurons=16, k=2, tokens=64, steps=20, seeds=(0, 1), rows=32,
                            rates=(1.4e-3, 2e-3, 2.8e-3), first_rates=(2e-3, 2.8e-3))  # fmt: skip
        results = Results(None, asdict(settings))
        measure(results, settings, options.processes)
        print("\n".join(page(results, settings)))
        return
    settings = Settings()
    results = Results(DOCS / "experts.json", {**asdict(settings), **CONSTANTS, "warm-up": WARM_UP, "last rate": LAST_RATE})
    if not options.page:
        measure(results, settings, options.processes)
    if keys := all_missing(results, settings):
        parser.error(f"docs/studies/experts.json must have all runs for a page, got none of {keys[0]} and {len(keys) - 1} more.")
    (DOCS / "experts.md").write_text("\n".join(page(results, settings)) + "\n", encoding="utf-8")
    draw_figure(results, settings, DOCS / "experts.png")


if __name__ == "__main__":
    main()
