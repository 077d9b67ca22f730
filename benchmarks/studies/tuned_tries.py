"""What else was tried to bring the tuned conversion of study B closer to the dense model.

    .venv/bin/python benchmarks/studies/tuned_tries.py            over two hours on two cores, one process on each
    .venv/bin/python benchmarks/studies/tuned_tries.py --quick    a trial run of a few minutes; writes nothing

Each try changes one thing of the arm with one price of `tuned.py`: what is measured again after tuning, what is learned in it, how long it
is, or how large blocks are. All else is as there, and the dense model is tuned as long. Writes docs/studies/tuned_tries.json and
tuned_tries.md; an interrupted study goes on from there and from the checkpoints in build/tuned_tries.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from _study import DOCS, Job, Results, arguments, crossed_difference, measure_all, table
from _tuned_page import DENSE, PRICE, STATIC, percent
from torch import Tensor
from tuned import EVALUATION, SAMPLE, TRAINING, Run, Settings

from tinyonn.hf.dyn_nsa import BudgetSchedule, calibrate, collected_budget_loss, convert_attention, distil_compression

CHECKPOINTS = Path(__file__).resolve().parents[2] / "build" / "tuned_tries"
LAYERS = 30  # of SmolLM2-135M
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

    @property
    def target(self) -> float:
        return self.budget(LAYERS)

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

    seed, *_ = settings.seeds
    first = [job(arm, AS_BEFORE, each) for each in settings.seeds for arm in (PRICE, DENSE, STATIC)]
    rest = [job(PRICE, what, seed) for what in TOLD if what not in (AS_BEFORE, SMALLER)] + [job(DENSE, LONGER, seed)]
    rest += [job(arm, SMALLER, each) for each in settings.seeds for arm in (PRICE, STATIC)]
    for jobs in (first, rest):  # the rest needs files of the first
        if processes == 1:
            for one in jobs:
                results.measured(*one.key, by=partial(one.by, *one.given))
        else:
            measure_all(results, jobs, processes)


def page(results: Results, settings: Settings) -> list[str]:
    seed, *_ = settings.seeds

    def cells(arm: str, what: str, seeds: Iterable[int]) -> list[dict[str, Any]]:
        found = [results.get(arm, what, each) for each in seeds]
        if None in found:
            raise SystemExit(f"the study must have run whole, got no cell of {arm}, {what}.")
        return found  # type: ignore[return-value]

    def relative(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
        middle, low, high = map(math.expm1, crossed_difference(*([one["losses"] for one in arm] for arm in (ours, theirs))))
        return percent((middle, low, high))

    def read(found: list[dict[str, Any]], what: str) -> tuple[str, str]:
        blocks = sum(one["blocks"] for one in found) / len(found)
        return f"{blocks:.2f}", f"{blocks * (SmallBlocks if what == SMALLER else Settings).size:.0f}"

    base, rows = cells(PRICE, AS_BEFORE, [seed]), []
    for what, told in TOLD.items():
        ours, dense = cells(PRICE, what, [seed]), cells(DENSE, LONGER if what == LONGER else AS_BEFORE, [seed])
        rows.append([what, told, *read(ours, what), relative(ours, dense), "" if what in (AS_BEFORE, LONGER) else relative(ours, base)])
    both: list[list[object]] = []
    for what, size in ((AS_BEFORE, 64), (SMALLER, 32)):
        for arm in (STATIC, PRICE):
            ours = cells(arm, what, settings.seeds)
            both.append([arm, size, *read(ours, what), relative(ours, cells(DENSE, AS_BEFORE, settings.seeds))])
    against = relative(cells(PRICE, SMALLER, settings.seeds), cells(STATIC, SMALLER, settings.seeds))
    return [
        "# What else was tried in the tuned conversion",
        "",
        "[Study B](tuned.md) tunes a converted model that reads a quarter of the key blocks. The aim was a perplexity within 2 % of that",
        "of the dense model, tuned alike. This page shows what some changes do to it. `benchmarks/studies/tuned_tries.py` wrote the page.",
        "",
        f"Model, texts, steps and evaluation are those of study B, with seed {seed} of tuning. *Excess* is the perplexity over that of the",
        "dense model, tuned as long. The last column compares with the first row. Brackets hold a 95 % interval for other texts, not for",
        "other seeds.",
        "",
        *table(["try", "what changes", "blocks", "keys", "excess", "against the first row"], rows),
        "",
        f"Blocks of 64 and of 32, with {len(settings.seeds)} seeds; brackets hold a 95 % interval for other texts and seeds. A static",
        f"top-n reads as many blocks as one price. With blocks of 32, the perplexity with one price differs from it by {against}.",
        "",
        *table(["arm", "positions of a block", "blocks", "keys", "excess"], both),
        "",
        f"Measured on {results.origin()}.",
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else 2)
    options = parser.parse_args()
    settings = Settings()
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
