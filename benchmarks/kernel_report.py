"""What each Triton kernel is made of at its goal shape, and how long it should take, from the compiler and first principles: no GPU.

    .venv/bin/python benchmarks/kernel_report.py              a table for sm_90, in a minute or two
    .venv/bin/python benchmarks/kernel_report.py --write      docs/kernels.json and docs/kernels.md, for sm_80, sm_90 and sm_100
    .venv/bin/python benchmarks/kernel_report.py --check      whether these files are up to date, in seconds
    .venv/bin/python benchmarks/kernel_report.py --first-use  how long a first forward and backward compiles

Each op of `goals` runs on tensors without data. The report compiles the default configuration of each kernel that it launches, reads the
machine code, and sets it against the work that the mathematics needs (`kernel_work.py`):

    matrix        matrix instructions of one step of each loop
    duplicated    their floating-point operations over those of the step's products, 1 if nothing is computed twice
    masked        operations of all steps over those needed: padding, masked keys, and products that are computed again
    bound         operations at the peak rate, or bytes from DRAM, whichever takes longer
    predicted     the longest of tensor cores, DRAM, L2 and instruction issue, at the rates of `Machine`, plus the launches

The prediction is a model; its rates are rounded experience, and ±40 % is what to expect of it. It ranks changes, and a first run on a GPU
tells which of its parts are wrong. PyTorch's own operations between the kernels count by the bytes that they move.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from kernel_rates import (
    ISSUE_OF_A_WARP,
    LAUNCH,
    MACHINES,
    MOST_ISSUE,
    PROGRAMS,
    REACHED,
    REGISTERS,
    SCHEDULERS,
    WARPS,
    Machine,
    Row,
)
from kernel_report_page import page, tables
from kernel_work import WORK, Launch, Work, lists_of_text
from predicted import GOALS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyonn.testing.sass import Assembly
from tinyonn.testing.triton import ARCHS, SHARED_LIMIT, Build, Usage, builds_of

MOST_OFFERED = 4  # configurations of a kernel
DOCS = Path(__file__).resolve().parent.parent / "docs"


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dyn_nsa_results() -> tuple[Any, ...]:
    tokens, heads, kv_heads, dim = GOALS["dyn_nsa"]
    from tinyonn.ops.nsa._triton_dyn_nsa import dyn_nsa_forward
    from tinyonn.ops.nsa._tuples import DynNSAInputs, DynNSANumbers

    compressed = empty(1, tokens // 64, kv_heads, dim)
    key, number = empty(1, tokens, kv_heads, dim), empty(kv_heads, dtype=torch.float32)
    inputs = DynNSAInputs(
        empty(1, tokens, heads, dim), key, key, compressed, compressed, empty(1, tokens, heads, 3), number, number, *[None] * 3
    )
    options = DynNSANumbers(512, 1.0, 64, 64, 16, "share", 1, 2, False, dim**-0.5, None)
    return inputs, options, dyn_nsa_forward(inputs, options, (None, None, None))


def dyn_nsa_backward(inputs: Any, options: Any, found: Any) -> None:
    from tinyonn.ops.nsa._triton_dyn_nsa import dyn_nsa_backward
    from tinyonn.ops.nsa._tuples import DynNSASaved

    kept = [getattr(found, name) for name in DynNSASaved._fields[:-2]]
    saved = DynNSASaved(*kept, torch.empty_like(found.out), torch.empty_like(found.soft_counts))
    dyn_nsa_backward(inputs._replace(tau=found.own_tau), saved, options, (None, None, None))


def expert_results() -> tuple[Any, ...]:
    tokens, features, experts, neurons, slots = GOALS["expert_mlp"]
    from tinyonn.ops.experts._triton_experts import experts_forward
    from tinyonn.ops.experts._tuples import Inputs, Layout

    x, up, down = empty(tokens, features), empty(experts, 2 * neurons, features), empty(experts, features, neurons)
    inputs = Inputs(x, up, down, empty(tokens, slots, dtype=torch.int64), empty(tokens, slots), None, None)
    layout = Layout("silu", gated=True, interleaved=False, transposed=False)
    return inputs, layout, experts_forward(inputs, layout)


def expert_backward(inputs: Any, layout: Any, found: Any) -> None:
    from tinyonn.ops.experts._triton_experts import experts_backward
    from tinyonn.ops.experts._tuples import Saved, Wanted

    experts_backward(inputs, Saved(found[1], torch.empty_like(inputs.hidden_states)), layout, Wanted("down_proj"))


def statistics() -> None:
    from tinyonn_kernels.statistics.attention_stats import attention_stats_fwd
    from tinyonn_kernels.statistics.block_norms import block_norms_fwd
    from tinyonn_kernels.statistics.integrate_sps import integrate_sps_fwd
    from tinyonn_kernels.statistics.token_grad_norms import token_grad_norms_fwd

    f32 = torch.float32
    block_norms_fwd(empty(65536, 8192), None, empty(65536, 128, dtype=f32), 64)
    token_grad_norms_fwd(empty(16384, 4096), empty(16384, 4096), empty(16384, 64, dtype=f32), 64)
    planes = [empty(16384, 3198, dtype=f32) for _ in range(2)]
    integrate_sps_fwd(*planes, empty(32, dtype=torch.int64), None, None)
    entropy = empty(1, 8192, 32, dtype=f32)
    span = empty(1, 8192, dtype=torch.bool)
    attention_stats_fwd(empty(1, 8192, 32, 128), empty(1, 8192, 8, 128), entropy, entropy, span, None, None, None, 128**-0.5, True, 0, 0.0)


class Moved(TorchDispatchMode):
    """Counts PyTorch's operations that move data, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.bytes = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view and not any(word in func.name() for word in ("empty", "new_empty")):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
            self.number += 1
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in tensors if leaf.stride() and 0 not in leaf.stride())
        return found


