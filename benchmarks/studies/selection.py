"""Study A: which key blocks a trained model should read, at equal numbers of blocks, without any training of the model.

    .venv/bin/python benchmarks/studies/selection.py            about three hours on one core
    .venv/bin/python benchmarks/studies/selection.py --quick    a trial run of a few minutes; writes nothing

SmolLM2-135M reads a text of 2,048 or 4,096 tokens; each query reads the first block, the previous and its own, and those that an arm
chooses. A cell is the loss of one arm on one text at one budget, over the dense model's on the same text. Arms choose by the same
compressed keys, and are compared at equal mean blocks: a static arm sets the number, and the threshold of a dynamic arm is set on the dense
run of the text itself, once more if the sparse run then reads more than 0.05 blocks more or less. What is left of a difference is removed
by interpolation. Offsets and lines come from two other texts. Cells are saved to docs/studies/selection.json one by one, and an interrupted
study goes on from it. Writes docs/studies/selection.md and docs/studies/selection.png.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from _blocks import FLOOR, Blocks, Layer, Rule, above, dense, level, losses, ranked
from _study import DOCS, Results, arguments, module_text, prose_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyonn.cli.demo.smollm2 import prepare_smollm2, smollm2_folder
from tinyonn.hf.dyn_nsa import calibrate, convert_attention, cores, distil_compression
from tinyonn.hf.dyn_nsa.fitting import FARTHEST, MOST_GAIN, HeadPairs, thresholds
from tinyonn.hf.dyn_nsa.measures import LEAST_X

BUDGETS = (4, 6, 8)  # blocks of a static top-n, forced blocks included
TOKENS, LONG = 2048, 4096  # of a text; the second for LONG_ARMS alone
CODE = ("argparse.py", "typing.py", "statistics.py", "ipaddress.py")
PROSE = (0, 30_000, 60_000, 90_000)  # first tokens
CALIBRATION = (("code", "inspect.py"), ("prose", 6_000))
DISTILLATION = (("code", "inspect.py"), ("code", "tarfile.py"), ("code", "zipfile.py"), ("prose", 6_000), ("prose", 12_000))
CLOSE = 0.05  # blocks
STEPS = 150  # of distillation

MEAN, DISTILLED = "mean keys", "distilled keys"
TOP_N, TOP_P, PER_HEAD, OLD = "top-n", "top-p", "n per head", "old rule"
ONE_PRICE, OFFSETS, LINES = "one price", "price and offsets", "price and lines"
MORE, LESS = "price and lines, more if uncertain", "price and lines, less if uncertain"
SLOPES = {MORE: 0.5, LESS: -0.5}  # of thresholds on tau
MASS, FISHER = "oracle: top-n of the true share", "oracle: one price on the true effect"
ARMS = (
    (TOP_N, MEAN), (LINES, MEAN), (OFFSETS, MEAN), (PER_HEAD, MEAN), (TOP_P, MEAN), (OLD, MEAN), (ONE_PRICE, MEAN), (TOP_N, DISTILLED),
    (LINES, DISTILLED), (OFFSETS, DISTILLED), (PER_HEAD, DISTILLED), (MORE, MEAN), (LESS, MEAN), (MASS, ""), (FISHER, ""),
)  # fmt: skip
FIRST = ((TOP_N, MEAN), (LINES, MEAN), (TOP_N, DISTILLED), (LINES, DISTILLED))  # so that an interrupted study has them on all texts
LONG_ARMS = (*FIRST, (PER_HEAD, MEAN), (TOP_P, MEAN), (OLD, MEAN), (MASS, ""), (FISHER, ""))


def arm_name(arm: tuple[str, str]) -> str:
    return ", ".join(part for part in arm if part)


class Text:
    """A text, its dense run and what arms share on it."""

    def __init__(self, bench: Bench, kind: str, where: str | int) -> None:
        self.name, self.kind, self.ids = f"{kind} {where}", kind, bench.ids(kind, where)
        self.layers, self.loss, _ = dense(bench.model, self.ids)


class Bench:
    """The model, its compressed keys and what was measured on the calibration texts."""

    def __init__(self, tokens: int, steps: int) -> None:
        self.tokens, self.steps, self.folder = tokens, steps, prepare_smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = self._load().eval()
        self.model.set_attn_implementation("study")
        self._blocks: dict[str, Blocks] = {}
        self._lines: dict[str, Tensor] = {}
        self._numbers: dict[tuple[str, float], Tensor] = {}

    def _load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).requires_grad_(False)

    def ids(self, kind: str, where: str | int, tokens: int | None = None) -> Tensor:
        tokens = self.tokens if tokens is None else tokens
        text, first = (module_text(str(where)), 0) if kind == "code" else (self._prose, int(where))
        ids = self.tokenizer(text)["input_ids"] if isinstance(text, str) else text
        if len(ids) < first + tokens:
            raise ValueError(f"{kind} {where} must have {first + tokens} tokens, got {len(ids)}.")
        return torch.tensor([ids[first : first + tokens]])

    @cached_property
    def _prose(self) -> list[int]:
        return list(self.tokenizer(prose_text())["input_ids"])

    @cached_property
    def total(self) -> float:
        """Mean blocks that a dense query reads."""
        blocks = self.tokens / 64
        return (blocks + 1) / 2

    def target(self, number: float) -> float:
        """Mean blocks that queries read at a static number of blocks."""
        return sum(min(number, block + 1) for block in range(self.tokens // 64)) * 64 / self.tokens

    def converted(self, keys: str) -> Any:
        model = convert_attention(self._load())
        if keys == DISTILLED:
            tokens = min(self.tokens, TOKENS)
            stored = smollm2_folder().parent / f"study-distilled-{tokens}-{self.steps}.pt"
            given = {"texts": DISTILLATION, "tokens": tokens, "steps": self.steps}
            state = torch.load(stored) if stored.is_file() else None
            if isinstance(state, dict) and state["given"] == given:
                for core, part in zip(cores(model), state["parts"], strict=True):
                    core.load_state_dict(part)
            else:
                print("distils compressed keys", flush=True)
                distil_compression(model, [self.ids(*text, tokens) for text in DISTILLATION], steps=self.steps)
                if self.steps == STEPS:
                    new = stored.with_suffix(f".{os.getpid()}")
                    torch.save({"given": given, "parts": [core.state_dict() for core in cores(model)]}, new)
                    os.replace(new, stored)
        return model

    def blocks(self, keys: str) -> Blocks:
        keys = keys or MEAN
        if keys not in self._blocks:
            self._blocks[keys] = Blocks(cores(self.converted(keys)))
        return self._blocks[keys]

    @cached_property
    def masks(self) -> tuple[Tensor, Tensor]:
        return self.blocks(MEAN).far(self.tokens)

    @cached_property
    def sample(self) -> list[list[Layer]]:
        found = [dense(self.model, self.ids(*text), gradient=True) for text in CALIBRATION]
        self.weights = [sum(steep) / len(found) for steep in zip(*(one[2] for one in found), strict=True)]  # (H,) of each layer
        return [layers for layers, _, _ in found]

    @cached_property
    def effects(self) -> list[list[tuple[Tensor, Tensor]]]:
        """e² and true shares of the far blocks, by layer and calibration text, (K, pairs)."""
        far = self.masks[0]
        return [
            [tuple(x[:, far] for x in self.blocks(MEAN).effects(layer, self.weights[index])) for layer in layers]  # type: ignore[misc]
            for index, layers in enumerate(zip(*self.sample, strict=True))
        ]

    @cached_property
    def offsets(self) -> Tensor:
        """(L, K): log √(mean e²) - log √(mean P²), centred."""
        sums = [[torch.stack([effect.sum(-1), mass.square().sum(-1)]) for effect, mass in layer] for layer in self.effects]
        effect, mass = torch.stack([torch.stack(layer).sum(0) for layer in sums]).unbind(1)
        offsets = 0.5 * (effect.log() - mass.log())
        return offsets - offsets.mean()

    def lines(self, keys: str) -> Tensor:
        """(2, L, K): gain and base of each head, as `calibrate` sets them."""
        if keys not in self._lines:
            effects, far, blocks, heads = self.effects, self.masks[0], self.blocks(keys), []
            for index, layers in enumerate(zip(*self.sample, strict=True)):
                z = torch.cat([blocks.z(index, layer.query, layer.key)[:, far] for layer in layers], 1)
                effect = torch.cat([one for one, _ in effects[index]], 1)
                near = z > LEAST_X
                heads += [
                    HeadPairs(*(x[kept] for x in (*pair, torch.ones_like(pair[0])))) for *pair, kept in zip(z, effect, near, strict=True)
                ]
            self._lines[keys] = torch.stack(thresholds(heads)).float().unflatten(1, (-1, blocks.cores[0].num_kv_heads))
        return self._lines[keys]

    def numbers(self, keys: str, number: float) -> Tensor:
        """(L, K): far blocks of each head that together save most of the effect on the calibration texts, at this mean of blocks."""
        if (keys, number) not in self._numbers:
            far, blocks, gains = self.masks[0], self.blocks(keys), []
            for index, layers in enumerate(zip(*self.sample, strict=True)):
                gain = torch.zeros(blocks.cores[0].num_kv_heads, far.shape[1])
                for layer, (effect, _) in zip(layers, self.effects[index], strict=True):
                    rank = ranked(blocks.z(index, layer.query, layer.key), far)[:, far]
                    gain.scatter_add_(1, rank, effect)
                gains.append(gain.cummin(1).values)
            gain = torch.stack(gains)  # (L, K, rank)
            rows = far.sum(-1)
            cost = torch.stack([(rows > rank).float().mean() for rank in range(far.shape[1])])
            worth = (gain / cost.clamp(min=1e-9)).where(cost > 0, -1.0)
            order = worth.flatten().argsort(descending=True, stable=True)
            spent = cost.expand_as(worth).flatten()[order].cumsum(0)
            wanted = (self.target(number) - self.masks[1].sum(-1).float().mean().item()) * worth.shape[0] * worth.shape[1]
            taken = torch.zeros(worth.numel(), dtype=torch.int64)
            taken[order[: int((spent <= wanted).sum())]] = 1
            self._numbers[keys, number] = taken.view_as(worth).sum(-1)
        return self._numbers[keys, number]


def rule_of(bench: Bench, text: Text, arm: tuple[str, str], number: float, target: float) -> Rule:
    """The rule of an arm that reads `target` blocks in the mean on the dense run of a text."""
    (kind, keys), (far, forced) = arm, bench.masks
    blocks = bench.blocks(keys)
    wanted = (target - forced.sum(-1).double().mean().item()) * bench.tokens * len(text.layers) * blocks.cores[0].num_kv_heads
    spare = number - blocks.options.forced

    def price(score: Callable[..., Tensor]) -> Rule:
        return above(score, level((score(i, *layer[:3])[:, far] for i, layer in enumerate(text.layers)), wanted), far, forced)

    match kind:
        case "top-n":
            return lambda i, q, k, v: ((ranked(blocks.z(i, q, k), far) < spare) & far) | forced
        case "n per head":
            numbers = bench.numbers(keys, number)
            return lambda i, q, k, v: ((ranked(blocks.z(i, q, k), far) < numbers[i, :, None, None]) & far) | forced
        case "top-p":
            return price(lambda i, q, k, v: -_before(blocks.shares(i, q, k)[0], far, forced))
        case "one price":
            return price(lambda i, q, k, v: blocks.z(i, q, k))
        case "price and offsets":
            offsets = bench.offsets
            return price(lambda i, q, k, v: blocks.z(i, q, k) + offsets[i, :, None, None])
        case "price and lines":
            gain, base = bench.lines(keys)[..., None, None]
            return price(lambda i, q, k, v: (blocks.z(i, q, k) - base[i]) / gain[i])
        case "price and lines, more if uncertain" | "price and lines, less if uncertain":
            gain, base = bench.lines(keys)[..., None, None]

            def score(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                z, tau = blocks.uncertain_z(i, q, k)
                return (z + SLOPES[kind] * tau - base[i]) / gain[i]

            return price(score)
        case "old rule":
            lowest = level((blocks.relative(i, *layer[:2])[:, far] for i, layer in enumerate(text.layers)), wanted)
            return lambda i, q, k, v: _gated(blocks.relative(i, q, k) - lowest, far, forced)
        case _:
            return _oracle(bench, text, kind, spare, wanted)


def _before(shares: Tensor, far: Tensor, forced: Tensor) -> Tensor:
    """Share of the forced blocks and of those that rank before each, (K, T, NB)."""
    sure = (shares * forced).sum(-1, keepdim=True)
    order = shares.masked_fill(~far, -1).argsort(dim=-1, descending=True, stable=True)
    sorted_shares = (shares * far).gather(-1, order)
    return torch.empty_like(shares).scatter_(-1, order, sure + sorted_shares.cumsum(-1) - sorted_shares)


def _gated(margin: Tensor, far: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks above the threshold, and their log gates at temperature 1."""
    c = margin.clamp(0, 1)
    return ((margin > 0) & far) | forced, torch.where(forced, 0.0, (c * c * (3 - 2 * c)).clamp(min=1e-30).log())


