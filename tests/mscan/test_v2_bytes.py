"""Files of version 2 read by a reader written from docs/mscan.md alone, with struct and zlib-free arithmetic: the oracle of the bytes."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyonn.mscan import Integral, LayoutEntry, MscanWriter, SequenceRecord

LAYOUT = [LayoutEntry("model.layers.0.q.weight", 130, 3, 0), LayoutEntry("lm_héad.weight", 64, 1, 3)]


def crc(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def up(value: int) -> int:
    return -(-value // 64) * 64


def fnv(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def read_chunks(data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Metadata, chunks and trailer, every checksum and every padding checked."""
    magic, version, length, count, zero, uuid, meta_crc, zero2, first = struct.unpack_from("<5sHIIB16sIIQ", data)
    assert (magic, version, count, zero, zero2) == (b"MSCAN", 2, 0xFFFFFFFF, 0, 0)
    assert data[48:60] == bytes(12)
    assert struct.unpack_from("<I", data, 60)[0] == crc(data[:60])
    assert meta_crc == crc(data[64 : 64 + length])
    assert first == up(64 + length)
    assert not any(data[64 + length : first])
    chunks, at = [], first
    while data[at : at + 8] != b"MSCANEND":
        fields = struct.unpack_from("<16sHBBIQQQIIII", data, at)
        names = ("uuid", "type", "codec", "flags", "layout", "length", "ordinal", "first", "tokens", "crc", "zero", "header_crc")
        chunk: dict[str, Any] = dict(zip(names, fields, strict=True))
        assert chunk["uuid"] == uuid
        assert chunk["zero"] == 0
        assert chunk["header_crc"] == crc(data[at : at + 60])
        chunk["payload"] = data[at + 64 : at + 64 + chunk["length"]]
        assert chunk["crc"] == crc(chunk["payload"])
        chunk["at"], at = at, at + 64 + up(chunk["length"])
        assert not any(data[chunk["at"] + 64 + chunk["length"] : at])
        chunks.append(chunk)
    check_bonds(chunks, struct.unpack_from("<I", data, 60)[0])
    trailer = dict(zip(("magic", "uuid", "index", "self", "sequences"), struct.unpack_from("<8s16sQQQ", data, at), strict=True))
    assert trailer["uuid"] == uuid
    assert trailer["self"] == at == len(data) - 64
    assert data[at + 48 : at + 60] == bytes(12)
    assert struct.unpack_from("<I", data, at + 60)[0] == crc(data[at : at + 60])
    return json.loads(data[64 : 64 + length]), chunks, trailer


def check_bonds(chunks: list[dict[str, Any]], before: int) -> None:
    """Every chunk that commits names the one before it, a SEQUENCE also its layout and the chunks of its group."""
    layout, group = 0, b""
    for chunk in chunks:
        own = struct.pack("<I", chunk["header_crc"])
        if chunk["type"] == 2 or (chunk["type"] == 4 and chunk["ordinal"] != 2**64 - 1):
            group += own
            continue
        covered = crc(struct.pack("<I", layout) + group) if chunk["type"] == 3 else 0
        assert chunk["first"] == covered | (before or 1) << 32
        before, group = chunk["header_crc"], b""
        layout = before if chunk["type"] == 1 else layout


def unshuffle(raw: bytes, at: int, count: int, width: int) -> bytes:
    planes = [raw[at + byte * count : at + (byte + 1) * count] for byte in range(width)]
    return bytes(planes[byte][i] for i in range(count) for byte in range(width))


def value_of(code: int, lo: float, hi: float) -> float:
    if code in (0, 65534, 65535):
        return {0: 0.0, 65534: math.inf, 65535: math.nan}[code]
    return float(np.float32(2.0 ** (lo + (code - 1) * (hi - lo) / 65532)))


