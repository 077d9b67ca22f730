"""Tables of `kernel_report.py`, and its page."""

from __future__ import annotations

from typing import Any

from kernel_rates import ISSUE_OF_A_WARP, LAUNCH, MACHINES, MOST_ISSUE, REACHED, Row

from tinyonn.testing.triton import ARCHS

INTRODUCTION = """# Kernels

`benchmarks/kernel_report.py --write` wrote this page, except for its last section, with triton {version}. It compiles each Triton kernel at
the shape of its goal and compares the machine code with the work that the mathematics needs. It needs no GPU. Its times are predictions;
[below](#measured-on-an-h200) are those of an H200. Rates were set by them, so that the predicted time of an op is within 20 % of what was
measured. That of a single kernel can be wrong by a factor of two.

- **Goals**: `dyn_nsa` with 65,536 tokens, 64 query heads and 4 key/value heads of 128, bfloat16, and 16 key blocks of 64 per query, in 30
  ms forward and 75 ms backward; dense causal attention takes about 180 ms forward where it reaches 400 TFLOP/s. `expert_mlp` with 16,384
  tokens of 1,024 features and 1,024 experts of 64 neurons, 8 a token, in 1.15 ms forward and backward.
- **Launches**: forward of `dyn_nsa` works on 16 chunks of queries, so its kernels, and PyTorch's operations between them, run 16 times.
- **Registers** are per thread, with spilled bytes after a plus. **Programs × warps** is what a multiprocessor holds at once.
- **Duplicated**: matrix operations in the machine code, divided by those that the source asks for. It is 1 if nothing is computed twice, as
  `make test` demands of every configuration.
- **Extra work**: matrix operations of all steps, divided by those that the mathematics needs. The rest is padding, masked keys, rows of
  queries that do not list a block, and products that backward computes again.
- **Lists**: in the tables, neighbouring queries share only the forced blocks. In text they share more: the union of four neighbours'
  lists is 30 % of their summed length (25 % if they were equal), that of two 55 %. This was measured on SmolLM2-135M with 2,048 tokens
  and 4 or 8 blocks a query (`benchmarks/list_overlap.py`), and is assumed here for longer texts. The second total of an op has such
  lists.
- **Bound**: operations at the peak rate, or bytes from DRAM at the rate that a copy reaches, whichever takes longer.
- **Predicted**: the longest of four times, plus {launch:g} µs per launch: {rates}.

All figures, also those for sm_80 and sm_100, are in `docs/kernels.json`. Configurations for groups of 16 heads and D = 128 are the fastest
on an H200; others have been chosen by predictions for an H100. So the tables tell little about what an A100 or B200 can reach.
`kernels/resources.json` has registers and shared memory of every configuration that is offered."""
MEASURED = """## Measured on an H200

One NVIDIA H200, torch 2.11.0, triton 3.6.0. Every configuration of every kernel agrees with its float64 oracle. Times are medians of
`make gpu`; `benchmarks/results/nvidia-h200` has all of them, with the commit of each.

| `dyn_nsa`, 65,536 tokens, 64 query heads over 4 of 128, bfloat16, random lists | forward | backward | both |
|---|---|---|---|
| `dyn_nsa` | 44.2 ms | 107.5 ms | 151.8 ms |
| dense causal attention, cuDNN | 119.0 ms, 2.69× | 341.1 ms, 3.17× | 460.1 ms, 3.03× |
| dense causal attention, FlashAttention-2 | 206.8 ms, 4.68× | 550.5 ms, 5.12× | 757.4 ms, 4.99× |

The goal of 3× the best dense attention is reached, those of 6× and 7× FlashAttention-2 are not. In random lists, neighbouring queries share
the forced blocks alone, which is the worst case.

Times of kernels are from PyTorch's profiler, the best of up to twelve configurations that `python benchmarks/gpu_candidates.py` times
(`configurations.json`). Those of `select_fwd`, of the interval kernels' gradients, of `expert_grad_pre` and of sorting are from before
their last changes.

| forward | ms | | backward | ms | | `expert_mlp` with surprise | ms |
|---|---|---|---|---|---|---|---|
| `interval_fwd` | 8.9 | | `block_sparse_dq` | 35.1 | | `expert_gate_up` | 0.147 |
| `select_fwd` | 8.7 | | `interval_dq` | 15.6 | | `expert_rows`, `combine_slots`, forward | 0.230 |
| `block_sparse_fwd` | 22.5 | | `interval_dkv` | 20.5 | | `expert_grad_pre` | 0.196 |
| `merge_lists` | 0.2 | | `block_sparse_dkv` | 19.3 | | `expert_rows`, `combine_slots`, backward | 0.282 |
| PyTorch's | 0.3 | | `select_dq`, `select_dk` | 14.5 | | `expert_outer` | 0.409 |
| | | | others | 1.3 | | sorting, twice, and others | 0.168 |
| **together** | **40.6** | | | **106.3** | | | **1.43** |

A first forward and backward of `dyn_nsa` compiles 14 kernels, in 13.1 s of one core with triton 3.9.0 and 8.5 s with 3.6.0
(`benchmarks/kernel_report.py --first-use`). At D = 128 and groups of 16 heads, no configuration is left to try on an H100.

What the first runs changed:

- A tile of queries without visible keys began at the largest integer. Loops that fetch two steps ahead then added to it, and read far
  outside: an illegal memory access with three stages. No interpreter and no compiler shows this.
- Where every row has more blocks than fit, `select_fwd` took 18.9 ms, most of it in the bisection. It now compares bits alone, many at a
  time.
- Four warps on 64 rows beat eight on 128 in the interval kernels, two stages beat one in `block_sparse_dq` (35.1 ms, 37.4), and 64 rows
  with 136 spilled bytes beat 32 in `block_sparse_dkv` (19.3, 22.2). So the limit on spilled bytes is 160 now,
  not 0, and 640 where loops leave what is spilled alone, as at 256 features per head.
- 128 registers for `expert_grad_pre`, hence two programs on a multiprocessor: 0.196 ms instead of 0.286.
- Tiles of 64 columns and steps of 64 pairs in `expert_outer`: 0.409 ms instead of 0.457.
- `block_sparse_fwd` reads 115 GB from L2 at 5.1 TB/s, so no configuration changes it by more than 3 %."""
TRIED = """## Tried and left out

Each was compiled for an H100 with triton 3.9.0, or counted by hand, beside the code of that time. None predicted a gain worth its price:

- **Tensor descriptors (TMA)** for keys and values. A step of the window's `interval_fwd` without masks takes about 480 instructions instead
  of 400, and 10 barriers instead of 3; it needs 26 registers less, but the tile leaves room for one program either way. A step of
  `block_sparse_dq` takes 965 instead of 790. Triton's waits and its choice of a thread cost more than the addresses that they save.
- **dq of the interval kernels in one pass.** It needs the results of two branches, which forward would have to keep: 2.1 GB more at the
  goal. It saves 3.4 of 8.5 ms, less 1.4 ms to write and read the results, of a backward of 57.
- **A pipelined loop in `expert_rows`.** With 64 neurons the loop has one step; the kernel is within 2 % of its bound.
- **Norms for the surprise inside `expert_grad_pre`.** They would cost more instructions than a launch that reads the gradient once more.
  On an H200 this launch takes 0.016 ms. The surprise adds 0.041 ms more to `expert_grad_pre`, together 4 % of forward and backward; since
  then, the slots of a token are loaded before the products."""
