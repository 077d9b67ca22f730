"""Draws the README's picture, docs/overview.png.

    make demo DEMO_ARGS="--limit 24 --max-length 128"     scans SmolLM2-135M-Instruct into data/demo/python.mscan
    .venv/bin/python benchmarks/readme_picture.py         --scan FILE for another scan

Left: mean SPS (synergistic prediction score) of each weight of each decoder layer, from the scan. Right: loss against the number of key
blocks read, from docs/dyn_nsa_budget.json, the output of benchmarks/dyn_nsa_budget.py.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.mscan import MscanReader

ROOT = Path(__file__).resolve().parent.parent
LABELS = {
    "static top-n, tuned": ("fixed number of blocks, tuned", "o", "-", "#8a8f98"),
    "tau from attention, before": ("threshold, calibrated only", "s", ":", "#e07a3f"),
    "tau from attention, after": ("threshold, tuned 12 steps", "s", "-", "#c2410c"),
}


def read_map(path: Path) -> tuple[np.ndarray, list[str], dict[str, Any], int]:
    """(layers, modules) mean SPS, the modules' names, the scan's metadata and its number of tokens."""
    with MscanReader(path) as scan:
        integral = scan.integral()
        sps = integral.sps / np.maximum(integral.count, 1)  # (blocks,) mean over tokens
        cells: dict[tuple[int, str], float] = {}
        for entry in scan.layout:
            inside = entry.name.partition("layers.")[2]
            if inside:
                layer, _, module = inside.partition(".")
                name = module.removesuffix(".weight").rpartition(".")[2]
                cells[int(layer), name] = float(sps[entry.base : entry.base + entry.blocks].mean())
        metadata, tokens = dict(scan.metadata), int(integral.count.max())
    modules = list(dict.fromkeys(name for _, name in cells))
    grid = np.full((max(layer for layer, _ in cells) + 1, len(modules)), np.nan)
    for (layer, name), value in cells.items():
        grid[layer, modules.index(name)] = value
    return grid, modules, metadata, tokens


def read_curves(path: Path) -> tuple[dict[str, list[tuple[float, float]]], tuple[float, float], dict[str, Any]]:
    """(mean key blocks, loss in nats) of each arm, those of the dense model, and the settings."""
    page = json.loads(path.read_text(encoding="utf-8"))
    curves: dict[str, list[tuple[float, float]]] = {}
    for arm, _, perplexity, blocks in page["rows"]:
        curves.setdefault(arm, []).append((blocks, math.log(perplexity)))
    return {arm: sorted(curves[arm]) for arm in LABELS}, curves["dense, unconverted"][0], page["settings"]


def draw(scan: Path, figures: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grid, modules, metadata, tokens = read_map(scan)
    curves, dense, settings = read_curves(figures)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=[1.15, 1])
    limit = np.nanpercentile(np.abs(grid), 99)
    image = left.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=left, label="mean SPS", extend="both")
    left.set_xticks(range(len(modules)), modules, rotation=30, ha="right", fontsize=8)
    left.set_ylabel("decoder layer")
    model = str(metadata["model"]).removesuffix("-Q4_1-float32")
    left.set_title(f"Scan: {model}, {tokens:,} tokens of {metadata['topic']}", fontsize=10)

    for arm, (label, marker, line, colour) in LABELS.items():
        right.plot(*zip(*curves[arm], strict=True), marker=marker, linestyle=line, color=colour, label=label, markersize=5)
    right.plot(*dense, marker="D", color="#1d4ed8", linestyle="none", label="dense attention, not tuned")
    right.set_xlabel(f"mean key blocks read by a query ({settings['tokens']:,} tokens)")
    right.set_ylabel("loss, nats a token")
    right.set_title("DynNSA: loss against key blocks read", fontsize=10)
    right.grid(alpha=0.3)
    right.legend(fontsize=8, frameon=False)
    figure.savefig(out, dpi=130, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, default=ROOT / "data/demo/python.mscan", help="scan of a decoder (default: the demo's)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/overview.png")
    arguments = parser.parse_args()
    if not arguments.scan.exists():
        parser.error(f"{arguments.scan} is not there; run `make demo` first, or name a scan with --scan")
    draw(arguments.scan, ROOT / "docs/dyn_nsa_budget.json", arguments.out)


if __name__ == "__main__":
    main()
