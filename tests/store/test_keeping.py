"""Which steps stay restorable, and compaction, which drops what the others need."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinyonn.store import Keep, PerpetualStore, StoreError, read_life_log, verify
from tinyonn.store.manifest import CHAPTER, Index, Manifest

from .conftest import assert_same, copied, lived, segments, small, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("last:1", [20]),
        ("last:3", [18, 19, 20]),
        ("last:2,every:7", [7, 14, 19, 20]),
        ("last:1,best:2", [17, 20]),
        ("all", [*range(1, 21)]),
    ],
)
def test_keep(tmp_path: Path, keep: str, expected: list[int]) -> None:
    states = lived(tmp_path, 20, keep=keep)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep=keep) as store:
        assert store.steps == expected
        for compacted in (False, True):
            for step in expected:
                store.restore(step)
                assert_same(copied(model, optimizer), states[step])
            store.restore()
            if not compacted:
                store.compact()
                assert store.steps == expected
        with pytest.raises(StoreError, match="step must be a kept one"):
            store.restore(21)


@pytest.mark.parametrize("text", ["", "last", "last:0", "last:x", "best:-1", "last:1,last:2", "newest:3", 3])
def test_keep_rejects(text: Any) -> None:
    with pytest.raises(ValueError, match="keep"):
        Keep.parse(text)


def test_compaction_keeps_every_step_over_chapters(tmp_path: Path) -> None:
    steps = 2 * CHAPTER + 9
    model, optimizer = small()
    states = {}
    with PerpetualStore(tmp_path, model, optimizer, keep="last:4,every:10", auto_compact=False) as store:
        for step in range(1, steps + 1):
            train(model, optimizer)
            store.save(step)
            states[step] = copied(model, optimizer)
        kept = store.steps
        assert kept == sorted({*range(10, steps, 10), *range(steps - 3, steps + 1)})
        before = store.compact()
        assert before is not None
        assert before.bytes_after < before.bytes_before / 3
        assert before.files_after < 5
        again = store.compact()
        assert again is not None
        assert abs(again.bytes_after - before.bytes_after) < 2**16
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep="last:4,every:10") as store:
        assert store.steps == kept
        for step in reversed(kept):
            store.restore(step)
            assert_same(copied(model, optimizer), states[step])
        store.restore()
        train(model, optimizer)
        store.save(steps + 1)
    assert verify(tmp_path).faults == []
    assert verify(tmp_path).readable == [*[step for step in kept if step % 10 == 0], *range(steps - 2, steps + 2)]


@pytest.mark.parametrize("compacted", [(), (4,), (4, 6), (4, 5, 6, 7, 8)], ids=str)
def test_other_tensors_after_a_compaction(tmp_path: Path, compacted: tuple[int, ...]) -> None:
    states = lived(tmp_path, 4)
    model, optimizer = small(seed=1)
    for begin in (4, 6):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9 * (begin == 6))
        with PerpetualStore(tmp_path, model, None, keep="all") as store:
            if begin in compacted:
                store.compact()
        with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
            store._restored = True  # another optimiser begins here
            for step in (begin + 1, begin + 2):
                train(model, optimizer)
                store.save(step)
                states[step] = copied(model, optimizer)
                if step in compacted:
                    store.compact()
            assert store.steps == list(range(1, begin + 3))
    found = verify(tmp_path)
    assert (found.faults, found.readable) == ([], list(range(1, 9)))
    from tinyonn.store.ledger import Ledger
    from tinyonn.store.segment import Files

    ledger = Ledger(tmp_path, Manifest.read(tmp_path))
    for step, expected in states.items():
        layout, table = ledger.at(step)
        for tensor in ("inner.weight", "narrow"):
            data = bytes(Files(ledger.segments).checked(table[layout.numbers[f"model.{tensor}"]], tensor))
            assert data == expected[f"m.{tensor}"].reshape(-1).view(torch.uint8).numpy().tobytes(), step


def test_a_store_that_keeps_little_stays_small(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer, keep="last:1") as store:
        for step in range(1, 3 * CHAPTER + 3):
            train(model, optimizer)
            store.save(step)
        store.wait()
        whole = store.state_bytes()
    assert sum(path.stat().st_size for path in segments(tmp_path)) < (CHAPTER + 4) * 1.1 * whole


def test_training_goes_on_while_another_process_wants_a_compaction(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer, keep="last:1") as store:
        for step in range(1, 9):
            train(model, optimizer)
            if step == 6:
                store.wait()
                (tmp_path / "compact.request").touch()
            store.save(step)
        store.wait()
        assert not (tmp_path / "compact.request").exists()
        assert len(segments(tmp_path)) <= 3


def test_a_compaction_that_finds_no_room_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyonn.store import saving

    def no_room(*args: Any) -> None:
        raise StoreError("no room")

    monkeypatch.setattr(saving, "compact", no_room)
    model, optimizer = small()
    store = PerpetualStore(tmp_path, model, optimizer, keep="last:1")
    for step in range(1, CHAPTER + 3):
        train(model, optimizer)
        store.save(step)
    with pytest.warns(UserWarning, match="the store was not compacted: no room"):
        store.close()
    assert any("no room" in record.get("failed", "") for record in read_life_log(tmp_path / "life.jsonl").records)
    monkeypatch.undo()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.restore() == CHAPTER + 2


def test_saves_go_on_after_a_compaction_that_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    model = nn.Linear(2, 2)
    with PerpetualStore(tmp_path, model, keep="all") as store:
        store.save(1, wait=True)
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
            with pytest.raises(StoreError, match="bytes for its merged segments, and the disk has 0"):
                store.compact()
            assert store.compact(wait=False) is None
            store.wait()
            assert any("the store was not compacted: " in str(one.message) for one in recwarn)
        for step in (2, 3):
            nn.init.constant_(model.weight, step)
            store.save(step)
        assert store.compact() is not None
        for step in (2, 3):
            store.restore(step)
            assert model.weight.unique().tolist() == [step]
    assert verify(tmp_path).faults == []


def test_a_compaction_that_cannot_write_its_tables_leaves_no_merged_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Index.write_array

    def full(index: Index, kind: str, *args: Any) -> Any:
        if kind == "files":
            raise StoreError("no room")
        return write(index, kind, *args)

    states = lived(tmp_path, 3)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        store.restore()
        before = segments(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(Index, "write_array", full)
            with pytest.raises(StoreError, match="no room"):
                store.compact()
        assert segments(tmp_path) == before
        store.save(4)
        for step, expected in states.items():
            store.restore(step)
            assert_same(copied(model, optimizer), expected)


def test_a_chapter_is_closed_once_although_its_end_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tensors begin a chapter, and the disk is full while its table is written."""
    write = Index.write_array

    def full(index: Index, kind: str, *args: Any) -> Any:
        if kind == "table":
            raise StoreError("no room")
        return write(index, kind, *args)

    model = nn.Linear(2, 2)
    with PerpetualStore(tmp_path, model, keep="all") as store:
        store.save(1, wait=True)
        with monkeypatch.context() as patched:
            patched.setattr(Index, "write_array", full)
            with pytest.raises(StoreError, match="no room"):
                store.save(2, state={"more": torch.ones(2)})
        store.save(2, state={"more": torch.ones(2)}, wait=True)
    assert verify(tmp_path).files == len(segments(tmp_path)) == 2
    assert [(one.first, one.last) for one in Manifest.read(tmp_path).chapters] == [(1, 1)]


