"""What a new user gets: DynNSA and DynMoE with their defaults, on texts that no other study uses.

    .venv/bin/python benchmarks/studies/defaults.py            about half an hour on two cores, one process on each
    .venv/bin/python benchmarks/studies/defaults.py --quick    a trial run of a minute; writes nothing

Attention: `convert_attention` and `calibrate` with their defaults, on SmolLM2-135M, against a static top-n of the same compressed keys, for
READMEs and source of installed packages. Experts: `DynMoE` with its defaults in a small language model, written here, against a top-k with
a balance loss; both try three learning rates. Writes docs/studies/defaults.json and defaults.md. An interrupted study continues from the
JSON.
"""

from __future__ import annotations

import math
import sysconfig
from dataclasses import asdict
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from _defaults_page import DENSE, EXPERTS, NUMBERS, OURS, STATIC, TEXTS, TOP_K, Sizes, best_rate, page
from _experts_model import SWITCH, Mixture, Settings
from _study import DOCS, Job, Results, arguments, measure_all
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyonn.cli.demo.smollm2 import prepare_smollm2
from tinyonn.hf import calibrate, convert_attention, statistics
from tinyonn.nn import DynMoE

SAMPLE = (("readme", "accelerate"), ("code", "jinja2/environment.py"))
WARM_UP, LAST_RATE, DECAY = 50, 0.1, 0.1


def text_of(kind: str, name: str) -> str:
    if kind == "readme":
        return str(distribution(name).metadata.get_payload())
    return (Path(sysconfig.get_paths()["purelib"]) / name).read_text(encoding="utf-8")


def attention(sizes: Sizes, arm: str, number: int) -> dict[str, Any]:
    """Loss of each text, and key blocks a query reads, after the calls that a user writes."""
    folder = prepare_smollm2()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def ids(kind: str, name: str) -> Tensor:
        found: Tensor = tokenizer(text_of(kind, name), return_tensors="pt").input_ids[:, : sizes.tokens]
        if found.shape[1] < sizes.tokens:
            raise ValueError(f"{kind} {name} must have {sizes.tokens:,} tokens, got {found.shape[1]:,}.")
        return found

    if arm == STATIC:
        convert_attention(model, max_blocks=number)
    elif arm == OURS:
        convert_attention(model)
        blocks = sizes.tokens // 64
        calibrate(model, [ids(*text) for text in SAMPLE], target=sum(min(number, block + 1) for block in range(blocks)) / blocks)
    losses, read = [], []
    with torch.no_grad():
        for text in TEXTS[: sizes.texts]:
            losses.append(model(ids(*text), labels=ids(*text)).loss.item())
            layers = [] if arm == DENSE else list(statistics(model, reset=True).values())
            read.append(sum(layer["mean_count"] for layer in layers) / max(1, len(layers)))
    return {"losses": losses, "blocks": read}


class LanguageModel(nn.Module):
    """A decoder of bytes with learned positions, whose MLPs are mixtures of experts."""

    def __init__(self, sizes: Sizes, arm: str) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, sizes.width), nn.Embedding(sizes.context, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes, arm) for _ in range(sizes.layers))
        self.norm, self.head = nn.RMSNorm(sizes.width), nn.Linear(sizes.width, 256, bias=False)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=sizes.width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes, arm: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(sizes.width) for _ in range(2))
        self.qkv, self.out = nn.Linear(sizes.width, 3 * sizes.width, bias=False), nn.Linear(sizes.width, sizes.width, bias=False)
        shape = {"width": sizes.width, "experts": sizes.experts, "neurons": sizes.neurons, "k": sizes.k}
        self.moe: DynMoE | Mixture
        if arm == EXPERTS:
            self.moe = DynMoE(sizes.width, sizes.neurons, sizes.experts, target_k=sizes.k)
        else:
            self.moe = Mixture(Settings(**shape), SWITCH)
            nn.init.normal_(self.moe.router.weight, std=sizes.width**-0.5)
            for weight in (self.moe.gate_up_proj, self.moe.down_proj):
                nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, 32)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.moe(self.norms[1](x))


