"""Study E: a trained model whose MLPs are split into experts, at equal mean number of experts per token.

    .venv/bin/python benchmarks/studies/converted.py            about two hours on two cores, one process on each
    .venv/bin/python benchmarks/studies/converted.py --quick    a trial run of a few minutes; writes nothing

Each MLP of SmolLM2-135M, of 1,536 neurons, is split by co-activation into 16 experts of 96 neurons, all active at first. An arm sets the
routers to a mean number of experts per token on a sample, and then tunes experts and routers on other text, with attention and embeddings
frozen. Thresholds drift in training, so every four steps, and at the end, one shift for each layer restores the mean on the training text.
A seed draws which modules of the standard library are the sample, which are for training, and in which order; the evaluation is on others.
Thresholds choose other numbers of experts on other text, so they are shifted once more before the evaluation, to the mean on its texts.
With the first seed and the larger budget, each arm tries two learning rates of routers, and keeps the one of lower loss on texts that are
for this choice alone. Writes docs/studies/converted.json, converted.md and converted.png. An interrupted study continues from
docs/studies/converted.json. Arms share converted models and calibrated routers, which are kept in build/converted:
delete them after a change of the conversion.
"""

from __future__ import annotations

import os
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from _converted_page import ALL_TUNED, ARMS, DENSE, DIVERSITY, ONE_PRICE, SIZES, SURPRISE, TOP_K, best_rate, draw_figure, page
from _study import DOCS, Job, Results, arguments, half_precision, measure_all, module_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyonn.cli.demo.smollm2 import prepare_smollm2
from tinyonn.hf.dyn_moe import calibrate_experts, convert_mlp_to_dynmoe, expert_statistics
from tinyonn.hf.dyn_moe.sampling import contributions
from tinyonn.nn import DynMoE
from tinyonn.nn.surprise_capture import Visit
from tinyonn.train import HyperStep, capture

STARTS = Path(__file__).resolve().parents[2] / "build" / "converted"
EVALUATION = (
    "argparse.py", "statistics.py", "ipaddress.py", "zipfile.py", "tarfile.py", "typing.py", "tokenize.py", "textwrap.py",
)  # fmt: skip
CHOICE = ("shutil.py", "smtplib.py", "socket.py", "subprocess.py")
OTHERS = (
    "ast.py", "calendar.py", "cmd.py", "codecs.py", "configparser.py", "copy.py", "csv.py", "datetime.py", "dataclasses.py", "difflib.py",
    "doctest.py", "enum.py", "fractions.py", "ftplib.py", "functools.py", "gettext.py", "gzip.py", "heapq.py", "imaplib.py", "inspect.py",
    "locale.py", "mailbox.py", "mimetypes.py", "optparse.py", "os.py", "pathlib.py", "pdb.py", "pickle.py", "platform.py", "random.py",
)  # fmt: skip
EXPERT_RATE = 3e-4  # Adam's learning rate
SCALE = 4.0  # scale of the routers' sigmoids; at 1 the scores of all experts are nearly equal
BALANCE = 0.01  # weight of the load-balance loss, as in Switch Transformer
SHIFT_EVERY = 4
RIDGE = 0.01  # of the regression of log sizes, relative to the mean square of a feature


@dataclass(frozen=True)
class Settings:
    """Sizes of the study."""

    tokens: int = 512
    experts: int = 16
    budgets: tuple[int, ...] = (12, 8)
    steps: int = 24
    sample: int = 8  # modules
    texts: int = len(EVALUATION)
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1e-3, 1e-4)  # of routers