Call = Callable[[], object]


def goals() -> dict[str, Call]:
    """Ops by name. Forward runs once here, for the results that backward takes; `builds_of` keeps it from launching anything."""
    from tinyonn_kernels._tune import forced

    results: list[tuple[Any, ...]] = []
    with forced(0):
        builds_of(lambda: results.extend([dyn_nsa_results(), expert_results()]), ARCHS[0])
    attention, mixture = results
    return {
        "dyn_nsa forward": dyn_nsa_results,
        "dyn_nsa backward": lambda: dyn_nsa_backward(*attention),
        "expert_mlp forward": expert_results,
        "expert_mlp backward, with surprise": lambda: expert_backward(*mixture),
        "statistics": statistics,
    }


def listed(call: Call, arch: int) -> tuple[dict[str, list[Build]], Moved]:
    """Launches of an op by kernel and configuration, and PyTorch's operations."""
    from tinyonn_kernels._tune import compiled_for, forced

    moved = Moved()

    def run() -> None:
        with moved:
            call()

    with forced(0):
        builds = builds_of(compiled_for(arch, {"": run})[""], arch)
    found: dict[str, list[Build]] = {}
    for build in builds:
        found.setdefault(build.digest, []).append(build)
    return found, moved


_BUILDS: dict[tuple[str, int], Build] = {}


def _compiled(key: tuple[str, int]) -> tuple[Usage, Assembly]:
    return _BUILDS[key].disassembled()


