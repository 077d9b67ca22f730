"""Going on with a file: after a close, after a crash, with new blocks, beside another writer, and far enough to need an index."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tinyonn.errors import InputError, MscanError
from tinyonn.mscan import Integral, LayoutEntry, MscanReader, MscanWriter, SequenceRecord

LAYOUT = [LayoutEntry("layers.0.a.weight", 128, 2, 0), LayoutEntry("layers.1.a.weight", 64, 1, 2)]
LONGER = [*LAYOUT, LayoutEntry("lm_head.weight", 200, 4, 3)]


def record(i: int, blocks: int = 3, **rest: object) -> SequenceRecord:
    planes = np.random.default_rng(i).random((2, 2, blocks), np.float32)
    return SequenceRecord(f"s{i}", [i, i + 1], [0.25, np.nan], *planes, **rest)


def ids(path: Path, recovery: str = "strict") -> list[str]:
    with MscanReader(path, recovery=recovery) as reader:
        return [sequence.sequence_id for sequence in reader.sequences]


def crashed(path: Path, count: int) -> None:
    """A file of `count` sequences as a killed writer leaves it."""
    with MscanWriter(path.with_suffix(".whole"), {"k": 1}, LAYOUT, codec="f32") as writer:
        for i in range(count):
            writer.append(record(i))
        shutil.copy(writer.path, path)


@pytest.mark.parametrize("rounds", [1, 2, 20])
def test_append_after_a_clean_close(tmp_path: Path, rounds: int) -> None:
    path = tmp_path / "a.mscan"
    for i in range(rounds):
        with MscanWriter(path, {"k": 1}, LAYOUT, mode="a" if i else "x", codec="f32") as writer:
            assert set(writer.sequence_ids) == {f"s{k}" for k in range(i)}
            assert writer.append(record(i)) == i
            assert f"s{i}" in writer.sequence_ids
            assert writer.report == []
    assert ids(path) == [f"s{i}" for i in range(rounds)]
    with MscanReader(path) as reader:
        for i in range(rounds):
            np.testing.assert_array_equal(reader.planes(i)[0], record(i).activation)
        assert reader.stats().activation.count.tolist() == [4 * rounds, 2 * rounds]


def test_append_after_a_crash_drops_the_interrupted_group(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    crashed(path, 3)
    os.truncate(path, path.stat().st_size - 70)
    with MscanReader(path) as reader:
        assert len(reader) == 2
        assert len(reader.report) == 1
        assert "left out" in reader.report[0]
        with pytest.raises(MscanError, match="trailer"):
            reader.verify()
    with pytest.raises(MscanError, match="must end in a trailer"):
        MscanReader(path, recovery="strict")
    with MscanWriter(path, {"k": 1}, LAYOUT, mode="a", codec="f32") as writer:
        assert len(writer.report) == 1
        assert set(writer.sequence_ids) == {"s0", "s1"}
        assert "s2" not in writer.sequence_ids
        writer.append(record(7))
    assert ids(path) == ["s0", "s1", "s7"]
    with MscanReader(path) as reader:
        values = np.concatenate([record(i).activation[:, :2].ravel() for i in (0, 1, 7)]).astype(np.float64)
        np.testing.assert_allclose(reader.stats().activation.mean[0], values.mean(), rtol=1e-12)


def test_opening_for_append_and_closing_mends_a_crashed_file_and_leaves_a_clean_one(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    crashed(path, 2)
    MscanWriter(path, None, None, mode="a").close()
    assert ids(path) == ["s0", "s1"]
    before = path.read_bytes()
    MscanWriter(path, None, None, mode="a").close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [0, 3, 64, 100])
def test_a_file_cut_while_it_was_created_is_begun_anew(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.mscan"
    with MscanWriter(path, {"k": 1}, LAYOUT) as writer:
        writer.append(record(0))
    os.truncate(path, size)
    with pytest.raises(MscanError):
        MscanReader(path)
    with MscanWriter(path, {"k": 1}, LAYOUT, mode="a") as writer:
        assert "held no sequence" in writer.report[0]
        writer.append(record(1))
    assert ids(path) == ["s1"]


def test_a_file_of_another_kind_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    path.write_bytes(b"something else entirely")
    with pytest.raises(MscanError, match="must start with MSCAN"):
        MscanWriter(path, {}, LAYOUT, mode="a")
    assert path.read_bytes() == b"something else entirely"


def test_damage_before_the_end_is_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    crashed(path, 3)
    data = bytearray(path.read_bytes())
    data[data.index(record(1).activation.tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(MscanError, match="Valid chunks follow") as caught:
        MscanWriter(path, {"k": 1}, LAYOUT, mode="a")
    assert caught.value.offset is not None
    assert path.read_bytes() == data
    with MscanReader(path, recovery="salvage") as reader:
        assert ids(path, "salvage") == ["s0", "s1", "s2"]
        assert len(reader.report) == 1
        assert [np.isnan(reader.planes(i)[0]).all() for i in range(3)] == [False, True, False]
        np.testing.assert_array_equal(reader.planes(2)[0], record(2).activation)


def test_nothing_is_replaced_before_the_arguments_are_right(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    with MscanWriter(path, {}, LAYOUT) as writer:
        writer.append(record(0))
    before = path.read_bytes()
    wide = [LayoutEntry("a.weight", 2**40, 2**33, 0)]
    for arguments, options, message in (
        (({}, wide), {}, "at most 2\\^26 blocks"),
        (([1], LAYOUT), {}, "metadata must be a dict with strings for keys"),
        (({1: 1, "1": 2}, LAYOUT), {}, "metadata must be a dict with strings for keys"),
        (({}, LAYOUT), {"codec": None}, "codec must be one of log2u16, f32, got None"),
        (({}, [LayoutEntry("a.weight", 1.5, 1, 0)]), {}, "three integers below 2\\^63"),
        (({}, [LayoutEntry("a\ud800", 64, 1, 0)]), {}, "layout names must be valid Unicode"),
    ):
        with pytest.raises(InputError, match=message):
            MscanWriter(path, *arguments, mode="w", **options)
        assert path.read_bytes() == before
    with pytest.raises(InputError, match="path must not contain a NUL"):
        MscanWriter(f"{path}\0.mscan", {}, LAYOUT, mode="w")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.mscan"]


def test_replacing_keeps_permissions_and_links(tmp_path: Path) -> None:
    path, link = tmp_path / "a.mscan", tmp_path / "link.mscan"
    MscanWriter(path, {}, LAYOUT).close()
    path.chmod(0o600)
    link.symlink_to("a.mscan")
    with MscanWriter(link, {}, LAYOUT, mode="w") as writer:
        writer.append(record(3))
    assert link.is_symlink()
    assert ids(path) == ["s3"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", ["w", "a"])
def test_a_pipe_is_not_replaced(tmp_path: Path, mode: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MscanError, match="must be a file, got a pipe or device"):
        MscanWriter(tmp_path / "pipe", {}, LAYOUT, mode=mode)
    assert (tmp_path / "pipe").is_fifo()


def test_opening_and_closing_a_clean_file_leaves_it_untouched(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    with MscanWriter(path, {}, LAYOUT) as writer:
        writer.append(record(0))
    os.utime(path, ns=(10**18, 10**18))
    MscanWriter(path, None, None, mode="a").close()
    assert path.stat().st_mtime_ns == 10**18


def test_a_forked_process_cannot_write_and_does_not_hold_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    writer = MscanWriter(path, {}, LAYOUT)
    writer.append(record(0))
    context = multiprocessing.get_context("fork")
    answers, done = context.Queue(), context.Event()

    def child() -> None:
        try:
            writer.append(record(1))
        except MscanError as error:
            answers.put(str(error))
        done.wait(30)

    process = context.Process(target=child)
    process.start()
    assert "a writer belongs to the process that opened it" in answers.get(timeout=30)
    writer.append(record(2))
    writer.close()
    with MscanWriter(path, None, None, mode="a") as again:  # while the child still has its descriptor
        again.append(record(3))
    done.set()
    process.join(30)
    assert ids(path, "strict") == ["s0", "s2", "s3"]


def test_extending_the_layout_from_another_thread_never_tears_an_append(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    with MscanWriter(path, {}, LAYOUT, sync="none") as writer:
        wider, failures = list(LAYOUT), []

        def extend() -> None:
            for i in range(40):
                wider.append(LayoutEntry(f"more.{i}.weight", 64, 1, wider[-1].base + wider[-1].blocks))
                writer.extend_layout(wider)

        thread = threading.Thread(target=extend)
        thread.start()
        while thread.is_alive():
            try:
                writer.append(record(len(writer)))
            except InputError as error:
                failures.append(str(error))
        thread.join()
    with MscanReader(path, recovery="strict") as reader:
        assert len(reader.layout) == len(LAYOUT) + 40
        reader.verify()
    assert all("must have" in failure for failure in failures)


def test_modes_say_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    with pytest.raises(FileNotFoundError):
        MscanWriter(path, {}, LAYOUT, mode="a")
    with MscanWriter(path, {}, LAYOUT) as writer:
        writer.append(record(0))
    with pytest.raises(FileExistsError):
        MscanWriter(path, {}, LAYOUT)
    kept = MscanReader(path)
    with MscanWriter(path, {}, LAYOUT, mode="w") as writer:
        writer.append(record(5))
    assert ids(path) == ["s5"]
    np.testing.assert_allclose(kept.planes(0)[0], record(0).activation, rtol=1e-3)
    kept.close()
    with pytest.raises(ValueError, match="was closed"):
        kept.planes(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "r"}, "mode must be one of x, w, a, got 'r'"),
        ({"codec": "f16"}, "codec must be one of log2u16, f32, got 'f16'"),
        ({"sync": "always"}, "sync must be one of none, chunk, close, got 'always'"),
        ({"compression": "gzip"}, "compression must be one of None, zstd, got 'gzip'"),
        ({"metadata": {"x": float("nan")}}, "metadata must be JSON values"),
        ({"metadata": {"x": "\ud800"}}, "metadata must be JSON values"),
        ({"metadata": None}, "metadata and layout must be given"),
        ({"layout": []}, "layout must hold at least one entry"),
        ({"layout": [LAYOUT[1]]}, "base of 'layers.1.a.weight' must be 0"),
        ({"layout": [LAYOUT[0], LayoutEntry("layers.0.a.weight", 1, 1, 2)]}, "names must be unique"),
        ({"layout": [LayoutEntry("a", 3, 4, 0)]}, "blocks of 'a' must be 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_named_before_a_file_exists(tmp_path: Path, options: dict[str, object], message: str) -> None:
    arguments = {"metadata": {}, "layout": LAYOUT, **options}
    with pytest.raises(InputError, match=message):
        MscanWriter(tmp_path / "a.mscan", **arguments)
    assert not (tmp_path / "a.mscan").exists()


@pytest.mark.parametrize(
    ("metadata", "layout", "message"),
    [
        ({"k": 2}, LAYOUT, r"metadata\['k'\] must equal the file's 1, got 2"),
        ({"k": 1, "j": 0}, LAYOUT, r"metadata\['j'\] must equal the file's None, got 0"),
        ({"k": 1}, LAYOUT[:1], "layout must hold the file's 2 entries, got 1"),
        ({"k": 1}, [LayoutEntry("other", 128, 2, 0), LAYOUT[1]], "layout must agree with the file's"),
    ],
)
def test_append_wants_the_files_metadata_and_layout(tmp_path: Path, metadata: dict, layout: list[LayoutEntry], message: str) -> None:
    path = tmp_path / "a.mscan"
    crashed(path, 1)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        MscanWriter(path, metadata, layout, mode="a")
    assert path.read_bytes() == before
    with MscanWriter(path, None, None, mode="a") as writer:
        assert (writer.metadata, writer.layout) == ({"k": 1}, LAYOUT)


@pytest.mark.parametrize("how", ["extend", "reopen", "reopen after a crash"])
def test_new_blocks_start_a_new_layout(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.mscan"
    old, new = record(0, integral=Integral(*np.ones((6, 3)))), record(1, 7, integral=Integral(*np.ones((6, 7))))
    writer = MscanWriter(path, {}, LAYOUT, codec="f32")
    writer.append(old)
    if how == "extend":
        with pytest.raises(InputError, match="must agree"):
            writer.extend_layout([LONGER[0], LayoutEntry("x", 64, 1, 2), LONGER[2]])
        writer.extend_layout(LONGER)
    else:
        if how == "reopen":
            writer.close()
        else:
            del writer
        writer = MscanWriter(path, {}, LONGER, mode="a", codec="f32")
    assert writer.append(new) == 1
    writer.close()
    with MscanReader(path, recovery="strict") as reader:
        assert reader.layout == LONGER
        activation, grad_norm = reader.planes(0)
        np.testing.assert_array_equal(activation[:, :3], old.activation)
        np.testing.assert_array_equal(grad_norm[:, :3], old.grad_norm)
        assert np.isnan(activation[:, 3:]).all()
        np.testing.assert_array_equal(reader.planes(1)[1], new.grad_norm)
        assert reader.stats().activation.count.tolist() == [8, 4, 8]
        assert reader.integral().count.tolist() == [2, 2, 2, 1, 1, 1, 1]
        assert reader.sequence_integral(0).count.tolist() == [1, 1, 1, 0, 0, 0, 0]
    with MscanReader(path, recovery="salvage") as reader:
        np.testing.assert_array_equal(reader.planes(0)[0][:, :3], old.activation)


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    first = MscanWriter(path, {}, LAYOUT)
    first.append(record(0))
    for mode in ("a", "w"):
        with pytest.raises(MscanError, match="only one writer"):
            MscanWriter(path, {}, LAYOUT, mode=mode)
    first.append(record(1))
    first.close()
    with MscanWriter(path, {}, LAYOUT, mode="a") as writer:
        writer.append(record(2))
        with pytest.raises(MscanError, match="the writer is closed"):
            first.append(record(3))
    first.close()
    assert ids(path) == ["s0", "s1", "s2"]


def test_an_exception_leaves_a_closed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    with pytest.raises(KeyError), MscanWriter(path, {}, LAYOUT) as writer:  # noqa: PT012
        writer.append(record(0))
        raise KeyError
    assert ids(path) == ["s0"]


FULL = """
import resource, signal, sys
import numpy as np
from tinyonn.errors import MscanError
from tinyonn.mscan import LayoutEntry, MscanWriter, SequenceRecord
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = MscanWriter(sys.argv[1], {}, [LayoutEntry("a", 6400, 100, 0)], codec="f32")
plane = np.ones((10, 100), "f")
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for i in range(100):
    try:
        writer.append(SequenceRecord(str(i), range(10), [0.0] * 10, plane, plane))
    except MscanError as error:
        print(i, error)
        break