def read_planes(chunk: dict[str, Any]) -> np.ndarray:
    """(2, tokens, columns) of a DATA chunk, NaN where it stores nothing."""
    payload = chunk["payload"]
    ranges = struct.unpack_from("<4d", payload)
    columns, values, raw_length, zero = struct.unpack_from("<4Q", payload, 32)
    assert zero == 0
    width = {1: 2, 2: 4}[chunk["codec"]]
    sparse, packed = chunk["flags"] & 1, chunk["flags"] & 2
    tokens = chunk["tokens"]
    arrays = [(tokens + 1, 8), (values, 4)] if sparse else []
    arrays += [(values, width), (values, width)]
    starts = [0]
    for count, size in arrays[:-1]:
        starts.append(starts[-1] + up(count * size))
    assert raw_length == starts[-1] + values * width
    raw = payload[64:]
    if packed:
        raw = pytest.importorskip("zstandard").ZstdDecompressor().decompress(raw)
    assert len(raw) == raw_length
    parts = [
        unshuffle(raw, start, *array) if packed else raw[start : start + array[0] * array[1]]
        for start, array in zip(starts, arrays, strict=True)
    ]
    rows = struct.unpack(f"<{tokens + 1}Q", parts[0]) if sparse else tuple(range(0, values + 1, columns))
    ids = struct.unpack(f"<{values}I", parts[1]) if sparse else tuple(range(columns)) * tokens
    out = np.full((2, tokens, columns), np.nan, np.float32)
    for p in range(2):
        stored = struct.unpack(f"<{values}{'H' if width == 2 else 'f'}", parts[-2 + p])
        lo, hi = ranges[2 * p : 2 * p + 2]
        for token in range(tokens):
            for i in range(rows[token], rows[token + 1]):
                out[p, token, ids[i]] = value_of(stored[i], lo, hi) if width == 2 else stored[i]
    return out


def write(path: Path, records: list[SequenceRecord], **options: Any) -> bytes:
    with MscanWriter(path, {"modèle": "x"}, LAYOUT, **options) as writer:
        for record in records:
            writer.append(record)
        writer.append_integral(integral(9))
    return path.read_bytes()


def integral(seed: int) -> Integral:
    return Integral(*np.random.default_rng(seed).random((6, 4)))


def record(seed: int, tokens: int, *, missing: float = 0.0, text: str | None = None, marked: bool = False) -> SequenceRecord:
    rng = np.random.default_rng(seed)
    planes = rng.lognormal(-4, 3, (2, tokens, 4)).astype(np.float32)
    planes[:, rng.random((tokens, 4)) < missing] = np.nan
    planes[0, 0, 0], planes[1, -1, -1] = 0.0, np.inf
    mask = np.arange(tokens) % 2 if marked else None
    return SequenceRecord(
        f"séq {seed}", rng.integers(0, 2**32, tokens), rng.random(tokens, np.float32), *planes, mask, text, integral(seed)
    )


@pytest.mark.parametrize("codec", ["log2u16", "f32"])
@pytest.mark.parametrize("compression", [None, "zstd"], ids=["plain", "zstd"])
@pytest.mark.parametrize("missing", [0.1, 0.95], ids=["dense", "sparse"])
def test_bytes_are_those_of_the_format(tmp_path: Path, codec: str, compression: str | None, missing: float) -> None:
    if compression:
        pytest.importorskip("zstandard")
    records = [record(1, 1, text="dé"), record(2, 70, missing=missing, marked=True), record(3, 33)]
    metadata, chunks, trailer = read_chunks(write(tmp_path / "a.mscan", records, codec=codec, compression=compression))
    assert metadata == {"modèle": "x"}
    assert [chunk["type"] for chunk in chunks] == [1, 2, 4, 3, 2, 4, 3, 2, 4, 3, 4, 5]
    assert trailer["sequences"] == 3
    assert trailer["index"] == chunks[-1]["at"]

    entries, zero, blocks, names = struct.unpack_from("<IIQQ", chunks[0]["payload"])
    table = chunks[0]["payload"][64 + 32 * entries :]
    assert (entries, zero, blocks, names) == (2, 0, 4, len(table))
    for i, entry in enumerate(LAYOUT):
        base, count, features, at, length = struct.unpack_from("<QQQII", chunks[0]["payload"], 64 + 32 * i)
        assert LayoutEntry(table[at : at + length].decode(), features, count, base) == entry

    for i, wanted in enumerate(records):
        data, total, sequence = chunks[1 + 3 * i : 4 + 3 * i]
        assert {data["ordinal"], total["ordinal"], sequence["ordinal"]} == {i}
        assert bool(data["flags"] & 1) == (i == 1 and missing > 0.9)
        tolerance = {"rtol": 2e-3} if codec == "log2u16" else {"rtol": 0}
        np.testing.assert_allclose(read_planes(data), np.stack([wanted.activation, wanted.grad_norm]), **tolerance)
        check_sequence(sequence, wanted, data["at"], total["at"])
        assert struct.unpack_from("<8Q", total["payload"]) == (4, 0, 0, 0, 0, 0, 0, 0)
        for p, plane in enumerate(wanted.integral.planes()):
            np.testing.assert_array_equal(struct.unpack_from("<4d", total["payload"], 64 + 64 * p), plane)
    assert chunks[-2]["ordinal"] == 2**64 - 1
    check_index(chunks, records)


