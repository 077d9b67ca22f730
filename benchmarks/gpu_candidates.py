"""Times configurations of the kernels that are not offered, to choose those that are: of `dyn_nsa` and `expert_mlp` at their goals.

    python benchmarks/gpu_candidates.py                  every candidate, in about two minutes on an H200
    python benchmarks/gpu_candidates.py --output FILE    the same, as JSON too

Candidates are for half precision, D = 128, 16 query heads of a key/value head and experts of 64 neurons. Processes compile them first, side
by side; then each is timed alone (`gpu_kernels.by_kernel`). One that does not fit a GPU ends its row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.extend([str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")])

import torch  # noqa: E402
from bench_dyn_nsa_long import FULL  # noqa: E402
from gpu_kernels import by_kernel  # noqa: E402
from triton import Config  # noqa: E402

from tinyonn.testing.timing import last_line  # noqa: E402
from tinyonn_kernels._tune import TunedKernel, config  # noqa: E402

GOALS: dict[str, Any] = {  # op -> sizes
    "dyn_nsa": {"tokens": 65536, **{name: x for name, x in FULL.items() if name != "device"}},
    "expert_mlp": (16384, 1024, 1024, 64, 8),
}
# The same constants, so that other processes compile the kernels that are timed, with less to compute.
SHORT: dict[str, Any] = {"dyn_nsa": {**GOALS["dyn_nsa"], "tokens": 8192}, "expert_mlp": (2048, 1024, 1024, 64, 8)}
MODULES = {
    "nsa": ("interval_attention_fwd", "interval_attention_dq", "interval_attention_dkv", "select_blocks_fwd", "select_blocks_dq",
            "select_blocks_dk", "block_sparse_fwd", "block_sparse_dq", "block_sparse_dkv"),
    "experts": ("expert_mlp_fwd", "expert_mlp_bwd", "expert_rows", "expert_outer"),
}  # fmt: skip


Row = tuple[int | None, ...]


def grid(names: str, *rows: Row) -> list[Config]:
    """Configurations, from the values of the named tile sizes, then warps, stages and registers (None: as many as ptxas takes)."""
    return [config(*row[-3:], **dict(zip(names.split(), row[:-3], strict=True))) for row in rows]  # type: ignore[arg-type]


CANDIDATES: dict[str, list[Config]] = {
    "interval_fwd": grid(
        "ROWS KEYS", (64, 64, 4, 3, 255), (128, 64, 8, 3, 255), (128, 64, 8, 2, 255), (64, 64, 4, 2, 255), (128, 64, 4, 2, 255),
        (128, 128, 8, 2, 255), (128, 32, 8, 3, 255), (64, 32, 4, 3, 255),
    ),
    "interval_dq": grid(
        "ROWS KEYS", (64, 64, 4, 2, 255), (64, 32, 4, 2, None), (128, 64, 8, 2, 255), (128, 64, 8, 3, 255), (64, 32, 4, 3, 255),
        (128, 32, 8, 2, 255), (64, 64, 4, 1, 255), (64, 64, 4, 3, 255),
    ),
    "interval_dkv": grid(
        "ROWS KEYS", (32, 64, 4, 1, 255), (64, 128, 8, 1, 255), (32, 64, 4, 2, 255), (64, 64, 4, 1, 255), (32, 128, 8, 2, 255),
        (16, 64, 4, 2, 255), (32, 32, 4, 2, 255), (64, 64, 8, 2, 255),
    ),
    "select_fwd": grid("BLOCKS", (32, 4, 2, 168), (32, 4, 1, 168), (64, 4, 1, 168), (32, 4, 3, 168)),
    "select_dq": grid("BLOCKS", (64, 4, 1, 255), (32, 4, 1, 255), (64, 4, 2, 255), (64, 8, 1, 255)),
    "select_dk": grid("", (4, 1, 168), (4, 1, 255), (4, 2, 168), (8, 1, 255)),
    "block_sparse_fwd": grid("KEYS", (64, 4, 2, None), (64, 4, 3, None), (32, 4, 2, None), (32, 4, 2, 128)),
    "block_sparse_dq": grid("KEYS", (64, 4, 2, None), (64, 4, 1, None), (32, 4, 2, 168), (32, 4, 2, None), (64, 8, 2, None)),
    "block_sparse_dkv": grid(
        "ROWS KEYS", (32, 64, 4, 2, 255), (64, 64, 4, 1, 255), (32, 64, 4, 1, 255), (16, 64, 4, 2, 255), (64, 64, 8, 1, 255),
        (32, 64, 8, 2, 255), (32, 32, 4, 2, 255),
    ),
    "expert_gate_up": grid("COLUMNS DEPTH", (64, 64, 4, 3, None), (64, 64, 4, 2, None), (64, 64, 8, 3, None), (64, 128, 4, 2, None)),
    "expert_rows": grid("COLUMNS DEPTH", (128, 64, 4, 2, None), (128, 64, 8, 2, None), (256, 64, 8, 2, None), (64, 64, 4, 2, None)),
    "expert_grad_pre": grid(
        "COLUMNS DEPTH", (64, 64, 8, 3, 128), (64, 64, 4, 4, 255), (64, 128, 8, 3, 128), (64, 64, 8, 3, 255), (64, 64, 4, 3, 255)
    ),
    "expert_outer": grid(
        "LINES COLUMNS DEPTH", (64, 64, 64, 4, 2, 255), (64, 64, 128, 4, 2, 255), (64, 128, 128, 4, 2, 255), (64, 128, 64, 4, 2, 255),
        (128, 128, 64, 8, 2, 255), (64, 128, 32, 4, 3, 255),
    ),
}  # fmt: skip


def owners() -> dict[tuple[str, str], TunedKernel]:
    """All tuned kernels of both ops, by package and name."""
    found = {}
    for package, names in MODULES.items():
        for name in names:
            for kernel in vars(importlib.import_module(f"tinyonn_kernels.{package}.{name}")).values():
                if isinstance(kernel, TunedKernel):
                    found[package, kernel.base_fn.__name__.strip("_").removesuffix("_kernel")] = kernel
    return found


def kernels() -> dict[str, TunedKernel]:
    return {name: kernel for (_, name), kernel in owners().items()}


@contextmanager
def offered(candidates: dict[str, list[Config]]) -> Iterator[None]:
    """Within this context, these kernels have these tables."""
    tuned = kernels()
    before = {name: tuned[name].table for name in candidates}
    try:
        for name, table in candidates.items():
            tuned[name].table = lambda table=table, **_: table
            tuned[name]._offered.clear()
        yield
    finally:
        for name, table in before.items():
            tuned[name].table = table
            tuned[name]._offered.clear()


OP = {name: "dyn_nsa" if package == "nsa" else "expert_mlp" for package, name in owners()}


def times(name: str, tiles: Config, sizes: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a kernel in each part of its op, with these tiles; all other kernels have the first of their own."""
    report: dict[str, Any] = {}
    with offered({name: [tiles]}):
        by_kernel(report, "cuda", OP[name], sizes[OP[name]], numbers=[0])
    return {part: rows[name]["ms"][0] for part, rows in report["kernels"].items() if name in rows}


def compile_one(name: str, place: int) -> None:
    """Compiles a candidate. Whether it fits is told when it is timed."""
    with suppress(Exception):
        times(name, CANDIDATES[name][place], SHORT)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_candidates.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_candidates.py: this machine has no CUDA device that torch can use.", file=sys.stderr)
        return 1
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        for done in [pool.submit(compile_one, name, place) for name, table in CANDIDATES.items() for place in range(len(table))]:
            done.result()
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    for name, table in CANDIDATES.items():
        for tiles in table:
            try:
                found = times(name, tiles, GOALS)
            except Exception as error:  # it does not fit, for example
                report.setdefault(name, {})[str(tiles)] = last_line(error)
                print(f"{name:<18} {last_line(error)}  {tiles}", flush=True)
                continue
            report.setdefault(name, {})[str(tiles)] = found
            print(f"{name:<18} {', '.join(f'{part} {time:.3f} ms' for part, time in found.items())}  {tiles}", flush=True)
        if given.output:
            given.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