if sys.argv[2] == "free":
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    writer.append(SequenceRecord("later", range(10), [0.0] * 10, plane, plane))
try:
    writer.close()
except MscanError as error:
    print("close", error)
"""


@pytest.mark.parametrize("then", ["free", "full"])
def test_a_full_disk_raises_and_keeps_what_was_appended(tmp_path: Path, then: str) -> None:
    path = tmp_path / "a.mscan"
    done = subprocess.run([sys.executable, "-c", FULL, path, then], capture_output=True, text=True, timeout=120, check=True)
    count, message = done.stdout.splitlines()[0].split(maxsplit=1)
    assert count == "5"
    assert os.strerror(errno.EFBIG) in message
    assert ids(path, "tail") == [*"01234", *(["later"] if then == "free" else [])]
    if then == "free":
        assert ids(path, "strict")


def test_appends_from_threads_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    with MscanWriter(path, {}, LAYOUT, codec="f32") as writer:
        threads = [threading.Thread(target=lambda k=k: [writer.append(record(i)) for i in range(k, 200, 4)]) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with MscanReader(path, recovery="strict") as reader:
        assert {sequence.sequence_id for sequence in reader.sequences} == {f"s{i}" for i in range(200)}
        for i in (0, 77, 199):
            np.testing.assert_array_equal(reader.planes(i)[0], record(int(reader.sequences[i].sequence_id[1:])).activation)


ABANDON = """
import sys, threading
import numpy as np
from tinyonn import _C

