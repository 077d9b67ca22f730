"""What opening a store reads does not grow with its life, and no file that nobody needs stays."""

from __future__ import annotations

import errno
import io
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyonn.store import PerpetualStore, StoreError, compaction, ledger, life_log, manifest, read_life_log, rewind, saving, verify

from .conftest import flipped, lived, segments, small, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LONG = 2**16  # bytes of a log of which only the end is checked


def opened(folder: Path) -> PerpetualStore:
    store = PerpetualStore(folder, *small(), keep="all")
    store.restore()
    return store


def with_records(folder: Path, number: int, saves: int = 3) -> None:
    """Lives on: saves, with records between them."""
    model, optimizer = small()
    with PerpetualStore(folder, model, optimizer, keep="all") as store:
        newest = store.restore() or 0
        for step in range(newest + 1, newest + saves + 1):
            for _ in range(number // saves):
                store.record("metrics", step, loss=1.0, words="x" * 80)
            train(model, optimizer)
            store.save(step, wait=True)


def needless(folder: Path) -> list[str]:
    """Files of which neither manifest knows, read as the format says."""
    text = "".join(path.read_text() for path in [*folder.glob("manifest*.json"), *(folder / "index").glob("chapters-*")])
    numbers = {int(number) for path in (folder / "index").glob("files-*") for number in np.load(path)["file"]}
    numbers |= {int(number) for number in re.findall(r"\[(\d+),\d+,\"", text)}
    found = [path.name for path in (folder / "index").iterdir() if path.name not in text]
    return found + [path.name for path in segments(folder) if int(path.stem) not in numbers]


def test_opening_checks_the_end_of_a_long_log_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            read.append(super().readinto(buffer) or 0)
            return read[-1]

    def counted(file: int, mode: str, closefd: bool) -> io.BufferedReader:
        return io.BufferedReader(Counted(file, mode, closefd))

    sizes = {}
    for number in (900, 9000):
        with_records(tmp_path, number)
        with monkeypatch.context() as patched:
            patched.setattr(life_log, "open", counted, raising=False)
            read.clear()
            opened(tmp_path).close()
        sizes[(tmp_path / "life.jsonl").stat().st_size] = sum(read)
    short, long = sizes
    assert long > 8 * short > 8 * LONG
    assert 0 < max(sizes.values()) < 2 * LONG
    assert verify(tmp_path).faults == []
    assert len(read_life_log(tmp_path / "life.jsonl").records) > 9900


def test_damage_of_a_long_log_is_found_by_all_that_read_it(tmp_path: Path) -> None:
    with_records(tmp_path, 900)
    log = tmp_path / "life.jsonl"
    whole = log.read_bytes()
    flipped(log, 300, 0)
    opened(tmp_path).close()
    assert any("life.jsonl, line" in fault for fault in verify(tmp_path).faults)
    with pytest.raises(life_log.LifeLogError):
        read_life_log(log)
    assert log.read_bytes()[300] == whole[300] ^ 1
    log.write_bytes(whole)
    flipped(log, len(whole) - 300, 0)
    with pytest.warns(UserWarning, match=r"life.jsonl, line \d+: .* the [\d,]+ lines before it are whole. It is renamed to life.damaged-1"):
        opened(tmp_path).close()
    assert [record["event"] for record in read_life_log(log).records] == ["begin", "restore"]


def test_a_torn_record_at_the_end_of_a_long_log_is_dropped(tmp_path: Path) -> None:
    with_records(tmp_path, 900)
    log = tmp_path / "life.jsonl"
    before = len(read_life_log(log).records)
    log.write_bytes(log.read_bytes()[:-9])
    with opened(tmp_path) as store:
        assert store.log.dropped is not None
    found = read_life_log(log)
    assert found.torn is None
    assert [record["number"] for record in found.records] == list(range(1, before + 1))  # one dropped, and the restore


@pytest.mark.parametrize("cut", [0, 1, 5000, 70_000, 100_000])
def test_a_log_that_lost_its_end_is_checked_whole(tmp_path: Path, cut: int) -> None:
    """As after a power cut on a disk that promised too much."""
    with_records(tmp_path, 900)
    log = tmp_path / "life.jsonl"
    data = log.read_bytes()
    log.write_bytes(data[: max(0, data.rfind(b"\n", 0, cut) + 1)])
    assert any("life.jsonl must have at least" in fault for fault in verify(tmp_path).faults)
    opened(tmp_path).close()
    assert read_life_log(log).torn is None
    assert verify(tmp_path).faults == []


def test_opening_does_not_read_closed_chapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "CHAPTER", 2)
    lived(tmp_path, 12)
    with opened(tmp_path) as store:
        store.compact()
    read: list[str] = []
    array, chapters = manifest.Index.array, manifest.Index.chapters
    monkeypatch.setattr(manifest.Index, "array", lambda self, file: [read.append(file.name), array(self, file)][1])
    monkeypatch.setattr(manifest.Index, "chapters", lambda self, file: [read.append(file.name), chapters(self, file)][1])
    with opened(tmp_path) as store:
        assert len(read) == 1, read  # the table of the newest step
        assert store.steps == list(range(1, 13))
    assert needless(tmp_path) == []


