"""Writers that are killed, starved, cut off from the disk or doubled: what `append` and `close` promised is there."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tinyonn.errors import MscanError
from tinyonn.mscan import MscanReader, MscanWriter

SCRIPT = Path(__file__).with_name("faults.py")
SPEC = spec_from_file_location("mscan_faults", SCRIPT)
faults = module_from_spec(SPEC)
SPEC.loader.exec_module(faults)

SECTOR = 64  # bytes that reach the disk together; less than any disk's, so that every chunk can be torn
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def run(*arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not COMPILER or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler to preload a shim under the writer")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-O1", "-o", library, SCRIPT.with_name("write_shim.c"), "-ldl"], check=True, capture_output=True
    )
    return str(library)


@pytest.mark.parametrize("sync", ["none", "chunk"])
def test_a_killed_writer_loses_nothing_that_append_returned_for(tmp_path: Path, sync: str) -> None:
    assert run("kill", tmp_path, 40, sync).startswith("survived 40 kills")


def test_a_file_that_may_grow_no_further_keeps_what_append_returned_for(tmp_path: Path) -> None:
    assert int(run("starve", tmp_path, "file size").split()[1]) > 20


def test_a_full_disk_keeps_what_append_returned_for(tmp_path: Path, shim: str) -> None:
    environment = {"LD_PRELOAD": shim, "SHIM_TARGET": "starved.mscan", "SHIM_JOURNAL": os.devnull}
    assert int(run("starve", tmp_path, "space", **environment).split()[1]) > 20


def test_a_second_appender_is_refused_in_this_process_and_in_another(tmp_path: Path) -> None:
    path = tmp_path / "shared.mscan"
    with MscanWriter(path, faults.METADATA, faults.LAYOUT, codec="f32", sync="none") as writer:
        writer.append(faults.record(0))
        with pytest.raises(MscanError, match="only one writer"):
            MscanWriter(path, faults.METADATA, faults.LAYOUT, mode="a")
        with pytest.raises(AssertionError, match="only one writer"):
            run("append_one", path, 1)
        with pytest.raises(MscanError, match="only one writer"):
            MscanWriter(path, faults.METADATA, faults.LAYOUT, mode="w")
        writer.append(faults.record(1))
    run("append_one", path, 2)
    assert faults.read_prefix(path, "strict") == 3


def test_a_reader_beside_a_writer_sees_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "live.mscan"
    with MscanWriter(path, faults.METADATA, faults.LAYOUT, codec="f32", sync="none") as writer:
        for i in range(20):
            writer.append(faults.record(i))
            assert faults.read_prefix(path, "tail") == i + 1
    with MscanReader(path) as before, MscanWriter(path, None, None, mode="a", codec="f32", sync="none") as writer:
        writer.append(faults.record(20))
        for i in range(20):
            faults.assert_is_record(before, i, i)


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed and continued"])
def test_blocks_reserved_for_large_appends_are_given_back(tmp_path: Path, killed: bool) -> None:
    path = tmp_path / "large.mscan"
    run("large", path, "kill" if killed else "close")
    if killed:
        with MscanWriter(path, None, None, mode="a", sync="none") as writer:
            writer.append_integral(faults.Integral.zeros(2048))
    size = path.stat().st_size
    assert size > 4 << 20
    assert path.stat().st_blocks * 512 < size + (1 << 20)
    with MscanReader(path, recovery="strict") as reader:
        assert len(reader.sequences) == 1


def journal(path: Path) -> list[tuple[str, int, bytes]]:
    """(kind, number, data) of each event the shim saw, in order."""
    data, at, events = path.read_bytes(), 0, []
    while at < len(data):
        kind, a, b = struct.unpack_from("<cQQ", data, at)
        at += 17
        payload = data[at : at + b] if kind == b"W" else b""
        at += len(payload)
        events.append((kind.decode(), a, payload))
    return events


def pieces(event: tuple[str, int, bytes]) -> list[tuple[str, int, bytes]]:
    kind, at, data = event
    cuts = range(0, len(data), SECTOR) if kind == "W" else []
    return [(kind, at + cut, data[cut : cut + SECTOR]) for cut in cuts] if cuts else [event]


def image(events: list[tuple[str, int, bytes]]) -> bytes:
    content = bytearray()
    for kind, at, data in events:
        if kind == "T":
            content[at:] = bytes(max(0, at - len(content)))
        elif kind == "W":
            content.extend(bytes(max(0, at + len(data) - len(content))))
            content[at : at + len(data)] = data
    return bytes(content)


@pytest.mark.parametrize("sync", ["none", "chunk", "close"])
def test_what_each_sync_mode_promises_when_the_machine_fails(tmp_path: Path, shim: str, sync: str) -> None:
    """Replays a writer's system calls up to each one; of what was not synced, none, all or any part reached the disk."""
    count, path, scratch = 5, tmp_path / "synced.mscan", tmp_path / "crashed.mscan"
    receive, send = os.pipe()
    environment = {"LD_PRELOAD": shim, "SHIM_TARGET": path.name, "SHIM_JOURNAL": str(tmp_path / "journal"), "SHIM_ACK": str(send)}
    subprocess.run(
        [sys.executable, SCRIPT, "acknowledge", path, str(count), sync, str(send)],
        check=True,
        env={**os.environ, **environment},
        pass_fds=[send],
        timeout=60,
    )
    os.close(receive)
    os.close(send)
    events = journal(tmp_path / "journal")
    assert image(events) == path.read_bytes()
    assert [a for kind, a, _ in events if kind == "A"] == [*range(1, count + 1), faults.CLOSED]

    rng = random.Random(11)
    images = 0
    for end in range(len(events) + 1):
        past = events[:end]
        synced = max((i + 1 for i, (kind, _, _) in enumerate(past) if kind == "F"), default=0)
        durable, pending = past[:synced], [piece for event in past[synced:] for piece in pieces(event) if piece[0] in "WT"]
        named = any(kind == "D" for kind, _, _ in past)
        acknowledged = max((a for kind, a, _ in past if kind == "A"), default=0)
        promised = {
            "none": 0,
            "chunk": min(acknowledged, count),
            "close": count if acknowledged == faults.CLOSED else 0,
        }[sync]
        assert named or promised == 0, "a file whose directory was not synced may vanish"
        for reached in ([], pending, *(sorted_sample(rng, pending) for _ in range(3))):
            scratch.write_bytes(image([*durable, *reached]))
            images += 1
            found, recovery = survivors(scratch)
            assert recovery == "tail" or promised == 0, f"tail refused after event {end} of {len(events)}"
            assert found >= promised, f"{found} of {promised} sequences after event {end} of {len(events)}"
    assert images > 5 * count
    if sync == "none":
        assert not any(kind in "FD" for kind, _, _ in events)


def sorted_sample(rng: random.Random, pending: list) -> list:
    kept = [piece for piece in pending if rng.random() < 0.6]
    return kept if rng.random() < 0.5 else rng.sample(kept, len(kept))


def survivors(path: Path) -> tuple[int, str]:
    """How many sequences a reader finds, and by which recovery; each must be true."""
    try:
        return faults.read_prefix(path, "tail"), "tail"
    except MscanError:
        pass
    try:
        with MscanReader(path, recovery="salvage") as reader:
            for at in range(len(reader.sequences)):
                faults.assert_is_record(reader, at, int(reader.sequences[at].sequence_id[1:]))
            return len(reader.sequences), "salvage"
    except MscanError:
        return 0, "none"