compressing, abandoning = threading.Event(), threading.Event()

def compress(raw):
    compressing.set()
    abandoning.wait(10)
    threading.Event().wait(0.2)  # the other thread is inside abandon by now
    return bytes(raw)

writer = _C.Writer(sys.argv[1], "x", "{}", [("w", 64, 1, 0)], "f32", "none", compress, None)
planes = np.ones((2, 1, 1), np.float32)
appending = threading.Thread(target=lambda: writer.append("s", [1], [0.5], *planes, None, None, None))
appending.start()
compressing.wait(10)
abandoning.set()
writer.abandon()
appending.join()
print(len(writer))
"""


def test_abandoning_waits_for_an_append_that_needs_the_interpreter(tmp_path: Path) -> None:
    script = [sys.executable, "-c", ABANDON, str(tmp_path / "a.mscan")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"


def test_many_sequences_make_few_index_chunks_and_all_are_found(tmp_path: Path) -> None:
    path, count = tmp_path / "a.mscan", 70_000
    one, row, loss = np.array([3]), np.ones((1, 3), np.float32), np.zeros(1, np.float32)
    with MscanWriter(path, {}, LAYOUT, sync="none") as writer:
        for i in range(count):
            writer.append(SequenceRecord(f"s{i}", one, loss, row, row))
        shutil.copy(path, tmp_path / "crashed.mscan")
    for name, recovery in (("a", "strict"), ("crashed", "tail")):
        with MscanReader(tmp_path / f"{name}.mscan", recovery=recovery) as reader:
            assert len(reader) == count
            assert 2 <= reader.core.index_chunks <= 12  # 17 deltas of 4096: 2 merged chunks, and the rest
            assert reader.report == []
            for i in (0, 1, 4095, 4096, 32_767, 40_000, count - 1):
                assert reader.sequences[i].sequence_id == f"s{i}"
                assert reader.find(f"s{i}") == i
            assert reader.find("s70000") is None
            assert reader.stats().activation.count.tolist() == [2 * count, count]
    with MscanWriter(path, {}, LAYOUT, mode="a") as writer:
        assert "s69999" in writer.sequence_ids
        assert "x" not in writer.sequence_ids
        assert writer.append(SequenceRecord("x", one, loss, row, row)) == count
    with MscanReader(path) as reader:
        assert reader.sequences[count].sequence_id == "x"


def test_readers_keep_no_file_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    with MscanWriter(path, {}, LAYOUT) as writer:
        writer.append(record(0))
    before = len(os.listdir("/proc/self/fd"))
    readers = [MscanReader(path) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(len(reader) == 1 for reader in readers)
