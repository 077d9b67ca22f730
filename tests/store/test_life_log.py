"""The life log keeps every whole record, removes a torn last one, and names any other damage."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

from tinyonn.errors import InputError
from tinyonn.store import life_log
from tinyonn.store.life_log import LifeLog, LifeLogError, environment, read_life_log

EVENTS = [
    ("begin", 0, {"life": "4f0c", "parent": None}),
    ("stretch", 0, {"data": "bücher", "options": {"number": 3, "rates": [0.1, {"number": 4}, {"number": 5}]}, "text": '"}\n{"number": 9'}),
    ("metrics", 20, {"loss": 2.5, "pi": 0.25}),
    ("save", 20, {"bytes": 1234}),
    ("stop", 21, {"reason": "SIGTERM"}),
]


def write(path: Path, events=EVENTS) -> None:
    with LifeLog(path) as log:
        for event, step, fields in events:
            log.append(event, step, **fields)


def unchecked(line: bytes) -> tuple[bytes, str]:
    """A line without its checksum and newline, and the checksum."""
    found = re.fullmatch(rb'(.*), "crc": "([0-9a-f]{8})"\}\n', line, re.DOTALL)
    return found[1] + b"}", found[2].decode()


def whole_lines(data: bytes) -> list[bytes]:
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def test_each_line_is_json_with_the_running_checksum(tmp_path):
    """Of all lines so far without their checksums, computed at once here."""
    path = tmp_path / "a" / "b" / "life.jsonl"
    write(path)
    lines = whole_lines(path.read_bytes())
    so_far = b""
    for line, number in zip(lines, range(1, 6), strict=True):
        body, crc = unchecked(line)
        so_far += body
        assert crc == f"{zlib.crc32(so_far):08x}"
        record = json.loads(line)
        assert list(record)[:4] == ["number", "time", "event", "step"]
        assert list(record)[-1] == "crc"
        assert record["number"] == number
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", record["time"])


def test_what_is_appended_is_read_also_after_it_was_closed(tmp_path):
    path = tmp_path / "life.jsonl"
    write(path, EVENTS[:2])
    with LifeLog(path) as log:
        assert (log.number, log.dropped) == (2, None)
        for event, step, fields in EVENTS[2:]:
            log.append(event, step, durable=True, **fields)
    found = read_life_log(path)
    assert found.torn is None
    assert [(record["event"], record["step"]) for record in found.records] == [(event, step) for event, step, _ in EVENTS]
    for record, (_, _, fields) in zip(found.records, EVENTS, strict=True):
        assert fields.items() <= record.items()


def test_an_empty_log_is_read_as_no_records(tmp_path):
    path = tmp_path / "life.jsonl"
    LifeLog(path).close()
    assert (read_life_log(path).records, read_life_log(path).effective()) == ([], [])


def test_a_file_cut_at_any_byte_keeps_its_whole_records(tmp_path):
    path = tmp_path / "life.jsonl"
    write(path)
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = data[:size].count(b"\n")
        rest = data[data[:size].rfind(b"\n") + 1 : size].decode() or None
        found = read_life_log(path)
        assert (len(found.records), found.torn) == (whole, rest)
        assert path.stat().st_size == size
        with LifeLog(path) as log:
            assert (log.number, log.dropped) == (whole, rest)
            log.append("stop", 30, reason="again")
        assert [record["number"] for record in read_life_log(path).records] == list(range(1, whole + 2))
        assert path.read_bytes().startswith(b"".join(whole_lines(data[:size])))


def test_a_flipped_bit_anywhere_is_found_in_its_line(tmp_path):
    path = tmp_path / "life.jsonl"
    write(path)
    data = path.read_bytes()
    lines = whole_lines(data)
    before_last = len(data) - len(lines[-1])
    for place in range(len(data)):
        for bit in (0, 3, 5) if place % 7 else range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            if place < before_last:
                line = data[:place].count(b"\n") + 1
                for opened in (LifeLog, read_life_log):
                    with pytest.raises(LifeLogError, match=rf"life\.jsonl, line {line}: [^\n]*$") as error:
                        opened(path)
                    assert error.value.line == line
                assert path.read_bytes() == changed
            else:
                with LifeLog(path) as log:
                    assert log.number == len(lines) - 1
                    assert log.dropped == bytes(changed[before_last:]).decode("utf-8", "replace")
                assert path.read_bytes() == data[:before_last]


def test_the_message_has_both_checksums(tmp_path):
    path = tmp_path / "life.jsonl"
    write(path)
    lines = whole_lines(path.read_bytes())
    right = unchecked(lines[2])[1]
    wrong = f"{int(right, 16) ^ 1:08x}"
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(right.encode(), wrong.encode()), *lines[3:]]))
    message = f"{path}, line 3: its checksum must be {right}, got {wrong}; the 2 lines before it are whole."
    with pytest.raises(LifeLogError, match=f"^{re.escape(message)}$"):
        read_life_log(path)


def swapped(lines: list[bytes], place: int) -> list[bytes]:
    return [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]]


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    "change",
    [
        lambda lines, place: lines[:place] + lines[place + 1 :],
        swapped,
        lambda lines, place: [*lines[: place + 1], *lines[place:]],
        lambda lines, place: [*lines[:place], b"\n", *lines[place:]],
    ],
    ids=["removed", "swapped", "twice", "blank"],
)
def test_a_line_in_the_wrong_place_is_noticed(tmp_path, change, place):
    path = tmp_path / "life.jsonl"
    write(path)
    path.write_bytes(b"".join(change(whole_lines(path.read_bytes()), place)))
    with pytest.raises(LifeLogError, match=r"life\.jsonl, line \d: it") as found:
        read_life_log(path)
    assert found.value.line in (place + 1, place + 2)


def test_threads_share_a_log(tmp_path):
    path = tmp_path / "life.jsonl"
    with LifeLog(path) as log:

        def work(name: str) -> None:
            for step in range(300):
                log.append("metrics", step, thread=name, text="x" * (step % 50))

        threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    records = read_life_log(path).records
    assert [record["number"] for record in records] == list(range(1, 901))
    for name in "abc":
        assert [record["step"] for record in records if record["thread"] == name] == list(range(300))


APPENDER = """
import sys
from tinyonn.store.life_log import LifeLog
log = LifeLog(sys.argv[1])
for step in range(10**9):
    print(log.append("metrics", step, text="x" * (step % 3000))["number"], flush=True)
