"""Files of `model_file.py` and the ways in which the campaign of damage.py damages them."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from model_file import Entry, Model

METADATA = {"model": "tiny", "note": "x" * 90}
FAMILIES = 48


class Family:
    """A file, another that was copied from it and went on otherwise with the same lengths, and a stranger with a UUID of its own."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        compressed = seed % 5 == 4
        options = {
            "codec": ("f32", "log2u16")[seed % 2],
            "zstd": compressed,
            "linked": seed % 6 != 5,
            "chunk_tokens": int(rng.integers(1, 4)),
        }
        stem = Model(rng.bytes(16), METADATA, **options)
        stem.layout([Entry("layers.0.a.weight", 130, 3), Entry("layers.0.b.weight", 64, 1)])
        plan = [self._step(rng) for _ in range(int(rng.integers(3, 8)))]
        fork = int(rng.integers(0, len(plan)))
        ending = (rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.8)
        _grow(stem, np.random.default_rng(seed + 1000), plan[:fork])
        self.linked = stem.linked
        self.mixed = not stem.linked and seed % 12 == 11  # an old file that was gone on with
        self.models = []
        for twin in range(2):
            model = stem.fork()
            model.linked = model.linked or self.mixed
            _grow(model, np.random.default_rng(seed + 2000 + twin), plan[fork:], twin)
            total, anew, closed = ending
            own = np.random.default_rng(seed + 3000 + twin)
            if total:
                model.total(own)
            if closed:
                model.index(anew=anew)
                model.close()
            self.models.append(model)
        stranger = Model(rng.bytes(16), METADATA, **options)
        stranger.layout(stem.layouts[0])
        _grow(stranger, rng, plan[:2])
        self.stranger = stranger

    @staticmethod
    def _step(rng: np.random.Generator) -> tuple[str, dict]:
        kind = rng.choice(["append", "append", "append", "append", "index", "layout", "total"])
        shape = {"tokens": int(rng.integers(1, 7)), "planes": rng.random() < 0.85, "missing": float(rng.choice([0.0, 0.2, 0.8]))}
        return str(kind), {**shape, "integral": rng.random() < 0.8, "text": rng.random() < 0.5}


def _grow(model: Model, rng: np.random.Generator, plan: list[tuple[str, dict]], twin: int = 0) -> None:
    for kind, shape in plan:
        if kind == "append":
            # Sparse chunks of two copies must be equally long for a splice: where they are not, it lands inside one, which is fine too.
            model.append(rng, f"s{len(model.truths)}" if rng.random() < 0.8 else f"{'st'[twin]}{len(model.truths)}", **shape)
        elif kind == "layout":
            model.layout([Entry(f"more.{'ab'[twin]}{len(model.layouts)}.weight", 100, 2)])
        elif kind == "total":
            model.total(rng)
        elif not model.indexes or model.truths:
            model.index(anew=shape["text"])


# Ways to damage a file. Each takes a random source and a family and returns the pieces of the file, which `join` makes bytes.
Pieces = list[bytes]


def _flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray) -> None:
    size = min(len(data), rng.choice((1, 8, 64, 64, 200, 512, 2000)))
    at = rng.randrange(len(data) - size + 1)
    at = at // 64 * 64 if rng.random() < 0.5 else at
    source = rng.randrange(len(data) - size + 1) // 64 * 64
    data[at : at + size] = rng.choice((bytes(size), rng.randbytes(size), bytes(data[source : source + size])))


def _cut(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at // 64 * 64 if rng.random() < 0.5 else at :]


def _remove_range(rng: random.Random, data: bytearray) -> None:
    at, size = rng.randrange(len(data)), rng.choice((1, 12, 64, 128, 640))
    if rng.random() < 0.6:
        at, size = at // 64 * 64, (size + 63) // 64 * 64
    del data[at : at + size]


def _insert_range(rng: random.Random, data: bytearray) -> None:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 64, 64, 192))
    at = at // 64 * 64
    source = rng.randrange(len(data)) // 64 * 64
    data[at:at] = rng.choice((rng.randbytes(size), bytes(size), bytes(data[source : source + size])))


