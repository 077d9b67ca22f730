"""What else was tried to bring the tuned conversion of study B closer to the dense model.

    .venv/bin/python benchmarks/studies/tuned_tries.py            over an hour on two cores, one process on each
    .venv/bin/python benchmarks/studies/tuned_tries.py --quick    a trial run of a few minutes; writes nothing

Each try changes one thing of the arm with one price of `tuned.py`: what is measured again after tuning, what is learned in it, how long it
is, or how large blocks are. All else is as there, and the dense model is tuned as long. Writes docs/studies/tuned_tries.json and
tuned_tries.md; an interrupted study goes on from there and from the checkpoints in build/tuned_tries.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from _study import DOCS, Job, Results, arguments, crossed_difference, measure_all, table
from _tuned_page import DENSE, PRICE, percent
from torch import Tensor
from tuned import EVALUATION, SAMPLE, TRAINING, Run, Settings

from tinyonn.hf.dyn_nsa import BudgetSchedule, calibrate, collected_budget_loss, convert_attention, distil_compression

CHECKPOINTS = Path(__file__).resolve().parents[2] / "build" / "tuned_tries"
AS_BEFORE, AGAIN, DISTILLED_AGAIN, DISTILLED, LONGER, SMALLER = (
    "as in the study", "offsets again", "keys and offsets again", "keys learn on", "twice the steps", "blocks of 32",
)  # fmt: skip
TOLD = {
    AS_BEFORE: "nothing changed",
    AGAIN: "after tuning, `calibrate` measures again which heads need far blocks",
    DISTILLED_AGAIN: "after tuning, `distil_compression` teaches the keys of the tuned model, then `calibrate` as before tuning",
    DISTILLED: "`BudgetSchedule(distil_weight=1)` goes on teaching the keys while the model is tuned",
    LONGER: "the dense model too is tuned for twice as many steps",
    SMALLER: "blocks of 32 positions, of which a query reads the first and its last four; as many keys are read",
}


@dataclass
class SmallBlocks(Settings):
    size: ClassVar[int] = 32

    def budget(self, layers: int) -> float:
        """Blocks of 32 with as many keys as the blocks of the study."""
        whole = Settings(**asdict(self))
        return whole.budget(layers) * whole.size / self.size


class Try(Run):
    """An arm of the study with one thing changed."""

    def __init__(self, settings: Settings, arm: str, seed: int, folder: Path, what: str) -> None:
        self.what = what
        own = what in (DISTILLED, LONGER, SMALLER)  # the others go on from the tuned state of the first try
        super().__init__(settings, arm, seed, folder / (what if own else AS_BEFORE).replace(" ", "_"))

    def _start(self, path: Path) -> None:
        super()._start(path if self.what == SMALLER else path.parents[1] / path.name)

    def convert(self) -> None:
        if self.what == SMALLER:
            convert_attention(self.model, block_size=32, forced_local=4)
        else:
            super().convert()

    def schedule(self) -> BudgetSchedule:
        distil = 1.0 if self.what == DISTILLED else 0.0
        return BudgetSchedule(self.budget, self.settings.steps, temperature=self.settings.temperature, distil_weight=distil)

    def added_loss(self) -> Tensor | float:
        return collected_budget_loss(self.model) if self.what == DISTILLED else 0.0

    def finish(self) -> None:
        if self.what == DISTILLED_AGAIN:
            distil_compression(self.model, self.sample(), self.settings.distil_steps)
        if self.what in (AGAIN, DISTILLED_AGAIN):
            calibrate(self.model, self.sample(), self.budget)
        else:
            super().finish()


def cell(settings: Settings, arm: str, what: str, seed: int, folder: Path) -> dict[str, Any]:
    made = Try(settings, arm, seed, folder, what)
    made.tune()
    return made.measured()


def settings_of(settings: Settings, what: str) -> Settings:
    if what == LONGER:
        return replace(settings, steps=2 * settings.steps)
    return SmallBlocks(**asdict(settings)) if what == SMALLER else settings


def run(settings: Settings, results: Results, folder: Path, processes: int) -> None:
    def job(arm: str, what: str, seed: int) -> Job:
        return Job((arm, what, seed), cell, (settings_of(settings, what), arm, what, seed, folder))

    first = [job(arm, AS_BEFORE, seed) for seed in settings.seeds for arm in (PRICE, DENSE)]
    rest = [job(PRICE, what, seed) for seed in settings.seeds for what in TOLD if what != AS_BEFORE]
    rest += [job(DENSE, LONGER, seed) for seed in settings.seeds]
    for jobs in (first, rest):  # the rest needs files of the first
        if processes == 1:
            for one in jobs:
                results.measured(*one.key, by=partial(one.by, *one.given))
        else:
            measure_all(results, jobs, processes)


def page(results: Results, settings: Settings) -> list[str]:
    def losses(arm: str, what: str) -> list[list[float]]:
        found = [results.get(arm, what, seed) for seed in settings.seeds]
        if None in found:
            raise SystemExit(f"the study must have run whole, got no cell of {arm}, {what}.")
        return [cell["losses"] for cell in found if cell is not None]

    def relative(ours: list[list[float]], theirs: list[list[float]]) -> str:
        middle, low, high = map(math.expm1, crossed_difference(ours, theirs))
        return percent((middle, low, high))

    base, rows = losses(PRICE, AS_BEFORE), []
    for what, told in TOLD.items():
        ours, dense = losses(PRICE, what), losses(DENSE, LONGER if what == LONGER else AS_BEFORE)
        cells = [results.get(PRICE, what, seed) or {} for seed in settings.seeds]
        blocks = torch.tensor([one["blocks"] for one in cells]).mean().item()
        keys = blocks * (32 if what == SMALLER else 64)
        rows.append([what, told, f"{blocks:.2f}", f"{keys:.0f}", relative(ours, dense), "" if ours is base else relative(ours, base)])
    seeds = f"{len(settings.seeds)} seed{'s' if len(settings.seeds) > 1 else ''}"
    return [
        "# What else was tried in the tuned conversion",
        "",
        "[Study B](tuned.md) tunes a converted model that reads a quarter of the key blocks. The aim was a perplexity within 2 % of that",
        "of the dense model, tuned alike. This page shows what some changes do to it. `benchmarks/studies/tuned_tries.py` wrote the page.",
        "",
        f"Model, texts, steps and evaluation are those of study B, with {seeds}. *Excess* is the perplexity over that of the dense model,",
        "tuned as long. The last column compares with the first row. Brackets hold a 95 % interval for other texts"
        + (" and seeds." if len(settings.seeds) > 1 else ", not for other seeds."),
        "",
        *table(["try", "what changes", "blocks", "keys", "excess", "against the first row"], rows),
        "",
        f"Measured on {results.origin()}.",
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else 2)
    options = parser.parse_args()
    settings = Settings(seeds=(0,))
    if options.quick:
        settings = Settings(tokens=512, share=0.85, steps=2, distil_steps=10, rows=2, seeds=(0,))
    fixed = {**asdict(settings), "sample": SAMPLE, "training": TRAINING, "evaluation": EVALUATION, "tries": TOLD}
    results = Results(None if options.quick else DOCS / "tuned_tries.json", fixed)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            run(settings, results, Path(folder), 1)
        print("\n".join(page(results, settings)))
        return
    run(settings, results, CHECKPOINTS, options.processes)
    (DOCS / "tuned_tries.md").write_text("\n".join(page(results, settings)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
