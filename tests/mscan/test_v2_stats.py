"""Statistics, integrals, sets of files, and the groups of a layout."""

from __future__ import annotations

import shutil
from functools import reduce
from pathlib import Path

import numpy as np
import pytest

from tinyonn.errors import InputError, MscanError
from tinyonn.mscan import Integral, LayoutEntry, MscanReader, MscanWriter, SequenceRecord, convert, layout_groups

LAYOUT = [
    LayoutEntry("model.layers.0.q_proj.weight", 576, 9, 0),
    LayoutEntry("model.layers.0.experts.gate_up_proj.17", 640, 10, 9),
    LayoutEntry("model.layers.10.q_proj.weight", 64 * 21, 21, 19),
    LayoutEntry("lm_head.weight", 70, 2, 40),
]
BLOCKS = 42


def make(seed: int, tokens: int) -> SequenceRecord:
    rng = np.random.default_rng(seed)
    planes = rng.lognormal(2, 1.5, (2, tokens, BLOCKS)).astype(np.float32)
    planes[:, :, 40:] = 1234.567  # a constant has no deviation at all
    planes[0, rng.random((tokens, BLOCKS)) < 0.1] = np.nan
    planes[1, rng.random((tokens, BLOCKS)) < 0.1] = 0.0
    planes[1, rng.random((tokens, BLOCKS)) < 0.02] = np.inf
    if seed % 3 == 0:
        planes[:, :, :19] = np.nan
    return SequenceRecord(f"s{seed}", np.arange(tokens), np.ones(tokens), *planes, integral=integral(seed))


def integral(seed: int, blocks: int = BLOCKS) -> Integral:
    rng = np.random.default_rng(seed)
    tokens = rng.random((5, blocks))
    present = rng.integers(0, 6, blocks)
    tokens[np.arange(5)[:, None] >= present] = np.nan
    return of_tokens(tokens)


def of_tokens(tokens: np.ndarray) -> Integral:
    count = (~np.isnan(tokens)).sum(0).astype(np.float64)
    mean = np.nansum(tokens, 0) / np.maximum(count, 1)
    m2 = np.nansum((tokens - mean) ** 2, 0)
    return Integral(np.nansum(tokens, 0) * 2, count, mean, m2, mean * 3, m2 * 9)


def check_stats(reader: MscanReader, records: list[SequenceRecord], rtol: float) -> None:
    stats = reader.stats()
    assert stats.names == [entry.name for entry in LAYOUT]
    for name in ("activation", "grad_norm"):
        plane = np.concatenate([getattr(record, name) for record in records]).astype(np.float64)
        found = getattr(stats, name)
        for i, entry in enumerate(LAYOUT):
            values = plane[:, entry.base : entry.base + entry.blocks]
            finite = values[np.isfinite(values)]
            counted = (found.count[i], found.zeros[i], found.missing[i], found.nonfinite[i])
            assert counted == (finite.size, (values == 0).sum(), np.isnan(values).sum(), np.isinf(values).sum())
            np.testing.assert_allclose(found.mean[i], finite.mean(), rtol=rtol)
            np.testing.assert_allclose(
                found.m2[i], ((finite - finite.mean()) ** 2).sum(), rtol=10 * rtol, atol=(rtol * finite**2).sum() * rtol
            )
            np.testing.assert_allclose(found.std[i], finite.std(), rtol=10 * rtol, atol=rtol * finite.max())


@pytest.mark.parametrize("codec", ["log2u16", "f32"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 50], ids=lambda n: f"{n}-tokens")
def test_stats_equal_float64(tmp_path: Path, codec: str, tokens: int) -> None:
    records = [make(seed, tokens + seed % 2) for seed in range(1, 7)]
    with MscanWriter(tmp_path / "a.mscan", {}, LAYOUT, codec=codec) as writer:
        for record in records:
            writer.append(record)
        shutil.copy(writer.path, tmp_path / "crashed.mscan")
    with MscanReader(tmp_path / "a.mscan") as reader:
        check_stats(reader, records, 1e-12)
    with MscanReader(tmp_path / "crashed.mscan") as reader:
        check_stats(reader, records, 1e-12 if codec == "f32" else 5e-4)


@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize("special", [None, 0.0, np.inf, np.nan], ids=str)
def test_stats_of_rows_with_one_special_value_at_most(tmp_path: Path, tokens: int, special: float | None) -> None:
    rng = np.random.default_rng(7)
    records = []
    for block in range(BLOCKS):
        planes = rng.lognormal(2, 1.5, (2, tokens, BLOCKS)).astype(np.float32)
        if special is not None:
            planes[:, tokens - 1, block] = special
        records.append(SequenceRecord(str(block), np.arange(tokens), np.ones(tokens), *planes))
    with MscanWriter(tmp_path / "a.mscan", {}, LAYOUT) as writer:
        for record in records:
            writer.append(record)
    with MscanReader(tmp_path / "a.mscan") as reader:
        check_stats(reader, records, 1e-12)


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_a_negative_norm_is_refused_wherever_it_stands(tmp_path: Path, tokens: int) -> None:
    with MscanWriter(tmp_path / "a.mscan", {}, LAYOUT) as writer:
        for block in range(BLOCKS):
            planes = np.ones((2, tokens, BLOCKS), np.float32)
            planes[block % 2, tokens - 1, block] = -1e-3
            with pytest.raises(InputError, match="must not be negative"):
                writer.append(SequenceRecord("s", np.arange(tokens), np.ones(tokens), *planes))
        assert len(writer) == 0


