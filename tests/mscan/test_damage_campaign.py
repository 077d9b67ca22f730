"""A thousand files of the campaign that `make damage` runs, and the cases that led to it."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tinyonn.cli.app import app
from tinyonn.mscan import Integral, LayoutEntry, MscanError, MscanReader, MscanWriter, SequenceRecord
from tinyonn.mscan.convert import recover, verify

HERE = Path(__file__).parent


def load(name: str) -> Any:
    spec = spec_from_file_location(f"mscan_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


model_file = load("model_file")
Entry, Model = model_file.Entry, model_file.Model
LAYOUT, DATA, SEQUENCE, INTEGRAL, INDEX = range(1, 6)


def test_a_thousand_damaged_files_are_read_right_or_refused(tmp_path: Path) -> None:
    command = [sys.executable, HERE / "damage.py", "--files", "1000", "--workers", "1", "--keep", tmp_path / "failures"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.startswith("1,000 files read, seeds 0 … 999; 0 failed")


def test_the_campaign_keeps_and_names_a_file_that_is_misread(tmp_path: Path) -> None:
    for name in ("damage", "damage_kinds", "model_file"):
        shutil.copy(HERE / f"{name}.py", tmp_path)
    script = (HERE / "damage_judge.py").read_text()
    blind = script.replace("if not np.array_equal(got[:, :width], truth.integral)", "if np.array_equal(got[:, :width], truth.integral)")
    assert blind != script
    (tmp_path / "damage_judge.py").write_text(blind)
    command = [sys.executable, tmp_path / "damage.py", "--files", "30", "--keep", tmp_path / "failures"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "is none that was written" in done.stdout
    kept = sorted((tmp_path / "failures").iterdir())
    assert len(kept) == done.stdout.count("; kept as ") > 0


def grown(
    seed: int, *, fork: Any = None, linked: bool = True, integral: bool = True, count: int = 3, uuid: bytes = bytes(range(16))
) -> Any:
    """A closed file of `count` sequences, each of two DATA chunks, an INTEGRAL and a SEQUENCE; or one that goes on with `fork`."""
    rng = np.random.default_rng(seed)
    model = fork.fork() if fork else Model(uuid, {"model": "tiny"}, linked)
    if not fork:
        model.layout([Entry("layers.0.a.weight", 128, 2)])
    for _ in range(count):
        model.append(rng, f"s{len(model.truths)}", 4, planes=True, missing=0.0, integral=integral, text=True)
    return model


def chunks(path: Path) -> list[tuple[int, int]]:
    """Type and place of each chunk."""
    data, found = path.read_bytes(), []
    at = struct.unpack_from("<Q", data, 40)[0]
    while data[at : at + 8] != b"MSCANEND":
        found.append((struct.unpack_from("<H", data, at + 16)[0], at))
        at += 64 + model_file.up(struct.unpack_from("<Q", data, at + 24)[0])
    return found


def closed(model: Any) -> Any:
    twin = model.fork()
    twin.index()
    twin.close()
    return twin


def write(path: Path, pieces: list[bytes]) -> Path:
    path.write_bytes(b"".join(pieces))
    return path


def assert_refused_by_all(path: Path, match: str) -> None:
    with pytest.raises(MscanError, match=match):
        MscanReader(path, recovery="strict")
    with MscanReader(path) as reader, pytest.raises(MscanError, match=match):
        reader.verify()
    found = verify(path)
    assert not found.ok
    assert found.failure is not None
    shown = CliRunner().invoke(app, ["verify", str(path)])
    assert shown.exit_code == 1
    assert "DAMAGED" in shown.stdout
    assert found.failure.rule.split(":")[0] in " ".join(shown.stdout.split())


def is_written(reader: MscanReader, i: int, truths: list[Any]) -> bool:
    for truth in truths:
        if reader.sequences[i].sequence_id != truth.sequence_id or not np.array_equal(reader.sequences[i].loss, truth.loss):
            continue
        planes, integral = np.stack(reader.planes(i)), reader.sequence_integral(i)
        return np.array_equal(planes, truth.planes) and np.array_equal(np.stack(integral.planes()), truth.integral)
    return False


def read_planes(path: Path, i: int) -> None:
    with MscanReader(path) as reader:
        reader.planes(i)


def mismatches(path: Path, a: Any, b: Any) -> int:
    """How many of four sequences are refused, all of them if the file is; those that read are one copy's or the other's."""
    refused = 0
    for i in range(4):
        try:
            with MscanReader(path) as reader:
                right = is_written(reader, i, a.truths) or is_written(reader, i, b.truths)
        except MscanError:
            refused += 1
        else:
            assert right
    return refused


@pytest.mark.parametrize("swapped", [[0], [1], [2], [0, 1], [0, 1, 2]], ids=str)
def test_chunks_of_another_copy_are_not_read_as_a_sequences_own(tmp_path: Path, swapped: list[int]) -> None:
    stem = grown(0, count=1)
    a, b = closed(grown(1, fork=stem, count=2)), closed(grown(2, fork=stem, count=2))
    assert [len(piece) for piece in a.pieces] == [len(piece) for piece in b.pieces]
    group = 2 + 4 + 4  # the third sequence's DATA, DATA, INTEGRAL, SEQUENCE
    pieces = list(b.pieces)
    for k in swapped:
        pieces[group + k] = a.pieces[group + k]
    path = write(tmp_path / "spliced.mscan", pieces)
    assert_refused_by_all(path, "must follow the chunks it was written with, not others")
    with MscanReader(path) as reader:
        assert is_written(reader, 0, b.truths)
        assert is_written(reader, 1, b.truths)
        for read in (reader.planes, reader.codes, reader.sequence_integral):
            with pytest.raises(MscanError, match="not others"):
                read(2)
    with MscanReader(path, recovery="salvage") as reader:
        stored = reader.sequences[2]
        assert (stored.has_records, stored.lost_tokens, stored.lost_integral) == (False, 4, True)
        assert np.isnan(np.stack(reader.planes(2))).all()
        assert reader.sequence_integral(2) is None
        assert any("does not commit this" in line for line in reader.report)
        assert any("lost: the planes of 4 tokens and its integral" in line for line in reader.report)
    done = recover(path, tmp_path / "clean.mscan")
    assert "values of 4 tokens in 1 of the 3 sequences: they read as missing." in done.dropped
    assert "integrals of 1 of the 3 sequences." in done.dropped
    # What is known of the old revision: it does not notice.
    old = grown(0, count=1, linked=False)
    a, b = closed(grown(1, fork=old, count=2)), closed(grown(2, fork=old, count=2))
    pieces = [a.pieces[i] if i - group in swapped else piece for i, piece in enumerate(b.pieces)]
    MscanReader(write(tmp_path / "old.mscan", pieces), recovery="strict").close()


def test_two_copies_cut_together_at_any_chunk_are_noticed(tmp_path: Path) -> None:
    stem = grown(0, count=1)
    a, b = closed(grown(1, fork=stem, count=3)), closed(grown(2, fork=stem, count=3))
    for cut in range(1, len(a.pieces) + 1):
        path = write(tmp_path / "spliced.mscan", a.pieces[:cut] + b.pieces[cut:])
        whole = cut <= len(stem.pieces) or cut >= len(a.pieces) - 1  # the trailers are the same
        assert verify(path).ok == whole, cut
        if whole:
            continue
        with MscanReader(path, recovery="salvage") as reader:
            assert reader.report, cut
        assert mismatches(path, a, b), cut  # at least where the copies meet


def test_layouts_and_index_belong_to_the_same_copy(tmp_path: Path) -> None:
    """Columns under another copy's names would be wrong values too, and so would statistics."""
    stem = grown(0, count=1)
    twins = []
    for name, seed in (("left.weight", 1), ("rite.weight", 2)):
        model = stem.fork()
        model.layout([Entry(name, 64, 1)])
        twins.append(closed(grown(seed, fork=model, count=1)))
    a, b = twins
    for k in (len(stem.pieces), len(a.pieces) - 2):  # LAYOUT, INDEX
        path = write(tmp_path / "spliced.mscan", [b.pieces[i] if i == k else piece for i, piece in enumerate(a.pieces)])
        assert not verify(path).ok
        with pytest.raises(MscanError, match=r"must follow the (chunk|chunks) it was written"):
            read_planes(path, 1)
    path = write(tmp_path / "layout.mscan", [b.pieces[i] if i == len(stem.pieces) else piece for i, piece in enumerate(a.pieces)])
    with MscanReader(path, recovery="salvage") as reader:
        assert not reader.sequences[1].has_records


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "old"])
@pytest.mark.parametrize(
    ("gone", "lost_tokens", "lost_integral"), [([3], 2, False), ([2, 3], 4, False), ([4], 0, True), ([2, 3, 4], 4, True)], ids=str
)
def test_salvage_reports_every_chunk_that_is_missing(
    tmp_path: Path, linked: bool, gone: list[int], lost_tokens: int, lost_integral: bool
) -> None:
    model = closed(grown(0, linked=linked))
    path = write(tmp_path / "a.mscan", [piece for i, piece in enumerate(model.pieces) if i not in gone])
    with MscanReader(path, recovery="salvage") as reader:
        stored = [reader.sequences[i] for i in range(len(reader))]
        assert [s.sequence_id for s in stored] == ["s0", "s1", "s2"]
        assert any(line.endswith("missing.") or "lost: " in line for line in reader.report)
        if linked and len(gone) < 3:  # what is left cannot be told from another copy's
            lost_tokens, lost_integral = 4, True
        assert (stored[0].lost_tokens, stored[0].lost_integral) == (lost_tokens, lost_integral)
        assert stored[0].has_records == (lost_tokens < 4)
        assert (reader.sequence_integral(0) is None) == lost_integral
        kept = ~np.isnan(np.stack(reader.planes(0))).all(axis=(0, 2))
        assert kept.sum() == 4 - lost_tokens
        assert is_written(reader, 1, model.truths)
        assert is_written(reader, 2, model.truths)
    done = recover(path, tmp_path / "clean.mscan")
    assert any(line.startswith("integrals of 1 of the 3") for line in done.dropped) == lost_integral
    assert any(line.startswith(f"values of {lost_tokens} tokens") for line in done.dropped) == (lost_tokens > 0)


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "old"])
@pytest.mark.parametrize(("first", "count"), [(5, 1), (2, 4), (9, 1)], ids=["its SEQUENCE", "its whole group", "another SEQUENCE"])
def test_a_sequence_that_is_there_twice_is_kept_once(tmp_path: Path, linked: bool, first: int, count: int) -> None:
    model = closed(grown(0, linked=linked))
    run = model.pieces[first : first + count]
    pieces = model.pieces[: first + count] + run + model.pieces[first + count :]
    path = write(tmp_path / "a.mscan", pieces)
    assert not verify(path).ok
    with MscanReader(path, recovery="salvage") as reader:
        assert [reader.sequences[i].sequence_id for i in range(len(reader))] == ["s0", "s1", "s2"]
        assert all(is_written(reader, i, model.truths) for i in range(3))
        assert any("occurs twice" in line for line in reader.report)
    shown = CliRunner().invoke(app, ["recover", str(path), "-o", str(tmp_path / "clean.mscan")])
    assert shown.exit_code == 0, shown.output
    assert "occurs twice" in shown.stdout
    with MscanReader(tmp_path / "clean.mscan", recovery="strict") as clean:
        assert all(is_written(clean, i, model.truths) for i in range(3))