class Bench:
    """The converted model, texts, and what an arm does with them."""

    def __init__(self, settings: Settings, folder: Path | None, arm: str, seed: int, rate: float = 0.0) -> None:
        self.settings, self.folder, self.arm, self.seed, self.rate = settings, folder, arm, seed, rate
        base = prepare_smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.evaluation = [self._ids(name) for name in EVALUATION[: settings.texts]]
        self.choice = [self._ids(name) for name in CHOICE]
        others = [self._ids(name) for name in random.Random(seed).sample(OTHERS, len(OTHERS))]
        self.sample, self.training = torch.cat(others[: settings.sample]), others[settings.sample :]
        if arm != DENSE:
            self._convert()
        if arm == SIZES:
            self._predict_sizes()

    def _convert(self) -> None:
        """Converts the model, or loads it as another run of this seed has saved it."""
        saved = None if self.folder is None else self.folder / f"{self.seed}-{self.settings.tokens}"
        if saved is not None and saved.is_dir():
            self.model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
            return
        convert_mlp_to_dynmoe(self.model, num_experts=self.settings.experts, sample=self.sample, scale=SCALE)
        if saved is not None:
            saved.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=saved.parent) as new:
                self.model.save_pretrained(Path(new) / "model")
                if not saved.is_dir():
                    os.replace(Path(new) / "model", saved)

    def _ids(self, name: str) -> Tensor:
        ids = self.tokenizer(module_text(name))["input_ids"][: self.settings.tokens]
        if len(ids) < self.settings.tokens:
            raise ValueError(f"{name} must have {self.settings.tokens} tokens, got {len(ids)}.")
        return torch.tensor([ids])

    @torch.no_grad()
    def _predict_sizes(self) -> None:
        """Sets each router to predict the log of the norm of each expert's output: linear, by ridge regression."""
        found: dict[str, list[Tensor]] = {}
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, DynMoE)}
        hooks = [
            module.register_forward_hook(lambda module, args, out, name=name: found.setdefault(name, []).append(args[0].flatten(0, 1)))
            for name, module in layers.items()
        ]
        for row in self.sample.split(1):
            self.model(input_ids=row, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, module in layers.items():
            x = torch.cat(found[name])
            sizes = contributions(name, module, x).double().clamp(min=1e-9).log()
            x = (x / x.square().mean(-1, keepdim=True).sqrt()).double()
            centred = x - x.mean(0)
            gram = centred.T @ centred
            gram.diagonal().add_(RIDGE * gram.diagonal().mean())
            slope = torch.linalg.solve(gram, centred.T @ (sizes - sizes.mean(0)))
            module.router.form = "linear"
            module.router.prototypes.copy_(slope.T)
            module.router.thresholds.copy_(x.mean(0) @ slope - sizes.mean(0))

    def measured(self, budget: int) -> dict[str, Any]:
        if self.arm == DENSE:
            return self._evaluated("dense")
        if self.arm == ALL_TUNED:
            self._tune(None)
            return self._evaluated("after")
        self._calibrate_once(budget)
        found = self._evaluated("before")
        self._tune(budget)
        losses = [self._loss(ids) for ids in self.choice]
        found |= {"choice": sum(losses) / len(losses)} | self._evaluated("after, as is")
        if not self._has_thresholds:
            return {key.replace("after, as is", "after"): value for key, value in found.items()} | found
        self._calibrate(torch.cat(self.evaluation), budget, shift=True)  # to the mean number of experts on these texts
        return found | self._evaluated("after")

    @property
    def _has_thresholds(self) -> bool:
        return self.arm not in (TOP_K, SIZES)

    @torch.no_grad()
    def _loss(self, ids: Tensor) -> float:
        self.model.eval()
        return float(self.model(input_ids=ids, labels=ids, use_cache=False).loss)

    def _evaluated(self, name: str) -> dict[str, Any]:
        """Loss of each text, and mean number of experts per token and layer."""
        converted = self.arm != DENSE
        if converted:
            expert_statistics(self.model, reset=True)
        losses = [self._loss(ids) for ids in self.evaluation]
        means = [one["mean_k"] for one in expert_statistics(self.model, reset=True).values()] if converted else []
        return {f"losses {name}": losses, f"loss {name}": sum(losses) / len(losses)} | (
            {f"k {name}": sum(means) / len(means)} if means else {}
        )

    def _calibrate(self, sample: Tensor, budget: int, shift: bool = False) -> None:
        if self.arm == SIZES:
            for module in self.model.modules():
                if isinstance(module, DynMoE):
                    module.router.min_experts = module.router.max_experts = budget
            return
        bounds = {"min_experts": budget, "max_experts": budget} if self.arm == TOP_K else {}
        calibrate_experts(self.model, sample, budget, shift=shift, price=self._price, **bounds)

    @property
    def _price(self) -> Literal["gradient", "none"]:
        return "gradient" if self.arm in ONE_PRICE else "none"

    def _calibrate_once(self, budget: int) -> None:
        """Calibrates routers on the sample, or loads them as another run of this seed has calibrated them."""
        kind = TOP_K if self.arm == TOP_K else self._price
        saved = None if self.folder is None or self.arm == SIZES else self.folder / f"{self.seed}-{self.settings.tokens}-{budget}-{kind}.pt"
        routers = [module.router for module in self.model.modules() if isinstance(module, DynMoE)]
        bounds = ("target_k", "min_experts", "max_experts")
        if saved is not None and saved.is_file():
            for router, (state, numbers) in zip(routers, torch.load(saved), strict=True):
                router.load_state_dict(state)
                for name, number in zip(bounds, numbers, strict=True):
                    setattr(router, name, number)
            return
        self._calibrate(self.sample, budget)
        if saved is not None:
            new = saved.with_suffix(f".{os.getpid()}")
            torch.save([(router.state_dict(), [getattr(router, name) for name in bounds]) for router in routers], new)
            os.replace(new, saved)

    def _tune(self, budget: int | None) -> None:
        """Tunes experts and routers; without a budget, only experts."""
        model, steps = self.model.requires_grad_(False), self.settings.steps
        routers: list[Tensor] = []
        experts: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, DynMoE):
                module.gating_loss_kind = "sdl" if self.arm == DIVERSITY else "surprise"
                for name, parameter in module.named_parameters():
                    of_router = name.startswith("router.")
                    if budget is not None or not of_router:
                        (routers if of_router else experts).append(parameter.requires_grad_(True))
        groups = [{"params": experts, "lr": EXPERT_RATE}] + ([{"params": routers, "lr": self.rate}] if routers else [])
        optimizer = torch.optim.Adam(groups)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
        hyper_step = HyperStep(model, optimizer) if self.arm in (SURPRISE, DIVERSITY) else None
        shifted = budget is not None and self._has_thresholds
        for step in range(steps):
            ids = self.training[step % len(self.training)]
            model.train()

            def language_loss(ids: Tensor = ids) -> Tensor:
                with half_precision():
                    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
                return loss

            if hyper_step is not None:
                hyper_step(language_loss)
            else:
                with capture(model) as visits:
                    loss = language_loss()
                    (loss if self._has_thresholds else loss + BALANCE * balance_loss(visits)).backward()
                optimizer.step()
                optimizer.zero_grad()
            decay.step()
            if shifted and (step + 1) % SHIFT_EVERY == 0 and step + 1 < steps:
                self._calibrate(ids, budget or 0, shift=True)
        if shifted:
            self._calibrate(torch.cat(self.training[-4:]), budget or 0, shift=True)


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


