"""`scan --dataset-path` and `corpus` read compressed files and standard input as they read the plain file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyonn.mscan import MscanReader

from .conftest import Cli, one_line

zstandard = pytest.importorskip("zstandard", reason="zstd files are zstandard's")

ROWS = [{"id": f"r{i}", "text": f"def number_{i}(x): return x + {i}  # python code, import nothing"} for i in range(9)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def frames(raw: bytes) -> bytes:
    """Several frames, one behind another, as parallel compressors write them; one without its size."""
    half = len(raw) // 2
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw[:half]) + stream.compress(raw[half:]) + stream.flush()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda raw: gzip.compress(raw[:100]) + gzip.compress(raw[100:]),  # two members, as `cat a.gz b.gz` gives
    ".zst": frames,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.fixture
def piped(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`piped(bytes, "scan", ...)`: the command with these bytes on standard input."""

    def run(raw: bytes, *arguments: object) -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(raw))))  # type: ignore[arg-type]
        return cli(*arguments)

    return run


def scanned(path: Path) -> list[tuple[Any, ...]]:
    with MscanReader(path) as reader:
        return [
            (s.sequence_id, s.text, *(plane.tobytes() for plane in reader.planes(i)), np.asarray(s.loss).tobytes())
            for i, s in enumerate(reader.sequences)
        ]


@pytest.fixture
def plain(cli: Cli, model: Path, tmp_path: Path) -> list[tuple[Any, ...]]:
    (tmp_path / "code.jsonl").write_bytes(LINES)
    assert cli("scan", "-m", model, "-d", tmp_path / "code.jsonl", "-o", tmp_path / "plain.mscan").code == 0
    return scanned(tmp_path / "plain.mscan")


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_corpus_is_scanned_as_the_plain_one(
    cli: Cli, model: Path, plain: list[tuple[Any, ...]], tmp_path: Path, suffix: str
) -> None:
    packed, out = tmp_path / f"code_corpus.jsonl{suffix}", tmp_path / "o.mscan"
    packed.write_bytes(PACKERS[suffix](LINES))
    given = ["scan", "-m", model, "-d", packed, "-o", out]
    assert cli(*given, "--limit", 4).code == 0
    ran = cli(*given)  # and goes on
    assert ran.code == 0, ran.err
    assert "4 were there" in ran.out
    assert sorted(row[:2] for row in scanned(out)) == sorted(row[:2] for row in plain)
    one_line(cli(*given), "is complete", command="tinyonn scan")
    with MscanReader(out) as reader:
        assert (reader.metadata["topic"], reader.metadata["corpus"]) == ("code", packed.name)
    assert cli("scan", "-m", model, "-d", packed, "-o", tmp_path / "whole.mscan").code == 0
    assert scanned(tmp_path / "whole.mscan") == plain
    packed.write_bytes(PACKERS[suffix](LINES.replace(b"number_3", b"number_7")))
    one_line(cli(*given), "same configuration", "corpus_sha256", command="tinyonn scan")