"""


def test_a_killed_process_loses_no_acknowledged_record(tmp_path):
    path = tmp_path / "life.jsonl"
    acknowledged = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", APPENDER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = process.stdout.readline()
        assert int(first) > acknowledged
        time.sleep(0.05)
        assert read_life_log(path).records  # while the other process appends
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        acknowledged = int((first + rest).rpartition("\n")[0].split("\n")[-1])
        found = read_life_log(path)
        assert len(found.records) >= acknowledged
        with LifeLog(path) as log:
            assert log.number == len(found.records)


def test_a_clock_that_runs_backwards_is_in_the_record(tmp_path, monkeypatch):
    path = tmp_path / "life.jsonl"
    begin = 1_700_000_000.25
    times = iter([begin, begin + 10, begin - 3590, begin - 3500])
    monkeypatch.setattr(life_log.time, "time", lambda: next(times))
    write(path, [("metrics", step, {}) for step in (1, 2)])
    write(path, [("metrics", step, {}) for step in (3, 4)])
    records = read_life_log(path).records
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record.get("clock") for record in records] == [None, None, -3600.0, None]
    assert records[2]["time"] == "2023-11-14T21:13:30.250000+00:00"


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "life.jsonl"
    write(path, [("metrics", 1, {"loss": math.nan, "norms": [math.inf, 1.5, {"low": -math.inf}]})])

    def refused(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    record = json.loads(path.read_text(), parse_constant=refused)
    assert (record["loss"], record["norms"]) == (None, [None, 1.5, {"low": None}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": Path("x")}, r"^data must be a JSON value, got PosixPath "),
        ({"options": {"a": [1, {2}]}}, r"^options\.a\[1\] must be a JSON value, got set \{2\}\.$"),
        ({"layers": {1: 2}}, r"^layers must have strings as keys, got int 1\.$"),
        ({"text": b"x"}, r"^text must be a JSON value, got bytes b'x'\.$"),
    ],
    ids=["path", "set", "key", "bytes"],
)
def test_a_value_that_is_no_json_is_named_and_not_written(tmp_path, fields, message):
    with LifeLog(tmp_path / "life.jsonl") as log:
        with pytest.raises(TypeError, match=message):
            log.append("metrics", 1, **fields)
        assert log.append("metrics", 1)["number"] == 1


@pytest.mark.parametrize(
    ("event", "step", "fields", "error", "message"),
    [
        ("", 1, {}, ValueError, "event must not be empty"),
        (3, 1, {}, TypeError, "event must be a string, got int 3"),
        ("save", 1.0, {}, TypeError, "step must be an integer, got float 1.0"),
        ("save", True, {}, TypeError, "step must be an integer, got bool True"),
        ("save", -1, {}, ValueError, "step must be at least 0, got -1"),
        ("save", 1, {"crc": "x"}, ValueError, "fields must not be named number, time, event, step, clock, crc, got crc"),
    ],
    ids=["no event", "event", "step", "truth", "negative", "reserved"],
)
def test_bad_arguments_are_named(tmp_path, event, step, fields, error, message):
    with LifeLog(tmp_path / "life.jsonl") as log, pytest.raises(error, match=re.escape(message)):
        log.append(event, step, **fields)


def test_a_closed_log_takes_no_record(tmp_path):
    log = LifeLog(tmp_path / "life.jsonl")
    log.close()
    log.close()
    with pytest.raises(ValueError, match=r"log must be open, got .*life\.jsonl, which is closed\."):
        log.append("stop", 1)


@pytest.mark.parametrize("room", [0, 1, 40, 109])
def test_a_full_disk_leaves_no_half_record(tmp_path, files_of_at_most, room):
    path = tmp_path / "life.jsonl"
    write(path, EVENTS[:2])
    before = path.read_bytes()
    with LifeLog(path) as log:
        with files_of_at_most(len(before) + room):
            for _ in range(2):
                with pytest.raises(InputError, match=r"^log .*life\.jsonl cannot be written: [^\n]+\.$"):
                    log.append("metrics", 20, text="x" * 100)
                assert path.read_bytes() == before
        assert log.append("metrics", 20, loss=1.0)["number"] == 3
    assert [record["event"] for record in read_life_log(path).records] == ["begin", "stretch", "metrics"]


def test_half_a_record_that_could_not_be_removed_is_removed_before_the_next(tmp_path, files_of_at_most, monkeypatch):
    path = tmp_path / "life.jsonl"
    write(path, EVENTS[:2])
    size = path.stat().st_size

    def failed(file: int, length: int) -> None:
        raise OSError(5, "Input/output error")

    with LifeLog(path) as log:
        with monkeypatch.context() as patched, files_of_at_most(size + 30):
            patched.setattr(os, "ftruncate", failed)
            for message in ("no room for a whole line", "a part of a record cannot be removed"):
                with pytest.raises(InputError, match=message):
                    log.append("metrics", 20, text="x" * 100)
            assert path.stat().st_size == size + 30
        assert read_life_log(path).torn is not None
        log.append("metrics", 20)
    assert [record["number"] for record in read_life_log(path).records] == [1, 2, 3]


def test_a_record_that_may_not_be_on_the_disk_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "life.jsonl"

    def failed(file: int) -> None:
        raise OSError(5, "Input/output error")

    with LifeLog(path) as log:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failed)
            with pytest.raises(InputError, match="Input/output error"):
                log.append("save", 1, durable=True)
        log.append("save", 2, durable=True)
    assert [record["step"] for record in read_life_log(path).records] == [2]


def test_a_second_writer_is_noticed(tmp_path):
    path = tmp_path / "life.jsonl"
    with LifeLog(path) as one, LifeLog(path) as other:
        one.append("metrics", 1)
        with pytest.raises(LifeLogError, match=r"line 1: the file must have 0 bytes, got \d+; another process writes into it\."):
            other.append("metrics", 1)
    assert len(read_life_log(path).records) == 1


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "file" / "life.jsonl", Path("/proc/none/life.jsonl"), tmp_path / "folder"):
        with pytest.raises(InputError, match=rf"^path must be a life log that can be written, got {place}: [^\n]+\.$"):
            LifeLog(place)
    with pytest.raises(InputError, match=r"^path must be a life log, got .*/none: No such file or directory\.$"):
        read_life_log(tmp_path / "none")
    with pytest.raises(InputError, match=r"^path must be a life log, got .*/folder, which is a folder\.$"):
        read_life_log(tmp_path / "folder")
    for opened in (LifeLog, read_life_log):
        with pytest.raises(InputError, match=r"^path must be a life log, got .*/pipe, which is a pipe or device\.$"):
            opened(tmp_path / "pipe")


def test_a_folder_without_the_right_to_write_is_one_line(tmp_path, monkeypatch):
    """The system's error is made here, because root may write everywhere."""

    def refused(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(InputError, match=r"^path must be a life log that can be written, got .*life\.jsonl: Permission denied\.$"):
        LifeLog(tmp_path / "life.jsonl")


def test_a_restore_undoes_the_training_after_its_step(tmp_path):
    path = tmp_path / "life.jsonl"
    events = [
        ("begin", 0), ("stretch", 0), ("metrics", 10), ("save", 10), ("metrics", 20), ("birth", 20), ("save", 20), ("evaluation", 30),
        ("recycling", 30), ("fork", 20), ("restore", 20), ("stretch", 20), ("metrics", 30), ("save", 30), ("restore", 10), ("stretch", 10),
        ("metrics", 20), ("stop", 25),
    ]  # fmt: skip
    write(path, [(event, step, {}) for event, step in events])
    assert [(record["event"], record["step"]) for record in read_life_log(path).effective()] == [
        ("begin", 0), ("stretch", 0), ("metrics", 10), ("save", 10), ("fork", 20), ("restore", 20), ("stretch", 20), ("restore", 10),
        ("stretch", 10), ("metrics", 20), ("stop", 25),
    ]  # fmt: skip


def test_a_long_log_opens_quickly(tmp_path):
    path = tmp_path / "life.jsonl"
    lines, crc = [], 0
    for number in range(1, 100_001):
        time_of = f"2025-01-01T00:00:00.{number:06d}+00:00"
        body = json.dumps({"number": number, "time": time_of, "event": "metrics", "step": number, "loss": 2.5, "pi": 0.5}).encode()
        crc = zlib.crc32(body, crc)
        lines.append(body[:-1] + f', "crc": "{crc:08x}"}}\n'.encode())
    path.write_bytes(b"".join(lines))
    begin = time.process_time()
    with LifeLog(path) as log:
        assert time.process_time() - begin < 1.0
        assert log.number == 100_000


def test_the_environment_has_versions_without_imports():
    program = """
import json, sys
from tinyonn.store.life_log import environment
print(json.dumps(environment()), sys.modules.keys() & {"torch", "transformers", "numpy"} == set())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    text, _, light = done.stdout.strip().rpartition(" ")
    assert light == "True"
    found = json.loads(text)
    import numpy
    import torch

    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["versions"]["numpy"] == numpy.__version__
    assert set(found["versions"]) == {"python", "tinyonn", "torch", "transformers", "safetensors", "numpy"}


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(tmp_path), *words], capture_output=True, text=True, check=True).stdout.strip()

    assert life_log._commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a.txt").write_text("a")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a")
    commit = git("rev-parse", "HEAD")
    assert life_log._commit(tmp_path) == commit
    (tmp_path / "a.txt").write_text("b")
    assert life_log._commit(tmp_path) == f"{commit}-dirty"
    assert life_log._commit(tmp_path / "inside") is None
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert life_log._commit(tmp_path) is None
    assert environment()["commit"] is None


def test_the_error_of_a_damaged_log_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(LifeLogError("life.jsonl", 3, "it must end in a checksum")))
    assert (str(error), error.line) == ("life.jsonl, line 3: it must end in a checksum; the 2 lines before it are whole.", 3)