def resident(usage: Usage, warps: int) -> int:
    """Programs that a multiprocessor holds at once."""
    registers = -(-usage.registers // 8) * 8 * 32 * warps
    shared = SHARED_LIMIT[usage.arch] // (usage.shared + 1024) if usage.shared else PROGRAMS
    return max(1, min(REGISTERS // registers, shared, WARPS // warps, PROGRAMS))


def row_of(op: str, builds: list[Build], usage: Usage, assembly: Assembly, machine: Machine) -> Row:
    build = builds[0]
    launches = [Launch(one) for one in builds]
    works = [WORK[one.name](one) for one in launches]
    warps = build.options.get("num_warps", 4)
    chosen = {
        name: value for name, value in build.arguments.items() if name in ("ROWS", "KEYS", "BLOCKS", "QUERIES", "COLUMNS", "LINES", "DEPTH")
    }
    config = ", ".join(
        [*(f"{name} {value}" for name, value in chosen.items()), f"{warps} warps", f"{build.options.get('num_stages', 3)} stages"]
    )
    programs = resident(usage, warps)
    executed, issued, matrix, duplicated = _counted(launches, works, assembly, warps)
    main = max(assembly.loops, key=lambda loop: (loop.flops(warps), len(loop)), default=assembly.outside)
    needed, dram, cached = (sum(getattr(work, name) for work in works) for name in ("needed", "dram", "cached"))
    wide = any(name.startswith(("wgmma", "tcgen05")) for name in matrix)
    rate = (machine.wgmma if wide else machine.mma) * machine.units * machine.clock * 1e9
    filled = min(1.0, sum(one.programs for one in launches) / len(launches) / (machine.units * programs))
    clocks = machine.units * SCHEDULERS * machine.clock * 1e9 * filled
    issue = min(MOST_ISSUE, ISSUE_OF_A_WARP * programs * warps / SCHEDULERS)
    tiles = sum(step * tile for work in works for step, tile in zip(work.steps, work.tile, strict=True))
    seconds = {
        "tensor cores": max(executed, tiles) / (rate * REACHED * filled) if needed else 0.0,
        "DRAM": dram / machine.dram / 1e12,
        "L2": cached / machine.cache / 1e12,
        "issue": issued / clocks / issue,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return Row(
        op,
        build.kernel.__name__.strip("_").removesuffix("_kernel"),
        usage.arch,
        len(builds),
        config,
        usage.registers,
        usage.stack + usage.local,
        usage.shared,
        programs,
        warps,
        dict(matrix),
        len(main),
        duplicated,
        tiles / needed if needed else None,
        dict(assembly.loads),
        main.barriers,
        needed / 1e9,
        dram / 1e9,
        cached / 1e9,
        1e3 * max(needed / (max(machine.wgmma, machine.mma) * machine.units * machine.clock * 1e9), dram / machine.dram / 1e12),
        1e3 * (seconds[limit] + LAUNCH * len(builds)),
        limit,
        build.digest,
    )


def _counted(launches: list[Launch], works: list[Work], assembly: Assembly, warps: int) -> tuple[float, float, Counter[str], float | None]:
    """Operations and instructions of all programs, matrix instructions of a step, and their operations over those of its products."""
    loops = [loop for loop in assembly.loops if loop.matrix]
    times = [sum(work.steps[min(number, len(work.steps) - 1)] for work in works) for number in range(max(1, len(loops)))]
    tiles = [works[0].tile[min(number, len(works[0].tile) - 1)] for number in range(max(1, len(loops)))]
    programs = sum(one.programs if work.programs is None else work.programs for one, work in zip(launches, works, strict=True))
    executed = assembly.outside.flops(warps) * programs
    issued = float(len(assembly.outside) * programs * warps)
    before = sum(work.steps[0] if work.before is None else work.before for work in works)
    seen, matrix = 0, Counter(assembly.outside.matrix)
    for loop in assembly.loops:
        seen += bool(loop.matrix)
        # A loop around those with products runs once a program or tile, any other as often as the one before it.
        around = not loop.matrix and any(other.depth > loop.depth and other.matrix for other in assembly.loops)
        runs = programs if around else times[max(0, min(seen, len(times)) - 1)] if seen else before
        executed += loop.flops(warps) * runs
        issued += len(loop) * warps * runs
        matrix += loop.matrix
    whole = sum(time * tile for time, tile in zip(times, tiles, strict=True)) if loops else times[0] * tiles[0]
    return executed, issued, matrix, executed / whole if whole and executed else None


def report(ops: dict[str, Call], archs: Iterable[int], processes: int) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of all kernels, and PyTorch's operations of each op."""
    found = {(op, arch): listed(call, arch) for op, call in ops.items() for arch in archs}
    for (_, arch), (builds, _) in found.items():
        _BUILDS.update({(digest, arch): same[0] for digest, same in builds.items()})
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        compiled = dict(zip(_BUILDS, pool.map(_compiled, _BUILDS), strict=True))
    rows, rest = [], []
    for (op, arch), (builds, moved) in found.items():
        machine = MACHINES[arch]
        for digest, same in builds.items():
            row = row_of(op, same, *compiled[digest, arch], machine)
            with lists_of_text():
                row.text_ms = row_of(op, same, *compiled[digest, arch], machine).predicted_ms
            rows.append(row)
        seconds = moved.bytes / machine.dram / 1e12 + LAUNCH * moved.number
        rest.append({"op": op, "arch": arch, "operations": moved.number, "gb": moved.bytes / 1e9, "predicted_ms": 1e3 * seconds})
    return rows, rest


def stale(ops: dict[str, Call], path: Path) -> list[str]:
    """Kernels whose sources, arguments or compiler differ from those of the file. Nothing is compiled."""
    here = {
        (op, arch, digest): same[0].kernel.__name__
        for op, call in ops.items()
        for arch in ARCHS
        for digest, same in listed(call, arch)[0].items()
    }
    there = {(row["op"], row["arch"], row.get("source")): row["kernel"] for row in json.loads(path.read_text(encoding="utf-8"))["kernels"]}
    names = [here[key].strip("_").removesuffix("_kernel") for key in here.keys() - there.keys()] + [
        there[key] for key in there.keys() - here.keys()
    ]
    return sorted(set(names))


def first_use(op: str, arch: int) -> tuple[int, float]:
    """Builds that a first forward and backward compile, all configurations that are offered among them, and their CPU seconds."""
    from tinyonn_kernels._tune import compiled_for, forced

    launches = compiled_for(arch, {name: call for name, call in goals().items() if name.startswith(op)})
    found: dict[str, Build] = {}
    for number in range(MOST_OFFERED):
        with forced(number):
            for call in launches.values():
                found |= {build.digest: build for build in builds_of(call, arch)}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        before = os.times()
        for build in found.values():
            build.compile()
        after = os.times()
    return len(found), sum(after[:4]) - sum(before[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=[90])
    parser.add_argument("--op", nargs="+", help="beginnings of names of ops, such as dyn_nsa (default: all)", default=[""])
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument(
        "--first-use", action="store_true", help="CPU seconds in which one core compiles each op's kernels, of all configurations"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", action="store_true", help="write docs/kernels.json and docs/kernels.md, of all ops and architectures")
    parser.add_argument("--check", action="store_true", help="exit with 3 if docs/kernels.json is out of date")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.check:
        if found := stale(goals(), DOCS / "kernels.json"):
            parser.exit(3, f"docs/kernels.json is out of date for {', '.join(found)}; run `make kernels`\n")
        return
    ops = {name: call for name, call in goals().items() if options.write or any(name.startswith(begin) for begin in options.op)}
    if not ops:
        parser.error(f"--op must be the beginning of one of {', '.join(goals())}, got {' '.join(options.op)}.")
    archs = ARCHS if options.write else options.arch
    if options.first_use:
        for op in dict.fromkeys(name.split()[0] for name in ops):
            for arch in archs:
                number, seconds = first_use(op, arch)
                print(f"{op}, sm_{arch}: {number} kernels in {seconds:.1f} s of one core, triton {triton.__version__}", flush=True)
        return
    rows, rest = report(ops, archs, options.processes)
    figures = json.dumps({"triton": triton.__version__, "kernels": [asdict(row) for row in rows], "pytorch": rest}, indent=1) + "\n"
    if options.write:
        (DOCS / "kernels.json").write_text(figures, encoding="utf-8")
        (DOCS / "kernels.md").write_text("\n".join(page(rows, rest)) + "\n", encoding="utf-8")
    else:
        print("\n".join(line for arch in archs for line in tables(rows, rest, arch)))
    if options.json:
        options.json.write_text(figures, encoding="utf-8")


if __name__ == "__main__":
    main()
