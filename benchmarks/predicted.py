"""Predicted times of docs/kernels.json, for rows of benchmarks at the shape of a goal, to compare with the measurement."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

FILE = Path(__file__).resolve().parents[1] / "docs" / "kernels.json"
GOALS = {"dyn_nsa": (65_536, 64, 4, 128), "expert_mlp": (16_384, 1024, 1024, 64, 8)}  # as the arguments of a goal in kernel_report.py
NAMES = {80: "A100", 90: "H100", 100: "B200"}


@cache
def totals(arch: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of each op: with lists of key blocks that share the forced ones alone, and with lists as in text."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    sums: dict[str, tuple[float, float]] = {}
    for row in (*found["kernels"], *found["pytorch"]):
        if row["arch"] == arch:
            first, second = sums.get(row["op"], (0.0, 0.0))
            sums[row["op"]] = first + row["predicted_ms"], second + row.get("text_ms", row["predicted_ms"])
    return sums


def predicted(op: str, shape: tuple[int, ...], arch: int | None = None) -> dict[str, dict[str, float]]:
    """A note with the times predicted for an op and its gradient; none for other shapes than the goal's, and other GPUs.

    Args:
        arch: compute capability, such as 90; None for the GPU's.
    """
    if arch is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    sums = totals(arch) if arch is not None and GOALS[op] == shape else {}
    notes: dict[str, dict[str, float]] = {}
    for name, (first, second) in sums.items():
        if name.startswith(f"{op} "):
            own = notes.setdefault(f"predicted ms, {NAMES[arch]}", {})
            part = name.removeprefix(f"{op} ")
            own[part] = round(first, 2)
            if second != first:
                own[f"{part}, lists as in text"] = round(second, 2)
    return notes
