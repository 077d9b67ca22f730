"""EAVI against teacher forcing and scheduled sampling, at equal compute: exact answers of a small model in free generation.

    .venv/bin/python benchmarks/studies/eavi.py            some hours on two cores, one process on each
    .venv/bin/python benchmarks/studies/eavi.py --quick    a trial run of a minute; writes nothing

The model transforms one grid by a rule that the prompt names; see `_eavi_task.py`. Each arm first chooses among four settings of its own on
other rows than those of the evaluation, and then trains with three other seeds. Compute is counted in tokens: one for a token that passes
forward, generated ones and their prompts included, three for one that passes forward and backward. Writes docs/studies/eavi.json, eavi.md
and eavi.png. An interrupted study continues from docs/studies/eavi.json.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from _eavi_page import draw_figure, page
from _eavi_task import VOCABULARY, Rows, draw, key
from _study import DOCS, Job, Results, arguments, measure_all
from torch import Tensor

from tinyonn.arc import FAMILIES
from tinyonn.hf.tiny_onn import TinyOnnConfig, TinyOnnForCausalLM
from tinyonn.train import HyperStep, Ramp, alignment, eavi_step, excursion

IDS: dict[str, Any] = {"end_token_id": VOCABULARY.end, "pad_token_id": VOCABULARY.pad}
TEACHER, OWN, SUPER, SCHEDULED = ARMS = ("teacher forcing", "EAVI, own", "EAVI, super batch", "scheduled sampling")
ALL = 1000  # of the compute, in which ramps are given
CHOICE, EVALUATION = 1, 2  # which rows


@dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Attributes:
        side: rows and columns of an input.
        batch: rows of a step.
        budget: compute of a run, in tokens.
        choice_budget: compute of a run in which settings are chosen.
        seeds: of the runs that are compared.
        choice_seed: of the runs in which settings are chosen.
        rows: rows of an evaluation.
        marks: shares of the compute after which a run is evaluated.
        rates: learning rates; teacher forcing has all of them, the others the two in the middle with each ramp.
        ramps: shares of the compute between which the share of own answers, or of own tokens, rises from 0 to 1.
        warm_up: share of the compute in which the learning rate rises; then it falls as a cosine to a tenth.
    """

    side: int = 4
    batch: int = 32
    budget: int = 5_000_000
    choice_budget: int = 2_500_000
    seeds: tuple[int, ...] = (0, 1, 2)
    choice_seed: int = 100
    rows: int = 512
    marks: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    ramps: tuple[tuple[float, float], ...] = ((0.1, 0.5), (0.5, 0.9))
    warm_up: float = 0.03

    def choices(self, arm: str) -> list[tuple[float, tuple[float, float]]]:
        """(learning rate, ramp) among which an arm chooses; as many for each arm."""
        if arm == TEACHER:
            return [(rate, (1.0, 1.0)) for rate in self.rates]
        return [(rate, ramp) for rate in self.rates[1:3] for ramp in self.ramps]