@pytest.mark.parametrize("place", ["middle", "end"])
def test_files_of_a_compaction_that_failed_go_at_a_later_opening(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on after it, so that their numbers are below those of files that are needed."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise StoreError("no room")

    lived(tmp_path, 5)
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        store.restore()
        with monkeypatch.context() as patched:
            if place == "end":
                patched.setattr(manifest.Manifest, "write", fail)
            else:
                written = compaction._written
                patched.setattr(compaction, "_written", lambda *given: [written(*given), fail()])
            with pytest.raises(StoreError, match="no room"):
                store.compact()
        train(model, optimizer)
        store.save(6)
    assert not (tmp_path / "closed.json").exists()
    assert needless(tmp_path)
    for _ in range(3):  # files of the manifest before stay as long as it does
        with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
            newest = store.restore()
            store.save(newest + 1)
    assert needless(tmp_path) == []
    assert (tmp_path / "closed.json").exists()
    assert verify(tmp_path).faults == []


@pytest.mark.parametrize("place", ["before the first save", "at a compaction", "at going back"])
def test_files_that_no_manifest_got_leave_no_note(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after the first files in index/ are written, and before the manifest is."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise StoreError("no room")

    monkeypatch.setattr(ledger, "CHAPTER", 2)
    if place != "before the first save":
        lived(tmp_path, 6)
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        store.restore()
        with monkeypatch.context() as patched:
            if place == "before the first save":
                patched.setattr(saving.HostCopies, "of", fail)
                attempt = partial(store.save, 1)
            elif place == "at a compaction":
                patched.setattr(compaction, "_needed", fail)
                attempt = store.compact
            else:
                written = manifest.Index.write_array
                patched.setattr(manifest.Index, "write_array", lambda *given: (fail if given[1] == "table" else written)(*given))
                attempt = partial(store.rewind, 3)
            with pytest.raises(StoreError, match="no room"):
                attempt()
        if place == "at going back":  # training goes on, so that the manifest is written again
            train(model, optimizer)
            store.save(7)
    assert needless(tmp_path)
    assert not (tmp_path / "closed.json").exists()
    opened(tmp_path).close()
    assert needless(tmp_path) == []
    assert verify(tmp_path).faults == []


def test_a_layout_that_no_save_used_leaves_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        with monkeypatch.context() as patched:
            patched.setattr(saving.HostCopies, "of", lambda *given: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                store.save(1)
        model.register_buffer("later", torch.ones(3))
        store.save(1)
    assert not (tmp_path / "closed.json").exists()
    again, optimizer = small()
    again.register_buffer("later", torch.zeros(3))
    with PerpetualStore(tmp_path, again, optimizer) as store:
        assert store.restore() == 1
    assert needless(tmp_path) == []


def test_a_full_disk_leaves_no_part_of_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if "closed.json" not in self.name:
            return write(self, text, *args, **kwargs)
        write(self, text[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    lived(tmp_path, 3)
    assert not [path.name for path in tmp_path.iterdir() if "closed" in path.name]
    assert verify(tmp_path).faults == []


def test_a_store_whose_log_the_caller_closed_closes(tmp_path: Path) -> None:
    with PerpetualStore(tmp_path, *small()) as store:
        store.save(1, wait=True)
        store.log.close()
    assert not (tmp_path / "closed.json").exists()
    opened(tmp_path).close()  # the lock is free


@pytest.mark.parametrize("chapters", [1, 2, 3, 4, 7])
def test_lists_of_chapters_that_others_took_in_go(tmp_path: Path, chapters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "CHAPTER", 2)
    for steps in range(2 * chapters, 2 * chapters + 3):  # a chapter may end with the last save
        folder = tmp_path / str(steps)
        lived(folder, steps)
        assert needless(folder) == []
        for _ in range(3):
            with opened(folder) as store:
                store.save(store.step + 1)
            assert needless(folder) == []
            assert verify(folder).faults == []


def test_a_note_of_another_manifest_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    lived(tmp_path, 3)
    note = (tmp_path / "closed.json").read_bytes()
    with opened(tmp_path) as store:
        assert not (tmp_path / "closed.json").exists()  # a process that is killed now leaves none
        store.save(4)
    for left in (note, note[:-5], b"", b"\xff\n\n"):
        (tmp_path / "closed.json").write_bytes(left)
        (tmp_path / "segments" / "00000000.safetensors").write_bytes(b"old")
        if left != note:
            assert any("closed.json is damaged" in fault for fault in verify(tmp_path).faults)
        opened(tmp_path).close()
        assert needless(tmp_path) == []
        assert verify(tmp_path).faults == []


def test_going_back_leaves_no_note(tmp_path: Path) -> None:
    lived(tmp_path, 3)
    rewind(tmp_path, 2)
    assert not (tmp_path / "closed.json").exists()
    opened(tmp_path).close()
    assert needless(tmp_path) == []