HEAD = (
    "kernel",
    "launches",
    "configuration",
    "registers",
    "shared KB",
    "programs × warps",
    "matrix instructions",
    "duplicated",
    "extra work",
    "loads",
    "barriers",
    "GFLOP",
    "DRAM GB",
    "L2 GB",
    "bound ms",
    "predicted ms",
    "limit",
)
SHORT = (
    "kernel",
    "configuration",
    "registers",
    "programs × warps",
    "matrix instructions",
    "duplicated",
    "extra work",
    "bound ms",
    "predicted ms",
    "limit",
)


def cells_of(row: Row) -> dict[str, str]:
    """Cells of a table by heading."""
    spilled = f" + {row.spilled} B" if row.spilled else ""
    duplicated, masked = ("" if ratio is None else f"{ratio:.2f}" for ratio in (row.duplicated, row.masked))
    return {
        "kernel": row.kernel,
        "launches": str(row.launches),
        "configuration": row.config,
        "registers": f"{row.registers}{spilled}",
        "shared KB": f"{row.shared / 1024:.0f}",
        "programs × warps": f"{row.programs} × {row.warps}",
        "matrix instructions": ", ".join(f"{number} {name}" for name, number in row.matrix.items()),
        "duplicated": duplicated,
        "extra work": masked,
        "loads": ", ".join(f"{number} {name}" for name, number in sorted(row.loads.items())),
        "barriers": str(row.barriers),
        "GFLOP": f"{row.gflop:.0f}",
        "DRAM GB": f"{row.dram_gb:.2f}",
        "L2 GB": f"{row.cache_gb:.1f}",
        "bound ms": f"{row.bound_ms:.3f}",
        "predicted ms": f"{row.predicted_ms:.3f}",
        "limit": row.limit,
    }