def _reorder(rng: random.Random, pieces: Pieces) -> None:
    if rng.random() < 0.3:
        middle = pieces[1:]
        rng.shuffle(middle)
        pieces[1:] = middle
        return
    a = rng.randrange(1, len(pieces))
    b = a + 1 if rng.random() < 0.5 and a + 1 < len(pieces) else rng.randrange(1, len(pieces))
    pieces[a], pieces[b] = pieces[b], pieces[a]


def _duplicate(rng: random.Random, pieces: Pieces) -> None:
    a = rng.randrange(1, len(pieces))
    run = pieces[a : a + rng.choice((1, 1, 2, 3, 6))]
    at = a + len(run) if rng.random() < 0.5 else rng.randrange(1, len(pieces) + 1)
    pieces[at:at] = run


def _delete(rng: random.Random, pieces: Pieces) -> None:
    a = rng.randrange(1, len(pieces))
    del pieces[a : a + rng.choice((1, 1, 2, 3))]


def _splice(rng: random.Random, family: Family, first: int) -> Pieces:
    """Parts of both copies: cut at a chunk, at a byte, or chosen chunk by chunk."""
    a, b = family.models[first], family.models[1 - first]
    how = rng.randrange(4)
    if how == 0:
        at = rng.randrange(max(len(a.data()), 1))
        return [a.data()[:at] + b.data()[at:]]
    if how == 1:
        at = rng.randrange(1, max(2, min(len(a.pieces), len(b.pieces))))
        return a.pieces[:at] + b.pieces[at:]
    if how == 2:  # one run of chunks
        at = rng.randrange(1, len(a.pieces))
        end = at + rng.choice((1, 1, 2, 4))
        return a.pieces[:at] + b.pieces[at:end] + a.pieces[end:]
    return [rng.choice((x, y)) for x, y in zip(a.pieces, b.pieces, strict=False)]


def _stranger(rng: random.Random, family: Family, pieces: Pieces) -> None:
    a = rng.randrange(1, len(family.stranger.pieces))
    at = rng.randrange(1, len(pieces) + 1)
    pieces[at : at + rng.choice((0, 1))] = family.stranger.pieces[a : a + rng.choice((1, 3))]


BYTES: dict[str, Callable[[random.Random, bytearray], None]] = {
    "bit flip": _flip,
    "overwrite": _overwrite,
    "cut": _cut,
    "remove bytes": _remove_range,
    "insert bytes": _insert_range,
}
CHUNKS: dict[str, Callable[[random.Random, Pieces], None]] = {"reorder": _reorder, "duplicate": _duplicate, "delete": _delete}
KINDS = ("none", "splice", "splice", "stranger", *BYTES, *CHUNKS, "two")


def damaged(seed: int, family: Family) -> tuple[str, bytes, list[Model]]:
    """The kind of damage, the file, and the models one of which is the truth."""
    rng = random.Random(seed)
    first = rng.randrange(2)
    kind = rng.choices(KINDS, [1 if kind == "none" else 10 for kind in KINDS])[0]
    truths = [family.models[first]]
    pieces = list(family.models[first].pieces)
    steps = rng.sample([*BYTES, *CHUNKS, "splice"], 2) if kind == "two" else [kind]
    steps.sort(key=lambda step: (step != "splice", step in BYTES))  # pieces before bytes
    if "splice" in steps:
        if not family.linked:  # what docs/mscan.md says that the old revision does not notice
            steps = ["cut" if step == "splice" else step for step in steps]
        else:
            truths = family.models
            pieces = _splice(rng, family, first)
    data = bytearray(b"".join(pieces))
    for step in steps:
        if step in CHUNKS and len(pieces) > 2:
            CHUNKS[step](rng, pieces)
            data = bytearray(b"".join(pieces))
        elif step == "stranger":
            _stranger(rng, family, pieces)
            data = bytearray(b"".join(pieces))
        elif step in BYTES and data:
            BYTES[step](rng, data)
    name = kind if kind != "two" else " + ".join(sorted(steps))
    return name, bytes(data), list(truths)