def source() -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of SymPy's source, for training, choice of the learning rate and evaluation."""
    files = sorted((Path(sysconfig.get_paths()["purelib"]) / "sympy").glob("[a-z]*/*.py"))
    parts = [bytearray() for _ in range(3)]
    for number, path in enumerate(files):
        parts[{0: 2, 1: 1}.get(number % 10, 0)] += path.read_bytes()
    training, choice, evaluation = (torch.frombuffer(part, dtype=torch.uint8) for part in parts)
    return training, choice, evaluation


def draw(text: Tensor, rows: int, context: int, generator: torch.Generator) -> Tensor:
    """(rows, context + 1)."""
    starts = torch.randint(len(text) - context, (rows,), generator=generator)
    return torch.stack([text[start : start + context + 1] for start in starts]).long()


def row_losses(model: LanguageModel, rows: Tensor) -> Tensor:
    return functional.cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:], reduction="none").mean(-1)


def experts(sizes: Sizes, arm: str, rate: float, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    (training, choice, evaluation), model = source(), LanguageModel(sizes, arm)
    mixtures = [layer.moe for layer in model.layers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=DECAY)
    generator = torch.Generator().manual_seed(seed)
    for step in range(sizes.steps):
        falling = 0.5 * (1 + math.cos(math.pi * step / sizes.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / WARM_UP) * ((1 - LAST_RATE) * falling + LAST_RATE)
        loss = row_losses(model, draw(training, sizes.batch, sizes.context, generator)).mean()
        (loss + sum(mixture.loss for mixture in mixtures if isinstance(mixture, Mixture))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    chosen_by = losses_on(model, choice, sizes)
    counts = [mixture.counts if isinstance(mixture, Mixture) else mixture.expert_counts for mixture in mixtures]
    for count in counts:
        count.zero_()
    losses = losses_on(model, evaluation, sizes)
    k = sum(count.sum().item() for count in counts) / (len(counts) * sizes.rows * sizes.context)
    dead = sum(int((count == 0).sum()) for count in counts)
    return {"choice": chosen_by.mean().item(), "loss": losses.mean().item(), "losses": losses.tolist(), "k": k, "dead": dead}


@torch.no_grad()
def losses_on(model: LanguageModel, text: Tensor, sizes: Sizes) -> Tensor:
    """Loss of rows of a text, (rows,)."""
    rows = draw(text, sizes.rows, sizes.context, torch.Generator().manual_seed(7))
    return torch.cat([row_losses(model, part) for part in rows.split(32)])


def measure(results: Results, sizes: Sizes, processes: int) -> None:
    jobs = [Job((arm, number), attention, (sizes, arm, number)) for number in NUMBERS for arm in (OURS, STATIC)]
    jobs += [Job((DENSE,), attention, (sizes, DENSE, 0))]
    arms, (first, *others) = (EXPERTS, TOP_K), sizes.seeds
    jobs += [Job((arm, rate, first), experts, (sizes, arm, rate, first)) for rate in sizes.rates for arm in arms]
    measure_all(results, jobs, processes)
    left = [(arm, best_rate(results, sizes, arm), seed) for seed in others for arm in arms]
    measure_all(results, [Job(key, experts, (sizes, *key)) for key in left], processes)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else 2)
    parser.add_argument("--page", action="store_true", help="only writes the page again")
    options = parser.parse_args()
    if options.quick:
        sizes = Sizes(tokens=512, texts=2, width=32, layers=1, experts=8, neurons=8, k=2, steps=5, rates=(1e-3,), seeds=(0,), rows=32)
    else:
        sizes = Sizes()
    results = Results(None if options.quick else DOCS / "defaults.json", {**asdict(sizes), "sample": SAMPLE, "texts": TEXTS[: sizes.texts]})
    if not options.page:
        measure(results, sizes, options.processes)
    whole = 1 + 2 * (len(NUMBERS) + len(sizes.rates) + len(sizes.seeds) - 1)
    if len(results.cells) < whole:
        parser.error(f"docs/studies/defaults.json must have {whole} runs of these settings for a page, got {len(results.cells)}.")
    text = "\n".join(page(results, sizes))
    if options.quick:
        print(text)
    else:
        (DOCS / "defaults.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