def tables(rows: list[Row], rest: list[dict[str, Any]], arch: int, head: tuple[str, ...] = HEAD) -> list[str]:
    """Lines of a Markdown table for each op."""
    lines = []
    for other in (one for one in rest if one["arch"] == arch):
        own = [row for row in rows if (row.op, row.arch) == (other["op"], arch)]
        total, of_text = (sum(getattr(row, name) for row in own) + other["predicted_ms"] for name in ("predicted_ms", "text_ms"))
        less = f"; {of_text:.2f} ms with lists as in text" if of_text != total else ""
        lines += [
            f"### {other['op']}, {MACHINES[arch].name}: {total:.2f} ms predicted{less}",
            "",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
        ]
        every = [cells_of(row) for row in own]
        moved = {"kernel": f"{other['operations']} operations of PyTorch", "DRAM GB": f"{other['gb']:.2f}"}
        limit = "launches" if 2e3 * LAUNCH * other["operations"] > other["predicted_ms"] else "DRAM"
        every.append(dict.fromkeys(HEAD, "") | moved | {"predicted ms": f"{other['predicted_ms']:.3f}", "limit": limit})
        lines += ["| " + " | ".join(cells[name] for name in head) + " |" for cells in every]
        lines.append("")
    return lines


def page(rows: list[Row], rest: list[dict[str, Any]]) -> list[str]:
    """Lines of docs/kernels.md."""
    import triton

    machine = MACHINES[90]
    rates = (
        f"tensor cores at {REACHED:.0%} of their peak, DRAM at {machine.dram:g} and L2 at {machine.cache:g} TB/s ({machine.name}),"
        f" and instructions, of which each scheduler issues {ISSUE_OF_A_WARP:g} per clock for each resident warp, at most {MOST_ISSUE:g}"
    )
    lines = INTRODUCTION.format(version=triton.__version__, launch=LAUNCH * 1e6, rates=rates).splitlines()
    lines += ["", "## Predictions for an H100", "", *tables(rows, rest, 90, SHORT), "## Registers and programs on other GPUs", ""]
    others = [arch for arch in ARCHS if arch != 90]
    head = [f"{MACHINES[arch].name}: configuration, registers, programs × warps" for arch in others]
    lines += ["| op | kernel | " + " | ".join(head) + " |", "|" + "---|" * (2 + len(others))]
    found = {arch: _numbered([row for row in rows if row.arch == arch]) for arch in ARCHS}
    for op, kernel, number in found[90]:
        cells = [found[arch].get((op, kernel, number)) for arch in others]
        shown = ["" if one is None else f"{one['configuration']}: {one['registers']}, {one['programs × warps']}" for one in cells]
        lines.append(f"| {op} | {kernel} | {' | '.join(shown)} |")
    return [*lines, "", *MEASURED.splitlines(), "", *TRIED.splitlines()]


def _numbered(rows: list[Row]) -> dict[tuple[str, str, int], dict[str, str]]:
    """Cells by op, kernel, and which of its launches it is: the order is the same on every GPU, configurations differ."""
    found: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in rows:
        number = sum(key[:2] == (row.op, row.kernel) for key in found)
        found[row.op, row.kernel, number] = cells_of(row)
    return found
