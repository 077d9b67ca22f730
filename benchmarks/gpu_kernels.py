"""Time of every kernel of an op, by configuration, and the time of first use. Questions of `gpu.py`.

    python benchmarks/gpu_kernels.py cuda      seconds of the first step of `dyn_nsa` in this process, as one JSON line

A kernel's time is read from PyTorch's profiler, beside the time that `kernel_report.py` predicts for an H100.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from bench_dyn_nsa_long import Setting
from bench_expert_mlp import DTYPE, case, ours
from predicted import FILE, GOALS
from torch.profiler import ProfilerActivity

STEPS = 3  # profiled, after one that is not
OTHERS = "PyTorch's"
FIRST_USE_GOAL = 12.0  # seconds of compilation at the first forward and backward of dyn_nsa


def kernel_times(call: Callable[[], Any], device: str) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches of each kernel in one call; all of PyTorch's kernels are one entry. On a CPU, of PyTorch's operations."""
    call()
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        for _ in range(STEPS):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    found: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for event in profile.key_averages():
        micros = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if micros:
            own = event.key.startswith("_") and event.key.endswith("_kernel")
            name = event.key.strip("_").removesuffix("_kernel") if own else OTHERS
            time, launches = found[name]
            found[name] = (time + micros / 1e3 / STEPS, launches + event.count / STEPS)
    assert found, "the profiler must see kernels, got none."
    return dict(found)


def predictions(op: str, arch: int = 90) -> dict[str, float]:
    """Milliseconds by kernel, where neighbouring queries share the forced key blocks alone."""
    read = json.loads(FILE.read_text(encoding="utf-8"))
    found: defaultdict[str, float] = defaultdict(float)
    for row in (*read["kernels"], *read["pytorch"]):
        if row["arch"] == arch and row["op"] == op:
            found[row.get("kernel", OTHERS)] += row["predicted_ms"]
    return dict(found)


Parts = tuple[Callable[[], Any], Callable[[Any], Any], str, bool]  # forward, backward of its result, the name of backward, at the goal


def _attention(device: str, sizes: dict[str, Any]) -> Parts:
    given = {**sizes, "dtype": getattr(torch, sizes["dtype"])}
    setting = Setting(device=device, choices="random", **given)
    leaves = list(setting.leaves.values())
    at_goal = tuple(given[name] for name in ("tokens", "heads", "kv_heads", "dim")) == GOALS["dyn_nsa"]
    return setting.dyn_nsa, lambda out: torch.autograd.grad(out, leaves, setting.cotangent, retain_graph=True), "backward", at_goal


def _mixture(device: str, sizes: tuple[int, int, int, int, int]) -> Parts:
    c = case(*sizes, device, DTYPE[device])
    probe = torch.zeros(c.index.shape, device=device, requires_grad=True)
    leaves = [*c.leaves, probe]

    def backward(out: Any) -> Any:
        return torch.autograd.grad(out, leaves, c.cotangent, retain_graph=True)

    return lambda: ours(c, probe), backward, "backward, with surprise", tuple(sizes) == GOALS["expert_mlp"]


def by_kernel(report: dict[str, Any], device: str, op: str, sizes: Any, numbers: Iterable[int] | None = None) -> None:
    """Reports `kernels`: part -> kernel -> launches, predicted time, and times by configuration number.

    Args:
        op: "dyn_nsa" or "expert_mlp".
        sizes: keywords of `Setting` without device and choices, or positional arguments of `bench_expert_mlp.case`.
        numbers: of the configurations; all by default. A kernel with fewer of them repeats its last one.
    """
    from tinyonn_kernels._tune import forced

    forward, backward, backward_name, at_goal = _attention(device, sizes) if op == "dyn_nsa" else _mixture(device, sizes)
    found: dict[str, dict[str, Any]] = {}
    last = 0
    for number in itertools.count() if numbers is None else numbers:
        if numbers is None and number > last:
            break
        with forced(number) as offered:
            out = forward()
            parts = {f"{op} forward": forward, f"{op} {backward_name}": lambda out=out: backward(out)}
            for part, call in parts.items():
                expected = predictions(part) if at_goal else {}
                for name, (time, launches) in kernel_times(call, device).items():
                    row = found.setdefault(part, {}).setdefault(
                        name, {"launches": launches, "predicted ms, H100": round(expected.get(name, 0.0), 3), "ms": []}
                    )
                    row["ms"].append(round(time, 4))
        last = max(map(len, offered.values()), default=1) - 1
        report["kernels"], report["offered"] = found, dict(offered)
    best = {part: sum(min(row["ms"]) for row in rows.values()) for part, rows in found.items()}
    first = {part: sum(row["ms"][0] for row in rows.values()) for part, rows in found.items()}
    report["note"] = "; ".join(
        f"{part} {first[part]:.3f} ms with first configurations, {best[part]:.3f} with the fastest" for part in found
    )


def first_step(device: str) -> dict[str, Any]:
    """Seconds of the first and of a later step of `dyn_nsa` at the constants of its goal, after another kernel has been compiled."""
    from time import perf_counter

    from tinyonn import ops
    from tinyonn_kernels._tune import choices

    kind = torch.bfloat16 if device == "cuda" else torch.float32
    ops.block_norms(torch.randn(64, 256, device=device, dtype=kind), impl="triton")
    sizes = (
        {"tokens": 2048, "heads": 16, "kv_heads": 1, "dim": 128}
        if device == "cuda"
        else {"tokens": 320, "heads": 2, "kv_heads": 1, "dim": 16}
    )
    setting = Setting(choices="random", dtype=kind, device=device, **sizes)

    def step() -> float:
        start = perf_counter()
        torch.autograd.grad(setting.dyn_nsa(), list(setting.leaves.values()), setting.cotangent)
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    with choices() as settled:
        first = step()
    return {"first": round(first, 2), "later": round(step(), 4), "configurations tried": sum(one.tried for one in settled)}


def first_use(report: dict[str, Any], device: str) -> None:
    """Runs `first_step` in two new processes with an empty compile cache; the second finds what the first has compiled."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(paths)}
        for name in ("empty cache", "cache of the first process"):
            done = subprocess.run([sys.executable, str(Path(__file__)), device], capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
            report[name] = json.loads(done.stdout.strip().splitlines()[-1])
    report["goal"] = f"<= {FIRST_USE_GOAL:g} s"
    own, kept = report["empty cache"], report["cache of the first process"]
    report["note"] = f"first step {own['first']} s ({own['configurations tried']} configurations tried), {kept['first']} s from the cache"


if __name__ == "__main__":
    print(json.dumps(first_step(sys.argv[1])))
