"""convert_v1, merge, recover, verify, describe, to_npz, to_parquet."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tinyonn.errors import InputError, MscanError
from tinyonn.mscan import Integral, LayoutEntry, MscanReader, MscanWriter, SequenceRecord
from tinyonn.mscan.convert import convert_v1, describe, merge, recover, to_npz, to_parquet, verify

LAYOUT = [LayoutEntry("model.layers.0.a.weight", 128, 2, 0), LayoutEntry("lm_head.weight", 64, 1, 2)]


def record(i: int, blocks: int = 3) -> SequenceRecord:
    rng = np.random.default_rng(i)
    tokens = 2 + i
    planes = rng.lognormal(-3, 1, (2, tokens, blocks)).astype(np.float32)
    planes[:, 0, 1] = np.nan
    integral = Integral(*rng.random((6, blocks)))
    return SequenceRecord(f"s{i}", rng.integers(0, 9, tokens), rng.random(tokens), *planes, np.arange(tokens) % 2, f"text {i}", integral)


def write(path: Path, ordinals: range, layout: list[LayoutEntry] = LAYOUT, metadata: dict | None = None, codec: str = "f32") -> Path:
    with MscanWriter(path, metadata or {"model": "tiny"}, layout, codec=codec, sync="none") as writer:
        for i in ordinals:
            writer.append(record(i, layout[-1].base + layout[-1].blocks))
        writer.append(SequenceRecord(f"bare{ordinals[0]}", [1, 2], [0.5, np.nan]))
    return path


def write_v1(path: Path) -> list[tuple[int, int, int, int, int]]:
    metadata = {
        "id_to_param_name_map": {"5": "layers.0.a", "2": "layers.1.a"},
        "sequences": [{"sequence_id": 0, "num_tokens": 2, "source": "x"}],
    }
    rows = [(t, p, b, 1000 * t + 100 * p + b, 65535 - b) for t in range(2) for p in (5, 2) for b in range(2)]
    text = json.dumps(metadata, indent=2).encode()
    path.write_bytes(
        struct.pack("<5sHII", b"MSCAN", 1, 15 + len(text), len(rows)) + text + b"".join(struct.pack("<IHHHH", *r) for r in rows)
    )
    return rows


def assert_same(a: MscanReader, i: int, b: MscanReader, j: int) -> None:
    left, right = a.sequences[i], b.sequences[j]
    assert (left.sequence_id, left.text, left.has_records) == (right.sequence_id, right.text, right.has_records)
    for name in ("token_ids", "loss", "mask"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    if left.has_records:
        np.testing.assert_allclose(np.stack(a.planes(i)), np.stack(b.planes(j)), rtol=1e-6)
        np.testing.assert_array_equal(np.stack(a.sequence_integral(i).planes()), np.stack(b.sequence_integral(j).planes()))


def test_version_1_becomes_version_2_value_for_value(tmp_path: Path) -> None:
    rows = write_v1(tmp_path / "old.mscan")
    result = convert_v1(tmp_path / "old.mscan", tmp_path / "new.mscan")
    assert (result.sequences, result.tokens, result.dropped) == (1, 2, [])
    with MscanReader(tmp_path / "new.mscan", recovery="strict") as new, MscanReader(tmp_path / "old.mscan") as old:
        assert new.version == 2
        assert [entry.name for entry in new.layout] == ["layers.0.a", "layers.1.a"]
        activation, grad_norm = new.planes(0)
        for t, p, b, a, g in rows:
            column = (0 if p == 5 else 2) + b
            assert (activation[t, column], grad_norm[t, column]) == (a, g)
        assert new.sequences[0].text == "x"
        np.testing.assert_array_equal(np.stack(new.integral().planes()), np.stack(old.integral().planes()))
        assert new.metadata == old.metadata


def test_a_total_without_integrals_of_sequences_is_kept(tmp_path: Path) -> None:
    total = record(1).integral
    with MscanWriter(tmp_path / "a.mscan", {}, LAYOUT) as writer:
        writer.append(SequenceRecord("s", [1], [0.5]))
        writer.append_integral(total)
    merge([tmp_path / "a.mscan"], tmp_path / "b.mscan")
    with MscanReader(tmp_path / "b.mscan") as reader:
        np.testing.assert_array_equal(np.stack(reader.integral().planes()), np.stack(total.planes()))


def test_only_version_1_is_converted(tmp_path: Path) -> None:
    write(tmp_path / "a.mscan", range(1))
    with pytest.raises(InputError, match="must be of version 1, got 2"):
        convert_v1(tmp_path / "a.mscan", tmp_path / "b.mscan")
    assert os.listdir(tmp_path) == ["a.mscan"]


@pytest.mark.parametrize("codec", ["f32", "log2u16"])
def test_merged_files_hold_the_sequences_of_all_in_order(tmp_path: Path, codec: str) -> None:
    paths = [write(tmp_path / "a.mscan", range(2), codec=codec), write(tmp_path / "b.mscan", range(5, 8), codec=codec)]
    result = merge(paths, tmp_path / "all.mscan", codec=codec)
    assert (result.sequences, result.tokens) == (7, 2 + 3 + 2 + 7 + 8 + 9 + 2)
    with MscanReader(tmp_path / "all.mscan", recovery="strict") as merged, MscanReader(paths[0]) as a, MscanReader(paths[1]) as b:
        assert merged.metadata == {"model": "tiny", "merged": ["a.mscan", "b.mscan"]}
        for i in range(7):
            assert_same(merged, i, *((a, i) if i < 3 else (b, i - 3)))


def test_a_rank_set_merges_into_one_file(tmp_path: Path) -> None:
    for rank in range(2):
        write(tmp_path / f"scan.rank{rank}-of-2.mscan", range(rank, rank + 1), metadata={"model": "tiny", "rank": rank})
    merge([tmp_path / "scan.mscan"], tmp_path / "one.mscan")
    with MscanReader(tmp_path / "one.mscan", recovery="strict") as reader:
        assert [s.sequence_id for s in reader.sequences] == ["s0", "bare0", "s1", "bare1"]
    assert describe(tmp_path / "scan.mscan").sequences == 4
    assert verify(tmp_path / "scan.mscan").ok


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("recovery", ["tail", "salvage"])
def test_a_member_of_version_1_is_refused_with_the_remedy(tmp_path: Path, rank: int, recovery: str) -> None:
    names = [f"scan.rank{i}-of-2.mscan" for i in range(2)]
    write(tmp_path / names[1 - rank], range(1))
    write_v1(tmp_path / names[rank])
    remedy = "rename it, then convert it to version 2 with `tinyonn convert`"
    with pytest.raises(MscanError, match=rf"{names[rank]}: files of a set must be of version 2, got version 1; {remedy}\.$"):
        MscanReader(tmp_path / "scan.mscan", recovery=recovery)
    (tmp_path / names[rank]).rename(tmp_path / "own.mscan")
    convert_v1(tmp_path / "own.mscan", tmp_path / "new.mscan")
    assert verify(tmp_path / "new.mscan").version == 2


def test_a_longer_layout_merges_with_the_one_it_extends(tmp_path: Path) -> None:
    longer = [*LAYOUT, LayoutEntry("late.weight", 64, 1, 3)]
    merge([write(tmp_path / "a.mscan", range(1)), write(tmp_path / "b.mscan", range(1, 2), longer)], tmp_path / "all.mscan")
    with MscanReader(tmp_path / "all.mscan") as reader:
        assert reader.layout == longer
        assert np.isnan(reader.planes(0)[0][:, 3]).all()
        assert not np.isnan(reader.planes(2)[0][:, 3]).any()


def test_merge_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    a = write(tmp_path / "a.mscan", range(1))
    other = write(tmp_path / "b.mscan", range(1, 2), [LayoutEntry("x.weight", 64, 3, 0)])
    with pytest.raises(InputError, match=r"layouts of all files must agree, got a different one in .*b.mscan"):
        merge([a, other], tmp_path / "all.mscan")
    with pytest.raises(InputError, match="sequence ids must be unique, got 's0'"):
        merge([a, a], tmp_path / "all.mscan")
    with pytest.raises(InputError, match="at least one file"):
        merge([], tmp_path / "all.mscan")
    assert sorted(os.listdir(tmp_path)) == ["a.mscan", "b.mscan"]


def test_recover_keeps_what_reads_and_names_what_does_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mscan", range(3))
    data = bytearray(path.read_bytes())
    with MscanReader(path) as reader:
        name_at = data.index(reader.sequences[1].text.encode())
    data[name_at] ^= 1
    path.write_bytes(data)
    with pytest.raises(MscanError, match="crc32c"), MscanReader(path) as reader:
        list(reader.sequences)
    checked = verify(path)
    assert (checked.ok, checked.sequences) == (False, 3)
    assert checked.failure is not None
    assert checked.failure.offset is not None
    assert str(path) in str(checked.failure)
    result = recover(path, tmp_path / "clean.mscan")
    assert result.sequences == 3
    assert any("crc32c" in line for line in result.dropped)
    assert verify(tmp_path / "clean.mscan").ok
    with MscanReader(tmp_path / "clean.mscan", recovery="strict") as clean:
        assert [s.sequence_id for s in clean.sequences] == ["s0", "s2", "bare0"]
        np.testing.assert_array_equal(clean.planes(1)[0], record(2).activation)


def test_recover_counts_the_tokens_whose_values_are_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    planes = np.random.default_rng(0).random((4, 64, 3), np.float32)
    with MscanWriter(path, {}, LAYOUT, codec="f32") as writer:
        for i, plane in enumerate(planes):
            writer.append(SequenceRecord(f"s{i}", np.arange(64), np.ones(64), plane, plane))
    data = bytearray(path.read_bytes())
    for i in (1, 2):
        data[data.index(planes[i].tobytes()) + 100] ^= 1
    path.write_bytes(data)
    result = recover(path, tmp_path / "clean.mscan")
    assert result.dropped[-1] == "values of 128 tokens in 2 of the 4 sequences: they read as missing."


def test_recover_reads_version_1_files_that_a_longer_header_overwrote(tmp_path: Path) -> None:
    rows = write_v1(tmp_path / "old.mscan")
    data = (tmp_path / "old.mscan").read_bytes()
    length = struct.unpack_from("<I", data, 7)[0]
    metadata = json.loads(data[15:length])
    first = json.dumps({k: v for k, v in metadata.items() if k != "sequences"}, indent=2).encode()
    broken = struct.pack("<5sHII", b"MSCAN", 1, 15 + len(first), 0) + first + data[length:] * 4
    broken = struct.pack("<5sHII", b"MSCAN", 1, length, 4 * len(rows)) + data[15:length] + broken[length:]
    (tmp_path / "old.mscan").write_bytes(broken)
    lost = -((15 + len(first) - length) // 12)
    result = recover(tmp_path / "old.mscan", tmp_path / "new.mscan", overwrite=True)
    assert result.dropped == [f"a longer header was written over the first {lost} of 32 records"]


def test_verify_tells_an_intact_file_and_its_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mscan", range(2))
    result = verify(path)
    assert (result.ok, result.version, result.sequences, result.tokens, result.size) == (True, 2, 3, 7, path.stat().st_size)
    write_v1(tmp_path / "old.mscan")
    assert (verify(tmp_path / "old.mscan").ok, verify(tmp_path / "old.mscan").version) == (True, 1)
    path.write_bytes(b"something else entirely")
    result = verify(path)
    assert (result.ok, result.version, result.sequences) == (False, None, 0)
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "nowhere.mscan")


def test_describe_tells_what_a_file_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mscan", range(2))
    found = describe(path)
    assert (found.sequences, found.tokens, found.sequences_with_planes, found.blocks) == (3, 7, 2, 3)
    assert found.groups == ["model.layers.0", "lm_head"]
    assert found.bytes_per_value == path.stat().st_size / (2 * 7 * 3)
    path.write_bytes(path.read_bytes()[:-100])
    assert len(describe(path).missing) == 1


def test_npz_holds_every_array(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mscan", range(2))
    result = to_npz(path, tmp_path / "a.npz")
    assert (result.sequences, result.tokens) == (3, 7)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["offsets"].tolist() == [0, 2, 5, 7]
        assert arrays["sequence_ids"].tolist() == ["s0", "s1", "bare0"]
        assert arrays["texts"].tolist() == ["text 0", "text 1", ""]
        assert arrays["weights"].tolist() == [entry.name for entry in LAYOUT]
        assert arrays["weight_base"].tolist() == [0, 2]
        assert json.loads(str(arrays["metadata"])) == {"model": "tiny"}
        for i in range(2):
            rows, expected = slice(*arrays["offsets"][i : i + 2]), record(i)
            for name in ("activation", "grad_norm", "token_ids", "mask"):
                np.testing.assert_array_equal(arrays[name][rows], getattr(expected, name))
            np.testing.assert_array_equal(arrays["loss"][rows], np.asarray(expected.loss, np.float32))
        assert np.isnan(arrays["activation"][5:]).all()


def test_parquet_has_a_row_a_token_and_block(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    path = write(tmp_path / "a.mscan", range(2))
    to_parquet(path, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    rows = table.to_pylist()
    expected = []
    for i in range(2):
        sequence = record(i)
        for t, values in enumerate(sequence.activation):
            for column, value in enumerate(values):
                if not np.isnan(value):
                    weight, block = ("model.layers.0.a.weight", column) if column < 2 else ("lm_head.weight", 0)
                    row = (i, f"s{i}", t, int(sequence.token_ids[t]), float(np.float32(sequence.loss[t])), bool(t % 2))
                    layer = weight.removesuffix(".weight").removesuffix(".a")
                    expected.append((*row, layer, weight, block, float(value), float(sequence.grad_norm[t, column])))
    assert [tuple(row.values()) for row in rows] == expected
    assert json.loads(table.schema.metadata[b"tinyonn"]) == {"model": "tiny"}


def test_parquet_names_the_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = write(tmp_path / "a.mscan", range(1))
    with pytest.raises(RuntimeError, match="pip install pyarrow"):
        to_parquet(path, tmp_path / "a.parquet")


WRITERS: dict[str, Callable[..., object]] = {
    "merge": lambda a, b, **more: merge([a], b, **more),
    "recover": recover,
    "npz": to_npz,
    "parquet": to_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_exists_is_replaced_only_when_asked(tmp_path: Path, name: str) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    source, output = write(tmp_path / "a.mscan", range(1)), tmp_path / "folder" / "out"
    WRITERS[name](source, output)
    made = output.stat().st_ino
    with pytest.raises(InputError, match="output must not exist yet"):
        WRITERS[name](source, output)
    assert output.stat().st_ino == made
    WRITERS[name](source, output, overwrite=True)
    assert output.stat().st_ino != made
    assert os.listdir(output.parent) == ["out"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_source_is_never_its_own_output(tmp_path: Path, name: str) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    source = write(tmp_path / "a.mscan", range(1))
    members = [write(tmp_path / f"s.rank{rank}-of-2.mscan", range(rank, rank + 1)) for rank in range(2)]
    (tmp_path / "link.mscan").symlink_to("a.mscan")
    before = [file.read_bytes() for file in (source, *members)]
    for given, output in ((source, source), (tmp_path / "link.mscan", source), (tmp_path / "s.mscan", members[1])):
        with pytest.raises(InputError, match=r"output must be another file than the source, got .*\.mscan\."):
            WRITERS[name](given, output, overwrite=True)
    assert [file.read_bytes() for file in (source, *members)] == before


@pytest.mark.parametrize("name", WRITERS)
def test_only_files_are_replaced(tmp_path: Path, name: str) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    source = write(tmp_path / "a.mscan", range(1))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"output must be a file, got a pipe or device: .*pipe\."):
        WRITERS[name](source, tmp_path / "pipe", overwrite=True)
    assert (tmp_path / "pipe").is_fifo()


def test_a_pipe_is_no_scan_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mscan")
    with pytest.raises(MscanError, match=r"a \.mscan file must be a file, got a pipe or device"):
        describe(tmp_path / "a.mscan")


def test_a_path_that_is_no_unicode_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.mscan", range(1))
    with pytest.raises(InputError, match="path must be valid Unicode"):
        recover(source, tmp_path / "\udcff.mscan")
    source.rename(tmp_path / "\udcff.mscan")
    with pytest.raises(MscanError, match=r"path of a \.mscan file must be Unicode"):
        describe(tmp_path / "\udcff.mscan")


@pytest.mark.parametrize("name", ["merge", "npz", "parquet"])
def test_a_failure_leaves_no_output_behind(tmp_path: Path, name: str) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    source = write(tmp_path / "a.mscan", range(3))
    data = bytearray(source.read_bytes())
    data[data.index(b"text 2")] ^= 1
    source.write_bytes(data)
    with pytest.raises(MscanError):
        WRITERS[name](source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.mscan"]