def run(settings: Settings, arm: str, rate: float, ramp: tuple[float, float], seed: int, evaluated: int, budget: int) -> dict[str, Any]:
    """Trains one model and evaluates it on the way."""
    torch.manual_seed(seed)
    model = TinyOnnForCausalLM(TinyOnnConfig.bonsai("1m", vocab_size=len(VOCABULARY), attention="full"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    step = HyperStep(model, optimizer, max_grad_norm=1.0)
    share_of = Ramp(0.0, 1.0, round(ALL * ramp[0]), round(ALL * ramp[1]))
    for_choice = draw((CHOICE,), settings.rows, settings.side)
    forbidden = {key(prompt) for prompt in for_choice.prompts}
    held_out = for_choice if evaluated == CHOICE else draw((EVALUATION,), settings.rows, settings.side, forbidden)
    forbidden |= {key(prompt) for prompt in held_out.prompts}
    found: dict[str, Any] = {"exact": [], "tokens": [], "compute": []}
    spent = generated = trained = own = right = 0
    number, marks = 0, list(settings.marks)
    model.train()
    while spent < budget:
        rows = draw((3, seed, number), settings.batch, settings.side, forbidden)
        done = spent / budget
        for group in optimizer.param_groups:
            group["lr"] = rate * _rate_at(done, settings.warm_up)
        share = share_of(round(ALL * done))
        if arm in (OWN, SUPER):
            mode = "own" if arm == OWN else "super_batch"
            result = eavi_step(model, step, rows.prompts, rows.answers, mode=mode, share=share, seed=seed * 10**6 + number, **IDS)
            generated += result.batch.generated_tokens
            trained += result.batch.trained_tokens
            own += sum(answer is not None for answer in result.batch.own)
            right += int(result.batch.exact.sum())
        else:
            batch = alignment(rows.prompts, rows.answers, rows.answers, **IDS)
            if arm == SCHEDULED and share:
                batch["input_ids"] = _mixed(model, batch, share, seed * 10**6 + number)
                generated += int(batch["attention_mask"].sum())
            step(lambda batch=batch: model(**batch).loss, token_mask=batch["attention_mask"])  # type: ignore[misc]
            trained += int(batch["attention_mask"].sum())
        number += 1
        spent = generated + 3 * trained
        while marks and spent >= marks[0] * budget:
            marks.pop(0)
            exact, tokens = _answered(model, held_out)
            found["exact"].append(sum(exact) / len(exact))
            found["tokens"].append(tokens)
            found["compute"].append(spent)
    for family in FAMILIES:
        chosen = [one for one, name in zip(exact, held_out.families, strict=True) if name == family]
        found[f"exact {family}"] = sum(chosen) / len(chosen)
    found |= {"final": found["exact"][-1], "steps": number, "generated": generated, "trained": trained}
    return found | {"own exact": right / own if own else None, "forced": _forced(model, held_out)}


def _rate_at(done: float, warm_up: float) -> float:
    return min(1.0, (done + 1e-3) / warm_up) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def _mixed(model: TinyOnnForCausalLM, batch: dict[str, Tensor], share: float, seed: int) -> Tensor:
    """Inputs of scheduled sampling in two passes (Mihaylova and Martins, 2019): a share of the answers' tokens is replaced by what the
    model predicts from the true ones before it.
    """
    model.eval()
    predicted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    model.train()
    drawn = torch.rand(predicted.shape, generator=torch.Generator().manual_seed(seed)) < share
    replaced = drawn[:, 1:] & (batch["labels"][:, 1:] != -100)
    ids = batch["input_ids"].clone()
    ids[:, 1:] = torch.where(replaced, predicted[:, :-1], ids[:, 1:])
    return ids


def _answered(model: TinyOnnForCausalLM, rows: Rows) -> tuple[list[bool], float]:
    """Of the answers in free generation: whether each is the truth, and the share of their tokens that are right.

    Tokens are compared position by position, over the longer of the answer and the truth.
    """
    most = max(map(len, rows.answers)) + 1
    found: list[Tensor] = []
    for begin in range(0, len(rows.prompts), 128):
        found += excursion(model, rows.prompts[begin : begin + 128], max_new_tokens=most, **IDS)
    pairs = list(zip(found, rows.answers, strict=True))
    right = sum(int((one[: len(answer)] == answer[: len(one)]).sum()) for one, answer in pairs)
    return [torch.equal(one, answer) for one, answer in pairs], right / sum(max(len(one), len(answer)) for one, answer in pairs)


@torch.no_grad()
def _forced(model: TinyOnnForCausalLM, rows: Rows) -> float:
    """Share of the true tokens that have the highest probability, given the true ones before them."""
    batch = alignment(rows.prompts, rows.answers, rows.answers, **IDS)
    model.eval()
    predicted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)[:, :-1]
    model.train()
    labels = batch["labels"][:, 1:]
    return float((predicted == labels)[labels != -100].float().mean())


def chosen(results: Results, settings: Settings, arm: str) -> tuple[float, tuple[float, float]]:
    """The settings with which an arm had the most exact answers on the rows for the choice."""
    choices = settings.choices(arm)
    return max(choices, key=lambda choice: results.cells[_name("choice", arm, choice)]["final"])


def _name(*parts: Any) -> str:
    return " | ".join(f"{part[0]:g} {part[1][0]:g} {part[1][1]:g}" if isinstance(part, tuple) else str(part) for part in parts)


def measure(results: Results, settings: Settings, arms: Sequence[str], processes: int) -> None:
    """The choice of settings of each arm, and then its runs."""
    jobs = [
        Job((_name("choice", arm, choice),), run, (settings, arm, *choice, settings.choice_seed, CHOICE, settings.choice_budget))
        for arm in arms
        for choice in settings.choices(arm)
    ]
    measure_all(results, jobs, processes)
    jobs = [
        Job((_name("run", arm, seed),), run, (settings, arm, *chosen(results, settings, arm), seed, EVALUATION, settings.budget))
        for seed in settings.seeds
        for arm in arms
    ]
    measure_all(results, jobs, processes)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else 2)
    parser.add_argument("--page", action="store_true", help="only writes the page and the figure again")
    options = parser.parse_args()
    if options.quick:
        settings = Settings(batch=4, budget=6_000, choice_budget=3_000, seeds=(0, 1), rows=16, marks=(0.5, 1.0))
        results = Results(None, asdict(settings))
        measure(results, settings, ARMS, options.processes)
        print("\n".join(page(results, settings, {arm: chosen(results, settings, arm) for arm in ARMS})))
        return
    settings = Settings()
    results = Results(DOCS / "eavi.json", asdict(settings))
    if not options.page:
        measure(results, settings, ARMS, options.processes)
    whole = sum(len(settings.choices(arm)) + len(settings.seeds) for arm in ARMS)
    if len(results.cells) < whole:
        parser.error(f"docs/studies/eavi.json must have {whole} runs of these settings for a page, got {len(results.cells)}.")
    lines = page(results, settings, {arm: chosen(results, settings, arm) for arm in ARMS})
    (DOCS / "eavi.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_figure(results, settings, DOCS / "eavi.png")


if __name__ == "__main__":
    main()
