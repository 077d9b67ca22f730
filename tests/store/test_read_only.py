"""A store that this process may read and not write: the kernel refuses, with the rights of another user where the tests run as root."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tinyonn.cli.app import run
from tinyonn.store import PerpetualStore, StoreError, fork, rewind, verify

from .conftest import assert_same, copied, files_of, lived, small, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="rights of another user are those of Linux"),
]

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users can read; those of pytest are the user's own."""
    folder = Path(tempfile.mkdtemp(prefix="tinyonn-"))
    folder.chmod(0o755)
    yield folder
    with protected(folder, False):
        shutil.rmtree(folder)


@contextmanager
def protected(folder: Path, on: bool = True) -> Iterator[None]:
    """Within the block, nothing in a folder can be written."""
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o555 if path.is_dir() else 0o444) if on else (0o755 if path.is_dir() else 0o644))
    if not on or os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.setfsuid(NOBODY)  # of this thread and those that it begins; without it, root may write anywhere
    try:
        yield
    finally:
        libc.setfsuid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in files_of(folder)}


def test_opening_and_going_back_are_one_line_and_change_nothing(place: Path) -> None:
    lived(place / "store", 3)
    before = contents(place)
    with protected(place / "store"):
        for attempt in (lambda: PerpetualStore(place / "store", *small()), lambda: rewind(place / "store", 2)):
            with pytest.raises(StoreError, match=r"^\S+/store must be a (folder|store) that can be written, got Permission denied.$"):
                attempt()
        assert verify(place / "store").readable == [1, 2, 3]
    assert contents(place) == before


@pytest.mark.parametrize("command", [["restore", "--step", "2"], ["compact"]])
def test_commands_that_write_are_one_line_and_change_nothing(place: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("other", "store"):
        lived(place / name, 3)
    assert run(["life", command[0], str(place / "other"), *command[1:]]) == 0  # loads all modules, which another user may not read
    before = contents(place / "store")
    capsys.readouterr()
    with protected(place / "store"):
        assert run(["life", command[0], str(place / "store"), *command[1:]]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert "can be written" in err
    assert "Permission denied" in err
    assert contents(place / "store") == before


def test_commands_that_read_work(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lived(place / "store", 3)
    page = place / "pages" / "timeline.html"
    page.parent.mkdir(mode=0o777)
    page.parent.chmod(0o777)
    reading = (["log"], ["verify"], ["show", "--page", str(page)])
    for command in reading:  # loads all modules, which another user may not read
        assert run(["life", *command, str(place / "store")]) == 0
    page.unlink()
    capsys.readouterr()
    with protected(place / "store"):
        for command in reading:
            assert run(["life", *command, str(place / "store")]) == 0
        out = capsys.readouterr().out
        assert run(["life", "show", str(place / "store")]) == 2
    assert "kept       1, 2, 3" in out
    assert page.exists()
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert "timeline.html" in err


def test_a_fork_of_it_goes_on_elsewhere(place: Path) -> None:
    states = lived(place / "store", 3)
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    with protected(place / "store"):
        fork(place / "store", place / "open" / "fork")
        with pytest.raises(StoreError, match=r"^target must be a folder that can be written, got \S+store/fork: Permission denied.$"):
            fork(place / "store", place / "store" / "fork")
    model, optimizer = small(seed=1)
    with PerpetualStore(place / "open" / "fork", model, optimizer) as store:
        assert store.restore() == 3
        assert_same(copied(model, optimizer), states[3])
        store.save(4)


def test_a_disk_that_becomes_read_only_stops_at_the_next_step_with_the_last_one_intact(place: Path) -> None:
    folder = place / "store"
    model, optimizer = small()
    store = PerpetualStore(folder, model, optimizer, keep="all")
    store.restore()
    train(model, optimizer)
    store.save(1, wait=True)
    expected = copied(model, optimizer)
    with protected(folder):
        store._saver._background._pool.submit(ctypes.CDLL(None).setfsuid, NOBODY).result()  # the thread that writes began before
        train(model, optimizer)
        with pytest.raises(StoreError, match=r"^\S+ cannot be written: [^\n]*Permission denied[^\n]* Step 1 is intact.$"):
            store.save(2, wait=True)
        with pytest.raises(StoreError):
            store.save(3)
        with pytest.raises(StoreError):
            store.close()
    assert verify(folder).readable == [1]
    again, optimizer = small(seed=1)
    with PerpetualStore(folder, again, optimizer, keep="all") as store:
        assert store.restore() == 1
        assert_same(copied(again, optimizer), expected)
