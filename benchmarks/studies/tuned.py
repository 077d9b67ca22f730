"""Study B: perplexity of a converted and tuned SmolLM2-135M that reads a quarter of the key blocks.

    .venv/bin/python benchmarks/studies/tuned.py            over an hour on two cores, one process on each
    .venv/bin/python benchmarks/studies/tuned.py --quick    a trial run of a few minutes; writes nothing

Three arms are tuned with LoRA on the same texts in the same order, at equal steps: the dense model, a static top-n, and one price for the
model. Both sparse arms start from the same distilled compressed keys and also train gates and compression. Training, calibration and
evaluation texts differ. Writes docs/studies/tuned.json, tuned.md and tuned.png. An interrupted study goes on from docs/studies/tuned.json
and from the checkpoints in build/tuned. With `--page`, only the page and the figure are written, from the cells that are there.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from _study import DOCS, Results, arguments, half_precision, module_text, prose_text
from _tuned_page import BEFORE, DENSE, PRICE, STATIC, Cells, name, page, write
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyonn.cli.demo.smollm2 import prepare_smollm2
from tinyonn.hf.dyn_nsa import BudgetSchedule, calibrate, convert_attention, cores, distil_compression, parameter_groups, statistics

CHECKPOINTS = Path(__file__).resolve().parents[2] / "build" / "tuned"
TRAINING = (
    "ast.py", "calendar.py", "cmd.py", "codecs.py", "configparser.py", "copy.py", "csv.py", "datetime.py", "dataclasses.py", "difflib.py",
    "doctest.py", "enum.py", "fractions.py", "ftplib.py", "functools.py", "gettext.py", "gzip.py", "heapq.py", "imaplib.py", "locale.py",
    "mailbox.py", "mimetypes.py", "optparse.py", "os.py", "pathlib.py", "pdb.py", "pickle.py", "platform.py", "random.py", "shutil.py",
)  # fmt: skip
SAMPLE = (("code", "inspect.py"), ("prose", 0.66), ("code", "tarfile.py"), ("prose", 0.69))  # for distillation and calibration
EVALUATION = (
    ("code", "argparse.py"), ("prose", 0.75), ("code", "typing.py"), ("prose", 0.8), ("code", "statistics.py"), ("prose", 0.85),
    ("code", "ipaddress.py"), ("prose", 0.9),
)  # fmt: skip
CLOSE = 0.005  # relative error of the number of blocks on the evaluation texts
PROSE_END = 0.65  # of the prose: what comes before is trained on


@dataclass
class Settings:
    tokens: int = 2048
    share: float = 0.25  # of the blocks of a dense query
    steps: int = 24
    rank: int = 8
    rate: float = 5e-4
    parts_rate: float = 3e-4  # of gates and compression
    threshold_rate: float = 0.01
    temperature: tuple[float, float] = (0.3, 0.05)  # the model's weights hardly move in so few steps
    distil_steps: int = 150
    rows: int = len(EVALUATION)
    seeds: tuple[int, ...] = (0, 1)
    save_every: int = 8
    size: ClassVar[int] = 64  # positions of a block

    @property
    def blocks(self) -> float:
        """Mean key blocks of a dense query."""
        return (self.tokens / self.size + 1) / 2

    @property
    def target(self) -> float:
        return self.share * self.blocks

    def mean_of(self, number: int) -> float:
        """Mean key blocks of a query that reads at most `number`."""
        return sum(min(number, block + 1) for block in range(self.tokens // self.size)) / (self.tokens // self.size)

    def numbers(self, layers: int) -> list[int]:
        """Blocks that static top-n reads in each layer, two neighbouring numbers evenly spread, so that their mean is the target."""
        low = next(number for number in range(1, self.tokens // self.size) if self.mean_of(number + 1) > self.target)
        part = (self.target - self.mean_of(low)) / (self.mean_of(low + 1) - self.mean_of(low))
        return [low + (round((layer + 1) * part) > round(layer * part)) for layer in range(layers)]

    def budget(self, layers: int) -> float:
        """Mean key blocks of a query in the sparse arms: what static top-n reads, which is the target but for a fraction."""
        return sum(map(self.mean_of, self.numbers(layers))) / layers


class Texts:
    """Token ids of the texts, (1, tokens) each."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(prepare_smollm2())

    @cached_property
    def prose(self) -> Tensor:
        return torch.tensor(self._tokenizer(prose_text())["input_ids"])

    @cached_property
    def code(self) -> Tensor:
        return torch.cat([torch.tensor(self._tokenizer(module_text(name))["input_ids"]) for name in TRAINING])

    def of(self, kind: str, where: str | float) -> Tensor:
        if kind == "prose":
            return self._row(self.prose, int(float(where) * len(self.prose)))
        return self._row(torch.tensor(self._tokenizer(module_text(str(where)))["input_ids"]), 0)

    def training(self, seed: int, step: int) -> Tensor:
        """The row of a step: code and prose by turns."""
        every = self.prose[: int(PROSE_END * len(self.prose))] if step % 2 else self.code
        return self._row(every, random.Random(f"{seed} {step}").randrange(len(every) - self.tokens))

    def _row(self, ids: Tensor, begin: int) -> Tensor:
        if len(ids) < begin + self.tokens:
            raise ValueError(f"a text must have {begin + self.tokens:,} tokens, got {len(ids):,}.")
        return ids[None, begin : begin + self.tokens]