def test_of_a_sequence_that_is_there_twice_the_whole_one_is_kept(tmp_path: Path) -> None:
    model = closed(grown(0))
    orphan = model.pieces[9]  # SEQUENCE of s1, before its chunks
    path = write(tmp_path / "a.mscan", [*model.pieces[:6], orphan, *model.pieces[6:]])
    with MscanReader(path, recovery="salvage") as reader:
        assert sorted(reader.sequences[i].sequence_id for i in range(len(reader))) == ["s0", "s1", "s2"]
        assert all(is_written(reader, i, model.truths) for i in range(3))
        assert sum("occurs twice" in line for line in reader.report) == 1


def test_recover_keeps_the_first_whole_sequence_of_an_id(tmp_path: Path) -> None:
    """A writer may append one id twice; a recovered file holds it once."""
    path = tmp_path / "a.mscan"
    planes = np.random.default_rng(0).random((3, 2, 2), np.float32)
    with MscanWriter(path, {}, [LayoutEntry("a", 128, 2, 0)], codec="f32") as writer:
        for plane in planes:
            writer.append(SequenceRecord("s", [1, 2], [0.5, 0.5], plane, plane, integral=Integral.zeros(2)))
    data = path.read_bytes()
    assert recover(path, tmp_path / "whole.mscan").dropped == [
        f"sequence {i}: its id, 's', is also the id of sequence 0, which is kept." for i in (1, 2)
    ]
    path.write_bytes(data.replace(planes[0].tobytes(), bytes(16), 1))
    recover(path, tmp_path / "clean.mscan")
    with MscanReader(tmp_path / "clean.mscan") as clean:
        assert len(clean) == 1
        np.testing.assert_array_equal(clean.planes(0)[0], planes[1])


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "old"])
def test_data_and_integral_in_the_wrong_order_are_refused_everywhere(tmp_path: Path, linked: bool) -> None:
    """Built that way from the start, with all checksums right: the INTEGRAL stands where the second DATA should."""
    model = Model(bytes(range(16)), {}, linked)
    model.layout([Entry("a.weight", 128, 2)])
    model.append(np.random.default_rng(0), "s", 4, planes=True, missing=0.0, integral=True, text=False)
    model = closed(model)
    order = [0, 1, 2, 4, 3, *range(5, len(model.pieces))]
    path = write(tmp_path / "a.mscan", [model.pieces[i] for i in order])
    assert_refused_by_all(path, "INTEGRAL")
    with MscanReader(path) as reader:
        with pytest.raises(MscanError, match="INTEGRAL"):
            reader.planes(0)
        with pytest.raises(MscanError, match="INTEGRAL"):
            reader.sequence_integral(0)


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "old"])
def test_an_index_that_lists_another_total_or_layout_is_refused_everywhere(tmp_path: Path, linked: bool) -> None:
    model = grown(0, linked=linked)
    rng = np.random.default_rng(1)
    model.total(rng)
    model.total(rng)
    first = model.fork()
    first.total_at -= len(model.pieces[-1])
    assert verify(write(tmp_path / "right.mscan", closed(model).pieces)).ok
    assert_refused_by_all(write(tmp_path / "total.mscan", closed(first).pieces), "an INDEX must list the chunks before it")


