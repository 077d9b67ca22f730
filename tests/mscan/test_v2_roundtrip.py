"""What is appended is what is read back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyonn.errors import InputError, MscanError
from tinyonn.mscan import Integral, LayoutEntry, MscanReader, MscanWriter, SequenceRecord

FLOAT_MAX = float(np.finfo(np.float32).max)
VALUES = st.one_of(
    st.sampled_from([0.0, np.nan, np.nan, np.inf, FLOAT_MAX, 2.0**-149, 1.0]),
    st.floats(0, FLOAT_MAX, width=32),
    st.floats(0.5, 2, width=32),
)
CODECS = [(codec, compression) for codec in ("log2u16", "f32") for compression in (None, "zstd")]
each_codec = pytest.mark.parametrize(("codec", "compression"), CODECS, ids=[f"{a}-{b or 'plain'}" for a, b in CODECS])


def layout_of(*blocks: int) -> list[LayoutEntry]:
    base, entries = 0, []
    for i, count in enumerate(blocks):
        entries.append(LayoutEntry(f"model.layers.{i}.w.weight", count * 64 - 3, count, base))
        base += count
    return entries


def assert_planes(found: tuple[np.ndarray, np.ndarray], record: SequenceRecord, codec: str) -> None:
    for got, wanted in zip(found, (record.activation, record.grad_norm), strict=True):
        assert got.dtype == np.float32
        if codec == "f32":
            np.testing.assert_array_equal(got, wanted)
            continue
        np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
        np.testing.assert_array_equal(got == 0, wanted == 0)
        np.testing.assert_allclose(got, wanted, rtol=1.6e-3, atol=2.0**-149)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[LayoutEntry], list[SequenceRecord]]:
    layout = layout_of(*draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    blocks = layout[-1].base + layout[-1].blocks
    records = []
    for i in range(draw(st.integers(0, 3))):
        tokens = draw(st.integers(1, 6))
        kind = draw(st.sampled_from(["any", "constant", "missing", "zero"]))
        fill = {"any": VALUES, "constant": st.just(draw(st.floats(2.0**-140, FLOAT_MAX, width=32)))}.get(
            kind, st.just(np.nan if kind == "missing" else 0.0)
        )
        planes = draw(hnp.arrays(np.float32, (2, tokens, blocks), elements=fill, fill=st.nothing()))
        ids = draw(hnp.arrays(np.int64, tokens, elements=st.integers(0, 2**32 - 1)))
        loss = draw(hnp.arrays(np.float32, tokens, elements=st.floats(width=32)))
        mask = draw(st.none() | hnp.arrays(np.uint8, tokens, elements=st.integers(0, 1)))
        name = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=70))
        text = draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
        records.append(SequenceRecord(f"{i}{name}", ids, loss, *planes, mask, text))
    return layout, records


@each_codec
@given(data=sequences())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_sequences_return(
    tmp_path: Path, codec: str, compression: str | None, data: tuple[list[LayoutEntry], list[SequenceRecord]]
) -> None:
    if compression:
        pytest.importorskip("zstandard")
    layout, records = data
    with MscanWriter(tmp_path / "a.mscan", {"n": len(records)}, layout, mode="w", codec=codec, compression=compression) as writer:
        assert [writer.append(record) for record in records] == list(range(len(records)))
    for recovery in ("strict", "tail", "salvage"):
        with MscanReader(tmp_path / "a.mscan", recovery=recovery) as reader:
            assert (reader.layout, reader.metadata, reader.report) == (layout, {"n": len(records)}, [])
            assert len(reader.sequences) == len(records)
            for i, (found, record) in enumerate(zip(reader.sequences, records, strict=True)):
                assert (found.sequence_id, found.text, found.ordinal) == (record.sequence_id, record.text, i)
                assert (found.num_tokens, found.has_records) == (len(record.token_ids), True)
                np.testing.assert_array_equal(found.token_ids, record.token_ids)
                np.testing.assert_array_equal(found.loss, record.loss)
                np.testing.assert_array_equal(found.mask, np.ones(len(record.token_ids)) if record.mask is None else record.mask)
                assert_planes(reader.planes(i), record, codec)
                assert reader.find(record.sequence_id) == i


def big_record(tokens: int, blocks: int, *, missing: float = 0.0, seed: int = 0) -> SequenceRecord:
    rng = np.random.default_rng(seed)
    planes = rng.lognormal(-3, 3, (2, tokens, blocks)).astype(np.float32)
    planes[:, rng.random((tokens, blocks)) < missing] = np.nan
    return SequenceRecord(f"s{seed}", np.arange(tokens), np.arange(tokens, dtype=np.float32), *planes)


@each_codec
@pytest.mark.parametrize("missing", [0.0, 0.4, 0.9, 1.0], ids=lambda m: f"missing-{m}")
def test_a_sequence_longer_than_a_chunk_returns(tmp_path: Path, codec: str, compression: str | None, missing: float) -> None:
    if compression:
        pytest.importorskip("zstandard")
    record = big_record(1500, 1001, missing=missing)
    with MscanWriter(tmp_path / "a.mscan", {}, layout_of(1000, 1), codec=codec, compression=compression) as writer:
        writer.append(record)
    with MscanReader(tmp_path / "a.mscan", recovery="strict") as reader:
        assert_planes(reader.planes(0), record, codec)
        chunks = reader.codes(0)
    assert len(chunks) == (2 if codec == "log2u16" else 3)
    assert [chunk.first_token for chunk in chunks] == list(np.cumsum([0, *(1047 if codec == "log2u16" else 523 for _ in chunks[:-1])]))
    assert all((chunk.rows is not None) == (missing >= 0.9) for chunk in chunks)


def test_sparse_planes_take_the_room_of_what_is_there(tmp_path: Path) -> None:
    record = big_record(200, 4000)
    record.activation[:, 250:] = np.nan
    record.grad_norm[:, 250:] = np.nan
    with MscanWriter(tmp_path / "a.mscan", {}, layout_of(4000)) as writer:
        writer.append(record)
    assert (tmp_path / "a.mscan").stat().st_size < 200 * 250 * 8 * 1.05
    with MscanReader(tmp_path / "a.mscan") as reader:
        assert_planes(reader.planes(0), record, "log2u16")


def test_a_block_missing_in_one_plane_only_stays_in_the_other(tmp_path: Path) -> None:
    record = big_record(64, 40, missing=0.95)
    record.activation[3, 7], record.grad_norm[3, 7] = 2.5, np.nan
    record.activation[4, 8], record.grad_norm[4, 8] = np.nan, 0.0
    with MscanWriter(tmp_path / "a.mscan", {}, layout_of(40)) as writer:
        writer.append(record)
    with MscanReader(tmp_path / "a.mscan") as reader:
        assert reader.codes(0)[0].rows is not None
        assert_planes(reader.planes(0), record, "log2u16")


@pytest.mark.parametrize("codec", ["log2u16", "f32"])
def test_codes_are_views_that_outlive_the_reader(tmp_path: Path, codec: str) -> None:
    record = big_record(9, 20)
    with MscanWriter(tmp_path / "a.mscan", {}, layout_of(20), codec=codec) as writer:
        writer.append(record)
    reader = MscanReader(tmp_path / "a.mscan")
    (chunk,) = reader.codes(0)
    planes = reader.planes(0)
    assert not chunk.activation.flags.owndata
    assert chunk.activation.ctypes.data % 64 == chunk.grad_norm.ctypes.data % 64 == 0
    reader.close()
    del reader
    gc.collect()
    (tmp_path / "a.mscan").unlink()
    with pytest.raises(ValueError, match="read-only"):
        chunk.activation[0, 0] = 1
    for stored, (lo, hi), plane in zip(chunk[1:3], chunk[3:5], planes, strict=True):
        values = stored if codec == "f32" else np.exp2(lo + (stored.astype(np.float64) - 1) * (hi - lo) / 65532)
        np.testing.assert_allclose(values, plane, rtol=1e-6)


def test_strided_other_typed_and_tensor_inputs_are_taken(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    planes = np.random.default_rng(0).random((8, 6), np.float64)
    records = [
        SequenceRecord(
            "strided", list(range(4)), [1, 2, 3, 4], planes[::2].astype("f")[:, ::2], planes[1::2, ::2], [True, False, True, False]
        ),
        SequenceRecord("tensor", torch.arange(4), torch.ones(4), torch.from_numpy(planes[:4, :3]), torch.from_numpy(planes[4:, 3:])),
        SequenceRecord("int32", np.arange(4, dtype=np.int32), np.zeros(4, "f2"), planes[:4, :3].T.copy().T, planes[4:, 3:].astype("f2")),
    ]
    with MscanWriter(tmp_path / "a.mscan", {}, layout_of(3), codec="f32") as writer:
        for record in records:
            writer.append(record)
    with MscanReader(tmp_path / "a.mscan") as reader:
        for i, record in enumerate(records):
            np.testing.assert_array_equal(reader.sequences[i].token_ids, np.arange(4))
            for got, wanted in zip(reader.planes(i), (record.activation, record.grad_norm), strict=True):
                np.testing.assert_array_equal(got, np.asarray(wanted).astype(np.float32))
        np.testing.assert_array_equal(reader.sequences[0].mask, [1, 0, 1, 0])


GOOD: dict[str, Any] = {
    "sequence_id": "a",
    "token_ids": [1, 2],
    "loss": [0.5, 0.5],
    "activation": np.ones((2, 3), "f"),
    "grad_norm": np.ones((2, 3), "f"),
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token_ids": [], "loss": [], "activation": None, "grad_norm": None}, "token_ids must hold 1"),
        ({"token_ids": [1, -1]}, r"token_ids must be 0 … 4294967295, got -1"),
        ({"token_ids": [1, 2**32]}, r"token_ids must be 0 … 4294967295, got 4294967296"),
        ({"token_ids": [1.5, 2]}, "token_ids must be a vector of integers"),
        ({"token_ids": [[1, 2]]}, "token_ids must be a vector of integers"),
        ({"loss": [1.0]}, r"loss must have shape \(2\), got \(1\)"),
        ({"loss": "x"}, "loss must be an array of real numbers"),
        ({"activation": np.ones((2, 4), "f")}, r"activation must have shape \(2, 3\), got \(2, 4\)"),
        ({"grad_norm": np.ones((3, 3), "f")}, r"grad_norm must have shape \(2, 3\), got \(3, 3\)"),
        ({"grad_norm": None}, "given both or neither"),
        ({"activation": -np.ones((2, 3), "f")}, "activation must not be negative"),
        ({"grad_norm": np.full((2, 3), -np.inf, "f")}, "grad_norm must not be negative"),
        ({"mask": [1]}, r"mask must have shape \(2\), got \(1\)"),
        ({"integral": Integral.zeros(4)}, r"integral.sps must have shape \(3\), got \(4\)"),
        ({"sequence_id": "x" * 65537}, "sequence_id must take at most 65536 bytes"),
        ({"sequence_id": 5}, "sequence_id must be a string, got int"),
        ({"sequence_id": "b\ud800"}, "sequence_id must be valid Unicode, got a lone surrogate at character 1"),
        ({"text": 5}, "text must be a string, got int"),
        ({"text": "\ud800"}, "text must be valid Unicode"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_record_is_named_and_leaves_no_trace(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with MscanWriter(tmp_path / "a.mscan", {}, layout_of(3)) as writer:
        writer.append(SequenceRecord(**GOOD))
        with pytest.raises(InputError, match=message):
            writer.append(SequenceRecord(**{**GOOD, "sequence_id": "b", **wrong}))
        assert set(writer.sequence_ids) == {"a"}
        writer.append(SequenceRecord(**{**GOOD, "sequence_id": "c"}))
    with MscanReader(tmp_path / "a.mscan", recovery="strict") as reader:
        assert [sequence.sequence_id for sequence in reader.sequences] == ["a", "c"]
        assert reader.stats().activation.count.tolist() == [12]


def test_planes_that_were_not_stored_are_named(tmp_path: Path) -> None:
    with MscanWriter(tmp_path / "a.mscan", {}, layout_of(3)) as writer:
        writer.append(SequenceRecord("a", [1, 2], [0.5, np.nan], integral=Integral.zeros(3)))
    with MscanReader(tmp_path / "a.mscan") as reader:
        assert not reader.sequences[0].has_records
        assert reader.codes(0) == []
        with pytest.raises(MscanError, match="sequence 0 must hold planes"):
            reader.planes(0)


def test_sequences_are_a_sequence(tmp_path: Path) -> None:
    with MscanWriter(tmp_path / "a.mscan", {}, layout_of(3)) as writer:
        for i in range(5):
            writer.append(SequenceRecord(str(i), [i], [0.0]))
    with MscanReader(tmp_path / "a.mscan") as reader:
        assert reader.sequences[-1].sequence_id == "4"
        assert [item.sequence_id for item in reader.sequences[1:4:2]] == ["1", "3"]
        assert [item.sequence_id for item in reader.sequences] == list("01234")
        for i in (5, -6):
            with pytest.raises(IndexError, match=f"sequence {i} of 5"):
                reader.sequences[i]
            with pytest.raises(IndexError, match=f"sequence {i} of 5"):
                reader.planes(i)
