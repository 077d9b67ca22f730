"""A save writes only what changed since the last one, and an error of it leaves the last step intact."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tinyonn.store import PerpetualStore, StoreError, read_life_log, rewind, verify
from tinyonn.store.background import Background
from tinyonn.store.life_log import LOG

from .conftest import assert_same, copied, lived, segments, small, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_saves_do_not_see_what_the_next_step_changes(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        train(model, optimizer)
        store.save(1)
        expected = copied(model, optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        store.restore(1)
    assert_same(copied(model, optimizer), expected)


def test_only_changed_chunks_are_written(tmp_path: Path) -> None:
    model, optimizer = small()
    train(model, optimizer)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        store.save(1)
        with torch.no_grad():
            model.experts[3] += 1
        optimizer.state[model.experts]["exp_avg"][5] += 1
        store.save(2)
        store.save(3)
    first, second, third = (record["bytes"] for record in read_life_log(tmp_path / LOG).records if record["event"] == "save")
    assert first > 16 * 4096 * 3
    assert second < 2 * 4096 + 32768  # two slices, the JSON texts and the index
    assert third < 1024  # the index
    names = load_file(segments(tmp_path)[1]).keys()
    assert {name for name in names if not name.startswith("@")} == {"model.experts[03:04]", "optimizer.experts.exp_avg[05:06]"}
    assert len(segments(tmp_path)) == 2


def test_segments_are_safetensors_files_with_the_values(tmp_path: Path) -> None:
    expected = lived(tmp_path, 1)[1]
    found = load_file(segments(tmp_path)[0])
    rows = [found[f"model.experts[{row:02d}:{row + 1:02d}]"] for row in range(16)]
    assert torch.equal(torch.cat(rows), expected["m.experts"])
    assert torch.equal(found["optimizer.narrow.exp_avg"], expected["o.narrow.exp_avg"])
    assert ("model.head.weight" in found) != ("model.inner.weight" in found)  # a tied weight is stored once


def test_a_changed_byte_of_any_tensor_is_saved(tmp_path: Path) -> None:
    model, optimizer = small()
    train(model, optimizer)
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        store.save(1)
        step = 1
        for tensor in model.state_dict().values():
            if not tensor.numel():
                continue
            flat = tensor.reshape(-1).view(torch.uint8)
            for place in (0, len(flat) - 1):
                flat[place] ^= 1
                step += 1
                store.save(step)
                expected = copied(model, optimizer)
                flat[place] ^= 1
                store.restore(step)
                assert_same(copied(model, optimizer), expected)


def test_the_log_tells_the_life(tmp_path: Path) -> None:
    lived(tmp_path, 3)
    rewind(tmp_path, 2)
    log = read_life_log(tmp_path / "life.jsonl")
    assert [(record["event"], record["step"]) for record in log.records] == [
        ("begin", 0), ("save", 1), ("save", 2), ("save", 3), ("restore", 2),
    ]  # fmt: skip
    assert [record["step"] for record in log.effective() if record["event"] == "save"] == [1, 2]
    assert log.records[0]["life"] == json.loads((tmp_path / "manifest.json").read_text().splitlines()[0])["life"]


def test_a_full_disk_stops_with_the_last_step_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = lived(tmp_path, 2)
    model, optimizer = small(seed=1)
    store = PerpetualStore(tmp_path, model, optimizer)
    store.restore()
    train(model, optimizer)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))  # type: ignore[attr-defined]
    store.save(3)
    with pytest.raises(StoreError, match=r"needs [\d,]+ bytes for step 3, and the disk has 5,000. Step 2 is intact.") as caught:
        store.close()
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.restore() == 2
        assert_same(copied(model, optimizer), states[2])
    assert verify(tmp_path).faults == []


def test_a_full_disk_in_the_log_leaves_a_save_durable(tmp_path: Path, files_of_at_most: Callable[..., Any]) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer, keep="last:1") as store:
        train(model, optimizer)
        store.save(1, wait=True)
        store.record("note", 1, text="x" * 2**20)  # so that the log is the only file which reaches the limit
        with files_of_at_most((tmp_path / LOG).stat().st_size):
            train(model, optimizer)
            with pytest.warns(UserWarning, match=r"no record 'save' of step 2, but the store is intact: log .* cannot be written"):
                store.save(2, wait=True)
            with pytest.warns(UserWarning, match="no record 'compact' of step 2"):
                found = store.compact()
        assert found is not None
        assert found.files_after == 1
        expected = copied(model, optimizer)
        train(model, optimizer)
        assert store.restore() == 2
        assert_same(copied(model, optimizer), expected)
        store.save(3)
    assert [record["event"] for record in read_life_log(tmp_path / LOG).records] == ["begin", "save", "note", "restore", "save"]
    assert verify(tmp_path).faults == []


def test_an_error_of_the_background_reaches_the_next_step(tmp_path: Path) -> None:
    model, optimizer = small()
    store = PerpetualStore(tmp_path, model, optimizer)
    store.save(1, wait=True)
    shutil.rmtree(tmp_path / "segments")
    train(model, optimizer)
    store.save(2)
    store._saver._background._pool.submit(lambda: None).result()  # the save before it is done
    with pytest.raises(StoreError, match="cannot be written"):
        store.save(3)
    with pytest.raises(StoreError, match="cannot be written"):
        store.close()


def test_an_interrupt_within_a_save_does_not_count_as_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        store.save(1, wait=True)
        train(model, optimizer)
        with monkeypatch.context() as patched:

            def interrupted(*args: Any) -> None:
                raise KeyboardInterrupt

            patched.setattr(store._saver._background, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.save(2)
        store.save(3)
        expected = copied(model, optimizer)
        train(model, optimizer)
        assert store.restore() == 3
        assert_same(copied(model, optimizer), expected)


@pytest.mark.parametrize("overlap", [False, True], ids=["copied at once", "overlap"])
def test_an_interrupt_after_a_save_was_handed_on_leaves_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer, overlap=overlap) as store:
        train(model, optimizer)
        store.save(1, wait=True)
        train(model, optimizer)
        with monkeypatch.context() as patched:
            patched.setattr(store._saver._changes, "accept", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.save(2, wait=True)
        with pytest.raises(StoreError, match="step must be above 2"):
            store.save(2)
        expected = copied(model, optimizer)
        store.save(3)
        assert store.steps == [1, 2, 3]
        train(model, optimizer)
        assert store.restore() == 3
        assert_same(copied(model, optimizer), expected)


def test_saves_wait_while_many_of_them_are_not_written(tmp_path: Path) -> None:
    background, gate = Background(2**30), threading.Event()
    for _ in range(64):
        background.submit(lambda: gate.wait(20) and None)
    added = threading.Event()
    other = threading.Thread(target=lambda: (background.submit(lambda: None), added.set()))
    other.start()
    assert not added.wait(0.2)
    gate.set()
    other.join(20)
    assert added.is_set()
    background.wait()
    background.close()
