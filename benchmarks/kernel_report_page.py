"""Tables of `kernel_report.py`, and its page."""

from __future__ import annotations

from typing import Any

from kernel_rates import ISSUE_OF_A_WARP, LAUNCH, MACHINES, MOST_ISSUE, REACHED, Row

from tinyonn.testing.triton import ARCHS

INTRODUCTION = """# Kernels

`benchmarks/kernel_report.py --write` wrote this page, with triton {version}. It compiles each Triton kernel at the shape of its goal and
compares the machine code with the work that the mathematics needs. It needs no GPU, and none was used: the times are predictions.

- **Goals**: `dyn_nsa` with 65,536 tokens, 64 query heads and 4 key/value heads of 128, bfloat16, and 16 key blocks of 64 per query;
  `expert_mlp` with 16,384 tokens of 1,024 features and 1,024 experts of 64 neurons, 8 a token; statistics of 8,192 to 65,536 tokens.
- **Registers** are per thread, with spilled bytes after a plus. **Programs × warps** is what a multiprocessor holds at once.
- **Duplicated**: operations of the matrix instructions of a step over those of its products. It is 1 if nothing is computed twice.
- **Masked**: operations of all steps over those that the mathematics needs. The rest is padding, masked keys, rows of queries that do not
  list a block, and products that backward computes again.
- **Lists**: in the tables, neighbouring queries share only the forced blocks. In text they share more: the union of the lists of four
  neighbours is as long as 0.30 of these lists together, of two 0.55 (SmolLM2-135M, `benchmarks/list_overlap.py`). The second total of an
  op has such lists.
- **Bound**: operations at the peak rate, or bytes from DRAM at the rate that a copy reaches, whichever takes longer.
- **Predicted**: the longest of four times, plus {launch:g} µs per launch: {rates}. A model with such rates may be wrong by 40 %.

All figures, also those for sm_80 and sm_100, are in `docs/kernels.json`. `kernels/resources.json` has registers and shared memory of every
configuration that is offered."""
HEAD = (
    "kernel",
    "launches",
    "configuration",
    "registers",
    "shared KB",
    "programs × warps",
    "matrix instructions",
    "duplicated",
    "masked",
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
    "masked",
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
        "masked": masked,
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
        every.append(dict.fromkeys(HEAD, "") | moved | {"predicted ms": f"{other['predicted_ms']:.3f}", "limit": "DRAM"})
        lines += ["| " + " | ".join(cells[name] for name in head) + " |" for cells in every]
        lines.append("")
    return lines


def page(rows: list[Row], rest: list[dict[str, Any]]) -> list[str]:
    """Lines of docs/kernels.md."""
    import triton

    machine = MACHINES[90]
    rates = (
        f"tensor cores at {REACHED:.0%} of their peak, DRAM at {machine.dram:g} and L2 at {machine.cache:g} TB/s ({machine.name}),"
        f" instruction issue at {ISSUE_OF_A_WARP:g} per clock, scheduler and warp, at most {MOST_ISSUE:g}"
    )
    lines = INTRODUCTION.format(version=triton.__version__, launch=LAUNCH * 1e6, rates=rates).splitlines()
    lines += ["", "## Predictions for an H100", "", *tables(rows, rest, 90, SHORT), "## Registers and programs on other GPUs", ""]
    others = [arch for arch in ARCHS if arch != 90]
    head = [f"{MACHINES[arch].name}: registers, programs × warps" for arch in others]
    lines += ["| op | kernel | " + " | ".join(head) + " |", "|" + "---|" * (2 + len(others))]
    by_arch = {(row.op, row.kernel, row.config, row.arch): cells_of(row) for row in rows}
    for row in (row for row in rows if row.arch == 90):
        cells = [by_arch.get((row.op, row.kernel, row.config, arch)) for arch in others]
        shown = ["" if one is None else f"{one['registers']}, {one['programs × warps']}" for one in cells]
        lines.append(f"| {row.op} | {row.kernel} | {' | '.join(shown)} |")
    return lines