class Run:
    """One arm with one seed, from the trained model to the end of its tuning."""

    def __init__(self, settings: Settings, arm: str, seed: int, folder: Path) -> None:
        self.settings, self.arm, self.seed, self.folder = settings, arm, seed, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.texts = Texts(settings.tokens)
        model: Any = AutoModelForCausalLM.from_pretrained(prepare_smollm2(), dtype=torch.float32)
        self.model = model.to(self.device).requires_grad_(False)
        self.budget = settings.blocks
        if arm != DENSE:
            torch.manual_seed(0)  # new weights are drawn; all runs start from the same
            self.convert()
            self.budget = settings.budget(len(list(cores(self.model))))
            self._start(folder / "start.pt")

    def convert(self) -> None:
        convert_attention(self.model)

    def schedule(self) -> BudgetSchedule:
        return BudgetSchedule(self.budget, self.settings.steps, temperature=self.settings.temperature)

    def added_loss(self) -> Tensor | float:
        """What a step's loss has besides that of the next token."""
        return 0.0

    def finish(self) -> None:
        """Sets the price that the sample reads the budget at, after the last step."""
        calibrate(self.model, self.sample()[:2], self.budget, price="none")

    def sample(self) -> list[Tensor]:
        return [self.texts.of(*text).to(self.device) for text in SAMPLE]

    def measured(self) -> dict[str, Any]:
        """The cell: loss of each evaluation row, key blocks, and far blocks of each layer."""
        tried = [self._evaluated(None)]
        if self.arm == PRICE:  # the texts may read more or less than the sample
            forced = next(cores(self.model)).options.forced
            wanted = aim = self.budget - (tried[0]["blocks"] - tried[0]["far"])
            while abs(tried[-1]["blocks"] / self.budget - 1) > CLOSE and len(tried) < 3:
                aim *= wanted / max(tried[-1]["far"], 0.1 * wanted)
                tried.append(self._evaluated(forced + aim))
        return {**min(tried, key=lambda one: abs(one["blocks"] - self.budget)), "as shipped": tried[0]}

    def tune(self) -> None:
        """Tunes to the end, from the last state that was saved."""
        settings = self.settings
        torch.manual_seed(self.seed)
        parts = [] if self.arm == DENSE else ["dyn_nsa"]
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        self.model = get_peft_model(
            self.model, LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=targets, modules_to_save=parts)
        )
        self._limit_blocks()
        optimizer, schedule, begin = self._optimizer(), None, self._restore()
        if self.arm == PRICE:
            schedule = self.schedule()
        if begin is not None:
            optimizer.load_state_dict(begin["optimizer"])
            if schedule is not None:
                schedule.load_state_dict(begin["schedule"])
        first = 0 if begin is None else begin["step"]
        if schedule is not None and begin is not None:
            torch.set_rng_state(begin["random"].cpu())
            schedule.apply(self.model, first)  # the temperature is no part of the state
        self.model.train()
        for step in range(first, settings.steps):
            share = min(1.0, (step + 1) / 4) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / settings.steps)))
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * share
            if schedule is not None:
                schedule.apply(self.model, step)
            optimizer.zero_grad()
            with half_precision():
                loss = self._loss(self.texts.training(self.seed, step)).mean()
            (loss + self.added_loss()).backward()
            torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            if schedule is not None:
                schedule.apply(self.model, step + 1)  # a state that is saved has the price of the next step
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                self._save(step + 1, optimizer, schedule)
                print(f"{self.arm}, seed {self.seed}, step {step + 1} of {settings.steps}: loss {loss.item():.3f}", flush=True)
        if schedule is not None:
            self.finish()

    def _start(self, path: Path) -> None:
        """Distils compressed keys and finds thresholds, the same for all runs: from the file if it is there."""
        settings = {name: getattr(self.settings, name) for name in ("tokens", "share", "distil_steps", "size")}
        found = list(cores(self.model))
        state = torch.load(path, map_location=self.device) if path.is_file() else None
        if state is None or state["settings"] != settings:
            distil_compression(self.model, self.sample(), self.settings.distil_steps)
            calibrate(self.model, self.sample(), self.budget)
            parts = [core.state_dict() for core in found]
            state = {"settings": settings, "parts": parts, "prices": found[0].options.prices}
            _save(path, state)
        for core, part in zip(found, state["parts"], strict=True):
            core.load_state_dict(part)
            core.options.prices = state["prices"]
            if self.arm == STATIC:
                core.price.fill_(core.start_price)

    def _limit_blocks(self) -> None:
        """Limits the blocks of a static arm. All pass its thresholds, so those with the highest shares are read."""
        found = list(cores(self.model)) if self.arm == STATIC else []
        for core, number in zip(found, self.settings.numbers(len(found)), strict=True):
            core.options = replace(core.options, max_blocks=number)  # layers share their options otherwise
            core.base.requires_grad_(False)
            core.slope.requires_grad_(False)

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        if self.arm == DENSE:
            groups: Any = [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": settings.rate}]
        else:
            groups = parameter_groups(self.model, lr=settings.rate, parts_lr=settings.parts_rate, threshold_lr=settings.threshold_rate)
        for group in groups:
            group["full_rate"] = group["lr"]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    def _loss(self, ids: Tensor, **options: Any) -> Tensor:
        """Loss of each token, (T − 1,)."""
        ids = ids.to(self.device)
        logits = self.model(input_ids=ids, use_cache=False, **options).logits
        return cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")

    @torch.no_grad()
    def _evaluated(self, budget: float | None) -> dict[str, Any]:
        self.model.eval()
        self._limit_blocks()
        statistics(self.model, reset=True)
        options = {} if budget is None else {"block_budget": budget}
        texts = EVALUATION[: self.settings.rows]
        losses = [self._loss(self.texts.of(*text), **options).mean().item() for text in texts]
        layers = list(statistics(self.model, reset=True).values())
        mean = {name: sum(layer[name] for layer in layers) / max(len(layers), 1) for name in ("mean_count", "far_count") if layers}
        return {
            "loss": sum(losses) / len(losses), "blocks": mean.get("mean_count", self.settings.blocks), "far": mean.get("far_count"),
            "losses": losses, "kinds": [kind for kind, _ in texts], "far by layer": [layer["far_count"] for layer in layers],
        }  # fmt: skip

    def _path(self) -> Path:
        return self.folder / f"{self.arm.replace(' ', '_')}_{self.seed}.pt"

    def _save(self, step: int, optimizer: torch.optim.Optimizer, schedule: BudgetSchedule | None) -> None:
        own = {name: value for name, value in self.model.state_dict().items() if "lora_" in name or "dyn_nsa" in name}
        controller = None if schedule is None else schedule.state_dict()
        state = {
            "settings": asdict(self.settings), "step": step, "model": own, "optimizer": optimizer.state_dict(), "schedule": controller,
            "random": torch.get_rng_state(),
        }  # fmt: skip
        _save(self._path(), state)

    def _restore(self) -> dict[str, Any] | None:
        path = self._path()
        if not path.is_file():
            return None
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=False)
        if state["settings"] != asdict(self.settings):
            return None
        _, unknown = self.model.load_state_dict(state["model"], strict=False)
        assert not unknown
        return state


