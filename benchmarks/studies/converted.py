"""Study E: a trained model whose MLPs are split into experts, at equal mean number of experts per token.

    .venv/bin/python benchmarks/studies/converted.py            about forty minutes on two cores, one process on each
    .venv/bin/python benchmarks/studies/converted.py --quick    a trial run of a few minutes; writes nothing

Each MLP of SmolLM2-135M, of 1,536 neurons, is split by co-activation into 16 experts of 96 neurons, all active at first. An arm sets the
routers to a mean number of experts per token on a sample, and then tunes experts and routers on other text, with attention and embeddings
frozen. Thresholds drift in training, so every four steps, and at the end, one shift for each layer restores the mean on the training text.
A seed draws which modules of the standard library are the sample, which are for training, and in which order; the evaluation is on others.
Writes docs/studies/converted.json, converted.md and converted.png. An interrupted study continues from docs/studies/converted.json.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from _converted_page import ALL_TUNED, ARMS, DENSE, DIVERSITY, ONE_PRICE, SIZES, SURPRISE, TOP_K, draw_figure, page
from _study import DOCS, Job, Results, arguments, measure_all, module_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyonn.cli.demo.smollm2 import prepare_smollm2
from tinyonn.hf.dyn_moe import calibrate_experts, convert_mlp_to_dynmoe, expert_statistics
from tinyonn.hf.dyn_moe.sampling import contributions
from tinyonn.nn import DynMoE
from tinyonn.nn.dyn_moe import Visit
from tinyonn.train import HyperStep, capture

EVALUATION = (
    "argparse.py", "statistics.py", "ipaddress.py", "zipfile.py", "tarfile.py", "typing.py", "decimal.py", "textwrap.py",
)  # fmt: skip
OTHERS = (
    "ast.py", "calendar.py", "cmd.py", "codecs.py", "configparser.py", "copy.py", "csv.py", "datetime.py", "dataclasses.py", "difflib.py",
    "doctest.py", "enum.py", "fractions.py", "ftplib.py", "functools.py", "gettext.py", "gzip.py", "heapq.py", "imaplib.py", "inspect.py",
    "locale.py", "mailbox.py", "mimetypes.py", "optparse.py", "os.py", "pathlib.py", "pdb.py", "pickle.py", "platform.py", "random.py",
)  # fmt: skip
EXPERT_RATE, ROUTER_RATE = 3e-4, 1e-3  # Adam's learning rates
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
    steps: int = 36
    sample: int = 8  # modules
    texts: int = len(EVALUATION)
    seeds: tuple[int, ...] = (0, 1, 2)


class Bench:
    """The converted model, texts, and what an arm does with them."""

    def __init__(self, settings: Settings, arm: str, seed: int) -> None:
        self.settings, self.arm = settings, arm
        folder = prepare_smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.evaluation = [self._ids(name) for name in EVALUATION[: settings.texts]]
        others = [self._ids(name) for name in random.Random(seed).sample(OTHERS, len(OTHERS))]
        self.sample, self.training = torch.cat(others[: settings.sample]), others[settings.sample :]
        if arm != DENSE:
            convert_mlp_to_dynmoe(self.model, num_experts=settings.experts, sample=self.sample, scale=SCALE)
        if arm == SIZES:
            self._predict_sizes()

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

    def measured(self) -> dict[str, Any]:
        if self.arm == DENSE:
            return self._evaluated("dense")
        if self.arm == ALL_TUNED:
            self._tune(None)
            return self._evaluated("after")
        found, start = {}, self.model
        for budget in self.settings.budgets:
            self.model = copy.deepcopy(start)
            self._calibrate(self.sample, budget)
            found |= self._evaluated(f"before {budget}")
            self._tune(budget)
            found |= self._evaluated(f"after {budget}")
        return found

    @torch.no_grad()
    def _evaluated(self, name: str) -> dict[str, Any]:
        """Loss of each text, and mean number of experts per token and layer."""
        self.model.eval()
        converted = self.arm != DENSE
        if converted:
            expert_statistics(self.model, reset=True)
        losses = [self.model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in self.evaluation]
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
        price = "gradient" if self.arm in ONE_PRICE else "none"
        calibrate_experts(self.model, sample, budget, shift=shift, price=price, **bounds)

    def _tune(self, budget: int | None) -> None:
        """Tunes experts and routers; without a budget, only experts."""
        model, steps = self.model.requires_grad_(False), self.settings.steps
        routers, experts = [], []
        for module in model.modules():
            if isinstance(module, DynMoE):
                module.gating_loss_kind = "sdl" if self.arm == DIVERSITY else "surprise"
                for name, parameter in module.named_parameters():
                    of_router = name.startswith("router.")
                    if budget is not None or not of_router:
                        (routers if of_router else experts).append(parameter.requires_grad_(True))
        groups = [{"params": experts, "lr": EXPERT_RATE}] + ([{"params": routers, "lr": ROUTER_RATE}] if routers else [])
        optimizer = torch.optim.Adam(groups)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
        hyper_step = HyperStep(model, optimizer) if self.arm in (SURPRISE, DIVERSITY) else None
        shifted = budget is not None and self.arm not in (TOP_K, SIZES)
        for step in range(steps):
            ids = self.training[step % len(self.training)]
            model.train()

            def language_loss(ids: Tensor = ids) -> Tensor:
                loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
                return loss

            if hyper_step is not None:
                hyper_step(language_loss)
            else:
                with capture(model) as visits:
                    loss = language_loss()
                    (loss + BALANCE * balance_loss(visits) if self.arm in (TOP_K, SIZES) else loss).backward()
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


def run(settings: Settings, arm: str, seed: int) -> dict[str, Any]:
    begin = time.monotonic()
    return {**Bench(settings, arm, seed).measured(), "seconds": time.monotonic() - begin}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else 2)
    parser.add_argument("--page", action="store_true", help="only writes the page and the figure again")
    options = parser.parse_args()
    settings = Settings(tokens=64, budgets=(12,), steps=2, texts=2, seeds=(0,)) if options.quick else Settings()
    results = Results(None if options.quick else DOCS / "converted.json", asdict(settings))
    jobs = [Job((DENSE,), run, (settings, DENSE, 0))]
    jobs += [Job((arm, seed), run, (settings, arm, seed)) for seed in settings.seeds for arm in (*ARMS, ALL_TUNED)]
    if not options.page:
        measure_all(results, jobs, options.processes)
    if len(results.cells) < len(jobs):
        parser.error(f"docs/studies/converted.json must have {len(jobs)} runs of these settings for a page, got {len(results.cells)}.")
    if options.quick:
        print("\n".join(page(results, settings)))
        return
    (DOCS / "converted.md").write_text("\n".join(page(results, settings)) + "\n", encoding="utf-8")
    draw_figure(results, settings, DOCS / "converted.png")


if __name__ == "__main__":
    main()
