"""What the fault tests share, and the processes that they start, kill and starve.

Run as a script it is one of those processes: faults.py COMMAND ARGUMENTS, where COMMAND is a function below.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import struct
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np

from tinyonn.errors import MscanError
from tinyonn.mscan import Integral, LayoutEntry, MscanReader, MscanWriter, SequenceRecord

METADATA = {"model": "tiny"}
LAYOUT = [LayoutEntry("layers.0.a.weight", 128, 2, 0), LayoutEntry("layers.0.b.weight", 64, 1, 2)]
CLOSED = 1_000_000  # acknowledged after close
MODES = ("strict", "tail", "salvage")


@cache
def record(i: int) -> SequenceRecord:
    """Sequence i of every file here: the same whenever it is asked for."""
    rng = np.random.default_rng(i)
    tokens = 1 + i % 3
    planes = rng.lognormal(-3, 3, (2, tokens, 3)).astype(np.float32)
    if i % 2:
        planes[:, 0, 1] = np.nan
        planes[0, -1, 2] = 0
    integral = Integral(*rng.random((6, 3))) if i % 4 != 3 else None
    text = f"text of {i}" if i % 2 else None
    mask = (np.arange(tokens) % 2).astype(np.uint8) if i % 3 == 0 else None
    return SequenceRecord(
        f"s{i}", rng.integers(0, 50_000, tokens), rng.random(tokens, np.float32), planes[0], planes[1], mask, text, integral
    )


def write(path: Path | str, count: int, *, first: int = 0, mode: str = "x", sync: str = "none", codec: str = "f32") -> None:
    with MscanWriter(path, METADATA, LAYOUT, mode=mode, sync=sync, codec=codec) as writer:
        for i in range(first, first + count):
            writer.append(record(i))


def assert_is_record(reader: MscanReader, at: int, i: int) -> None:
    """Sequence `at` of an f32 file is record i, bit for bit; where the reader says that it left something out, that may be missing."""
    partial = reader.recovery == "salvage" and bool(reader.report)
    expected, found = record(i), reader.sequences[at]
    assert (found.sequence_id, found.text) == (expected.sequence_id, expected.text)
    assert np.array_equal(found.token_ids, expected.token_ids)
    assert np.array_equal(found.loss, expected.loss)
    assert np.array_equal(found.mask, np.ones(found.num_tokens) if expected.mask is None else expected.mask)
    for plane, wanted in zip(reader.planes(at), (expected.activation, expected.grad_norm), strict=True):
        assert np.array_equal(plane[~np.isnan(plane)], wanted[~np.isnan(plane)])
        assert partial or np.array_equal(np.isnan(plane), np.isnan(wanted))
    integral = reader.sequence_integral(at)
    assert partial or (integral is None) == (expected.integral is None)
    if integral is not None:
        assert np.array_equal(integral.planes(), expected.integral.planes())


def read_prefix(path: Path | str, recovery: str) -> int:
    """Asserts that the sequences of a file are records 0, 1, 2 …; returns how many."""
    with MscanReader(path, recovery=recovery) as reader:
        for i in range(len(reader.sequences)):
            assert_is_record(reader, i, i)
        return len(reader.sequences)


def chunks(data: bytes) -> list[tuple[int, int, int]]:
    """(type, begin, end) of each chunk of a whole file, read by the byte table of docs/mscan.md alone."""
    found, at = [], struct.unpack_from("<Q", data, 40)[0]
    uuid = data[16:32]
    while at + 64 <= len(data) and data[at : at + 16] == uuid:
        kind, length = struct.unpack_from("<H", data, at + 16)[0], struct.unpack_from("<Q", data, at + 24)[0]
        end = at + 64 + (length + 63) // 64 * 64
        found.append((kind, at, end))
        at = end
    return found


def flip(source: str, scratch: str, width: str) -> None:
    """Changes one bit (width 1) or all eight of every byte of a file in turn; reads it in every mode; prints what came of it."""
    data = bytearray(Path(source).read_bytes())
    with MscanReader(source) as reader:
        intact = {reader.sequences[i].sequence_id: _content(reader, i) for i in range(len(reader.sequences))}
        whole = _whole(reader)
    outcomes = dict.fromkeys(("refused", "reported", "right"), 0)
    fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.write(fd, data)
    for at in range(len(data)):
        bits = 1 << at % 8 if width == "1" else 0xFF
        os.pwrite(fd, bytes([data[at] ^ bits]), at)
        for mode in MODES:
            print(f"byte {at} ^ {bits:#x}, {mode}", file=sys.stderr, flush=True)
            outcomes[_judge(scratch, mode, intact, whole)] += 1
        os.pwrite(fd, data[at : at + 1], at)
    print(outcomes)


def _judge(path: str, mode: str, intact: dict, whole: tuple) -> str:
    try:
        with MscanReader(path, recovery=mode) as reader:
            contents = {reader.sequences[i].sequence_id: _content(reader, i) for i in range(len(reader.sequences))}
            found = _whole(reader)
            reported = bool(reader.report)
    except MscanError as error:
        return "refused" if str(path) in str(error) else "nameless"
    if not reported:
        assert contents == intact
        assert found[0] == whole[0]
        np.testing.assert_allclose(found[1], whole[1], rtol=2e-3)  # without an index statistics are of the rounded values
        return "right"
    for name, content in contents.items():
        *rest, integral, planes = content
        *expected_rest, expected_integral, expected_planes = intact[name]
        assert rest == expected_rest
        assert integral in (None, expected_integral)
        here, expected = np.frombuffer(planes, np.float32), np.frombuffer(expected_planes, np.float32)
        assert (np.isnan(here) | (here == expected)).all()  # a place that was left out is missing, never another number
    return "reported"


def _content(reader: MscanReader, i: int) -> tuple:
    sequence, integral = reader.sequences[i], reader.sequence_integral(i)
    planes = np.stack(reader.planes(i)).astype(np.float32)
    parts = [np.asarray(part).tobytes() for part in (sequence.token_ids, sequence.loss, sequence.mask)]
    return (sequence.text, *parts, None if integral is None else np.stack(integral.planes()).tobytes(), planes.tobytes())


def _whole(reader: MscanReader) -> tuple:
    stats = reader.stats()
    counts = [
        n.tolist() for plane in (stats.activation, stats.grad_norm) for n in (plane.count, plane.zeros, plane.missing, plane.nonfinite)
    ]
    moments = np.stack([stats.activation.mean, stats.activation.m2, stats.grad_norm.mean, stats.grad_norm.m2])
    return (reader.metadata, list(reader.layout), counts, np.stack(reader.integral().planes()).tobytes()), moments


def truncate(source: str, scratch: str) -> None:
    """Cuts a file at every byte, reads it in every mode, appends to it and reads it again."""
    data = Path(source).read_bytes()
    listed = chunks(data)
    first = listed[0][1]
    commits = [end for kind, _, end in listed if kind == 3]
    fd = os.open(scratch, os.O_RDWR | os.O_CREAT)
    for size in range(len(data) + 1):
        print(f"{size} bytes of {len(data)}", file=sys.stderr, flush=True)
        os.pwrite(fd, data[:size], 0)  # never emptied first: some file systems then write to the disk at once
        os.ftruncate(fd, size)
        committed = sum(end <= size for end in commits)
        for mode in MODES:
            try:
                assert read_prefix(scratch, mode) == committed
                assert mode != "strict" or size == len(data)
            except MscanError:
                assert size < first or (mode == "strict" and size < len(data))
        write(scratch, len(commits) + 1 - committed, first=committed, mode="a")
        assert read_prefix(scratch, "strict") == len(commits) + 1
    print("truncated", len(data))


def kill(folder: str, rounds: str, sync: str) -> None:
    """Kills a writer at a random moment, again and again; each goes on where the last one was killed."""
    path, acknowledged = Path(folder) / "killed.mscan", 0
    rng = random.Random(5)
    for _ in range(int(rounds)):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            _append_for_ever(path, acknowledged, send, sync)
        os.close(send)
        seen = b""
        for _ in range(rng.choice((0, 1, 3, 10, 40))):
            seen += os.read(receive, 8)
        time.sleep(rng.uniform(0.0, 0.002))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the writer ended by itself"
        while piece := os.read(receive, 1 << 16):
            seen += piece
        os.close(receive)
        acknowledged = max([acknowledged, *np.frombuffer(seen, np.uint64).astype(int).tolist()])
        if not path.exists():
            assert acknowledged == 0
            continue
        try:
            found = read_prefix(path, "tail")
        except MscanError:
            assert acknowledged == 0
            continue
        assert found >= acknowledged, f"{found} of {acknowledged} sequences are left"
        acknowledged = found
    write(path, 1, first=acknowledged, mode="a")
    assert read_prefix(path, "strict") == acknowledged + 1
    print("survived", rounds, "kills with", acknowledged, "sequences")


def _append_for_ever(path: Path, first: int, send: int, sync: str) -> None:
    try:
        for start in range(first, 1 << 30, 5):  # closing and opening again are killed too
            with MscanWriter(path, METADATA, LAYOUT, mode="a" if path.exists() else "x", sync=sync, codec="f32") as writer:
                for i in range(start, start + 5):
                    assert writer.append(record(i)) == i
                    os.write(send, struct.pack("<Q", i + 1))
    finally:
        os._exit(1)


def acknowledge(path: str, count: str, sync: str, ack: str) -> None:
    """Appends records and says so on `ack` after each, and once more after closing: runs under the shim."""
    with MscanWriter(path, METADATA, LAYOUT, sync=sync, codec="f32") as writer:
        for i in range(int(count)):
            writer.append(record(i))
            os.write(int(ack), struct.pack("<Q", i + 1))
    os.write(int(ack), struct.pack("<Q", CLOSED))


def large(path: str, end: str) -> None:
    """Appends 4 MiB and closes the file, or dies before that."""
    plane = np.ones((512, 2048), np.float32)
    writer = MscanWriter(path, METADATA, [LayoutEntry("layers.0.a.weight", 2048, 2048, 0)], sync="none")
    writer.append(SequenceRecord("s", np.arange(512), np.zeros(512), plane, plane))
    if end == "kill":
        print("appended", flush=True)
        os._exit(0)
    writer.close()


def append_one(path: str, i: str) -> None:
    write(path, 1, first=int(i), mode="a")


def starve(folder: str, how: str) -> None:
    """Lets writers run out of space at every step of a file's length; nothing that append returned for may be lost."""
    path = Path(folder) / "starved.mscan"
    write(path, 4)
    need = path.stat().st_size
    refused = 0
    for limit in range(0, need, 40):
        path.unlink()
        _limit(how, limit)
        returned = 0
        try:
            with MscanWriter(path, METADATA, LAYOUT, sync="none", codec="f32") as writer:
                for i in range(4):
                    writer.append(record(i))
                    returned = i + 1
        except MscanError as error:
            refused += any(reason in str(error) for reason in ("File too large", "No space left"))
        finally:
            _limit(how, -1)
        if not path.exists():
            assert returned == 0
            path.touch()
            continue
        if path.stat().st_size < 128:
            assert returned == 0
            continue
        found = read_prefix(path, "tail")
        assert found >= returned, f"{found} of {returned} sequences are left at {limit} bytes"
        write(path, 1, first=found, mode="a")
        assert read_prefix(path, "strict") == found + 1
    print("refused", refused)


def _limit(how: str, size: int) -> None:
    if how == "file size":
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))
    else:
        ctypes.CDLL(None).shim_set_space(ctypes.c_longlong(size))


if __name__ == "__main__":
    {call.__name__: call for call in (truncate, flip, kill, acknowledge, append_one, large, starve)}[sys.argv[1]](*sys.argv[2:])
