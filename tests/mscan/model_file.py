"""A writer of version 2 files, written from docs/mscan.md alone, and what a reader must find in them. Imports nothing of tinyonn."""

from __future__ import annotations

import json
import struct
from copy import copy
from dataclasses import dataclass, field

import numpy as np

LAYOUT, DATA, SEQUENCE, INTEGRAL, INDEX = range(1, 6)
WHOLE_FILE = 2**64 - 1


def _table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _table()


def crc(data: bytes, value: int = 0) -> int:
    value ^= 0xFFFFFFFF
    for byte in data:
        value = _CRC[(value ^ byte) & 255] ^ value >> 8
    return value ^ 0xFFFFFFFF


def up(size: int) -> int:
    return -(-size // 64) * 64


def padded(data: bytes) -> bytes:
    return data.ljust(up(len(data)), b"\0")


def fnv(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def decoded(codes: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """float32 values of log2u16 codes."""
    with np.errstate(over="ignore"):
        values = np.exp2(lo + (codes.astype(np.float64) - 1) * (hi - lo) / 65532).astype(np.float32)
    values[codes == 0] = 0
    values[codes == 65534] = np.inf
    values[codes == 65535] = np.nan
    return values


@dataclass(frozen=True)
class Entry:
    name: str
    out_features: int
    blocks: int


@dataclass(eq=False)
class Truth:
    """What a reader must give for one sequence; planes are (2, tokens, columns of its layout), integral is (6, columns)."""

    sequence_id: str
    token_ids: np.ndarray
    loss: np.ndarray
    mask: np.ndarray | None
    text: str | None
    planes: np.ndarray | None
    integral: np.ndarray | None


@dataclass
class Model:
    """A file as it grows. `pieces` are its parts in order: prologue with metadata, chunks, trailer."""

    uuid: bytes
    metadata: dict
    linked: bool = True  # False: as files were written before SEQUENCE named its chunks
    codec: str = "f32"
    zstd: bool = False
    chunk_tokens: int = 2  # tokens in a DATA chunk
    pieces: list[bytes] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)  # type of each piece, 0 for prologue and trailer
    truths: list[Truth] = field(default_factory=list)
    layouts: list[list[Entry]] = field(default_factory=list)
    totals: list[tuple[int, np.ndarray, bool]] = field(default_factory=list)  # sequences covered, (6, blocks), whether it has a link

    def __post_init__(self) -> None:
        text = json.dumps(self.metadata).encode()
        self.at = 64 + up(len(text))
        head = struct.pack("<5sHIIB16sIIQ12x", b"MSCAN", 2, len(text), 0xFFFFFFFF, 0, self.uuid, crc(text), 0, self.at)
        self.before = crc(head)
        self.pieces.append(head + struct.pack("<I", self.before) + padded(text))
        self.kinds.append(0)
        self.layout_places: list[int] = []
        self.layout_crc = 0
        self.total_at = 0
        self.entries: list[bytes] = []
        self.indexes: list[tuple[int, int]] = []  # place, first sequence listed

    def fork(self) -> Model:
        """A copy that can grow another way."""
        twin = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(twin, name, list(value))
        return twin

    def data(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def columns(self) -> int:
        return sum(entry.blocks for entry in self.layouts[-1])

    def _chunk(self, kind: int, payload: bytes, ordinal: int, *, codec: int = 0, flags: int = 0, at_40: int = 0, tokens: int = 0) -> int:
        fields = (self.uuid, kind, codec, flags, len(self.layouts) - 1, len(payload), ordinal, at_40, tokens, crc(payload), 0)
        head = struct.pack("<16sHBBIQQQIII", *fields)
        header_crc = crc(head)
        piece = head + struct.pack("<I", header_crc) + padded(payload)
        self.pieces.append(piece)
        self.kinds.append(kind)
        self.at += len(piece)
        return header_crc

    def _bond(self, group: int = 0) -> int:
        return group | (self.before or 1) << 32 if self.linked else 0

    def layout(self, added: list[Entry]) -> None:
        entries = [*(self.layouts[-1] if self.layouts else []), *added]
        names, rows, base = b"", b"", 0
        for entry in entries:
            name = entry.name.encode()
            rows += struct.pack("<QQQII", base, entry.blocks, entry.out_features, len(names), len(name))
            names, base = names + name, base + entry.blocks
        self.layouts.append(entries)
        self.layout_places.append(self.at)
        payload = struct.pack("<IIQQ40x", len(entries), 0, base, len(names)) + rows + names
        self.before = self.layout_crc = self._chunk(LAYOUT, payload, WHOLE_FILE, at_40=self._bond())

    def append(self, rng: np.random.Generator, name: str, tokens: int, *, planes: bool, missing: float, integral: bool, text: bool) -> None:
        ordinal, group = len(self.truths), self.at
        covered = crc(struct.pack("<I", self.layout_crc))
        parts, chunks = [], 0
        for first in range(0, tokens if planes else 0, self.chunk_tokens):
            count = min(self.chunk_tokens, tokens - first)
            values, header_crc = self._data(rng, ordinal, first, count, missing)
            parts.append(values)
            covered = crc(struct.pack("<I", header_crc), covered)
            chunks += 1
        summed, integral_at = None, 0
        if integral:
            integral_at, summed = self.at, rng.random((6, self.columns))
            covered = crc(struct.pack("<I", self._chunk(INTEGRAL, self._integral(summed), ordinal)), covered)
        mask = rng.integers(0, 2, tokens).astype(np.uint8) if ordinal % 2 else None
        words = f"text of {name} {rng.integers(1000):03}" if text else None
        truth = Truth(name, rng.integers(0, 50_000, tokens), rng.random(tokens, np.float32), mask, words, None, summed)
        truth.planes = np.concatenate(parts, axis=1) if parts else None
        raw, said = name.encode(), (words or "").encode()
        flags = (words is not None) | (mask is not None) << 1
        head = (tokens, group, integral_at, chunks, len(raw), len(said), flags, 0, fnv(raw), 0)
        payload = struct.pack("<QQQIIQIIQQ", *head) + padded(raw) + padded(truth.token_ids.astype("<u4").tobytes())
        payload += padded(truth.loss.astype("<f4").tobytes()) + (b"" if mask is None else padded(mask.tobytes())) + said
        self.entries.append(struct.pack("<QQQII", group, self.at, fnv(raw), tokens, chunks))
        self.before = self._chunk(SEQUENCE, payload, ordinal, at_40=self._bond(covered), tokens=tokens)
        self.truths.append(truth)

    def _data(self, rng: np.random.Generator, ordinal: int, first: int, tokens: int, missing: float) -> tuple[np.ndarray, int]:
        columns, width = self.columns, 4 if self.codec == "f32" else 2
        stored = rng.random((tokens, columns)) >= missing
        ranges, codes, planes = [0.0] * 4, [], []
        for p in range(2):
            if self.codec == "f32":
                plane = rng.lognormal(-3, 3, (tokens, columns)).astype("<f4")
                code = plane
            else:
                lo, hi = sorted(rng.uniform(-20, 4, 2))
                ranges[2 * p : 2 * p + 2] = lo, hi
                code = rng.integers(0, 65535, (tokens, columns)).astype("<u2")
                plane = decoded(code, lo, hi)
            plane[~stored] = np.nan
            if self.codec != "f32":
                code[~stored] = 65535
            codes.append(code)
            planes.append(plane)
        arrays: list[tuple[bytes, int]] = []
        sparse = missing > 0.5
        if sparse:
            rows = np.concatenate([[0], np.cumsum(stored.sum(axis=1))]).astype("<u8")
            arrays = [(rows.tobytes(), 8), (np.nonzero(stored)[1].astype("<u4").tobytes(), 4)]
        arrays += [((code[stored] if sparse else code).tobytes(), width) for code in codes]
        if self.zstd:
            arrays = [(np.frombuffer(raw, np.uint8).reshape(-1, size).T.tobytes(), size) for raw, size in arrays]
        region = b"".join(padded(raw) for raw, _ in arrays[:-1]) + arrays[-1][0]
        values = int(stored.sum()) if sparse else stored.size
        head = struct.pack("<4d4Q", *ranges, columns, values, len(region), 0)
        if self.zstd:
            import zstandard

            region = zstandard.ZstdCompressor().compress(region)
        flags = sparse | self.zstd << 1
        codec = {"log2u16": 1, "f32": 2}[self.codec]
        return np.stack(planes), self._chunk(DATA, head + region, ordinal, codec=codec, flags=flags, at_40=first, tokens=tokens)

    def _integral(self, planes: np.ndarray) -> bytes:
        parts = [plane.astype("<f8").tobytes() for plane in planes]
        return struct.pack("<Q56x", planes.shape[1]) + b"".join(padded(part) for part in parts[:-1]) + parts[-1]

    def total(self, rng: np.random.Generator) -> None:
        self.total_at, planes = self.at, rng.random((6, self.columns))
        self.totals.append((len(self.truths), planes, self.linked))
        self.before = self._chunk(INTEGRAL, self._integral(planes), WHOLE_FILE, at_40=self._bond())

    def index(self, *, anew: bool = False) -> None:
        """`anew`: lists every sequence and replaces the chain."""
        if anew:
            self.indexes.clear()
        prev, first = self.indexes[-1] if self.indexes else (0, 0)
        listed = self.entries[first:]
        tables = padded(b"".join(statistics(self.truths, self.layouts[-1])))
        tables += b"".join(struct.pack("<Q", place) for place in self.layout_places)
        counts = (len(self.layouts[-1]), len(self.layouts), 0, crc(tables), 0)
        head = struct.pack("<5Q5I", self.at, prev, first, len(listed), self.total_at, *counts)
        payload = padded(head + struct.pack("<I", crc(head)) + b"".join(listed)) + tables
        self.indexes.append((self.at, len(self.truths)))
        self.before = self._chunk(INDEX, payload, WHOLE_FILE, at_40=self._bond())

    def close(self) -> None:
        head = struct.pack("<8s16sQQQ12x", b"MSCANEND", self.uuid, self.indexes[-1][0], self.at, len(self.truths))
        self.pieces.append(head + struct.pack("<I", crc(head)))
        self.kinds.append(0)
        self.at += 64


def moments(values: np.ndarray) -> tuple[int, int, int, int, float, float]:
    values = values.ravel().astype(np.float64)
    finite = values[np.isfinite(values)]
    mean = float(finite.mean()) if finite.size else 0.0
    counts = (finite.size, int((values == 0).sum()), int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    return (*counts, mean, float(((finite - mean) ** 2).sum()))


def per_entry(truths: list[Truth], layout: list[Entry]) -> list[tuple[int, int, int, int, float, float]]:
    """Activation, then gradient, of each layout entry, over the planes of all sequences."""
    out, base = [], 0
    for entry in layout:
        for p in range(2):
            parts = [truth.planes[p, :, base : base + entry.blocks].ravel() for truth in truths if truth.planes is not None]
            out.append(moments(np.concatenate([np.empty(0), *parts])))
        base += entry.blocks
    return out


def statistics(truths: list[Truth], layout: list[Entry]) -> list[bytes]:
    return [struct.pack("<4Q2d", *values) for values in per_entry(truths, layout)]