def test_other_files_in_the_folders_are_left_alone(tmp_path: Path) -> None:
    lived(tmp_path, 2)
    (tmp_path / "segments" / ".notes").mkdir()
    (tmp_path / "segments" / "readme.txt").write_text("mine")
    with PerpetualStore(tmp_path, *small()) as store:
        store.restore()
        store.compact()
    assert (tmp_path / "segments" / "readme.txt").read_text() == "mine"


def test_the_manifest_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    """Each step begins a chapter, because the shape of a tensor changes."""
    model = nn.Linear(1, 1)
    sizes = {}
    with PerpetualStore(tmp_path, model, keep="all") as store:
        for step in range(1, 41):
            store.save(step, state={"grows": torch.full((step,), step)}, wait=True)
            sizes[step] = (tmp_path / "manifest.json").stat().st_size
    assert sizes[40] < sizes[8] + 200
    with PerpetualStore(tmp_path, model, keep="all") as store:
        assert store.steps == list(range(1, 41))
        for step in (1, 7, 32, 33, 40):
            store.restore(step)
            assert torch.equal(store.state["grows"], torch.full((step,), step))
        store.restore(33, rewind=True)
        store.save(34, state={"grows": torch.ones(3)})
        store.compact()
        store.restore(31)
        assert torch.equal(store.state["grows"], torch.full((31,), 31))
    assert verify(tmp_path).faults == []


def test_a_store_of_the_first_format_goes_on(tmp_path: Path) -> None:
    """There the manifest had all chapters; the list of files was one as after a compaction."""
    from tinyonn.store.layout import digest, hex_digest

    states = lived(tmp_path, 20)  # two chapters, of eight times the bytes of the state
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        store.restore()
        store.compact()
    found = json.loads((tmp_path / "manifest.json").read_text().splitlines()[0])
    volumes = found.pop("volumes")
    assert volumes
    found |= {"format": 1, "chapters": [one for name, *_ in volumes for one in json.loads((tmp_path / "index" / name).read_text())]}
    line = json.dumps(found)
    (tmp_path / "manifest.json").write_text(f"{line}\n{hex_digest(digest(line.encode()))}\n")
    for _ in range(2):
        with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
            for step in (1, 12, 20):
                store.restore(step)
                assert_same(copied(model, optimizer), states[step])
            store.restore()
            store.save(store.steps[-1] + 1)
    assert verify(tmp_path).faults == []