def _oracle(bench: Bench, text: Text, kind: str, spare: float, wanted: float) -> Rule:
    far, forced = bench.masks
    blocks, weights = bench.blocks(MEAN), (bench.sample, bench.weights)[1]

    def measures(i: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return blocks.effects(Layer(q, k, v, q), weights[i])

    if kind == MASS:
        return lambda *layer: ((ranked(measures(*layer)[1], far) < spare) & far) | forced
    lowest = level((measures(i, *layer[:3])[0][:, far] for i, layer in enumerate(text.layers)), wanted)
    return above(lambda *layer: measures(*layer)[0], lowest, far, forced)


def measure(bench: Bench, text: Text, arm: tuple[str, str], number: float) -> dict[str, float]:
    target = aim = bench.target(number)
    tried: list[tuple[float, Tensor]] = []
    while True:
        loss, count = losses(bench.model, text.ids, rule_of(bench, text, arm, number, aim))
        tried.append((count, loss))
        if arm[0] in (TOP_N, PER_HEAD, MASS) or abs(count - target) <= CLOSE or len(tried) == 3:
            break
        aim -= count - target
    count, loss = min(tried, key=lambda one: abs(one[0] - target))
    excess, half = loss - text.loss, len(loss) // 2
    far = count - bench.masks[1].sum(-1).double().mean().item()
    return {"excess": excess.mean().item(), "blocks": count, "far": far, "late": excess[half:].mean().item()}


def check(bench: Bench, text: Text) -> dict[str, float]:
    """Loss of a model that `calibrate` has set against the same thresholds in this study's run."""
    model = bench.converted(MEAN)
    reached = calibrate(model, [text.ids], bench.target(BUDGETS[0]))
    far, forced = bench.masks
    thresholds = torch.stack([core.threshold_base().detach() for core in cores(model)])[..., None, None]
    blocks = bench.blocks(MEAN)

    def rule(i: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        c = ((blocks.z(i, q, k) - thresholds[i]) / blocks.options.temperature).clamp(0, 1)
        return ((c > 0) & far) | forced, torch.where(forced, 0.0, (c * c * (3 - 2 * c)).clamp(min=1e-30).log())

    ours, count = losses(bench.model, text.ids, rule, exact=True)
    with torch.no_grad():
        theirs = model(input_ids=text.ids, labels=text.ids, use_cache=False).loss.item()
    return {"run of this study": ours.mean().item(), "converted model": theirs, "blocks": count, "blocks of the converted model": reached}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--page", action="store_true", help="only write the page of the cells that are there")
    options = parser.parse_args()
    texts = [pair for both in zip((("prose", x) for x in PROSE), (("code", x) for x in CODE), strict=True) for pair in both]
    if options.quick:
        studied = [(Results(None, {}), 512, 10, texts[:2], (4,), ARMS)]
    else:
        studied = [
            (results_of("selection.json", TOKENS, texts), TOKENS, STEPS, texts, BUDGETS, ARMS),
            (results_of("selection_4096.json", LONG, texts), LONG, STEPS, texts, BUDGETS, LONG_ARMS),
        ]
    if not options.page:
        for results, tokens, steps, *grid in studied:
            run(Bench(tokens, steps), results, *grid)
    if not options.quick:
        from _selection_page import write

        write(DOCS, [results for results, *_ in studied], BUDGETS, [arms for *_, arms in studied])


def results_of(name: str, tokens: int, texts: list[tuple[str, Any]]) -> Results:
    constants = {
        "calibration": CALIBRATION,
        "distillation": DISTILLATION,
        "close": CLOSE,
        "floor": FLOOR,
        "slopes": SLOPES,
        "fit": [LEAST_X, MOST_GAIN, FARTHEST],
    }
    settings = {"tokens": tokens, "steps": STEPS, "budgets": BUDGETS, "texts": [f"{kind} {where}" for kind, where in texts]}
    return Results(DOCS / name, settings | constants)


def run(bench: Bench, results: Results, texts: list[tuple[str, Any]], budgets: tuple[int, ...], arms: tuple[tuple[str, str], ...]) -> None:
    rest = tuple(arm for arm in arms if arm not in FIRST)
    for chosen, number in [(chosen, number) for chosen in (FIRST, *((arm,) for arm in rest)) for number in budgets]:
        for kind, where in texts:
            name = f"{kind} {where}"
            if results.get("dense", name) and all(results.get(arm_name(arm), name, number) for arm in chosen):
                continue
            text = Text(bench, kind, where)
            results.measured("dense", name, by=lambda text=text: {"loss": text.loss.mean().item(), "blocks": bench.total})
            for arm in chosen:
                results.measured(
                    arm_name(arm), name, number, by=lambda text=text, arm=arm, number=number: measure(bench, text, arm, number)
                )
    if bench.tokens != LONG and results.get("check") is None:
        text = Text(bench, *texts[0])
        results.measured("check", by=lambda: check(bench, text))


if __name__ == "__main__":
    main()
