"""The page of the study of defaults, its texts and its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from _study import Results, crossed_difference, ratio_of_means, table

TEXTS = (
    ("readme", "transformers"), ("code", "transformers/generation/utils.py"), ("readme", "torch"),
    ("code", "numpy/lib/_function_base_impl.py"), ("readme", "tqdm"), ("code", "torch/nn/modules/module.py"), ("readme", "regex"),
    ("code", "huggingface_hub/hf_api.py"),
)  # fmt: skip
NUMBERS = (4, 6)  # blocks of the static top-n
DENSE, STATIC, OURS = "dense", "static top-n", "DynNSA"
TOP_K, EXPERTS = "top-k, balance loss", "DynMoE"


@dataclass(frozen=True)
class Sizes:
    """Of the study; the language model's are below `tokens`."""

    tokens: int = 2048
    texts: int = len(TEXTS)
    context: int = 128
    width: int = 128
    layers: int = 3
    experts: int = 32
    neurons: int = 32
    k: int = 4
    batch: int = 8
    steps: int = 800
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int = 256


def page(results: Results, sizes: Sizes) -> list[str]:
    """Lines of the page."""
    cells, kinds = results.cells, [kind for kind, _ in TEXTS[: sizes.texts]]
    lines = [
        "# What the defaults do",
        "",
        "`benchmarks/studies/defaults.py` wrote this page. It calls the library as a new user would, on texts that no other study uses.",
        "",
        "## Attention",
        "",
        f"SmolLM2-135M reads {sizes.tokens:,} tokens. `convert_attention(model)` and `calibrate(model, sample, target)` set DynNSA, with"
        " the README of accelerate and a module of Jinja as the sample. The static top-n is `convert_attention(model, max_blocks=n)`: the"
        " same blocks and compressed keys, and for every query the n blocks of highest share. *Excess* is the loss over the dense"
        " model's, in nats per token. Blocks are per query and include the forced ones. The ratio of all texts has a 95 % interval.",
        "",
    ]
    dense, rows = cells[DENSE]["losses"], []
    for number in NUMBERS:
        over = {arm: [a - b for a, b in zip(cells[f"{arm} | {number}"]["losses"], dense, strict=True)] for arm in (STATIC, OURS)}
        for kind in (*dict.fromkeys(kinds), "all"):
            chosen = [place for place, one in enumerate(kinds) if kind in (one, "all")]
            row: list[object] = [number, {"readme": "READMEs"}.get(kind, kind)]
            for arm in (STATIC, OURS):
                blocks = cells[f"{arm} | {number}"]["blocks"]
                row += [f"{mean_at(blocks, chosen):.2f}", f"{mean_at(over[arm], chosen):.4f}"]
            ratio, low, high = ratio_of_means(*([over[arm][i] for i in chosen] for arm in (OURS, STATIC)))
            rows.append([*row, f"{ratio:.2f}" + (f" ({low:.2f} … {high:.2f})" if kind == "all" else "")])
    head = ["n", "texts", "static: blocks", "static: excess", "DynNSA: blocks", "DynNSA: excess", "ratio of excess"]
    lines += [*table(head, rows), "", "Each text:", ""]
    columns = [(number, arm) for number in NUMBERS for arm in (STATIC, OURS)]
    rows = []
    for place, (kind, name) in enumerate(TEXTS[: sizes.texts]):
        every = [(one["losses"][place] - dense[place], one["blocks"][place]) for one in (cells[f"{arm} | {n}"] for n, arm in columns)]
        rows.append([f"{kind} {name}", f"{dense[place]:.3f}", *(f"{excess:+.4f} @ {blocks:.2f}" for excess, blocks in every)])
    head = ["text", "dense loss", *(f"{arm}, n {number}: excess @ blocks" for number, arm in columns)]
    rates = {arm: best_rate(results, sizes, arm) for arm in (TOP_K, EXPERTS)}
    arms = {arm: [cells[f"{arm} | {rate:g} | {seed}"] for seed in sizes.seeds] for arm, rate in rates.items()}
    lines += [
        *table(head, rows),
        "",
        "## Experts",
        "",
        f"A decoder of bytes, {sizes.layers} layers of {sizes.width} features with {sizes.experts} experts of {sizes.neurons} neurons each,"
        f" trains {sizes.steps:,} steps of {sizes.batch} × {sizes.context} bytes of SymPy's source. `DynMoE(..., target_k={sizes.k})` has"
        f" its defaults otherwise. The top-k chooses {sizes.k} experts, weighs them by a softmax over these, and has the balance loss of"
        f" Switch Transformer. Seed {sizes.seeds[0]} trains at the learning rates {', '.join(f'{rate:g}' for rate in sizes.rates)}, the"
        " others at the one of lowest loss on modules that are for this choice alone. The evaluation is on"
        f" {sizes.rows} rows of yet other modules.",
        "",
    ]
    rows = []
    for arm, found in arms.items():
        dead = sum(one["dead"] for one in found)
        rows.append([arm, f"{rates[arm]:g}", f"{sum(one['loss'] for one in found) / len(found):.4f}",
                     *(f"{one['loss']:.4f}" for one in found), f"{sum(one['k'] for one in found) / len(found):.2f}",
                     f"{dead} of {len(found) * sizes.layers * sizes.experts}"])  # fmt: skip
    lines += table(["arm", "learning rate", "loss", *(f"seed {seed}" for seed in sizes.seeds), "experts per token", "dead experts"], rows)
    ours, theirs = ([one["losses"] for one in arms[arm]] for arm in (EXPERTS, TOP_K))
    return [
        *lines,
        "",
        "DynMoE's loss is {:+.4f} ({:+.4f} … {:+.4f}) nats per byte beside the top-k's (95 % interval for other seeds and rows).".format(
            *crossed_difference(ours, theirs)
        ),
        "",
        f"Measured on {results.origin()}.",
    ]


def mean_at(values: list[float], places: list[int]) -> float:
    return sum(values[place] for place in places) / len(places)


def best_rate(results: Results, sizes: Sizes, arm: str) -> float:
    """Learning rate of the lowest loss with the first seed, on text that is for this choice alone."""
    return min(sizes.rates, key=lambda rate: results.cells[f"{arm} | {rate:g} | {sizes.seeds[0]}"]["choice"])
