"""Recall from scratch: a small model trained with few key blocks per query, where queries need few or many.

    .venv/bin/python benchmarks/studies/recall.py            about an hour on two cores, one process on each
    .venv/bin/python benchmarks/studies/recall.py --quick    a trial run of a few minutes; writes nothing

A row is text of the standard library, byte by byte, with facts in its first part and questions about them in its last. The facts that a
question needs lie in 1, 2, 4 or 8 blocks; see `_recall_task.py`. All arms share the first part of the training, with plain attention.
Writes docs/studies/recall.json, recall.md and recall.png. An interrupted study continues from docs/studies/recall.json and from the
checkpoints in build/recall.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _recall_page import ARMS, DENSE, PRICE, STATIC, draw_figure, page
from _recall_task import DEMANDS, EVALUATION, FORCED, IGNORED, TRAINING, Rows, Settings, new_model
from _study import DOCS, Results, arguments
from torch import Tensor
from torch.nn.functional import cross_entropy

from tinyonn.hf import calibrate, convert_attention, distil_compression
from tinyonn.hf.dyn_nsa import BudgetSchedule, cores, parameter_groups

OTHER_ROWS, EVALUATION_ROWS = 10**9, 2 * 10**9  # where the draws of distillation and of the evaluation begin
PATH = 0.3  # of the sparse steps, in which the blocks read fall to the budget, as in BudgetSchedule
WARM_UP, SAVE_EVERY, TELL_EVERY = 30, 100, 50  # steps
CLOSE, MOST_TRIES = 0.01, 3  # relative error of the far blocks on the evaluation rows
CHECKPOINTS = Path(__file__).resolve().parents[2] / "build" / "recall"


class Run:
    """Training of one arm with one seed.

    The state is saved every few hundred steps, and read from `folder` where it is there. All arms go on from the state after the steps with
    plain attention, which the first of them that runs trains.
    """

    def __init__(self, settings: Settings, arm: str, seed: int, folder: Path | None) -> None:
        self.settings, self.arm, self.seed, self.folder = settings, arm, seed, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rows = Rows(settings, TRAINING)
        self.short = Rows(replace(settings, tokens=settings.short), TRAINING)
        self.model = new_model(settings, seed).to(self.device)
        self.optimizer = self._new_optimizer()
        self.schedule: BudgetSchedule | None = None
        self.step = 0

    def train_start(self) -> None:
        """The steps with plain attention."""
        self._restore("start")
        self._train_to(self.settings.dense_steps, "start")

    def train(self) -> None:
        """All steps of the arm."""
        if not self._saved(self.arm):
            self.train_start()
        if self.arm != DENSE:
            self._convert()
        self.optimizer = self._new_optimizer()
        if not self._restore(self.arm) and self.arm != DENSE:
            self._distil(self.settings.distil_steps)
        self._train_to(self.settings.steps, self.arm)
        if self.arm == STATIC:
            self._read_at_most(self.settings.top_n)
        if self.arm == PRICE:
            calibrate(self.model, self._sample(8), self.settings.target, price="none")

    def _convert(self) -> None:
        settings = self.settings
        most = self._n_at(0) if self.arm == STATIC else None
        convert_attention(self.model, block_size=settings.block, compress_size=16, window=4 * settings.block, max_blocks=most)
        if self.arm == STATIC:  # every block passes, so the max_blocks with the highest shares are read
            for core in cores(self.model):
                core.base.requires_grad_(False)
                core.slope.requires_grad_(False)
        else:
            self.schedule = BudgetSchedule(settings.target, settings.steps - settings.dense_steps)
        self.model.to(self.device)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        rate, groups = self.settings.rate, [{"params": list(self.model.parameters())}]
        if next(cores(self.model), None) is not None:
            groups = parameter_groups(self.model, lr=rate, parts_lr=self.settings.parts_rate, threshold_lr=self.settings.threshold_rate)
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        for group in optimizer.param_groups:
            group["full"] = group["lr"]
        return optimizer

    def _train_to(self, last: int, name: str) -> None:
        settings, first = self.settings, self.settings.dense_steps
        while self.step < last:
            since = self.step - (first if self.step >= first else 0)  # each part begins with a new optimiser
            share = min(1.0, (since + 1) / WARM_UP) * (0.1 + 0.45 * (1 + math.cos(math.pi * self.step / settings.steps)))
            for group in self.optimizer.param_groups:
                group["lr"] = group["full"] * share
            if self.schedule is not None:
                self.schedule.apply(self.model, since)
            if self.arm == STATIC and name == STATIC:
                self._read_at_most(self._n_at(since))
            if next(cores(self.model), None) is not None and since and since % settings.again_every == 0:
                self._distil(settings.again_steps)
            self.model.train()
            self.optimizer.zero_grad()
            rows, batch = self.rows, settings.batch
            if self.step < settings.steps * settings.short_share:
                rows, batch = self.short, settings.batch * settings.tokens // settings.short
            text, answer = self._losses(*rows.draw(self.seed * 1_000_000 + self.step, batch)[:3])
            (text + settings.answer_weight * answer).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            if self.step % SAVE_EVERY == 0 or self.step == last:
                self._save(name)
            if self.step % TELL_EVERY == 0:
                read = f", {float(next(cores(self.model)).price):.2f} price" if self.schedule is not None else ""
                print(f"    {name}, seed {self.seed}, step {self.step}: text {text:.3f}, answers {answer:.3f}{read}", flush=True)
        if self.schedule is not None:
            self.schedule.apply(self.model, self.step - first)

    def _read_at_most(self, blocks: int) -> None:
        for core in cores(self.model):
            core.options.max_blocks = blocks

    def _n_at(self, since: int) -> int:
        """Blocks that static top-n reads at a step of its own: from all to n, on the path on which the schedule lowers its budget."""
        share = min(1.0, since / (PATH * (self.settings.steps - self.settings.dense_steps)))
        return round((self.settings.tokens // self.settings.block) ** (1 - share) * self.settings.top_n**share)

    def _losses(self, ids: Tensor, text: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of text and of answers."""
        logits = self.model(input_ids=ids.to(self.device), use_cache=False).logits.flatten(0, 1)
        return (
            cross_entropy(logits, text.flatten().to(self.device), ignore_index=IGNORED),
            cross_entropy(logits, answers.flatten().to(self.device), ignore_index=IGNORED),
        )

    def _distil(self, steps: int) -> None:
        if steps:
            distil_compression(self.model, self._sample(-(-steps // 10)), steps)

    def _sample(self, number: int) -> list[Tensor]:
        """Batches of other rows than those of the steps, for distillation and calibration."""
        first = OTHER_ROWS + self.seed * 1_000_000 + self.step
        return [self.rows.draw(first + i, self.settings.batch)[0].to(self.device) for i in range(number)]

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name.replace(' ', '_')}_{self.seed}.pt"

    def _save(self, name: str) -> None:
        if (path := self._path(name)) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        schedule = None if self.schedule is None else self.schedule.state_dict()
        state = {
            "settings": asdict(self.settings), "step": self.step, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "schedule": schedule,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def _saved(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=False)
        return state if state["settings"] == asdict(self.settings) else None

    def _restore(self, name: str) -> bool:
        """Takes up the state that was saved under this name; whether there was one."""
        state = self._saved(name)
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        return True

    def measured(self) -> dict[str, Any]:
        """What `evaluated` gives, at the budget: the price that the training rows set reads other numbers of blocks on other rows."""
        found, blocks = self.evaluated(), self.settings.tokens // self.settings.block
        if self.arm != PRICE:
            return found
        shipped, aim = found, self.settings.target
        wanted = aim - sum(min(block + 1, FORCED) for block in range(blocks)) / blocks
        for _ in range(MOST_TRIES):
            if abs(found["far"] / wanted - 1) <= CLOSE:
                break
            aim += wanted - found["far"]
            calibrate(self.model, self._evaluation_rows(), aim, price="none")
            found = self.evaluated()
        return found | {"far as shipped": shipped["far"], "text as shipped": shipped["text"]}

    def _evaluation_rows(self) -> list[Tensor]:
        rows = Rows(self.settings, EVALUATION)
        return [rows.draw(EVALUATION_ROWS + number, 1)[0].to(self.device) for number in range(self.settings.rows)]

    @torch.no_grad()
    def evaluated(self) -> dict[str, Any]:
        """Losses and accuracy of each row of other texts, and far blocks by layer and by kind of query."""
        settings, rows = self.settings, Rows(self.settings, EVALUATION)
        self.model.eval()
        seen: list[list[Tensor]] = []  # of a row, by layer: key blocks of each query, (T,)
        hooks = [
            core.register_forward_hook(lambda core, args, out: seen[-1].append(out.counts[0].float().mean(-1)))
            for core in cores(self.model)
        ]
        found: dict[str, Any] = {"text": [], **{f"{kind} {demand}": [] for kind in ("loss", "accuracy") for demand in DEMANDS}}
        blocks, far = torch.arange(settings.tokens) // settings.block + 1, []
        kinds = []
        for number in range(settings.rows):
            ids, text, answers, demand = rows.draw(EVALUATION_ROWS + number, 1)
            seen.append([])
            logits = self.model(input_ids=ids.to(self.device), use_cache=False).logits[0].float().cpu()
            found["text"].append(cross_entropy(logits, text[0], ignore_index=IGNORED).item())
            right = logits.argmax(-1) == answers[0]
            for one in DEMANDS:
                chosen = demand[0] == one
                found[f"loss {one}"].append(cross_entropy(logits[chosen], answers[0, chosen]).item())
                found[f"accuracy {one}"].append(right[chosen].float().mean().item())
            read = torch.stack(seen[-1]).cpu() if seen[-1] else blocks.float().expand(settings.layers, -1)
            far.append(read - blocks.clamp(max=FORCED))
            kinds.append(demand[0])
        for hook in hooks:
            hook.remove()
        every, kind = torch.stack(far), torch.stack(kinds)  # (rows, layers, T), (rows, T)
        found["far"] = every.mean().item()
        found["far by layer"] = every.mean((0, 2)).tolist()
        by_query = every.transpose(0, 1)
        found["far by demand"] = {str(one): by_query[:, kind == one].mean(1).tolist() for one in (0, *DEMANDS)}
        return found


def run_start(settings: Settings, seed: int, folder: Path | None) -> None:
    _quiet()
    Run(settings, DENSE, seed, folder).train_start()


def run_arm(settings: Settings, arm: str, seed: int, folder: Path | None) -> dict[str, Any]:
    _quiet()
    begin, run = time.monotonic(), Run(settings, arm, seed, folder)
    run.train()
    return {**run.measured(), "seconds": time.monotonic() - begin}


def _quiet() -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def measure(results: Results, settings: Settings, folder: Path, processes: int) -> None:
    """Measures the cells that are missing, some at a time."""
    missing = [(seed, arm) for seed in settings.seeds for arm in ARMS if results.get(arm, seed) is None]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        starts = {seed: pool.submit(run_start, settings, seed, folder) for seed, _ in missing}
        running: dict[Future[dict[str, Any]], tuple[int, str]] = {}
        for seed, start in starts.items():
            start.result()
            running |= {pool.submit(run_arm, settings, arm, seed, folder): (seed, arm) for other, arm in missing if other == seed}
        for done in as_completed(running):
            seed, arm = running[done]
            results.measured(arm, seed, by=done.result)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else 2)
    parser.add_argument("--page", action="store_true", help="only writes the page and the figure again")
    options = parser.parse_args()
    if options.quick:
        settings = Settings(
            tokens=256, width=32, layers=2, batch=2, steps=12, distil_steps=10, again_every=4, again_steps=2, rows=2, seeds=(0,)
        )
        results = Results(None, asdict(settings))
        for arm in ARMS:
            results.measured(arm, 0, by=lambda arm=arm: run_arm(settings, arm, 0, None))  # type: ignore[misc]
        print("\n".join(page(results, settings)))
        return
    settings = Settings()
    results = Results(DOCS / "recall.json", {**asdict(settings), "training": TRAINING, "evaluation": EVALUATION})
    if not options.page:
        measure(results, settings, CHECKPOINTS, options.processes)
    whole = len(ARMS) * len(settings.seeds)
    if len(results.cells) < whole:
        parser.error(f"docs/studies/recall.json must have {whole} runs of these settings for a page, got {len(results.cells)}.")
    (DOCS / "recall.md").write_text("\n".join(page(results, settings)) + "\n", encoding="utf-8")
    draw_figure(results, settings, DOCS / "recall.png")


if __name__ == "__main__":
    main()