def test_a_broken_frame_is_refused_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    model = Model(bytes(range(16)), {}, zstd=True)
    model.layout([Entry("a.weight", 128, 2)])
    right = model._chunk

    def broken(kind: int, payload: bytes, *rest: Any, **more: Any) -> int:
        return right(kind, payload[:70] + bytes(len(payload) - 70) if kind == DATA else payload, *rest, **more)

    model._chunk = broken
    model.append(np.random.default_rng(0), "s", 2, planes=True, missing=0.0, integral=True, text=False)
    model._chunk = right
    assert_refused_by_all(write(tmp_path / "a.mscan", closed(model).pieces), "zstd|frame|expand")


def test_an_old_file_goes_on_as_a_new_one(tmp_path: Path) -> None:
    model = closed(grown(0, linked=False))
    path = write(tmp_path / "a.mscan", model.pieces)
    with MscanReader(path, recovery="strict") as reader:
        assert all(is_written(reader, i, model.truths) for i in range(3))
    plane = np.ones((2, 2), np.float32)
    with MscanWriter(path, None, None, mode="a", codec="f32") as writer:
        writer.append(SequenceRecord("new", [1, 2], [0.5, 0.5], plane, plane))
    assert verify(path).ok
    bonds = [struct.unpack_from("<II", path.read_bytes(), at + 40) for kind, at in chunks(path) if kind == SEQUENCE]
    assert [bond == (0, 0) for bond in bonds] == [True, True, True, False]
    with MscanReader(path) as reader:
        np.testing.assert_array_equal(reader.planes(3)[0], plane)
        assert is_written(reader, 2, model.truths)


def test_a_set_of_ranks_is_checked_like_a_file(tmp_path: Path) -> None:
    stem = grown(0, count=1)
    a, b = closed(grown(1, fork=stem)), closed(grown(2, fork=stem))
    write(tmp_path / "s.rank0-of-2.mscan", closed(grown(4, count=1, uuid=bytes(16))).pieces)
    write(tmp_path / "s.rank1-of-2.mscan", a.pieces[:-5] + b.pieces[-5:-3] + a.pieces[-3:])
    assert not verify(tmp_path / "s.mscan").ok
    with MscanReader(tmp_path / "s.mscan") as reader, pytest.raises(MscanError, match=r"rank1-of-2.*must follow"):
        reader.verify()
    with MscanReader(tmp_path / "s.mscan", recovery="salvage") as reader:
        assert reader.report
        assert all(line.startswith("s.rank1-of-2.mscan: ") for line in reader.report)


def test_mscan_error_can_be_imported_where_it_is_raised() -> None:
    import tinyonn.errors
    import tinyonn.mscan

    assert tinyonn.mscan.MscanError is tinyonn.errors.MscanError
    assert "MscanError" in tinyonn.mscan.__all__
