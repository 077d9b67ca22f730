"""Writes small version 2 files, one of each kind, for the fuzzer to start from: make_seeds.py FOLDER."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np

from tinyonn.mscan import Integral, LayoutEntry, MscanWriter, SequenceRecord

LAYOUT = [LayoutEntry("model.layers.0.a.weight", 128, 2, 0), LayoutEntry("model.layers.0.b.weight", 70, 2, 2)]


def record(rng: np.random.Generator, ordinal: int, tokens: int, missing: float) -> SequenceRecord:
    planes = rng.lognormal(-3, 2, (2, tokens, 4)).astype(np.float32)
    planes[:, rng.random((tokens, 4)) < missing] = np.nan
    planes[0, 0, 0] = 0.0
    integral = Integral(*rng.random((6, 4))) if ordinal % 2 else None
    mask = np.arange(tokens) % 2 if ordinal % 3 == 0 else None
    text = "ein Text" if ordinal % 2 == 0 else None
    return SequenceRecord(f"s{ordinal}", np.arange(tokens), rng.random(tokens), planes[0], planes[1], mask, text, integral)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    compressions = [None, "zstd"] if find_spec("zstandard") else [None]
    for codec, compression, missing in product(["log2u16", "f32"], compressions, [0.0, 0.9]):
        rng = np.random.default_rng(7)
        path = folder / f"{codec}-{compression}-{missing}.mscan"
        with MscanWriter(path, {"model": "tiny"}, LAYOUT, codec=codec, compression=compression, sync="none") as writer:
            for ordinal in range(3):
                writer.append(record(rng, ordinal, 1 + 3 * ordinal, missing))
            writer.append(SequenceRecord("bare", [1, 2], [0.5, np.nan]))
        whole = path.read_bytes()
        path.with_name(f"torn-{path.name}").write_bytes(whole[: len(whole) * 2 // 3])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
