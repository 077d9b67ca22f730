"""A crash between any two operations on files leaves a store that opens with the newest durable step or the one before, bit for bit.

One run is stopped before each operation, and the folder is copied there as a crash would leave it: after a kill, with all that was written;
after a power cut, with half of what was not yet synchronised. Each copy is then opened.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinyonn.store import PerpetualStore, fork, segment, verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Crashes:
    """Copies of a folder as crashes leave it, before each operation on files; those with equal files once.

    Attributes:
        found: (content of each file, the steps of which one must be the newest).
        allowed: these steps, at present.
    """

    def __init__(self, folder: Path, patched: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._synced: dict[int, int] = {}  # inode -> bytes on the disk
        self._seen: set[Any] = set()
        self.found: list[tuple[dict[Path, bytes], set[int | None]]] = []
        self.allowed: set[int | None] = {None}
        self._fsync, self._unlink = os.fsync, os.unlink
        patched.setattr(os, "fsync", self.fsync)
        patched.setattr(os, "unlink", self.unlink)
        for home, name in ((os, "replace"), (os, "link"), (os, "ftruncate"), (os, "mkdir"), (os, "write"), (shutil, "copyfile")):
            patched.setattr(home, name, self.stopped(getattr(home, name)))
        patched.setattr(Path, "open", self.stopped(Path.open))
        patched.setattr(segment, "save_file", self.stopped(segment.save_file))

    def stopped(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.crash()
            return operation(*args, **kwargs)

        return run

    def fsync(self, file: int) -> None:
        self.crash()
        self._fsync(file)
        found = os.fstat(file)
        self._synced[found.st_ino] = found.st_size

    def unlink(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self.crash()
        if os.stat(path, *args, **kwargs).st_nlink == 1:
            self._synced.pop(os.stat(path).st_ino, None)
        self._unlink(path, *args, **kwargs)

    def crash(self) -> None:
        """Notes how the folder is now."""
        files = {}
        for root, _, names in os.walk(self._folder):
            for name in names:
                path = Path(root) / name
                with open(path, "rb") as file:
                    files[path.relative_to(self._folder)] = file.read(), os.fstat(file.fileno()).st_ino
        for power_cut in (False, True):
            left = {}
            for path, (data, inode) in files.items():
                synced = min(self._synced.get(inode, 0), len(data)) if power_cut else len(data)
                left[path] = data[: synced + (len(data) - synced) // 2]
            key = frozenset(left.items()), frozenset(self.allowed)
            if key not in self._seen:
                self._seen.add(key)
                self.found.append((left, set(self.allowed)))


def filled(value: int) -> nn.Linear:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(value)
        model.bias.fill_(-value)
    return model


def test_any_crash_leaves_the_newest_durable_step_or_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "lives"
    model = filled(0)
    with pytest.MonkeyPatch.context() as patched:
        crashes = Crashes(folder, patched)
        with PerpetualStore(folder / "one", model, keep="all") as store:

            def save(step: int) -> None:
                crashes.allowed = {store.step, step}
                model.load_state_dict(filled(step).state_dict())
                store.save(step, wait=True)
                crashes.allowed = {step}

            for step in (1, 2, 3):
                save(step)
            store.compact()
            save(4)
            crashes.allowed = {2, 4}
            store.rewind(2)
            crashes.allowed = {2}
            save(5)
        fork(folder / "one", folder / "two")
    assert len(crashes.found) > 60
    for number, (files, allowed) in enumerate(crashes.found):
        copy = tmp_path / str(number)
        for path, data in files.items():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes(data)
        check(copy / "one", allowed)
        if (copy / "two" / "manifest.json").exists():
            check(copy / "two", {5})
        else:  # the fork was not done, and can be done again
            shutil.rmtree(copy / "two", ignore_errors=True)
            if allowed == {5}:
                assert fork(copy / "one", copy / "two").kept == [5]


def check(folder: Path, allowed: set[int | None]) -> None:
    model = filled(0)
    with PerpetualStore(folder, model, keep="all") as store:
        newest = store.restore()
        assert newest in allowed
        for step in store.steps:
            store.restore(step)
            assert torch.equal(model.weight, filled(step).weight)
            assert torch.equal(model.bias, filled(step).bias)
    found = verify(folder)
    assert found.faults == []
    assert found.readable[-1:] == ([] if newest is None else [newest])
