"""create_mscan_file, append_records_to_mscan, load_mscan_file: version 1's functions over version 2 files."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from tinyonn.errors import InputError, MscanError
from tinyonn.mscan import MscanReader, append_records_to_mscan, create_mscan_file, load_mscan_file

RECORD = np.dtype([("token_idx", "<u4"), ("param_id", "<u2"), ("block_idx", "<u2"), ("activation", "<u2"), ("grad_norm", "<u2")])
METADATA = {"model_name": "tiny", "id_to_param_name_map": {"4": "model.layers.0.a.weight", "9": "model.layers.1.a.weight"}}


def records(first: int, tokens: int, blocks: dict[int, int]) -> np.ndarray:
    """Every block of every token, in the order in which load_mscan_file gives them."""
    rng = np.random.default_rng(first)
    rows = [
        (first + t, param, block, *rng.integers(0, 65536, 2)) for t in range(tokens) for param, n in blocks.items() for block in range(n)
    ]
    return np.array(rows, RECORD)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "scan.mscan"


def test_records_and_sequences_come_back_as_they_were_appended(path: Path) -> None:
    create_mscan_file(path, METADATA)
    assert load_mscan_file(path)[0] == {**METADATA, "sequences": []}
    assert load_mscan_file(path)[1].tolist() == []
    infos = [
        {"sequence_id": 0, "num_tokens": 3, "source": "one"},
        {"sequence_id": "seven", "num_tokens": 2},
        {"sequence_id": "8", "num_tokens": 1, "source": ""},
        {"sequence_id": 3, "num_tokens": 2, "topic": "maths", "scores": [1, None]},
    ]
    everything, first = [], 0
    for info in infos:
        everything.append(records(first, info["num_tokens"], {4: 2, 9: 1}))
        append_records_to_mscan(path, everything[-1], info)
        first += info["num_tokens"]
    metadata, loaded = load_mscan_file(path)
    assert metadata == {**METADATA, "sequences": infos}
    assert loaded.dtype == RECORD
    np.testing.assert_array_equal(loaded, np.concatenate(everything))
    assert path.read_bytes()[:7] == b"MSCAN\x02\x00"


def test_sparse_records_become_planes_with_nan(path: Path) -> None:
    create_mscan_file(path, METADATA)
    sparse = np.array([(1, 9, 1, 5, 6), (2, 4, 0, 0, 0)], RECORD)
    append_records_to_mscan(path, sparse, {"sequence_id": 0, "num_tokens": 4})
    with MscanReader(path) as reader:
        assert [(e.name, e.base, e.blocks) for e in reader.layout] == [("model.layers.0.a.weight", 0, 1), ("model.layers.1.a.weight", 1, 2)]
        activation, grad_norm = reader.planes(0)
    expected = np.full((2, 4, 3), np.nan, np.float32)
    expected[:, 1, 2] = 5, 6
    expected[:, 2, 0] = 0, 0
    np.testing.assert_array_equal(np.stack([activation, grad_norm]), expected)
    np.testing.assert_array_equal(load_mscan_file(path)[1], sparse)


def test_parameters_and_blocks_that_appear_later_are_kept(path: Path) -> None:
    create_mscan_file(path, METADATA)
    stages = [{4: 2}, {4: 3}, {4: 3, 9: 1, 77: 2}]
    for i, blocks in enumerate(stages):
        append_records_to_mscan(path, records(2 * i, 2, blocks), {"sequence_id": i, "num_tokens": 2})
    _, loaded = load_mscan_file(path)
    key = ["token_idx", "param_id", "block_idx"]
    np.testing.assert_array_equal(np.sort(loaded, order=key), np.concatenate([records(2 * i, 2, b) for i, b in enumerate(stages)]))


def test_token_numbers_that_start_again_in_each_sequence_come_back_so(path: Path) -> None:
    create_mscan_file(path, METADATA)
    for i in range(3):
        append_records_to_mscan(path, records(0, 2, {4: 1}), {"sequence_id": i, "num_tokens": 2})
    assert load_mscan_file(path)[1]["token_idx"].tolist() == [0, 1] * 3


def test_a_sequence_without_records_is_listed(path: Path) -> None:
    create_mscan_file(path, METADATA)
    append_records_to_mscan(path, records(0, 2, {4: 1}), {"sequence_id": 0, "num_tokens": 2})
    append_records_to_mscan(path, np.empty(0, RECORD), {"sequence_id": 1, "num_tokens": 2})
    metadata, loaded = load_mscan_file(path)
    assert [s["sequence_id"] for s in metadata["sequences"]] == [0, 1]
    assert len(loaded) == 2


def test_an_append_writes_its_own_bytes_however_long_the_file(path: Path) -> None:
    create_mscan_file(path, METADATA)
    grown = []
    size = path.stat().st_size
    for i in range(60):
        append_records_to_mscan(path, records(2 * i, 2, {4: 2, 9: 1}), {"sequence_id": i, "num_tokens": 2})
        grown.append(path.stat().st_size - size)
        size = path.stat().st_size
    assert max(grown[30:]) <= 2 * max(grown[1:10])
    with open(path, "rb") as file:
        before = file.read(size // 2)
    append_records_to_mscan(path, records(120, 2, {4: 2, 9: 1}), {"sequence_id": 60, "num_tokens": 2})
    with open(path, "rb") as file:
        assert file.read(size // 2) == before


def test_a_version_1_file_loads_as_it_stands(path: Path) -> None:
    path.parent.mkdir()
    metadata = {**METADATA, "sequences": [{"sequence_id": 0, "num_tokens": 2, "source": "x"}]}
    text = json.dumps(metadata, indent=2).encode()
    rows = records(0, 2, {9: 1, 4: 2})
    path.write_bytes(struct.pack("<5sHII", b"MSCAN", 1, 15 + len(text), len(rows)) + text + rows.tobytes())
    found, loaded = load_mscan_file(path)
    assert found == metadata
    np.testing.assert_array_equal(loaded, rows)
    with pytest.raises(InputError, match="must be of version 2, got 1: convert it first"):
        append_records_to_mscan(path, rows, {"sequence_id": 1, "num_tokens": 2})


@pytest.mark.parametrize(
    ("rows", "info", "match"),
    [
        pytest.param(np.zeros(2), {"sequence_id": 0}, "records must be a vector", id="dtype"),
        pytest.param(
            np.zeros(2, RECORD), {"sequence_id": 0, "num_tokens": 1}, "two records of the same token and block", id="one place twice"
        ),
        pytest.param(records(0, 3, {4: 1}), {"sequence_id": 0, "num_tokens": 2}, r"num_tokens must .* tokens 0 … 2, got 2", id="too short"),
        pytest.param(records(0, 1, {4: 1}), {"sequence_id": 0, "num_tokens": 0}, "num_tokens must", id="no tokens"),
        pytest.param(records(0, 1, {4: 1}), {"num_tokens": 1}, "has no sequence_id", id="no id"),
    ],
)
def test_records_that_do_not_fit_are_refused_and_change_nothing(path: Path, rows: np.ndarray, info: dict, match: str) -> None:
    create_mscan_file(path, METADATA)
    before = path.read_bytes()
    with pytest.raises(InputError, match=match):
        append_records_to_mscan(path, rows, info)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_metadata_that_names_a_parameter_twice_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match="id_to_param_name_map must map ids"):
        create_mscan_file(path, {"id_to_param_name_map": {"0": "a", "1": "a"}})


def test_norms_that_version_1_cannot_hold_are_refused(path: Path) -> None:
    from tinyonn.mscan import LayoutEntry, MscanWriter, SequenceRecord

    path.parent.mkdir()
    with MscanWriter(path, {}, [LayoutEntry("a", 1, 1, 0)]) as writer:
        writer.append(SequenceRecord("0", [1], [0.0], np.full((1, 1), 0.5), np.ones((1, 1))))
    with pytest.raises(InputError, match="must hold version 1 records"):
        load_mscan_file(path)


def test_a_damaged_file_is_refused_by_append(path: Path) -> None:
    create_mscan_file(path, METADATA)
    append_records_to_mscan(path, records(0, 2, {4: 1}), {"sequence_id": 0, "num_tokens": 2})
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(MscanError, match="prologue"):
        append_records_to_mscan(path, records(2, 2, {4: 1}), {"sequence_id": 1, "num_tokens": 2})
