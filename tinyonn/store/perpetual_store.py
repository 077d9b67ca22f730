"""A store of incremental checkpoints: each save writes only what changed since the last one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.optim import Optimizer

from .._io.locks import lock_file, unlock_file
from ..errors import InputError
from ..nn.expert_pools import expert_pools
from ..nn.expert_rows import own_part
from ..ops._checks import check_size
from .background import Background
from .compaction import Compaction, compact, unneeded_bytes
from .dcp import ChunkPlanner, PlanOnly, SegmentReader, SegmentWriter
from .errors import CLOSED, DamagedStoreError, StoreError
from .keep import Keep
from .layout import Layout
from .ledger import Ledger
from .life_log import LifeLog
from .logs import open_log
from .manifest import INDEX, NAME, PREVIOUS, SEGMENTS, Manifest
from .rewinding import check_step, go_back_hint
from .segment import Files, Segment
from .staging import Changes, HostCopies, Overlap, Part, Staged, Versions
from .state import RANDOM, STATE, Stateful, TrainingState, clean, set_random_state

REQUEST = "compact.request"  # a file that another process makes, so that the trainer compacts
MAX_BYTES = 2**30
MAX_STEP = 2**63 - 1  # that index files hold
_T = TypeVar("_T")

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
        max_bytes: bytes of copies that wait to be written, at most; then `save` waits, with its own copy made. So the copies take at most
            `max_bytes` (one save if that is larger) and one save more.
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
        self._group: Any = None
        self.rank, self.processes = 0, 1
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            self._group = distributed.new_group(backend="gloo")
            self.rank, self.processes = distributed.get_rank(), distributed.get_world_size()
        self._state = TrainingState(model, _optimizers(optimizer), objects or {}, self.rank)
        self._pools = frozenset(_pool_names(self._state.model, pools))
        self._auto_compact = auto_compact
        self._dropped = True  # whether a step was dropped since the last look for what is not needed
        self._ledger: Ledger | None = None
        self._lock: int | None = None
        self.log: LifeLog | None = None
        found = self._on_first(self._open)
        self.life, self.parent, self.step = found
        self._restored = self.step is None
        self._closed = False
        self.random_restored = False
        self.state: dict[str, Any] = {}
        self._random: dict[str, Any] | None = None
        self._background = Background(max_bytes)
        self._signature: Any = None
        self._planner: ChunkPlanner | None = None
        self._changes: Changes | None = None
        self._copies = HostCopies()
        self._overlaps = overlap
        self._overlap = Overlap(self._state.optimizers if overlap else [])
        self._trained: frozenset[str] = frozenset()
        self._last_compaction: Compaction | None = None

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
            StoreError: the step is not after the newest; `restore` was not called on a store with steps; an earlier save failed, as on a
                full disk, and then the last durable step is intact.
        """
        begin = time.perf_counter()
        check_size("step", step, 0)
        if step > MAX_STEP:
            raise ValueError(f"step must be below 2**63, got {step}.")
        if not self._restored:
            raise StoreError(f"restore() must be called before save(), because {self.folder} has step {self.step} already.")
        if self.step is not None and step <= self.step:
            raise StoreError(f"step must be above {self.step}, the newest, got {step}; rewind() goes back to a step that is kept.")
        self._call(self._overlap.wait)
        self._call(self._background.check)
        try:
            collected = self._state.collect(state or {})
        except Exception as error:
            self._refuse(step, error)
        else:
            self._plan(*collected)
            self._stage(step, *collected, None if score is None or not math.isfinite(score) else float(score))
        if wait:
            self.wait()
        return Save(step, time.perf_counter() - begin)

    def wait(self) -> None:
        """Waits until all saves are durable.

        Raises:
            StoreError: one failed.
        """
        self._call(self._overlap.wait)
        self._call(self._background.wait)

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
        failed: list[StoreError] = []

        def run() -> None:
            try:
                self._on_first(self._compact)
            except StoreError as error:  # the store is as it was, so that saves can go on
                failed.append(error)
                if not wait:
                    warnings.warn(f"the store was not compacted: {error}", stacklevel=2)

        self._call(self._overlap.wait)
        self._call(partial(self._background.submit, run))
        if not wait:
            return None
        self.wait()
        if failed:
            raise failed[0]
        return self._last_compaction

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
        ledger = self._together(self._reading)
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

        self._signature = None  # the next save compares with what the manifest has then, also after an error
        self._on_first(run)
        self.step = step
        self.record("restore", step)

    @property
    def steps(self) -> list[int]:
        """Restorable steps, on all processes; waits for the saves."""
        self.wait()
        return list(self._together(self._reading).manifest.kept)

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
        """Waits for the saves, and lets another process use the store.

        Raises:
            StoreError: a save failed.
        """
        try:
            self.wait()
        finally:
            self._closed = True
            self._overlap.close()
            self._background.close()
            if self.log is not None:
                self.log.close()
            if self._lock is not None:
                unlock_file(self._lock)
                self._lock = None
        # The process group stays until that of the program ends. To destroy it, all processes must be done with it, and to wait for them
        # would hang a process that closes the store alone, after an error of its own.

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
            elif any((folder / SEGMENTS).iterdir()) and any((folder / INDEX).iterdir()):
                remedy = f"`tinyonn life restore {folder}` brings back the manifest before it"
                if not (folder / PREVIOUS).exists():
                    remedy = "if a fork was interrupted, remove the folder and fork again"
                raise StoreError(f"{folder} has segments but no {NAME}; {remedy}.")
            else:
                manifest = Manifest(str(uuid.uuid4()))
                manifest.write(folder)
            self._ledger = Ledger(folder, manifest)
            self._ledger.sweep()
            self.log = open_log(folder, manifest)
        except BaseException:
            os.close(self._lock)
            raise
        return manifest.life, manifest.parent, manifest.newest

    def _on_first(self, run: Callable[[], Any]) -> Any:
        """Runs on the first process, and returns or raises the same on all."""
        if self._group is None:
            return run()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = run()
            except Exception as error:
                box[1] = _sendable(error)
        distributed.broadcast_object_list(box, src=0, group=self._group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def _together(self, run: Callable[[], _T]) -> _T:
        """Runs on all processes, and returns what this one found; an error of one is raised on all."""
        found: list[_T] = []
        error: Exception | None = None
        try:
            found.append(run())
        except Exception as caught:
            error = caught
        if self._group is not None:
            errors: list[Any] = [None] * self.processes
            distributed.all_gather_object(errors, None if error is None else _sendable(error), group=self._group)
            error = error or next((one for one in errors if one is not None), None)
        if error is not None:
            raise error
        return found[0]

    def _reading(self) -> Ledger:
        """The ledger; on processes other than the first, of the manifest as it is now."""
        return self._ledger if self._ledger is not None else Ledger(self.folder, Manifest.read(self.folder))

    def _call(self, run: Callable[[], None]) -> None:
        """Runs, with the error of dcp as the one that caused it."""
        try:
            run()
        except CheckpointException as error:
            causes = [one for one, _ in error.failures.values()]
            cause = next((one for one in causes if isinstance(one, StoreError)), causes[0])
            if isinstance(cause, StoreError) and not isinstance(cause, DamagedStoreError):
                cause = StoreError(f"{cause} {self._intact()}".strip())
            raise cause from error

    def _intact(self) -> str:
        with contextlib.suppress(StoreError):
            newest = Manifest.read(self.folder).newest
            return "" if newest is None else f"Step {newest} is intact."
        return ""

    def _plan(self, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        """Plans what each process writes, if that is not known yet."""
        signature = [(name, one.dtype, one.shape, getattr(one, "placements", None)) for name, one in tensors.items()]
        if signature == self._signature:
            return
        self.wait()
        planner = ChunkPlanner(frozenset(name for name in tensors if _is_pool(name, tensors, self._pools)))
        metadata: Any = None

        def run() -> None:
            nonlocal metadata
            metadata = dcp.save({**tensors, **texts}, storage_writer=PlanOnly(), planner=planner, **self._dist())

        # In the background, like the saves: if one process plans and another saves, dcp meets both, and all get an error.
        self._call(partial(self._background.submit, run))
        self._call(self._background.wait)
        layout = Layout.of(metadata)

        def begin() -> np.ndarray:
            assert self._ledger is not None
            self._ledger.begin(layout)
            return self._ledger.table()[1]

        table = self._on_first(begin)
        numbers = {(chunk.tensor, chunk.offsets): number for number, chunk in enumerate(layout.chunks)}
        parts: dict[str, list[Part]] = {}
        for item in planner.plan.items:
            name, offsets = item.index.fqn, tuple(item.index.offset or ())
            number = numbers[name, offsets]
            if name in texts or not offsets:
                parts[name] = [Part(number, 0, -1)]
                continue
            start = _first_row(tensors[name])
            rows = layout.chunks[number].sizes[0]
            parts.setdefault(name, []).append(Part(number, offsets[0] - start, offsets[0] - start + rows))
        known = [None if row["file"] < 0 else (int(row["digest"][0]) << 64) | int(row["digest"][1]) for row in table]
        trained = self._state.trained()
        self._planner, self._changes, self._signature = planner, Changes(layout, parts, known), signature
        self._trained = frozenset(name for name in parts if name in trained or name.startswith("optimizer."))

    def _refuse(self, step: int, error: Exception) -> None:
        """Hands an error of this process on to all of them, which plan or save; in one process, raises it."""
        if self._group is None:
            raise error
        job = partial(dcp.save, {}, storage_writer=PlanOnly(_sendable(error)), **self._dist())
        self._call(partial(self._background.submit, job))
        self.step = step
        if self._signature is None:  # others wait for their plan, and get the error now
            self._call(self._background.wait)

    def _dist(self) -> dict[str, Any]:
        return {"process_group": self._group, "no_dist": self._group is None}

    def _stage(self, step: int, tensors: dict[str, Tensor], texts: dict[str, str], score: float | None) -> None:
        """Copies what changed on this process and hands it to the background; a part of it in another thread, while the caller goes on."""
        changes = self._changes
        assert changes is not None
        try:
            local = {name: own_part(tensors[name]) for name in changes.parts if name in tensors}
            later = {name for name, one in local.items() if one.device.type != "cpu" or (self._overlaps and name in self._trained)}
            host = self._copies.of(local)
            host.update({name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for name, text in texts.items()})
            staged = changes.find({name: one for name, one in host.items() if name not in later})
        except Exception as error:
            self._refuse(step, error)
            return

        def hand_on(found: Staged | Exception) -> None:
            size = 0 if isinstance(found, Exception) else found.bytes
            self._background.submit(partial(self._write, step, score, found), size)
            self.step = step  # at once: after an interrupt, the same step must not be saved again
            if not isinstance(found, Exception):
                changes.accept(found)

        if not later:
            self._call(partial(hand_on, staged))
            return
        versions = Versions({name: local[name] for name in later if local[name].device.type == "cpu"})

        def read() -> Staged:
            found = changes.find({name: host[name] for name in later})
            versions.check()
            return staged.with_(found)

        self._overlap.start(read, hand_on)
        self.step = step

    def _write(self, step: int, score: float | None, staged: Staged | Exception) -> None:
        """Makes a save durable; in the background, on all processes."""
        publish = partial(self._publish, step, score)
        writer = SegmentWriter(self.folder / SEGMENTS, self.rank, step, staged, self._ledger, publish)
        dcp.save({}, storage_writer=writer, planner=self._planner, **self._dist())

    def _publish(self, step: int, score: float | None, segments: list[Segment]) -> None:
        ledger = self._ledger
        assert ledger is not None
        chapters, kept = len(ledger.manifest.chapters), len(ledger.manifest.kept)
        ledger.manifest.processes = self.processes
        index = ledger.append(step, segments, score, self.keep)
        self._record_done("save", step, bytes=sum(one.size for one in segments) + index)
        self._dropped = self._dropped or len(ledger.manifest.kept) <= kept
        due = self._auto_compact and self._dropped and len(ledger.manifest.chapters) > chapters
        try:
            if (self.folder / REQUEST).exists():
                self._compact()
            elif due:
                self._dropped = False
                total, unneeded = unneeded_bytes(ledger)
                if unneeded > total / 2:
                    self._compact()
        except StoreError as error:  # the step is durable, and a full disk may have room later
            self._dropped = True
            self._record_done("compact", step, failed=str(error))
            (self.folder / REQUEST).unlink(missing_ok=True)  # after the record, which the process that made it reads
            warnings.warn(f"the store was not compacted: {error}", stacklevel=2)

    def _record_done(self, event: str, step: int, **fields: Any) -> None:
        """Records what is done; a log that cannot be written is a warning, because the store is as it should be."""
        assert self.log is not None
        try:
            self.log.append(event, step, **fields)
        except InputError as error:
            warnings.warn(f"the life log has no record {event!r} of step {step}, but the store is intact: {error}", stacklevel=2)

    def _compact(self) -> None:
        if self._ledger is None:
            return
        begin = time.perf_counter()
        found = compact(self._ledger)
        self._last_compaction, self._dropped = found, False
        seconds = round(time.perf_counter() - begin, 3)
        self._record_done("compact", self._ledger.manifest.newest or 0, seconds=seconds, **found._asdict())
        (self.folder / REQUEST).unlink(missing_ok=True)

    def _read(self, ledger: Ledger, step: int) -> dict[str, Any]:
        """Reads a step into model, optimisers and objects. Returns its further values."""

        def checked() -> tuple[Layout, str, dict[str, Any] | None, dict[str, Tensor], SegmentReader]:
            layout, table = ledger.at(step)
            files = Files(ledger.segments)
            own, number = f"{RANDOM}{self.rank}", sum(name.startswith(RANDOM) for name in layout.numbers)
            names = [STATE, *([own] if own in layout.numbers and number == self.processes else [])]
            texts = [bytes(files.checked(table[layout.numbers[name]], name)).decode() for name in names]
            self._state.check(layout, texts[0])
            reader = SegmentReader(layout, table, files)
            tensors = {name: reader.whole(name) for name in layout.tensors if name.startswith("object.")}
            return layout, texts[0], json.loads(texts[1]) if len(texts) > 1 else None, tensors, reader

        layout, text, random_state, tensors, reader = self._together(checked)
        targets = self._state.targets(layout)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        before: dict[str, Any] = {}

        def load_objects() -> None:
            before.update(self._state.object_states())
            self._state.load_objects(text, tensors)

        try:
            self._together(load_objects)
            self._call(partial(dcp.load, targets, storage_reader=reader, planner=planner, **self._dist()))
        except BaseException:
            self._state.bring_back(before)
            raise
        self._state.load_copies(targets)
        self._state.load_optimizers(layout, text, targets, tensors)
        self.random_restored, self._random = random_state is not None, random_state
        self.restore_random_state()
        return self._state.extra(text, tensors)


def _sendable(error: Exception) -> Exception:
    """An error for another process: ours as they are, others by their text, because not all can be pickled."""
    return error if isinstance(error, InputError) else RuntimeError(f"{type(error).__name__}: {error}")


def _optimizers(given: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    if given is None:
        return []
    return [given] if isinstance(given, Optimizer) or not isinstance(given, Iterable) else list(given)


def _pool_names(model: nn.Module, pools: Iterable[Tensor] | None) -> Iterable[str]:
    wanted = {id(one) for one in (expert_pools(model) if pools is None else pools)}
    return [clean(name) for name, parameter in model.named_parameters() if id(parameter) in wanted]


def _is_pool(name: str, tensors: Mapping[str, Tensor], pools: frozenset[str]) -> bool:
    """Whether a tensor is a pool of experts, or the optimiser's state of one with its shape."""
    kind, _, rest = name.partition(".")
    if kind == "model":
        return rest in pools
    parameter = rest.rpartition(".")[0]
    return kind == "optimizer" and parameter in pools and tensors[name].shape == tensors[f"model.{parameter}"].shape


def _first_row(tensor: Any) -> int:
    """The first row of this process's part of a tensor."""
    if not hasattr(tensor, "device_mesh"):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offsets[0])