def _save(path: Path, state: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    torch.save(state, part)
    os.replace(part, path)


def cell(settings: Settings, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """What one process does: an arm with a seed, or before any tuning."""
    _one_thread()
    begin = time.monotonic()
    run = Run(settings, arm, seed, folder)
    if seed != BEFORE:
        run.tune()
    return {**run.measured(), "seconds": round(time.monotonic() - begin)}


def start(settings: Settings, folder: Path) -> None:
    _one_thread()
    Run(settings, PRICE, BEFORE, folder)


def _one_thread() -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def run(settings: Settings, results: Results, folder: Path, workers: int) -> None:
    wanted = [(arm, seed) for arm in (DENSE, PRICE, STATIC) for seed in (BEFORE, *settings.seeds)]
    wanted = [key for key in wanted if results.get(*name(*key)) is None]
    if not wanted:
        return
    if workers == 1:
        for key in wanted:
            results.measured(*name(*key), by=partial(cell, settings, *key, folder))
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        begun = pool.submit(start, settings, folder)
        futures = {pool.submit(cell, settings, *key, folder): key for key in wanted if key[0] == DENSE}
        begun.result()  # one process finds what all sparse arms start from, another tunes the dense model meanwhile
        futures |= {pool.submit(cell, settings, *key, folder): key for key in wanted if key[0] != DENSE}
        for future in as_completed(futures):
            results.measured(*name(*futures[future]), by=future.result)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--page", action="store_true", help="only write the page of the cells that are there")
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else 2)
    options = parser.parse_args()
    settings = Settings()
    if options.quick:
        settings = Settings(tokens=512, share=0.85, steps=2, distil_steps=10, rows=2, seeds=(0,))
    results = Results(
        None if options.quick else DOCS / "tuned.json",
        {**asdict(settings), "sample": SAMPLE, "training": TRAINING, "evaluation": EVALUATION},
    )
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            run(settings, results, Path(folder), 1)
        print("\n".join(page(Cells(results, settings))))
        return
    if not options.page:
        run(settings, results, CHECKPOINTS, options.processes)
    write(DOCS, results, settings)


if __name__ == "__main__":
    main()