def test_a_compressed_list_is_read_too(cli: Cli, model: Path, plain: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "code.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    assert cli("scan", "-m", model, "-d", tmp_path / "code.json.gz", "-o", tmp_path / "o.mscan").code == 0
    assert scanned(tmp_path / "o.mscan") == plain


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_cut_or_damaged_file_is_named_and_nothing_is_written(cli: Cli, model: Path, tmp_path: Path, suffix: str) -> None:
    whole = PACKERS[suffix](os.urandom(20000).hex().encode() + b"\n" + LINES)
    broken = bytearray(whole)
    broken[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    for name, raw in (("cut", whole[:-30]), ("broken", bytes(broken))):
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.write_bytes(raw)
        # The first line is malformed on purpose: the archive's fault must not pass for a malformed record.
        ran = cli("scan", "-m", model, "-d", path, "-o", tmp_path / "o.mscan", "--skip-bad")
        one_line(ran, "must be a whole compressed file", path.name, command="tinyonn scan")
        one_line(
            cli("corpus", path, "-t", "python", "-o", tmp_path / "c.jsonl", "--skip-bad"),
            "must be a whole compressed file",
            command="tinyonn corpus",
        )
        assert not (tmp_path / "c.jsonl").exists()
        assert not (tmp_path / "o.mscan").exists()


def test_what_compression_cannot_help_is_named(cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, raw, words in (
        ("a.zip", b"PK\x03\x04" + bytes(60), "zip archive"),
        ("a.parquet.gz", gzip.compress(b"PAR1" + bytes(60)), "plain file where it is Parquet"),
        ("empty.gz", gzip.compress(b""), "at least one good record"),
        ("bad.jsonl.gz", gzip.compress(LINES + b"{\n"), "bad.jsonl.gz, line 10: must be one JSON object"),
    ):
        (tmp_path / name).write_bytes(raw)
        one_line(cli("scan", "-m", model, "-d", tmp_path / name, "-o", tmp_path / "o.mscan"), words, command="tinyonn scan")
    (tmp_path / "a.zst").write_bytes(frames(LINES))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    ran = cli("scan", "-m", model, "-d", tmp_path / "a.zst", "-o", tmp_path / "o.mscan")
    one_line(ran, "a file compressed by zstd needs zstandard: pip install zstandard.", command="tinyonn scan")


TEXTS = "An ordinary text about nothing at all, long enough to be kept. " * 9


def archive(raw: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(raw)
        tar.addfile(member, io.BytesIO(raw))
    return packed.getvalue()


@pytest.mark.parametrize("content", ["records", "text"])
@pytest.mark.parametrize(
    ("pack", "words"),
    [
        (lambda text: text.encode("utf-16"), ("UTF-8, got UTF-16:", "iconv -f UTF-16 -t UTF-8")),
        (lambda text: text.encode("utf-16-le"), ("UTF-8, got UTF-16LE:", "iconv -f UTF-16LE -t UTF-8")),
        (lambda text: text.encode("utf-16-be"), ("UTF-8, got UTF-16BE:", "iconv -f UTF-16BE -t UTF-8")),
        (lambda text: text.encode("utf-32"), ("UTF-8, got UTF-32:", "iconv -f UTF-32 -t UTF-8")),
        (lambda text: text.encode("utf-32-be"), ("UTF-8, got UTF-32BE:", "iconv -f UTF-32BE -t UTF-8")),
        (lambda text: gzip.compress(text.encode("utf-16-le")), ("UTF-8, got UTF-16LE:",)),
        (
            lambda text: lzma.compress(text.encode(), format=lzma.FORMAT_ALONE),
            ("by gzip, bzip2, xz or zstd, got LZMA without xz:", "unpack"),
        ),
        (lambda text: archive(text.encode()), ("got a tar archive:", "unpack it first")),
        (lambda text: gzip.compress(archive(text.encode())), ("got a tar archive:", "unpack it first")),
        (lambda text: gzip.compress(gzip.compress(text.encode())), ("must be compressed once", "unpack it first")),
        (lambda text: b"\x04\x22\x4d\x18" + text.encode(), ("got lz4:", "unpack it first")),
    ],
    ids=["utf16", "utf16le", "utf16be", "utf32", "utf32be", "utf16le.gz", "lzma", "tar", "tar.gz", "gz.gz", "lz4"],
)
def test_a_kind_that_is_not_read_is_named_with_the_remedy(
    cli: Cli, model: Path, piped: Callable[..., Any], tmp_path: Path, pack: Callable[[str], bytes], words: tuple[str, ...], content: str
) -> None:
    raw = pack(LINES.decode() if content == "records" else TEXTS)
    (tmp_path / "a.dat").write_bytes(raw)
    out = tmp_path / ("o.mscan" if content == "records" else "o.jsonl")
    if content == "records":
        one_line(cli("scan", "-m", model, "-d", tmp_path / "a.dat", "-o", out), "a.dat", *words, command="tinyonn scan")
        one_line(piped(raw, "scan", "-m", model, "-d", "-", "-o", out), "standard input", *words, command="tinyonn scan")
    one_line(cli("corpus", tmp_path / "a.dat", "-t", "any", "--everything", "-o", out), "a.dat", *words, command="tinyonn corpus")
    assert not out.exists()


def test_zstd_files_may_begin_with_a_frame_to_skip(cli: Cli, model: Path, plain: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """As those of pzstd, which writes the size of each frame in front of it."""
    path = tmp_path / "code.jsonl.zst"
    packed = zstandard.ZstdCompressor().compress(LINES)
    path.write_bytes(struct.pack("<III", 0x184D2A50, 4, len(packed)) + packed)
    ran = cli("scan", "-m", model, "-d", path, "-o", tmp_path / "o.mscan")
    assert ran.code == 0, ran.err
    assert scanned(tmp_path / "o.mscan") == plain


def test_a_text_that_begins_like_an_archive_is_a_text(cli: Cli, tmp_path: Path) -> None:
    text = "BZh is how the files of bzip2 begin, and so do the notes on their format. " * 3
    (tmp_path / "notes.txt").write_text(text)
    ran = cli("corpus", tmp_path / "notes.txt", "-t", "any", "--everything", "-o", tmp_path / "c.jsonl")
    assert ran.code == 0, ran.err
    assert cut_from(tmp_path / "c.jsonl")[0]["text"].strip() == text.strip()


@pytest.mark.parametrize("packer", [None, ".gz", ".zst"], ids=["plain", "gz", "zst"])
def test_standard_input_is_scanned_as_the_file(
    piped: Callable[..., Any], model: Path, plain: list[tuple[Any, ...]], tmp_path: Path, packer: str | None
) -> None:
    out = tmp_path / "o.mscan"
    raw = LINES if packer is None else PACKERS[packer](LINES)
    given = ["scan", "-m", model, "-d", "-", "-o", out]
    ran = piped(raw, *given)
    assert ran.code == 0, ran.err
    assert scanned(out) == plain
    with MscanReader(out) as reader:
        assert (reader.metadata["topic"], reader.metadata["corpus"]) == ("stdin", "standard input")
        first = reader.metadata["corpus_sha256"]
    refused = "must not exist when dataset_path is standard input, which cannot be resumed"
    one_line(piped(raw, *given), refused, "--overwrite", command="tinyonn scan")
    assert piped(LINES.replace(b"number_3", b"number_7"), *given, "--overwrite").code == 0
    with MscanReader(out) as reader:
        assert reader.metadata["corpus_sha256"] != first


def test_a_real_pipe_is_read(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinyonn", "scan", "-m", str(model), "-d", "-", "-o", str(tmp_path / "o.mscan")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert process.stdin is not None
    for start in range(0, len(LINES), 50):  # in pieces that end within lines
        process.stdin.write(LINES[start : start + 50])
        process.stdin.flush()
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    assert out.startswith(b"scanned  9 sequences")


def test_standard_input_that_cannot_be_read(
    piped: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["scan", "-m", model, "-d", "-", "-o", tmp_path / "o.mscan"]
    one_line(piped(b"", *given), "nothing on standard input", command="tinyonn scan")
    one_line(piped(LINES + b"{\n", *given), "standard input, line 10: must be one JSON object", command="tinyonn scan")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    one_line(piped(LINES, *given), "2 processes share it, got standard input", command="tinyonn scan")
    assert not (tmp_path / "o.mscan").exists()


def cut_from(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k != "source"} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_corpus_is_cut_from_compressed_records(cli: Cli, tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACKERS[suffix](LINES))
    ran = cli("corpus", tmp_path / f"a.jsonl{suffix}", "-t", "any", "--everything", "-o", tmp_path / "c.jsonl")
    assert ran.code == 0, ran.err
    assert cut_from(tmp_path / "c.jsonl") == ROWS


def test_a_corpus_is_cut_from_a_folder_with_compressed_files(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "b.txt.zst").write_bytes(frames(("A long enough text of the folder. " * 3).encode()))
    (folder / "c.bin.gz").write_bytes(gzip.compress(bytes(100)))
    ran = cli("corpus", folder, "-t", "any", "--everything", "-o", tmp_path / "c.jsonl")
    assert ran.code == 0, ran.err
    found = cut_from(tmp_path / "c.jsonl")
    assert found[:9] == ROWS
    assert found[9]["text"] == "A long enough text of the folder. " * 3
    assert len(found) == 10


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (LINES, [row["text"] for row in ROWS]),
        (json.dumps(ROWS).encode(), [row["text"] for row in ROWS]),
        (gzip.compress(LINES), [row["text"] for row in ROWS]),
        (b"A plain text, long enough to be kept as one.\n", ["A plain text, long enough to be kept as one.\n"]),
    ],
    ids=["lines", "list", "gz", "text"],
)
def test_a_corpus_is_cut_from_standard_input(piped: Callable[..., Any], tmp_path: Path, raw: bytes, texts: list[str]) -> None:
    ran = piped(raw, "corpus", "-", "-t", "any", "--everything", "-o", tmp_path / "c.jsonl")
    assert ran.code == 0, ran.err
    assert [row["text"] for row in cut_from(tmp_path / "c.jsonl")] == texts
