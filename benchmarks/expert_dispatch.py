"""Where a dense einsum beats sparse dispatch over many small experts, in time and in memory.

    .venv/bin/python benchmarks/expert_dispatch.py            about ten minutes on one core
    .venv/bin/python benchmarks/expert_dispatch.py --quick    a trial run of half a minute; writes nothing without --out

Measures forward and backward of one mixture: three sweeps around 256 experts of 32 neurons with 4 experts per token (64 to 4096 experts,
8 to 128 neurons, 1 to 16 experts per token), the corners, and sweeps up to all experts per token, where the dense form does no extra work.
The candidates are those of `bench_expert_mlp.py`; for the surprise, an einsum over the gradient of every token and expert is added. Outputs
are checked to be equal, then all candidates are timed in turn. Peak memory is measured by allocation events and includes gradients.

A form that would need too much time or memory at a size is left out there. Each finished size is saved to OUT/einsum_or_dispatch.json, and
an interrupted run continues from it. Writes OUT/einsum_or_dispatch.md and OUT/einsum_or_dispatch.png; with --device cuda, the names end in
"_cuda".
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_expert_mlp import DENSE_OPERATIONS, DTYPE, TOLERANCE, Case, allocated, case, check_close, check_equal, forwards_of, step
from expert_dispatch_page import write_page
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
REFERENCE, SURPRISED, EINSUM = "step over grouped_mm", "expert_mlp, surprise", "surprise alone, by einsum"
CENTRE = (256, 32, 4)  # experts, neurons, slots
EVERYWHERE = 4  # every form is timed with this many slots; other counts time the forms that depend on it and the compared ones
SLOW = ("dense einsum", "transformers, eager", "transformers, batched_mm")
ROUNDS = (3, 40)
NAIVE_ELEMENTS, EAGER_ELEMENTS, EINSUM_ELEMENTS = 1 << 26, 1 << 28, 1 << 27  # larger sizes take seconds


def grid(quick: bool) -> list[tuple[int, int, int]]:
    """(experts, neurons, slots) in the order in which they are measured."""
    if quick:
        return [(64, 8, 1), (64, 8, 4), (64, 8, 64)]
    experts, neurons, slots = CENTRE
    cells = [(number, neurons, slots) for number in (64, 128, 256, 512, 1024, 2048, 4096)]
    cells += [(experts, number, slots) for number in (8, 16, 32, 64, 128)]
    cells += [(experts, neurons, number) for number in (1, 2, 4, 8, 16, 64, 128)]
    cells += [(64, number, most) for number in (8, 32, 128) for most in (1, 4, 16, 32, 64)]
    cells += [(number, size, most) for number, size in ((4096, 8), (1024, 128)) for most in (1, 16)]
    return list(dict.fromkeys(cells))


@torch.no_grad()
def surprise_by_einsum(c: Case) -> Tensor:
    """Norms of the gradient of down_proj for every token and slot, from explicit gradients."""
    gate, up = torch.einsum("nf,nkif->nki", c.x, c.up[c.index]).chunk(2, -1)
    grads = torch.einsum("nk,nf,nki->nkfi", c.weight, c.cotangent, functional.silu(gate) * up)
    return grads.flatten(2).norm(dim=-1)


def wanted(c: Case, name: str) -> bool:
    """Whether the form is timed at this size."""
    experts, slots = len(c.up), c.index.shape[1]
    if name in SLOW and slots != EVERYWHERE:
        return False
    match name:
        case "dense einsum":
            return c.x.numel() * experts <= NAIVE_ELEMENTS
        case "transformers, eager":
            return experts * c.up.numel() <= EAGER_ELEMENTS
    return True


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(calls: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    """Times the calls in turn, round after round, for about `seconds`; every call has run once before."""

    def sample(call: Callable[[], Any]) -> float:
        start = now(device)
        call()
        return now(device) - start

    gc.disable()
    samples = {name: [sample(call)] for name, call in calls.items()}
    one_round = sum(found[0] for found in samples.values())
    names = list(calls)
    for turn in range(1, min(max(int(seconds / one_round), ROUNDS[0]), ROUNDS[1])):
        # The order changes, so that no candidate always inherits the cache and the freed memory of the same neighbour.
        random.Random(turn).shuffle(names)
        for name in names:
            samples[name].append(sample(calls[name]))
    gc.enable()
    return samples


def measure(c: Case, device: str, seconds: float) -> dict[str, dict[str, float]]:
    """{candidate: {"min", "median" in seconds, "rounds", "peak", "kept" in bytes}}; raises an error if outputs differ."""
    tolerance = TOLERANCE[DTYPE[device]]
    forwards = {name: forward for name, forward in forwards_of(c).items() if wanted(c, name)}
    calls: dict[str, Callable[[], Any]] = {name: partial(step, c, forward) for name, forward in forwards.items()}
    reference, surprise = calls[REFERENCE](), calls[SURPRISED]()[5]
    for name, call in calls.items():
        found = call()
        check_equal({REFERENCE: reference, name: found}, tolerance)
        if len(found) > 5:
            check_close(found[5], surprise, tolerance, f"surprise of {name}")
    memory = {name: (allocated(calls[name], device)[0], allocated(forward, device)[1]) for name, forward in forwards.items()}
    if c.index.numel() * c.up[0].numel() <= EINSUM_ELEMENTS:
        calls[EINSUM] = partial(surprise_by_einsum, c)
        check_close(surprise, calls[EINSUM](), tolerance, "surprise of expert_mlp")
        memory[EINSUM] = (allocated(calls[EINSUM], device)[0], 0)
    del reference, found
    return {
        name: {
            "min": min(found),
            "median": statistics.median(found),
            "rounds": len(found),
            "peak": memory[name][0],
            "kept": memory[name][1],
        }
        for name, found in timed(calls, device, seconds).items()
    }


class Results:
    """Finished cells, saved to a file one by one; with `path` None, in memory only."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.cells: dict[tuple[int, int, int], dict[str, dict[str, float]]] = {}
        if path is not None and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["settings"] == settings:
                self.cells = {(cell["experts"], cell["neurons"], cell["slots"]): cell["candidates"] for cell in stored["cells"]}

    def note(self, cell: tuple[int, int, int], found: dict[str, dict[str, float]]) -> None:
        self.cells[cell] = found
        if self.path is not None:
            self.path.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")

    def content(self) -> dict[str, Any]:
        cells = [
            {"experts": experts, "neurons": neurons, "slots": slots, "candidates": found}
            for (experts, neurons, slots), found in sorted(self.cells.items())
        ]
        return {"settings": self.settings, "cells": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds of timing for one size")
    parser.add_argument("--out", type=Path, help="folder of the page (default: docs/; with --quick: none)")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    device, folder = options.device, options.out or (None if options.quick else ROOT / "docs")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device that torch can use")
    if options.quick:
        options.tokens, options.features, options.seconds = 256, 64, 0.2
    torch.set_num_threads(options.threads)
    settings = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores",
        "dtype": str(DTYPE[device]).removeprefix("torch."),
        "torch": torch.__version__,
        "dense_operations": DENSE_OPERATIONS[device],
        **{name: getattr(options, name) for name in ("tokens", "features", "threads", "quick")},
    }
    stem = "einsum_or_dispatch" + ("_cuda" if device == "cuda" else "")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    results = Results(None if folder is None else folder / f"{stem}.json", settings)
    print(f"{settings['device']}, {options.threads} torch threads")
    for cell in grid(options.quick):
        if cell in results.cells:
            continue
        c = case(options.tokens, options.features, *cell, device=device, dtype=DTYPE[device])
        found = measure(c, device, options.seconds)
        results.note(cell, found)
        print("{} experts of {}, {} a token:".format(*cell))
        for name, row in found.items():
            print(f"  {name:<36} {row['median'] * 1e3:10.2f} ms {row['peak'] / 1e6:9.1f} MB, keeps {row['kept'] / 1e6:.1f}", flush=True)
    if folder is not None:
        write_page(results.content(), folder, stem)


if __name__ == "__main__":
    main()
