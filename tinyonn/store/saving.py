"""Saves of a store: what each process writes, what changed, and the thread that makes it durable."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from ..errors import InputError
from ..nn.expert_rows import own_part
from .background import Background
from .compaction import Compaction, compact, unneeded_bytes
from .dcp import ChunkPlanner, PlanOnly, SegmentWriter
from .errors import StoreError
from .keep import Keep
from .layout import Layout
from .ledger import Ledger
from .life_log import LifeLog
from .manifest import SEGMENTS
from .processes import Processes, call, sendable
from .segment import Segment
from .staging import Changes, HostCopies, Overlap, Part, Staged, Versions
from .state import TrainingState

REQUEST = "compact.request"  # a file that another process makes, so that the trainer compacts


class Saver:
    """Saves steps of a store, and compacts it.

    Args:
        folder: of the store.
        state: what is saved.
        pools: names of the model's pools of experts.
        processes: that save.
        ledger, log: of the store, on the first process; None on others.
        step: the newest; None if there is none.
        keep, max_bytes, overlap, auto_compact: as of `PerpetualStore`.

    Attributes:
        step: the newest that was handed on to the background.
    """

    def __init__(
        self,
        folder: Path,
        state: TrainingState,
        pools: frozenset[str],
        processes: Processes,
        ledger: Ledger | None,
        log: LifeLog | None,
        step: int | None,
        *,
        keep: Keep,
        max_bytes: int,
        overlap: bool,
        auto_compact: bool,
    ) -> None:
        self._folder, self._state, self._pools, self._processes = folder, state, pools, processes
        self._ledger, self._log, self._keep = ledger, log, keep
        self.step = step
        self._auto_compact = auto_compact
        self._dropped = True  # whether a step was dropped since the last look for what is not needed
        self._background = Background(max_bytes)
        self._signature: Any = None
        self._planner: ChunkPlanner | None = None
        self._changes: Changes | None = None
        self._copies = HostCopies()
        self._overlaps = overlap
        self._overlap = Overlap(state.optimizers if overlap else [])
        self._trained: frozenset[str] = frozenset()
        self._last_compaction: Compaction | None = None

    def save(self, step: int, score: float | None, state: Mapping[str, Any]) -> None:
        """Hands a step on to the background, which makes it durable."""
        self._call(self._overlap.wait)
        self._call(self._background.check)
        try:
            collected = self._state.collect(state)
        except Exception as error:
            self._refuse(step, error)
            return
        self._plan(*collected)
        self._stage(step, *collected, None if score is None or not math.isfinite(score) else float(score))

    def wait(self) -> None:
        """Waits until all saves are durable, and raises the error of one."""
        self._call(self._overlap.wait)
        self._call(self._background.wait)

    def compact(self, wait: bool) -> Compaction | None:
        """See `PerpetualStore.compact`."""
        failed: list[StoreError] = []

        def run() -> None:
            try:
                self._processes.on_first(self._compact)
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

    def rewound(self) -> None:
        """Compares the next save with what the manifest has then."""
        self._signature = None

    def close(self) -> None:
        """Does what waits, and ends the threads; raises nothing."""
        self._overlap.close()
        self._background.close()

    # ---- within ----

    def _call(self, run: Callable[[], None]) -> None:
        call(self._folder, run)

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
            metadata = dcp.save({**tensors, **texts}, storage_writer=PlanOnly(), planner=planner, **self._processes.for_dcp())

        # In the background, like the saves: if one process plans and another saves, dcp meets both, and all get an error.
        self._call(partial(self._background.submit, run))
        self._call(self._background.wait)
        layout = Layout.of(metadata)

        def begin() -> np.ndarray:
            assert self._ledger is not None
            self._ledger.begin(layout)
            return self._ledger.table()[1]

        table = self._processes.on_first(begin)
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
        if self._processes.group is None:
            raise error
        job = partial(dcp.save, {}, storage_writer=PlanOnly(sendable(error)), **self._processes.for_dcp())
        self._call(partial(self._background.submit, job))
        self.step = step
        if self._signature is None:  # others wait for their plan, and get the error now
            self._call(self._background.wait)

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
        writer = SegmentWriter(self._folder / SEGMENTS, self._processes.rank, step, staged, self._ledger, publish)
        dcp.save({}, storage_writer=writer, planner=self._planner, **self._processes.for_dcp())

    def _publish(self, step: int, score: float | None, segments: list[Segment]) -> None:
        ledger = self._ledger
        assert ledger is not None
        chapters, kept = len(ledger.manifest.chapters), len(ledger.manifest.kept)
        ledger.manifest.processes = self._processes.number
        index = ledger.append(step, segments, score, self._keep)
        self._record_done("save", step, bytes=sum(one.size for one in segments) + index)
        self._dropped = self._dropped or len(ledger.manifest.kept) <= kept
        due = self._auto_compact and self._dropped and len(ledger.manifest.chapters) > chapters
        try:
            if (self._folder / REQUEST).exists():
                self._compact()
            elif due:
                self._dropped = False
                total, unneeded = unneeded_bytes(ledger)
                if unneeded > total / 2:
                    self._compact()
        except StoreError as error:  # the step is durable, and a full disk may have room later
            self._dropped = True
            self._record_done("compact", step, failed=str(error))
            (self._folder / REQUEST).unlink(missing_ok=True)  # after the record, which the process that made it reads
            warnings.warn(f"the store was not compacted: {error}", stacklevel=2)

    def _record_done(self, event: str, step: int, **fields: Any) -> None:
        """Records what is done; a log that cannot be written is a warning, because the store is as it should be."""
        assert self._log is not None
        try:
            self._log.append(event, step, **fields)
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
        (self._folder / REQUEST).unlink(missing_ok=True)


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
