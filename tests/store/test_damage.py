"""Any damage is noticed, and the last whole step can be read."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tinyonn.store import DamagedStoreError, PerpetualStore, StoreError, read_life_log, rewind, verify
from tinyonn.store.manifest import CHAPTER, Manifest
from tinyonn.store.segment import Files

from .conftest import assert_same, copied, files_of, flipped, lived, segments, small

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    lived(tmp_path / "store", CHAPTER + 3)
    for _ in range(2):  # deletes what an earlier chapter left
        with PerpetualStore(tmp_path / "store", *small(), keep="all") as store:
            store.restore()
            store.save(store.steps[-1] + 1)
    assert verify(tmp_path / "store").faults == []
    draw = random.Random(0)
    for path in files_of(tmp_path / "store"):
        if path.parent.name == "segments" and draw.random() < 0.9:
            continue
        whole = path.read_bytes()
        for place in {0, 9, len(whole) // 2, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(6))}:
            flipped(path, place, draw.randrange(8))
            found = verify(tmp_path / "store")
            assert found.faults, (path.name, place)
            assert any(path.name in fault for fault in found.faults), (path.name, place, found.faults)
            path.write_bytes(whole)
    assert verify(tmp_path / "store").faults == []


def test_a_damaged_segment_names_file_tensor_and_what_is_readable(tmp_path: Path) -> None:
    states = lived(tmp_path, 3)
    newest = segments(tmp_path)[-1]
    size = newest.stat().st_size
    flipped(newest, size - 5, 0)
    found = verify(tmp_path)
    assert found.readable == [1, 2]
    assert found.lost == [3]
    model, optimizer = small(seed=1)
    before = copied(model, optimizer)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        with pytest.raises(DamagedStoreError, match=rf"{newest.name}: \S+ is damaged. Step 2 is whole: `tinyonn life restore .* --step 2`"):
            store.restore()
        assert_same(copied(model, optimizer), before)
    assert rewind(tmp_path, 2) == 2
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.restore() == 2
        assert_same(copied(model, optimizer), states[2])
    assert verify(tmp_path).faults == []


def test_only_steps_that_use_a_damaged_chunk_of_a_merged_segment_are_lost(tmp_path: Path) -> None:
    model = nn.Linear(40, 40)
    with PerpetualStore(tmp_path, model, keep="all") as store:
        for step in range(1, 5):
            nn.init.constant_(model.weight, step)
            store.save(step)
        store.compact()
    (merged,) = segments(tmp_path)
    data = merged.read_bytes()
    place = data.index(np.full(40 * 40, 2, np.float32).tobytes())
    flipped(merged, place, 0)
    found = verify(tmp_path)
    assert (found.readable, found.lost) == ([1, 3, 4], [2])
    with PerpetualStore(tmp_path, model, keep="all") as store:
        for step in (1, 3, 4):
            store.restore(step)
            assert model.weight.unique().tolist() == [step]
        with pytest.raises(DamagedStoreError, match=r"model\.weight is damaged"):
            store.restore(2)


def test_a_message_on_damage_reads_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    with PerpetualStore(tmp_path, model, keep="all") as store:
        for step in range(1, 12):
            store.save(step)  # the weights are in the first segment
        store.wait()
        flipped(segments(tmp_path)[0], segments(tmp_path)[0].stat().st_size - 1, 0)
        read: list[str] = []
        checked = Files.checked
        monkeypatch.setattr(Files, "checked", lambda files, place, name: (read.append(name), checked(files, place, name))[1])
        with pytest.raises(
            DamagedStoreError, match=r"The 3 steps before it are damaged too; `tinyonn life verify .*` lists those that are"
        ):
            store.restore()
    assert len(read) < 5 * 4  # the step itself and three before it


def test_a_damaged_log_is_set_aside(tmp_path: Path) -> None:
    states = lived(tmp_path, 3)
    log = tmp_path / "life.jsonl"
    flipped(log, 5, 0)
    damaged = log.read_bytes()
    model, optimizer = small(seed=1)
    with pytest.warns(UserWarning, match=r"^\S+life.jsonl, line 1: [^\n]* is renamed to life.damaged-1.jsonl, and a new log begins.$"):
        store = PerpetualStore(tmp_path, model, optimizer)
    with store:
        assert store.restore() == 3
    assert_same(copied(model, optimizer), states[3])
    assert (tmp_path / "life.damaged-1.jsonl").read_bytes() == damaged
    assert verify(tmp_path).faults == []
    begin, restore = read_life_log(log).records
    assert (begin["event"], begin["step"], begin["life"], begin["damaged"]) == ("begin", 3, store.life, "life.damaged-1.jsonl")
    assert restore["event"] == "restore"
    flipped(log, 5, 0)
    with pytest.warns(UserWarning, match="life.damaged-2.jsonl"):
        rewind(tmp_path, 2)
    assert (tmp_path / "life.damaged-1.jsonl").read_bytes() == damaged
    assert [record["event"] for record in read_life_log(log).records] == ["begin", "restore"]


@pytest.mark.parametrize("what", ["manifest", "segment"])
def test_truncation_at_every_byte_is_noticed_and_the_step_before_stays(tmp_path: Path, what: str) -> None:
    source = tmp_path / "source"
    model, optimizer = nn.Linear(2, 2), None
    with PerpetualStore(source, model, optimizer, keep="all") as store:
        for step in (1, 2, 3):
            with torch.no_grad():
                model.weight.fill_(step)
            store.save(step)
    path = source / "manifest.json" if what == "manifest" else segments(source)[-1]
    whole = path.read_bytes()
    previous = (source / "manifest.previous.json").read_bytes()
    stride = 1 if what == "manifest" else max(1, len(whole) // 400)
    for length in [*range(0, len(whole), stride), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError) as caught, PerpetualStore(source, model) as store:
            store.restore()
        assert path.name in str(caught.value)
        assert "--step 2" in str(caught.value), length
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    assert rewind(copy, 2) == 2
    with PerpetualStore(copy, model) as store:
        assert store.restore() == 2
    assert float(model.weight.detach()[0, 0]) == 2
    path.write_bytes(whole)
    (source / "manifest.previous.json").write_bytes(previous)
    with PerpetualStore(source, model) as store:
        assert store.restore() == 3


def test_opening_deletes_what_a_killed_save_left(tmp_path: Path) -> None:
    lived(tmp_path, 2)
    (tmp_path / "closed.json").unlink()
    (tmp_path / "segments" / "00000099.safetensors").write_bytes(b"half")
    (tmp_path / "index" / "table-00000099.npy").write_bytes(b"half")
    with PerpetualStore(tmp_path, *small()) as store:
        assert store.restore() == 2
    assert len(segments(tmp_path)) == 2
    assert verify(tmp_path).faults == []


@pytest.mark.parametrize("lost", ["index", "segments"])
def test_what_is_left_of_a_store_is_not_deleted(tmp_path: Path, lost: str) -> None:
    lived(tmp_path, 3)
    for path in (*tmp_path.glob("manifest*"), *(tmp_path / lost).iterdir()):
        path.unlink()
    left = files_of(tmp_path)
    with pytest.raises(StoreError, match=r"has (segments|files in index/), but no manifest.json; if a fork was interrupted"):
        PerpetualStore(tmp_path, *small())
    assert files_of(tmp_path) == left


def test_only_restore_takes_the_manifest_before(tmp_path: Path) -> None:
    from tinyonn.store.overview import newest_step
    from tinyonn.store.rewinding import editing

    lived(tmp_path, 3)
    manifest = tmp_path / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-4])
    with pytest.raises(DamagedStoreError), editing(tmp_path):
        pass
    manifest.unlink()
    with pytest.raises(StoreError, match="brings back the one before it"):
        newest_step(tmp_path)
    assert rewind(tmp_path) == 2
    assert newest_step(tmp_path) == 2


@pytest.mark.parametrize("kind", ["files", "chapters"])
def test_a_damaged_list_of_files_deletes_nothing(tmp_path: Path, kind: str) -> None:
    lived(tmp_path, CHAPTER + 3)
    if kind == "files":
        with PerpetualStore(tmp_path, *small(), keep="all") as store:
            store.restore()
            store.compact()
    before = segments(tmp_path)
    for path in (tmp_path / "index").glob(f"{kind}-*"):
        flipped(path, path.stat().st_size - 1, 0)
    with pytest.raises(DamagedStoreError, match=rf"{kind}-\d+\.\w+ is damaged"):
        PerpetualStore(tmp_path, *small())
    assert segments(tmp_path) == before
    found = verify(tmp_path)
    assert f"{kind}-" in found.faults[0]
    assert found.readable[-1] == CHAPTER + 3  # steps of the open chapter


def test_a_step_of_which_every_chunk_is_whole_counts_as_readable(tmp_path: Path) -> None:
    states = lived(tmp_path, 3)
    with PerpetualStore(tmp_path, *small(), keep="all") as store:
        store.restore()
        store.compact()
    flipped(segments(tmp_path)[0], 20, 0)  # in the header, which tables make superfluous
    found = verify(tmp_path)
    assert len(found.faults) == 1
    assert "damaged header" in found.faults[0]
    assert (found.readable, found.lost) == ([1, 2, 3], [])
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        for step, state in states.items():
            store.restore(step)
            assert_same(copied(model, optimizer), state)
    flipped(segments(tmp_path)[0], segments(tmp_path)[0].stat().st_size - 5, 0)
    assert verify(tmp_path).lost


def test_a_compaction_while_a_store_is_checked_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lived(tmp_path, 3)
    read = Manifest.read
    calls = []

    def compacted(folder: Path, *name: str) -> Manifest:
        found = read(folder, *name)
        calls.append(name)
        if len(calls) == 1:
            with PerpetualStore(tmp_path, *small(), keep="last:1") as store:
                store.restore()
                store.save(4)
                store.compact()
        return found

    monkeypatch.setattr("tinyonn.store.verification.Manifest.read", compacted)
    found = verify(tmp_path)
    assert found.faults == []
    assert found.readable == [4]
