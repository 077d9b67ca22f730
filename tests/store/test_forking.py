"""A fork is a life of its own that shares segments."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tinyonn.store import PerpetualStore, StoreError, fork, read_life_log, verify

from .conftest import assert_same, copied, lived, segments, small, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_forks_live_apart(tmp_path: Path) -> None:
    states = lived(tmp_path / "one", 5)
    child = fork(tmp_path / "one", tmp_path / "two", 3)
    assert child.parent is not None
    assert child.parent["step"] == 3
    shared = segments(tmp_path / "two")
    assert all(path.stat().st_nlink == 2 for path in shared)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path / "two", model, optimizer, keep="last:1") as store:
        assert store.life == child.life
        assert store.parent == child.parent
        assert store.restore() == 3
        assert_same(copied(model, optimizer), states[3])
        for step in range(4, 9):
            train(model, optimizer)
            store.save(step)
        store.compact()
        own = copied(model, optimizer)
    with PerpetualStore(tmp_path / "one", model, optimizer, keep="last:1") as store:
        assert store.life == child.parent["life"]
        store.restore()
        assert_same(copied(model, optimizer), states[5])
        store.save(6)
        store.compact()
    assert verify(tmp_path / "two").faults == []
    shutil.rmtree(tmp_path / "one")
    with PerpetualStore(tmp_path / "two", model, optimizer) as store:
        assert store.restore() == 8
        assert_same(copied(model, optimizer), own)
    events = [record["event"] for record in read_life_log(tmp_path / "two" / "parents" / f"{child.parent['life']}.jsonl").records]
    assert events.count("save") == 5


def test_fork_rejects(tmp_path: Path) -> None:
    lived(tmp_path / "one", 2)
    with pytest.raises(StoreError, match="new or empty folder"):
        fork(tmp_path / "one", tmp_path / "one")
    with pytest.raises(StoreError, match="kept one, 1, 2, got 9"):
        fork(tmp_path / "one", tmp_path / "two", 9)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("existed", [False, True])
def test_a_fork_that_fails_leaves_nothing(tmp_path: Path, existed: bool) -> None:
    lived(tmp_path / "one", 3)
    segments(tmp_path / "one")[-1].unlink()
    if existed:
        (tmp_path / "two").mkdir()
    with pytest.raises(StoreError, match=r"00000003.safetensors"):
        fork(tmp_path / "one", tmp_path / "two", 3)
    assert (tmp_path / "two").exists() == existed
    assert fork(tmp_path / "one", tmp_path / "two", 2).kept == [2]


def test_a_fork_that_was_killed_says_what_to_do(tmp_path: Path) -> None:
    lived(tmp_path / "one", 3)
    fork(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "manifest.json").unlink()
    with pytest.raises(StoreError, match="if a fork was interrupted, remove the folder and fork again"):
        PerpetualStore(tmp_path / "two", *small())
