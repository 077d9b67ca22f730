"""Draws the README's picture, docs/overview.png.

    make demo DEMO_ARGS="--limit 24 --max-length 128"     scans SmolLM2-135M-Instruct into data/demo/python.mscan
    .venv/bin/python benchmarks/readme_picture.py         --scan FILE for another scan

Left: mean SPS (synergistic prediction score) of each weight of each decoder layer, from the scan. Right: loss over dense attention against
the number of key blocks read, from docs/studies/selection.json, the output of benchmarks/studies/selection.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from tinyonn.mscan import MscanReader

ROOT = Path(__file__).resolve().parent.parent
LABELS = {
    "top-n, mean keys": ("fixed number of blocks", "o", "-", "#8a8f98"),
    "n per head, mean keys": ("fixed number for each head", "o", ":", "#8a8f98"),
    "price and lines, mean keys": ("DynNSA", "s", "-", "#e07a3f"),
    "price and lines, distilled keys": ("DynNSA, distilled keys", "s", "-", "#c2410c"),
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


def read_curves(path: Path) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """(mean key blocks, loss over dense attention in nats) of each arm, each a mean over texts, and the number of tokens of a text."""
    page = json.loads(path.read_text(encoding="utf-8"))
    curves = {}
    for arm in LABELS:
        rows = [
            [page["cells"][f"{arm} | {text} | {budget}"] for text in page["settings"]["texts"]] for budget in page["settings"]["budgets"]
        ]
        curves[arm] = [(fmean(cell["blocks"] for cell in row), fmean(cell["excess"] for cell in row)) for row in rows]
    return curves, page["settings"]["tokens"]


def draw(scan: Path, figures: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grid, modules, metadata, tokens = read_map(scan)
    curves, length = read_curves(figures)
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
    right.set_ylim(bottom=0)
    right.set_xlabel(f"mean key blocks read by a query ({length:,} tokens)")
    right.set_ylabel("loss over dense attention, nats per token")
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
    draw(arguments.scan, ROOT / "docs/studies/selection.json", arguments.out)


if __name__ == "__main__":
    main()
