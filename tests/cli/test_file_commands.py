"""`tinyonn info`, `verify`, `recover`, `convert`: what a file holds, whether it is whole, and what becomes of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tinyonn.mscan import LayoutEntry, MscanReader, MscanWriter, SequenceRecord

from .conftest import Cli, one_line

LAYOUT = [LayoutEntry("model.layers.0.q_proj.weight", 128, 2, 0), LayoutEntry("lm_head.weight", 100, 2, 2)]


def make(path: Path, names: list[str], seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    with MscanWriter(path, {"model": "tiny", "topic": "cats", "credit": "full", "model_weights_sha256": "ab" * 32}, LAYOUT) as writer:
        for name in names:
            writer.append(
                SequenceRecord(
                    name,
                    np.arange(5),
                    np.array([1, 2, 3, 2, np.nan], np.float32),
                    rng.random((5, 4), np.float32),
                    rng.random((5, 4), np.float32),
                    text=f"text of {name} " * 10,
                )
            )
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return make(tmp_path / "a.mscan", ["s0", "s1", "s2"])


@pytest.fixture
def damaged(scan: Path, tmp_path: Path) -> Path:
    """One bit of a value in the middle is another."""
    raw = bytearray(scan.read_bytes())
    with MscanReader(scan) as reader:
        codes = np.ascontiguousarray(reader.codes(1)[0].activation)
    at = raw.find(codes.tobytes()[:8])
    assert at > 0
    raw[at] ^= 4
    path = tmp_path / "damaged.mscan"
    path.write_bytes(raw)
    return path


def version_1(path: Path) -> Path:
    metadata = {
        "version": "1.1",
        "id_to_param_name_map": {"0": "layers.0.q_proj"},
        "sequences": [{"sequence_id": "s0", "num_tokens": 2, "source": "x"}],
    }
    header = json.dumps(metadata).encode()
    records = np.array([(0, 0, 0, 7, 1), (1, 0, 0, 9, 3)], dtype=np.dtype("<u4,<u2,<u2,<u2,<u2"))
    path.write_bytes(struct.pack("<5sHII", b"MSCAN", 1, len(header), len(records)) + header + records.tobytes())
    return path


def test_info_tells_what_there_is(cli: Cli, scan: Path) -> None:
    ran = cli("info", scan, "--sequences", 2, "--layout")
    assert ran.code == 0, ran.err
    for words in (
        f"{scan}, ",
        ".mscan version 2",
        "3, 15 tokens",
        "4: 2 weights, 1 layer",
        "model ",
        "tiny",
        "cats",
        "s0 ",
        "2.000  text of s0",
    ):
        assert words in ran.out
    assert "abababababababab\n" in ran.out  # a hash, shortened
    assert "model.layers.0.q_proj.weight       128       2      0" in ran.out
    assert "s2" not in ran.out
    assert max(map(len, ran.out.replace(str(scan), "x").splitlines())) <= 80


def test_info_as_json(cli: Cli, scan: Path) -> None:
    found = json.loads(cli("info", scan, "--json", "--sequences", 1).out)
    assert (found["version"], found["sequences"], found["tokens"], found["blocks"]) == (2, 3, 15, 4)
    assert found["layout"][1] == {"name": "lm_head.weight", "out_features": 100, "blocks": 2, "base": 2}
    assert found["metadata"]["topic"] == "cats"
    assert found["first_sequences"] == [{"sequence_id": "s0", "tokens": 5, "loss": 2.0, "text": "text of s0 " * 10}]


def test_info_of_a_cut_file_says_what_is_missing(cli: Cli, scan: Path) -> None:
    raw = scan.read_bytes()
    scan.write_bytes(raw[: len(raw) // 2])
    ran = cli("info", scan)
    assert ran.code == 0, ran.err
    assert "missing" in ran.out


@pytest.mark.parametrize("command", ["info", "report", "convert", "compare"])
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "at least 15 bytes, got an empty file"),
        (b"hello", "must start with MSCAN"),
        (b"MSCAT\2", "must start with MSCAN"),
        (b"a text of more than 15 bytes", "must start with MSCAN"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "must start with MSCAN"),
        (b"MSCAN\2\0", "at least 15 bytes, got 7"),
        (b"MSCAN\2\0" + bytes(20), "must hold its 64-byte prologue"),
        (b"MSCAN\x09\0" + bytes(99), "version must be 1 or 2, got 9"),
        (None, "Is a directory"),
    ],
    ids=["empty", "text5", "almost", "text28", "png", "cut7", "cut27", "version9", "folder"],
)
def test_a_file_of_another_kind_is_named_and_no_recovery_is_offered(
    cli: Cli, scan: Path, tmp_path: Path, command: str, raw: bytes | None, words: str
) -> None:
    other, output = tmp_path / "other.mscan", tmp_path / ("new.mscan" if command == "convert" else "new.html")
    other.mkdir() if raw is None else other.write_bytes(raw)
    files = [scan, other] if command == "compare" else [other]
    ran = cli(command, *files, *([] if command == "info" else ["-o", output]))
    one_line(ran, "other.mscan", words, command=f"tinyonn {command}")
    assert "recover" not in ran.err
    assert not output.exists()


def test_verify_is_0_for_whole_files_and_1_for_damaged(cli: Cli, scan: Path, damaged: Path) -> None:
    ran = cli("verify", scan)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"ok       {scan}: version 2, 3 sequences, 15 tokens, ")
    ran = cli("verify", damaged, scan)
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"DAMAGED  {damaged} at byte ")
    assert f"tinyonn recover {damaged} -o {damaged.with_suffix('.recovered.mscan')}` keeps 3 sequences" in lines[1]
    assert lines[2].startswith("ok ")


def test_recover_keeps_what_is_whole(cli: Cli, scan: Path, damaged: Path, tmp_path: Path) -> None:
    output = tmp_path / "fixed.mscan"
    before = damaged.read_bytes()
    ran = cli("recover", damaged, "-o", output)
    assert ran.code == 0, ran.err
    assert "3 sequences, 15 tokens" in ran.out
    assert "lost     bytes " in ran.out
    assert damaged.read_bytes() == before
    with MscanReader(output) as fixed, MscanReader(scan) as whole:
        # The values of s1 are gone, and are not made up; its tokens and losses are still there.
        assert [fixed.sequences[i].sequence_id for i in range(3)] == ["s0", "s1", "s2"]
        assert np.isnan(fixed.planes(1)).all()
        np.testing.assert_array_equal(fixed.sequences[1].loss, whole.sequences[1].loss)
        np.testing.assert_allclose(fixed.planes(2)[0], whole.planes(2)[0], rtol=5e-4)
    assert cli("verify", output).code == 0
    one_line(cli("recover", damaged, "-o", output), "output must not exist yet", str(output), command="tinyonn recover")
    assert cli("recover", damaged, "-o", output, "--overwrite").code == 0


def test_version_1_becomes_2(cli: Cli, tmp_path: Path) -> None:
    old, new = version_1(tmp_path / "old.mscan"), tmp_path / "new.mscan"
    ran = cli("convert", old, "--output_path", new)
    assert ran.code == 0, ran.err
    with MscanReader(new) as reader:
        assert reader.version == 2
        np.testing.assert_array_equal(reader.planes(0)[0][:, 0], [7, 9])
        np.testing.assert_array_equal(reader.planes(0)[1][:, 0], [1, 3])


def test_files_are_merged(cli: Cli, scan: Path, tmp_path: Path) -> None:
    other, both = make(tmp_path / "b.mscan", ["t0"], seed=1), tmp_path / "both.mscan"
    ran = cli("convert", scan, other, "-o", both, "--codec", "f32")
    assert ran.code == 0, ran.err
    assert "4 sequences, 20 tokens" in ran.out
    with MscanReader(both) as reader:
        assert sorted(reader.sequences[i].sequence_id for i in range(4)) == ["s0", "s1", "s2", "t0"]
    one_line(cli("convert", scan, scan, "-o", tmp_path / "c.mscan"), "unique", "'s0'", command="tinyonn convert")
    assert not (tmp_path / "c.mscan").exists()


def test_compression_and_codec_are_used(cli: Cli, scan: Path, tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    for options, name in (((), "plain"), (("--codec", "f32"), "exact"), (("--compression", "zstd"), "packed")):
        assert cli("convert", scan, "-o", tmp_path / f"{name}.mscan", *options).code == 0
        assert cli("verify", tmp_path / f"{name}.mscan").code == 0
    plain, exact, packed = ((tmp_path / f"{name}.mscan").read_bytes() for name in ("plain", "exact", "packed"))
    assert exact != plain != packed
    assert b"\x28\xb5\x2f\xfd" in packed
    assert b"\x28\xb5\x2f\xfd" not in plain


def test_exports(cli: Cli, scan: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    assert cli("convert", scan, "-o", tmp_path / "a.npz").code == 0
    with MscanReader(scan) as reader, np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["activation"][5:10], reader.planes(1)[0])
    assert cli("convert", scan, "--to", "parquet", "-o", tmp_path / "table").code == 0
    assert pq.read_table(tmp_path / "table").num_rows == 15 * 4


def test_bad_conversions_are_one_line(cli: Cli, scan: Path, damaged: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.mscan"
    words.write_text("only words, and not a scan" * 10)
    for arguments, parts in (
        (("convert", scan, "-o", tmp_path / "x.csv"), ("output must end in .mscan, .parquet or .npz",)),
        (("convert", scan, "-o", scan, "--overwrite"), ("must be another file than the source",)),
        (("convert", scan, scan, "-o", tmp_path / "x.npz"), ("one source, got 2",)),
        (("convert", scan, "-o", tmp_path / "x.npz", "--codec", "f32"), ("--codec and --compression must be left out",)),
        (("convert", tmp_path / "none.mscan", "-o", tmp_path / "x.mscan"), ("none.mscan",)),
        (("convert", damaged, "-o", tmp_path / "x.mscan"), (str(damaged), "byte")),
        (("info", words), (str(words),)),
        (("info", tmp_path), (str(tmp_path),)),
        (("recover", words, "-o", tmp_path / "x.mscan"), (str(words),)),
        (("verify", tmp_path / "none.mscan"), ("none.mscan", "No such file")),
    ):
        one_line(cli(*arguments), *parts, command=f"tinyonn {arguments[0]}")
    assert not (tmp_path / "x.mscan").exists()
    assert cli("verify", words).code == 1
