"""The store as storage of `torch.distributed.checkpoint`, which plans what each process saves and reads."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from .errors import StoreError
from .layout import Chunk, Layout, runs
from .ledger import Ledger
from .segment import Files, Segment, free_bytes, write_segment
from .staging import Staged

SPARE = 2**20  # bytes of the disk that a save leaves free
PIECE = 4096  # bytes of a chunk of a pool, at least


class ChunkPlanner(DefaultSavePlanner):
    """Plans once, with pools cut into rows; later saves use the same plan, without sending it.

    Args:
        pools: names of tensors whose first dimension is experts.

    Attributes:
        plan: what this process writes.
    """

    def __init__(self, pools: frozenset[str]) -> None:
        super().__init__(flatten_state_dict=False)
        self._pools = pools
        self._ready = False

    def create_local_plan(self) -> SavePlan:
        if self._ready:
            return SavePlan([], usable=False)
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[part for item in plan.items for part in self._parts(item)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        planned = [rank for rank, plan in enumerate(all_plans) if plan.usable]
        if planned and len(planned) < len(all_plans):
            rank = planned[0]
            raise StoreError(
                f"the state must have the same tensors on all processes, but those of process {rank} changed and others did not."
            )
        if not planned:
            return [SavePlan([], usable=False) for _ in all_plans], self.metadata
        return super().create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = new_plan if new_plan.usable else dataclasses.replace(self.plan, storage_data=new_plan.storage_data)
        self.plan, self._ready = plan, True
        return plan

    def _parts(self, item: WriteItem) -> list[WriteItem]:
        data = item.tensor_data
        if data is None:
            return [item]
        sizes, offsets = tuple(data.chunk.sizes), tuple(data.chunk.offsets)
        if not math.prod(sizes) and data.size.numel():
            return []  # an empty shard
        if item.index.fqn not in self._pools or not sizes:
            return [item]
        row = math.prod(sizes[1:]) * data.properties.dtype.itemsize
        rows = max(1, -(-PIECE // max(row, 1)))
        if rows >= sizes[0]:
            return [item]
        parts = []
        for begin in range(0, sizes[0], rows):
            where = torch.Size((offsets[0] + begin, *offsets[1:]))
            size = torch.Size((min(rows, sizes[0] - begin), *sizes[1:]))
            chunk = dataclasses.replace(data, chunk=ChunkStorageMetadata(where, size))
            parts.append(WriteItem(MetadataIndex(item.index.fqn, where), WriteItemType.SHARD, tensor_data=chunk))
        return parts


class _Plain(StorageWriter):
    """The calls of a writer that need nothing."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        return _done([])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return None


class PlanOnly(_Plain):
    """Writes nothing; a save with it makes the plan.

    Args:
        error: what keeps this process from planning or saving, which all processes then get, whether they plan or save.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if self._error is not None:
            raise self._error
        return plan


class SegmentWriter(_Plain):
    """Writes the changed chunks of a save, a segment for each process, and then the manifest on the first process.

    Args:
        segments: folder of the segments.
        rank: of this process.
        step: of the save.
        staged: what changed here; or the error that kept it from being found, which all processes then get.
        ledger: of the first process; None on others.
        publish: called on the first process with the segments of all, which makes them durable.
    """

    def __init__(self, segments: Path, rank: int, step: int, staged: Staged | Exception, ledger: Ledger | None, publish: Any) -> None:
        self._segments, self._rank, self._step, self._staged = segments, rank, step, staged
        self._ledger, self._publish = ledger, publish

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        assert self._ledger is not None
        first = self._ledger.next_files(len(plans))
        return [dataclasses.replace(plan, storage_data=first + number) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        staged = self._staged
        if isinstance(staged, Exception):
            raise staged
        if not staged.tensors:
            return _done([])
        free = free_bytes(self._segments)
        if free < staged.bytes + SPARE:
            raise StoreError(f"{self._segments} needs {staged.bytes:,} bytes for step {self._step}, and the disk has {free:,}.")
        segment = write_segment(self._segments, plan.storage_data, self._step, self._rank, staged.tensors, staged.digests, staged.aliases)
        return _done([WriteResult(MetadataIndex("@segment"), segment.size, segment)])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        segments: list[Segment] = [one.storage_data for found in results for one in found]
        self._publish(segments)


class SegmentReader(StorageReader):
    """Reads the tensors of a step. All of what all processes read is checked before the first tensor is changed: dcp exchanges plans, with
    the errors of making them, before it reads.

    Args:
        layout, table: of the step.
        files: of the store.
    """

    def __init__(self, layout: Layout, table: np.ndarray, files: Files) -> None:
        self._layout, self._table, self._files = layout, table, files
        self._runs: dict[MetadataIndex, tuple[Chunk, list[int]]] = {}
        self._checked: dict[MetadataIndex, Tensor] = {}

    def whole(self, name: str) -> Tensor:
        """A tensor with all of its parts, checked."""
        kind = self._layout.tensors[name]
        found = torch.empty(kind.shape, dtype=kind.dtype)
        for chunk, numbers in runs(self._layout, self._table, name):
            part = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
            found[part] = self._tensor(chunk, numbers)
        return found

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found: dict[str, Any] = {}
        for name, kind in self._layout.tensors.items():
            chunks = []
            for chunk, numbers in runs(self._layout, self._table, name):
                self._runs[MetadataIndex(name, chunk.offsets)] = chunk, numbers
                chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
            found[name] = TensorStorageMetadata(TensorProperties(dtype=kind.dtype), torch.Size(kind.shape), chunks)
        return Metadata(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        wanted = {item.storage_index for item in plan.items}
        self._checked = {index: self._tensor(*self._runs[MetadataIndex(index.fqn, index.offset)]) for index in wanted}
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            part = self._checked[item.storage_index]
            if part.shape != item.lengths:
                for dim, (begin, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, begin, size)
            target = planner.resolve_tensor(item)
            target.detach().copy_(part)
            planner.commit_tensor(item, target)
        found: Future[None] = Future()
        found.set_result(None)
        return found

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def _tensor(self, chunk: Chunk, numbers: list[int]) -> Tensor:
        """A part of a tensor as it was saved, checked."""
        total = sum(len(self._files.checked(self._table[number], self._layout.names[number])) for number in numbers)
        dtype = self._layout.tensors[chunk.tensor].dtype
        if not total:
            return torch.empty(chunk.sizes, dtype=dtype)
        first = self._table[numbers[0]]
        data = self._files.data(int(first["file"]), int(first["offset"]), total)
        return view_bytes(data, dtype).reshape(chunk.sizes)


def view_bytes(data: memoryview, dtype: torch.dtype) -> Tensor:
    """Bytes as a tensor with one dimension, without a copy."""
    raw = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)


def _done(results: list[WriteResult]) -> Future[list[WriteResult]]:
    found: Future[list[WriteResult]] = Future()
    found.set_result(results)
    return found