def run(settings: Settings, folder: Path | None, arm: str, rate: float, budget: int, seed: int) -> dict[str, Any]:
    return Bench(settings, folder, arm, seed, rate).measured(budget)


def measure(results: Results, settings: Settings, folder: Path | None, processes: int) -> None:
    """Measures the cells that are missing: all learning rates first."""
    most, (first, *_), given = settings.budgets[0], settings.seeds, (settings, folder)
    jobs = [Job((DENSE,), run, (*given, DENSE, 0.0, 0, 0))]
    jobs += [Job((ALL_TUNED, seed), run, (*given, ALL_TUNED, 0.0, 0, seed)) for seed in settings.seeds]
    jobs += [Job((arm, rate, most, first), run, (*given, arm, rate, most, first)) for rate in settings.rates for arm in ARMS]
    measure_all(results, jobs, processes)
    left = [
        (arm, best_rate(results, settings, arm), budget, seed) for seed in settings.seeds for budget in settings.budgets for arm in ARMS
    ]
    measure_all(results, [Job(key, run, (*given, *key)) for key in left], processes)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else 2)
    parser.add_argument("--page", action="store_true", help="only writes the page and the figure again")
    options = parser.parse_args()
    settings = Settings(tokens=64, budgets=(12,), steps=2, texts=2, seeds=(0,), rates=(1e-3,)) if options.quick else Settings()
    constants = {"expert rate": EXPERT_RATE, "scale": SCALE, "balance": BALANCE, "shift every": SHIFT_EVERY, "ridge": RIDGE}
    texts = {"evaluation": EVALUATION, "choice": CHOICE, "others": OTHERS}
    results = Results(None if options.quick else DOCS / "converted.json", {**asdict(settings), **constants, **texts})
    if not options.page:
        measure(results, settings, None if options.quick else STARTS, options.processes)
    whole = 1 + len(settings.seeds) + len(ARMS) * (len(settings.budgets) * len(settings.seeds) + len(settings.rates) - 1)
    if len(results.cells) < whole:
        parser.error(f"docs/studies/converted.json must have {whole} runs of these settings for a page, got {len(results.cells)}.")
    if options.quick:
        print("\n".join(page(results, settings)))
        return
    (DOCS / "converted.md").write_text("\n".join(page(results, settings)) + "\n", encoding="utf-8")
    draw_figure(results, settings, DOCS / "converted.png")


if __name__ == "__main__":
    main()