def test_a_constant_has_mean_itself_and_no_deviation(tmp_path: Path) -> None:
    planes = np.full((2, 301, BLOCKS), 1234.567, np.float32)
    with MscanWriter(tmp_path / "a.mscan", {}, LAYOUT) as writer:
        for i in range(3):
            writer.append(SequenceRecord(str(i), np.arange(301), np.ones(301), *planes))
    with MscanReader(tmp_path / "a.mscan") as reader:
        stats = reader.stats()
        np.testing.assert_array_equal(stats.activation.mean, np.float32(1234.567))
        np.testing.assert_array_equal(stats.activation.m2, 0.0)
        np.testing.assert_array_equal(reader.planes(2)[1], planes[1])


def test_stats_of_a_damaged_plane_are_still_there(tmp_path: Path) -> None:
    records = [make(seed, 9) for seed in range(1, 4)]
    path = tmp_path / "a.mscan"
    with MscanWriter(path, {}, LAYOUT) as writer:
        for record in records:
            writer.append(record)
    with MscanReader(path) as reader:
        spot = reader.codes(1)[0].activation.tobytes()
    data = path.read_bytes()
    assert data.count(spot) == 1
    at = data.index(spot)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with MscanReader(path) as reader:
        check_stats(reader, records, 1e-12)
        reader.planes(0)
        with pytest.raises(MscanError, match="payload crc32c must match") as caught:
            reader.planes(1)
        assert caught.value.path == str(path)
        assert caught.value.offset is not None
        assert caught.value.offset < at


def assert_same(a: Integral, b: Integral) -> None:
    for found, wanted in zip(a.planes(), b.planes(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)


def test_integrals_add_like_their_tokens() -> None:
    tokens = np.random.default_rng(0).random((40, 6))
    tokens[:, 5] = np.nan
    tokens[:30, 4] = np.nan
    parts = [of_tokens(part) for part in (tokens[:7], tokens[7:8], tokens[8:30], tokens[30:])]
    assert_same(reduce(lambda a, b: a + b, parts), of_tokens(tokens))
    assert_same(Integral.zeros(6) + parts[0], parts[0])
    assert_same(of_tokens(tokens[:3, :2]) + Integral.zeros(6), of_tokens(tokens[:3, :2]).widened(6))


def test_the_total_is_what_was_stored_until_a_sequence_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    records = [make(seed, 2) for seed in range(4)]
    total = integral(99)
    with MscanWriter(path, {}, LAYOUT) as writer:
        for record in records[:3]:
            writer.append(record)
        writer.append_integral(total)
    with MscanReader(path) as reader:
        assert_same(reader.integral(), total)
        for i in range(3):
            assert_same(reader.sequence_integral(i), records[i].integral)
    with MscanWriter(path, {}, LAYOUT, mode="a") as writer:
        writer.append(records[3])
    with MscanReader(path) as reader:
        assert_same(reader.integral(), reduce(lambda a, b: a + b, (record.integral for record in records)))
    with MscanWriter(path, {}, LAYOUT, mode="a") as writer:
        writer.append(SequenceRecord("bare", [1], [0.0]))
    with MscanReader(path) as reader:
        assert reader.sequence_integral(4) is None
        with pytest.raises(MscanError, match="sequence 4 must hold an integral"):
            reader.integral()


def write_set(folder: Path, size: int, counts: list[int]) -> list[SequenceRecord]:
    everything = []
    for rank, count in enumerate(counts):
        with MscanWriter(folder / f"scan.rank{rank}-of-{size}.mscan", {"rank": rank, "k": 1}, LAYOUT, codec="f32") as writer:
            for i in range(count):
                everything.append(make(10 * rank + i + 1, 3))
                writer.append(everything[-1])
    return everything


@pytest.mark.parametrize("name", ["scan.mscan", "scan.rank1-of-3.mscan"])
def test_a_set_of_ranks_reads_as_one(tmp_path: Path, name: str) -> None:
    records = write_set(tmp_path, 3, [2, 0, 3])
    with MscanReader(tmp_path / name, recovery="strict") as reader:
        assert reader.metadata == {"k": 1}
        assert [item.sequence_id for item in reader.sequences] == [record.sequence_id for record in records]
        assert [item.ordinal for item in reader.sequences] == list(range(5))
        for i, record in enumerate(records):
            np.testing.assert_array_equal(reader.planes(i)[0], record.activation)
            assert_same(reader.sequence_integral(i), record.integral)
            assert reader.find(record.sequence_id) == i
        assert reader.find("none") is None
        np.testing.assert_array_equal(reader.planes(-1)[0], records[-1].activation)
        assert len(reader.codes(4)) == 1
        check_stats(reader, records, 1e-12)
        assert_same(reader.integral(), reduce(lambda a, b: a + b, (record.integral for record in records)))
        reader.verify()
    with MscanReader(tmp_path / "scan.rank2-of-3.mscan", whole_set=False) as reader:
        assert [item.sequence_id for item in reader.sequences] == [record.sequence_id for record in records[2:]]
        assert reader.metadata["rank"] == 2


def test_a_copy_of_a_member_under_anothers_name_is_refused_and_salvage_names_it(tmp_path: Path) -> None:
    """Else its sequences are counted twice, and nothing says that those of the other rank are gone."""
    write_set(tmp_path, 2, [2, 2])
    first, second = (tmp_path / f"scan.rank{rank}-of-2.mscan" for rank in range(2))
    second.write_bytes(first.read_bytes())
    rule = "members of a set must be different files, got a copy of scan.rank0-of-2.mscan"
    for recovery in ("tail", "strict"):
        with pytest.raises(MscanError, match=rule) as found:
            MscanReader(tmp_path / "scan.mscan", recovery=recovery)
        assert found.value.path == str(second)
    assert not convert.verify(tmp_path / "scan.mscan").ok
    result = convert.recover(tmp_path / "scan.mscan", tmp_path / "one.mscan")
    assert result.sequences == 2
    assert rule in result.dropped[0]
    with MscanWriter(second, {"rank": 0, "k": 1}, LAYOUT, mode="a", codec="f32") as writer:  # a copy that went on is one still
        writer.append(make(30, 3))
    with pytest.raises(MscanError, match=rule):
        MscanReader(tmp_path / "scan.mscan")


def test_a_set_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, 3, [1, 1])
    for name in ("scan.mscan", "scan.rank0-of-3.mscan"):
        with pytest.raises(MscanError, match=r"must be complete: scan\.rank2-of-3\.mscan is missing"):
            MscanReader(tmp_path / name)
    write_set(tmp_path, 2, [1, 1])
    with pytest.raises(MscanError, match=r"must have one size, got .* N = 2, 3"):
        MscanReader(tmp_path / "scan.mscan")
    assert len(MscanReader(tmp_path / "scan.rank0-of-2.mscan")) == 2
    with pytest.raises(FileNotFoundError):
        MscanReader(tmp_path / "other.mscan")


