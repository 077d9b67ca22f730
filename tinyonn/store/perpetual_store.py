"""A store of incremental checkpoints: each save writes only what changed since the last one."""

from __future__ import annotations

import contextlib
import json
import numbers
import os
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.optim import Optimizer

from .._io.locks import lock_file, unlock_file
from ..errors import shown
from ..nn.expert_pools import expert_pools
from ..nn.expert_rows import own_part
from ..ops._checks import check_size
from .closing import leave_note, take_note
from .compaction import Compaction
from .dcp import SegmentReader
from .errors import CLOSED, DamagedStoreError, StoreError
from .keep import Keep
from .layout import Layout
from .ledger import Ledger
from .life_log import LifeLog
from .logs import open_log
from .manifest import INDEX, NAME, PREVIOUS, SEGMENTS, Manifest
from .processes import Processes, call
from .rewinding import check_step, go_back_hint
from .saving import Saver
from .segment import Files
from .state import RANDOM, STATE, Stateful, TrainingState, clean, set_random_state

MAX_BYTES = 2**30
MAX_STEP = 2**63 - 1  # that index files hold

# torch.distributed.checkpoint warns in each call that runs in one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Save(NamedTuple):
    """A save that a thread makes durable.

    Attributes:
        step: the step.
        waited: seconds that the call took.
    """

    step: int
    waited: float