def check_sequence(chunk: dict[str, Any], wanted: SequenceRecord, group: int, total: int) -> None:
    payload, name, count = chunk["payload"], wanted.sequence_id.encode(), len(wanted.token_ids)
    text = (wanted.text or "").encode()
    flags = (wanted.text is not None) + 2 * (wanted.mask is not None)
    head = struct.unpack_from("<QQQIIQIIQQ", payload)
    assert head == (count, group, total, 1, len(name), len(text), flags, 0, fnv(name), 0)
    at = 64
    assert payload[at : at + len(name)] == name
    at += up(len(name))
    assert struct.unpack_from(f"<{count}I", payload, at) == tuple(wanted.token_ids)
    at += up(4 * count)
    np.testing.assert_array_equal(np.array(struct.unpack_from(f"<{count}f", payload, at), np.float32), wanted.loss)
    at += up(4 * count)
    if wanted.mask is not None:
        assert list(payload[at : at + count]) == list(wanted.mask)
        at += up(count)
    assert payload[at:] == text


def check_index(chunks: list[dict[str, Any]], records: list[SequenceRecord]) -> None:
    payload = chunks[-1]["payload"]
    own, before, first, count, total, entries, layouts, level, tables, zero, head = struct.unpack_from("<5Q6I", payload)
    assert (own, before, first, count, total) == (chunks[-1]["at"], 0, 0, 3, chunks[-2]["at"])
    assert (entries, layouts, level, zero, head) == (2, 1, 0, 0, crc(payload[:60]))
    for i, wanted in enumerate(records):
        group, at, key, tokens, data = struct.unpack_from("<QQQII", payload, 64 + 32 * i)
        assert (group, at) == (chunks[1 + 3 * i]["at"], chunks[3 + 3 * i]["at"])
        assert (key, tokens, data) == (fnv(wanted.sequence_id.encode()), len(wanted.token_ids), 1)
    stats = up(64 + 32 * 3)
    assert tables == crc(payload[stats:])
    assert struct.unpack_from("<Q", payload, up(stats + 96 * 2)) == (chunks[0]["at"],)
    assert len(payload) == up(stats + 96 * 2) + 8
    for i, entry in enumerate(LAYOUT):
        for p in range(2):
            planes = [(wanted.activation, wanted.grad_norm)[p][:, entry.base : entry.base + entry.blocks] for wanted in records]
            values = np.concatenate([plane.ravel() for plane in planes]).astype(np.float64)
            finite = values[np.isfinite(values)]
            found = struct.unpack_from("<4Q2d", payload, stats + 96 * i + 48 * p)
            assert found[:4] == (finite.size, (values == 0).sum(), np.isnan(values).sum(), np.isinf(values).sum())
            np.testing.assert_allclose(found[4:], [finite.mean(), ((finite - finite.mean()) ** 2).sum()], rtol=1e-9)


def test_a_sequence_without_planes_or_integral_is_its_own_group(tmp_path: Path) -> None:
    with MscanWriter(tmp_path / "a.mscan", {}, LAYOUT) as writer:
        writer.append(SequenceRecord("a", [7], [math.nan]))
    _, chunks, _ = read_chunks((tmp_path / "a.mscan").read_bytes())
    assert [chunk["type"] for chunk in chunks] == [1, 3, 5]
    assert struct.unpack_from("<QQQI", chunks[1]["payload"]) == (1, chunks[1]["at"], 0, 0)