def test_members_of_a_set_must_agree(tmp_path: Path) -> None:
    write_set(tmp_path, 2, [1, 1])
    last = tmp_path / "scan.rank1-of-2.mscan"
    with MscanWriter(last, {"rank": 1, "k": 2}, LAYOUT, mode="w"):
        pass
    with pytest.raises(MscanError, match="metadata of a set must agree"):
        MscanReader(tmp_path / "scan.mscan")
    with MscanWriter(last, {"rank": 1, "k": 1}, LAYOUT[:3], mode="w"):
        pass
    with pytest.raises(MscanError, match="layout of a set must agree"):
        MscanReader(tmp_path / "scan.mscan")


def test_groups_are_decoder_layers() -> None:
    names, offsets = layout_groups(LAYOUT)
    assert names == ["model.layers.0", "model.layers.10", "lm_head"]
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [0, 19, 40, 42]
    gpt = [LayoutEntry("transformer.h.3.attn.c_attn.weight", 64, 1, 0), LayoutEntry("transformer.h.30.mlp.weight", 64, 1, 1)]
    assert layout_groups(gpt)[0] == ["transformer.h.3", "transformer.h.30"]
    assert layout_groups([LayoutEntry("0.weight", 64, 1, 0), LayoutEntry("score2.weight", 64, 1, 1)])[0] == ["0", "score2"]
    with pytest.raises(InputError, match="must keep the weights of one layer together"):
        layout_groups([*LAYOUT, LayoutEntry("model.layers.0.k_proj.weight", 64, 1, 42)])


@pytest.mark.parametrize("recovery", ["strict", "tail", "salvage"])
@pytest.mark.parametrize(
    ("data", "message"), [(b"", "15 bytes"), (b"x" * 99, "MSCAN"), (b"MSCAN\x03\x00" + bytes(99), "version must be 1 or 2, got 3")]
)
def test_other_files_are_named_as_such(tmp_path: Path, recovery: str, data: bytes, message: str) -> None:
    (tmp_path / "a.mscan").write_bytes(data)
    with pytest.raises(MscanError, match=message):
        MscanReader(tmp_path / "a.mscan", recovery=recovery)


def test_recovery_is_one_of_three(tmp_path: Path) -> None:
    with MscanWriter(tmp_path / "a.mscan", {}, LAYOUT):
        pass
    with pytest.raises(InputError, match="recovery must be 'strict', 'tail' or 'salvage', got 'best'"):
        MscanReader(tmp_path / "a.mscan", recovery="best")