class PerpetualStore:
    """A store of incremental checkpoints of a model, its optimiser and other objects, and the log of its life.

        store = PerpetualStore("life/store", model, optimizer, objects={"scheduler": scheduler}, keep="last:3,every:1000")
        step = store.restore() or 0
        for step in range(step + 1, 10_001):
            train(model, optimizer)
            store.save(step, score=integrity)
        store.close()

    A save compares the checksum of each chunk (a tensor; of pools of experts, a few rows) with that of its last save, copies those that
    differ, and returns. A thread writes them as a safetensors file and then replaces the manifest; with that the step is durable. When a
    process is killed, the last durable step is readable, and what was written after it is deleted at the next opening.

    `torch.distributed.checkpoint` plans which process saves and reads what, so a model under `DistributedDataParallel` or `fully_shard` is
    saved by all processes in parallel, and can be restored on another number of them. All processes make the store and call its methods.
    The folder must be one that all of them see.

    Random states of Python, NumPy and PyTorch are saved too. A run that was stopped and restored then continues bit for bit on a CPU, if
    the caller's data come in the same order.

    Args:
        folder: folder of the store; created if it does not exist.
        model: a module, or one wrapped by `DistributedDataParallel`, `fully_shard` or `torch.compile`.
        optimizer: optimiser of the model's parameters, or several; None for none.
        objects: other objects with `state_dict` and `load_state_dict`, by name. Their states may hold tensors, numbers, texts, lists,
            tuples and dicts.
        keep: which steps stay restorable: a `Keep`, or a text such as "last:3,every:1000,best:1" or "all".
        pools: parameters whose first dimension is experts; None for those that `expert_pools` finds.
        max_bytes: bytes of copies that wait to be written, at most, in 64 saves; then `save` waits, with its own copy made. So they take
            at most `max_bytes` (one save if that is larger) and one save more.
        overlap: whether parameters and the optimisers' state on a CPU are compared and copied while the next forward and backward pass run;
            `step` of the optimisers then waits for that. Nothing else may change them between `save` and the optimiser's next step: what
            autograd notices is an error, a change through `.data` would be saved in part. Tensors of a GPU are always copied to the
            host in `save` and compared later.
        auto_compact: whether to compact when more than half of the stored bytes belong to no kept step.

    Attributes:
        life: UUID of the life.
        parent: {"life": UUID, "step": step} of a fork; None otherwise.
        step: step of the newest save, whether it is durable yet or not; None if there is none.
        log: the `LifeLog`, on the first process; None on others.
        state: further values of the step that was restored, as `save` got them.
        random_restored: whether the last `restore` set the random states; false if another number of processes saved them.

    Raises:
        StoreError: the folder cannot be written, is in use, damaged or of a newer version.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        objects: Mapping[str, Stateful] | None = None,
        keep: Keep | str = "last:3",
        pools: Iterable[Tensor] | None = None,
        max_bytes: int = MAX_BYTES,
        overlap: bool = False,
        auto_compact: bool = True,
    ) -> None:
        check_size("max_bytes", max_bytes)
        self.folder = Path(folder)
        self.keep = Keep.parse(keep)
        self._processes = Processes()
        self._state = TrainingState(model, _optimizers(optimizer), objects or {}, self._processes.rank)
        names = frozenset(_pool_names(self._state.model, pools))
        self._ledger: Ledger | None = None
        self._lock: int | None = None
        self.log: LifeLog | None = None
        self.life, self.parent, newest = self._processes.on_first(self._open)
        self._saver = Saver(
            self.folder,
            self._state,
            names,
            self._processes,
            self._ledger,
            self.log,
            newest,
            keep=self.keep,
            max_bytes=max_bytes,
            overlap=overlap,
            auto_compact=auto_compact,
        )
        self._restored = newest is None
        self._closed = False
        self.random_restored = False
        self.state: dict[str, Any] = {}
        self._random: dict[str, Any] | None = None

    @property
    def step(self) -> int | None:
        """Step of the newest save, whether it is durable yet or not; None if there is none."""
        return self._saver.step

    # ---- saving ----

    def save(self, step: int, *, score: float | None = None, state: Mapping[str, Any] | None = None, wait: bool = False) -> Save:
        """Saves a step; waits only until what changed is copied.

        Where the log of the life cannot be written, as on a full disk, the step is durable nevertheless, with a warning.

        Args:
            step: step over the whole life; larger than those before.
            score: value by which `keep` chooses the best steps, the highest first, such as PI; None or NaN if there is none.
            state: further values by name, tensors and what JSON can hold; after `restore` they are in the attribute `state`.
            wait: whether to wait until the step is durable.

        Returns:
            The step, and how long the call took.

        Raises:
            TypeError: the score is no number.
            StoreError: the step is not after the newest; `restore` was not called on a store with steps; an earlier save failed, as on a
                full disk, and then the last durable step is intact.
        """
        begin = time.perf_counter()
        check_size("step", step, 0)
        if step > MAX_STEP:
            raise ValueError(f"step must be below 2**63, got {step}.")
        if score is not None and not isinstance(score, numbers.Real | Tensor):
            raise TypeError(f"score must be a number, got {type(score).__name__} {shown(score)}.")
        self._check_open()
        if not self._restored:
            raise StoreError(f"restore() must be called before save(), because {self.folder} has step {self.step} already.")
        if self.step is not None and step <= self.step:
            raise StoreError(f"step must be above {self.step}, the newest, got {step}; rewind() goes back to a step that is kept.")
        self._saver.save(step, score, state or {})
        if wait:
            self.wait()
        return Save(step, time.perf_counter() - begin)

    def wait(self) -> None:
        """Waits until all saves are durable.

        Raises:
            StoreError: one failed.
        """
        self._saver.wait()

    def state_bytes(self) -> int:
        """Bytes of the whole state on this process, which the first save writes; later ones write at most as much."""
        tensors, texts = self._state.collect({})
        local = sum(one.numel() * one.element_size() for one in map(own_part, tensors.values()))
        return local + sum(len(text) for text in texts.values())

    def compact(self, wait: bool = True) -> Compaction | None:
        """Drops what no kept step needs, and merges segments, in the background.

        Returns:
            What it did, on the first process; None on others and without `wait`.

        Raises:
            StoreError: the disk has no room for the merged segments, or a segment is damaged; the store is as it was. Without `wait`, this
                is a warning.
        """
        return self._saver.compact(wait)

    # ---- restoring ----

    def restore(self, step: int | None = None, *, rewind: bool = False) -> int | None:
        """Restores model, optimisers, objects and random states.

        Everything is read and checked, on all processes, before the first tensor is changed. An error changes nothing.

        Args:
            step: a kept step; None for the newest.
            rewind: whether to forget the steps after it, so that training can go on from there. Without, an older step is only read.

        Returns:
            The step; None if the store has none.

        Raises:
            StoreError: the step is not kept; the store is of another model, and the message names three tensors that differ; a segment is
                damaged, and the message names the file, the tensor and a step before it that is whole; the store is closed.
            Exception: what an object's `load_state_dict` raises.
        """
        self._check_open()
        self.wait()
        if self.step is None and step is None:
            self._restored = True
            if self.log is not None and self.log.number > 1:  # a run that was killed before its first save
                self.record("restore", 0)
            return None
        self._restored = self.step is None  # with steps, not until all of it succeeded
        ledger = self._processes.together(self._reading)
        wanted = ledger.manifest.newest if step is None else step
        assert wanted is not None
        try:
            self.state = self._read(ledger, wanted)
        except DamagedStoreError as error:
            raise DamagedStoreError(f"{error}{go_back_hint(ledger, wanted)}") from error
        newest = wanted == ledger.manifest.newest
        if rewind and not newest:
            self.rewind(wanted)
        elif newest:
            self.record("restore", wanted)
        self._restored = newest or rewind
        return wanted

    def restore_random_state(self) -> None:
        """Sets the random states of the last `restore` again, for a trainer that draws numbers before it goes on."""
        if self._random is not None:
            set_random_state(self._random)

    def rewind(self, step: int) -> None:
        """Forgets the steps after a kept one; `fork` keeps them elsewhere first.

        Raises:
            StoreError: the step is not kept or damaged; the store is closed or cannot be written. Then the later steps stay.
        """
        self._check_open()
        self.wait()

        def run() -> None:
            assert self._ledger is not None
            check_step(self._ledger, step)
            self._ledger.rewind(step)

        self._saver.rewound()  # also after an error
        self._processes.on_first(run)
        self._saver.step = step
        self.record("restore", step)

    @property
    def steps(self) -> list[int]:
        """Restorable steps, on all processes; waits for the saves."""
        self.wait()
        return list(self._processes.together(self._reading).manifest.kept)

    # ---- the life ----

    def record(self, event: str, step: int, durable: bool = False, **fields: Any) -> None:
        """Adds a record to the log of the life, on the first process; does nothing on others. See `LifeLog`.

        Raises:
            StoreError: the store is closed.
        """
        self._check_open()
        if self.log is not None:
            self.log.append(event, step, durable=durable, **fields)

    def close(self) -> None:
        """Waits for the saves, and lets another program use the store. Does not wait for the other processes of this one.

        Raises:
            StoreError: a save failed.
        """
        try:
            self.wait()
            if self.log is not None and not self._closed:
                self._leave_note()
        finally:
            self._closed = True
            self._saver.close()
            if self.log is not None:
                self.log.close()
            if self._lock is not None:
                unlock_file(self._lock)
                self._lock = None
            self._processes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(BaseException):  # the error within the block is the one to see
            self.close()

    # ---- within ----

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(CLOSED)

    def _open(self) -> tuple[str, dict[str, Any] | None, int | None]:
        """Locks the folder and reads or makes the manifest; on the first process."""
        folder = self.folder
        try:
            for one in (folder, folder / SEGMENTS, folder / INDEX):
                one.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(folder / ".lock")
        except BlockingIOError:
            raise StoreError(f"{folder} must be a store that no other run writes into; wait for it, or fork the store.") from None
        except OSError as error:
            raise StoreError(f"{folder} must be a folder that can be written, got {error.strerror}.") from error
        try:
            if (folder / NAME).exists():
                manifest = Manifest.read(folder)
            elif left := [what for name, what in ((SEGMENTS, "segments"), (INDEX, "files in index/")) if any((folder / name).iterdir())]:
                remedy = f"`tinyonn life restore {folder}` brings back the manifest before it"
                if not (folder / PREVIOUS).exists():
                    remedy = "if a fork was interrupted, remove the folder and fork again"
                raise StoreError(f"{folder} has {left[0]}, but no {NAME}; {remedy}.")
            else:
                manifest = Manifest(str(uuid.uuid4()))
                manifest.write(folder)
            self._ledger = Ledger(folder, manifest)
            note = take_note(folder)
            if note is not None and note.holds(folder):
                self._ledger.check_lists()
                self._ledger.is_tidy = True
            else:
                self._ledger.sweep()
            self.log = open_log(folder, manifest, None if note is None else note.checked)
        except BaseException:
            os.close(self._lock)
            raise
        return manifest.life, manifest.parent, manifest.newest

    def _leave_note(self) -> None:
        """Notes that the next opening need not look for files that nobody needs; without the note it does."""
        assert self._ledger is not None
        assert self.log is not None
        with contextlib.suppress(OSError, ValueError):  # also a manifest that is damaged meanwhile, and a log that the caller closed
            if self._ledger.tidy():
                leave_note(self.folder, self.log.sync())

    def _reading(self) -> Ledger:
        """The ledger; on processes other than the first, of the manifest as it is now."""
        return self._ledger if self._ledger is not None else Ledger(self.folder, Manifest.read(self.folder))

    def _read(self, ledger: Ledger, step: int) -> dict[str, Any]:
        """Reads a step into model, optimisers and objects. Returns its further values."""

        def checked() -> tuple[Layout, str, dict[str, Any] | None, dict[str, Tensor], SegmentReader]:
            layout, table = ledger.at(step)
            files = Files(ledger.segments)
            own, number = f"{RANDOM}{self._processes.rank}", sum(name.startswith(RANDOM) for name in layout.numbers)
            names = [STATE, *([own] if own in layout.numbers and number == self._processes.number else [])]
            texts = [bytes(files.checked(table[layout.numbers[name]], name)).decode() for name in names]
            self._state.check(layout, texts[0])
            reader = SegmentReader(layout, table, files)
            tensors = {name: reader.whole(name) for name in layout.tensors if name.startswith("object.")}
            return layout, texts[0], json.loads(texts[1]) if len(texts) > 1 else None, tensors, reader

        layout, text, random_state, tensors, reader = self._processes.together(checked)
        targets = self._state.targets(layout)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        before: dict[str, Any] = {}

        def load_objects() -> None:
            before.update(self._state.object_states())
            self._state.load_objects(text, tensors)

        try:
            self._processes.together(load_objects)
            call(self.folder, partial(dcp.load, targets, storage_reader=reader, planner=planner, **self._processes.for_dcp()))
        except BaseException:
            self._state.bring_back(before)
            raise
        self._state.load_copies(targets)
        self._state.load_optimizers(layout, text, targets, tensors)
        self.random_restored, self._random = random_state is not None, random_state
        self.restore_random_state()
        return self._state.extra(text, tensors)


def _optimizers(given: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    if given is None:
        return []
    return [given] if isinstance(given, Optimizer) or not isinstance(given, Iterable) else list(given)


def _pool_names(model: nn.Module, pools: Iterable[Tensor] | None) -> Iterable[str]:
    wanted = {id(one) for one in (expert_pools(model) if pools is None else pools)}
    return [clean(name) for name, parameter in model.named_parameters() if id(parameter) in wanted]
