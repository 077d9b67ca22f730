"""Version 1 files, written here with struct alone: healthy, damaged, and as their several writers left them."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from tinyonn.errors import InputError, MscanError
from tinyonn.mscan.reader import MscanReader
from tinyonn.mscan.v1.reader import V1Reader
from tinyonn.mscan.v1.sums import integrate

NAMES = {"0": "lm_head", "3": "model.layers.10.mlp.up_proj", "7": "model.layers.2.mlp.up_proj"}
BLOCKS = {0: 2, 3: 3, 7: 1}
COLUMN = {7: 0, 3: 1, 0: 4}  # layers in numerical order, then what is outside any layer
SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "v1-sample.mscan"


def head(metadata: dict, count: int) -> bytes:
    text = json.dumps(metadata, indent=2).encode()
    return struct.pack("<5sHII", b"MSCAN", 1, 15 + len(text), count) + text


def rows(num_tokens: int, first: int = 0) -> list[tuple[int, int, int, int, int]]:
    return [
        (first + t, param, block, 100 * (first + t) + 10 * param + block, 65535 - (first + t) * block)
        for t in range(num_tokens)
        for param, blocks in BLOCKS.items()
        for block in range(blocks)
    ]


def pack(records: list[tuple[int, int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("<IHHHH", *record) for record in records)


def meta(*num_tokens: int) -> dict:
    listed = [{"sequence_id": i, "num_tokens": n, "source": f"text {i}"} for i, n in enumerate(num_tokens)]
    return {"format_version": "1.1", "model_name": "tiny", "id_to_param_name_map": NAMES, "sequences": listed}


def overwritten(metadata: dict, records: bytes) -> bytes:
    """What the writer leaves that writes its longer, final header over the first records."""
    first = head({key: value for key, value in metadata.items() if key != "sequences"}, 0) + records
    last = head(metadata, len(records) // 12)
    return last + first[len(last) :]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scan.mscan"


def test_planes_hold_every_record_in_its_place(path: Path) -> None:
    path.write_bytes(head(meta(2, 3), 30) + pack(rows(5)))
    with V1Reader(path, recovery="strict") as reader:
        assert [(s.sequence_id, s.num_tokens, s.text, s.has_records) for s in reader.sequences] == [
            ("0", 2, "text 0", True),
            ("1", 3, "text 1", True),
        ]
        assert [(e.name, e.base, e.blocks) for e in reader.layout] == [(NAMES[str(p)], COLUMN[p], BLOCKS[p]) for p in (7, 3, 0)]
        for sequence, first in ((0, 0), (1, 2)):
            activation, grad_norm = reader.planes(sequence)
            expected = np.full((2, len(activation), 6), np.nan, np.float32)
            for t, param, block, a, g in rows(len(activation), first):
                expected[:, t - first, COLUMN[param] + block] = a, g
            np.testing.assert_array_equal(np.stack([activation, grad_norm]), expected)
            assert not np.isnan(expected).any()
        assert reader.report == []
        assert not any("not a measurement" in note for note in reader.metadata["version_1_notes"])


def test_a_header_length_without_the_prologue_is_understood(path: Path) -> None:
    data = head(meta(5), 30) + pack(rows(5))
    length = struct.unpack_from("<I", data, 7)[0]
    path.write_bytes(data[:7] + struct.pack("<I", length - 15) + data[11:])
    with V1Reader(path, recovery="strict") as reader:
        assert reader.records(0).tolist() == rows(5)


def test_records_without_listed_sequences_are_one_sequence(path: Path) -> None:
    metadata = meta()
    del metadata["sequences"]
    path.write_bytes(head(metadata, 30) + pack(rows(5)))
    with V1Reader(path) as reader:
        assert [(s.sequence_id, s.num_tokens) for s in reader.sequences] == [("0", 5)]


def test_the_general_reader_opens_version_1_as_its_own_kind(path: Path) -> None:
    path.write_bytes(head(meta(2, 3), 30) + pack(rows(5)))
    with MscanReader(path, recovery="strict") as reader:
        assert isinstance(reader, V1Reader)
        assert isinstance(reader, MscanReader)
        assert (reader.version, reader.recovery, len(reader)) == (1, "strict", 2)


def test_missing_records_are_nan_and_never_zero(path: Path) -> None:
    path.write_bytes(head(meta(2), 1) + pack([(1, 3, 2, 0, 0)]))
    with V1Reader(path) as reader:
        activation, grad_norm = reader.planes(0)
        assert activation.shape == (2, 3)
        assert activation[1, 2] == 0
        assert grad_norm[1, 2] == 0
        assert np.isnan(activation).sum() == np.isnan(grad_norm).sum() == 5
        assert any("not a measurement" in note for note in reader.metadata["version_1_notes"])


def test_a_file_without_records_opens(path: Path) -> None:
    path.write_bytes(head({"model_name": "x"}, 0))
    with V1Reader(path, recovery="strict") as reader:
        assert (len(reader.sequences), reader.layout) == (0, [])


@pytest.mark.parametrize("num_tokens", [(5,), (2, 3)], ids=["one sequence", "two sequences"])
def test_an_overwritten_header_costs_the_records_beneath_it(path: Path, num_tokens: tuple[int, ...]) -> None:
    data = overwritten(meta(*num_tokens), pack(rows(5)))
    path.write_bytes(data)
    for recovery in ("strict", "tail"):
        with pytest.raises(MscanError, match=r"longer header was written over the first \d+ of 30 records"):
            V1Reader(path, recovery=recovery)
    grown = len(head(meta(*num_tokens), 0)) - len(head({k: v for k, v in meta().items() if k != "sequences"}, 0))
    lost = math.ceil(grown / 12)
    with V1Reader(path, recovery="salvage") as reader:
        assert reader.report == [f"a longer header was written over the first {lost} of 30 records"]
        assert [tuple(r) for i in range(len(num_tokens)) for r in reader.records(i).tolist()] == rows(5)[lost:]
        activation = np.concatenate([reader.planes(i)[0] for i in range(len(num_tokens))])
        assert np.isnan(activation).sum() == lost


def test_a_writer_killed_before_close_is_salvaged_whole(path: Path) -> None:
    metadata = {"model_name": "tiny", "id_to_param_name_map": NAMES}
    path.write_bytes(head(metadata, 0) + pack(rows(5)) + b"\x01\x02")
    with pytest.raises(MscanError, match="must end after its 0 records"):
        V1Reader(path, recovery="strict")
    with V1Reader(path) as reader:
        assert len(reader.sequences) == 0
        assert "362 bytes follow" in reader.report[0]
    with V1Reader(path, recovery="salvage") as reader:
        assert reader.records(0).tolist() == rows(5)
        assert "all are read" in reader.report[0]


@pytest.mark.parametrize("recovery", ["strict", "tail", "salvage"])
def test_every_truncation_gives_a_prefix_of_the_records_or_an_error(path: Path, recovery: str) -> None:
    data = head(meta(2, 3), 30) + pack(rows(5))
    begin = len(data) - 360
    for size in range(len(data)):
        path.write_bytes(data[:size])
        if size < begin or recovery == "strict":
            with pytest.raises(MscanError):
                V1Reader(path, recovery=recovery)
            continue
        with V1Reader(path, recovery=recovery) as reader:
            kept = [tuple(r) for i in range(2) for r in reader.records(i).tolist()]
            assert kept == rows(5)[: (size - begin) // 12]
            assert f"{30 - len(kept)} records before the 30" in reader.report[0]


def test_every_flipped_bit_gives_an_error_or_planes_of_the_promised_shape(path: Path) -> None:
    data = bytearray(head(meta(2, 3), 30) + pack(rows(5)))
    outcomes = set()
    for byte in range(len(data)):
        for bit in (0x01, 0x80):
            data[byte] ^= bit
            path.write_bytes(data)
            data[byte] ^= bit
            for recovery in ("strict", "salvage"):
                try:
                    with V1Reader(path, recovery=recovery) as reader:
                        for sequence in reader.sequences:
                            assert reader.planes(sequence.ordinal)[0].shape[0] == sequence.num_tokens
                        outcomes.add("read")
                except MscanError:
                    outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param({"id_to_param_name_map": {"70000": "a"}}, "ids 0 … 65535", id="id too large"),
        pytest.param({"id_to_param_name_map": {"0": "a", "1": "a"}}, "every parameter once", id="name twice"),
        pytest.param({"sequences": {"a": 1}}, "sequences must be a list", id="sequences not a list"),
        pytest.param({"sequences": [{"num_tokens": -1}]}, "num_tokens of sequence 0", id="negative length"),
        pytest.param({"sequences": [{"num_tokens": 10**30}]}, "num_tokens of sequence 0", id="absurd length"),
        pytest.param(
            {"sequences": [{"num_tokens": 4}]}, "byte [0-9]+: token_idx must be below the 4 tokens", id="token beyond the sequences"
        ),
        pytest.param(
            {"id_to_param_name_map": {"0": "a", "3": "b"}}, "param_id must be a key of id_to_param_name_map, got 7", id="unnamed parameter"
        ),
    ],
)
def test_metadata_that_contradicts_the_records_is_refused(path: Path, change: dict, match: str) -> None:
    path.write_bytes(head({**meta(5), **change}, 30) + pack(rows(5)))
    with pytest.raises(MscanError, match=match):
        V1Reader(path)


def test_salvage_leaves_out_records_that_name_nothing_and_says_how_many(path: Path) -> None:
    path.write_bytes(head(meta(5), 32) + pack(rows(5)[:7] + [(0, 9, 0, 1, 1), (77, 3, 0, 1, 1)] + rows(5)[7:]))
    with V1Reader(path, recovery="salvage") as reader:
        assert reader.report == ["2 records of a parameter or token that does not exist"]
        assert reader.records(0).tolist() == rows(5)


@pytest.mark.parametrize("tokens", [1 << 24, 1 << 20], ids=["2^24", "2^20"])
def test_planes_that_would_dwarf_their_records_are_refused(path: Path, tokens: int) -> None:
    path.write_bytes(head(meta(tokens), 6) + pack(rows(1)))
    with V1Reader(path) as reader, pytest.raises(MscanError, match="must fill more of its"):
        reader.planes(0)


def test_two_records_of_one_place_are_refused_by_name(path: Path) -> None:
    path.write_bytes(head(meta(2), 13) + pack(rows(2) + [(1, 3, 2, 5, 5)]))
    with V1Reader(path) as reader, pytest.raises(MscanError, match="several of token 1, parameter 3, block 2"):
        reader.planes(0)


def test_deeply_nested_metadata_is_refused(path: Path) -> None:
    text = b"[" * 200_000
    path.write_bytes(struct.pack("<5sHII", b"MSCAN", 1, 15 + len(text), 0) + text)
    with pytest.raises(MscanError, match="metadata must be JSON"):
        V1Reader(path)


def test_truncation_by_another_process_is_an_error_and_no_signal(path: Path) -> None:
    path.write_bytes(head(meta(5), 30) + pack(rows(5)))
    with V1Reader(path) as reader:
        os.truncate(path, 400)
        with pytest.raises(MscanError, match="truncated while open"):
            reader.planes(0)


def test_recovery_must_be_known(path: Path) -> None:
    path.write_bytes(head(meta(), 0))
    with pytest.raises(InputError, match="recovery must be one of strict, tail, salvage, got 'hope'"):
        V1Reader(path, recovery="hope")


def test_integral_is_the_sum_of_z_differences() -> None:
    rng = np.random.default_rng(0)
    planes = rng.uniform(0.5, 2.0, (2, 4, 5)).astype(np.float32)
    planes[:, 1, 2] = np.nan
    planes[0, 2, 3:] = 7.0  # a constant group has z = 0
    result = integrate(*planes, np.array([0, 3, 5]))
    expected = [0.0] * 5
    for token in range(4):
        for group in (range(3), range(3, 5)):
            for plane, sign in ((planes[0], 1), (planes[1], -1)):
                there = [float(plane[token, c]) for c in group if not math.isnan(plane[token, c])]
                mean = sum(there) / len(there)
                std = math.sqrt(sum((v - mean) ** 2 for v in there) / len(there))
                for c in group:
                    if std > 1e-6 * abs(mean) and not math.isnan(plane[token, c]):
                        expected[c] += sign * (float(plane[token, c]) - mean) / std
    np.testing.assert_allclose(result.sps, expected, rtol=1e-12, atol=1e-12)
    assert result.count.tolist() == [4, 4, 3, 4, 4]
    column = planes[1, [0, 2, 3], 2].astype(float)
    assert result.grad_mean[2] == pytest.approx(column.mean(), rel=1e-12)
    assert result.grad_m2[2] == pytest.approx(column.var() * 3, rel=1e-12)


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"no sample file at {SAMPLE}")
def test_the_sample_of_a_real_writer_reads() -> None:
    with V1Reader(SAMPLE, recovery="strict") as reader:
        data = SAMPLE.read_bytes()
        records = np.frombuffer(data, "<u4,<u2,<u2,<u2,<u2", offset=18658)
        assert [(s.sequence_id, s.num_tokens) for s in reader.sequences] == [("0", 20)]
        assert len(reader.layout) == 196
        assert reader.layout[0].name == "model.layers.0.mlp.down_proj"
        activation, grad_norm = reader.planes(0)
        assert activation.shape == (20, 5376)
        assert np.nansum(activation, dtype=np.float64) == records["f3"].sum(dtype=np.int64)
        assert (grad_norm == 0).all()
        assert any("not a measurement" in note for note in reader.metadata["version_1_notes"])
