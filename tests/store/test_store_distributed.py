"""A store that two processes wrote opens on one and on four; shards are written in parallel, and nothing is written twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from tinyonn.store import DamagedStoreError, PerpetualStore, StoreError, perpetual_store, saving, verify

from .conftest import flipped

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(6, 32, 36))
        self.num_experts = 6
        self.inner = nn.Linear(36, 8)
        self.one = nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.one(self.inner(x) + self.experts.sum((0, 1))[:8]).sum()


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model.inner)
    return fully_shard(model)


def by_columns(model: nn.Module) -> nn.Module:
    return fully_shard(model, shard_placement_fn=lambda parameter: Shard(min(1, parameter.dim() - 1)))


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": DistributedDataParallel, "sharded": sharded, "by columns": by_columns}


def whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): whole(value) for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name.removeprefix('module.')}.{key}"] = whole(value)
    return found


def made(wrap: str | None) -> tuple[nn.Module, torch.optim.AdamW]:
    model: nn.Module = Model()
    if wrap is not None:
        model = WRAPS[wrap](model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def lived(folder: Path, wrap: str, rank: int) -> None:
    """Four steps on each process; the third changes one expert only."""
    model, optimizer = made(wrap)
    with PerpetualStore(folder, model, optimizer, keep="all") as store:
        assert store.restore() is None
        for step in (1, 2, 3, 4):
            if step == 3:
                with torch.no_grad():
                    local = model.state_dict()[("module." if wrap == "ddp" else "") + "experts"]
                    local = local.to_local() if hasattr(local, "to_local") else local
                    if rank == 0:
                        local[0] += 1
                    if wrap == "ddp":
                        distributed.broadcast(local, 0)
            else:
                model(torch.randn(2, 36, generator=torch.Generator().manual_seed(step))).backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.manual_seed(100 * step + rank)
            store.save(step)
            found = tensors(model, optimizer)
            if rank == 0:
                torch.save(found, folder.parent / f"{step}.pt")
        assert store.steps == [1, 2, 3, 4]
        if wrap == "sharded":
            store.compact()
    distributed.barrier()


def reopened(folder: Path, wrap: str | None, rank: int) -> None:
    model, optimizer = made(wrap)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with PerpetualStore(folder, model, optimizer, keep="all") as store:
        for step in (2, 3, 4):
            assert store.restore(step) == step
            found = tensors(model, optimizer)
            expected = torch.load(folder.parent / f"{step}.pt")
            assert found.keys() == expected.keys()
            assert [(step, name) for name in found if not torch.equal(found[name], expected[name])] == []
        processes = distributed.get_world_size() if distributed.is_initialized() else 1
        assert store.random_restored == (processes == 2)
        if processes == 2:
            drawn = float(torch.rand(()))
            torch.manual_seed(400 + rank)
            assert drawn == float(torch.rand(()))
        model(torch.randn(2, 36, generator=torch.Generator().manual_seed(9))).backward()
        optimizer.step()
        store.save(5)
        after = tensors(model, optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert store.restore() == 5
        found = tensors(model, optimizer)
        assert [name for name in found if not torch.equal(found[name], after[name])] == []
        if rank == 0:
            torch.save(after, folder.parent / "5.pt")


@pytest.fixture(scope="module")
def run(forked: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Callable[[int], None]], None]:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")

    def run(ranks: int, work: Callable[[int], None]) -> None:
        meeting = tmp_path_factory.mktemp("group") / "store"

        def member(rank: int) -> None:
            if ranks > 1:
                distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
            work(rank)
            if ranks > 1:
                distributed.destroy_process_group()

        processes = [forked(partial(member, rank)) for rank in range(ranks)]
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * ranks

    return run


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_store_of_two_processes_opens_on_other_numbers(tmp_path: Path, run: Callable[..., None], wrap: str) -> None:
    folder = tmp_path / "store"
    run(2, partial(lived, folder, wrap))
    assert verify(folder).faults == []
    size = sum(path.stat().st_size for path in (folder / "segments").iterdir())
    state = sum(one.numel() * one.element_size() for one in torch.load(tmp_path / "4.pt").values())
    assert size < 4 * state  # three steps change all, one changes an expert
    run(1, lambda rank: reopened(folder, None, rank))
    for ranks in (2, 4):
        from tinyonn.store import rewind

        rewind(folder, 4)
        run(ranks, partial(reopened, folder, wrap))
    assert verify(folder).faults == []


def broken(folder: Path, rank: int) -> None:
    model, optimizer = made("ddp")
    store = PerpetualStore(folder, model, optimizer)
    store.restore()
    store.save(1, wait=True)
    if rank == 1:
        import shutil

        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 0)  # type: ignore[attr-defined,assignment]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    store.save(2)
    with pytest.raises(StoreError, match="the disk has 0"):
        store.wait()
    with pytest.raises(StoreError, match="the disk has 0"):
        store.save(3)
    with pytest.raises(StoreError):
        store.close()
    distributed.barrier()


def test_an_error_of_one_process_reaches_all_and_the_last_step_is_intact(tmp_path: Path, run: Callable[..., None]) -> None:
    run(2, partial(broken, tmp_path))
    assert verify(tmp_path).faults == []
    assert verify(tmp_path).readable == [1]


class Place:
    """An object that one process may refuse to load, or give a tensor of another size."""

    def __init__(self, rank: int) -> None:
        self.rank, self.value, self.size, self.refuses = rank, 0, 1, False

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "tensor": torch.ones(self.size)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuses and state["value"] == 1:
            raise ValueError(f"process {self.rank} refuses")
        self.value = state["value"]


def unreadable(*args: Any) -> Any:
    raise DamagedStoreError("the manifest is damaged.")


def one_fails_to_read(folder: Path, rank: int) -> None:
    """The second process alone finds each fault."""
    model, optimizer = made("sharded")
    place = Place(rank)
    with PerpetualStore(folder, model, optimizer, objects={"place": place}, keep="all") as store:
        store.restore()
        place.value = 1
        model(torch.randn(2, 36)).backward()
        optimizer.step()
        store.save(1, wait=True)
        place.value, place.refuses = 2, rank == 1
        optimizer.param_groups[0]["lr"] = 0.5
        for parameter in model.parameters():
            parameter.detach().add_(1)
        before = tensors(model, optimizer)
        with pytest.raises((ValueError, RuntimeError), match="process 1 refuses"):
            store.restore()
        place.refuses = False
        with pytest.MonkeyPatch.context() as patched:
            if rank == 1:
                patched.setattr(perpetual_store.Manifest, "read", unreadable)
            with pytest.raises(DamagedStoreError, match="the manifest is damaged"):
                store.restore()
        if rank == 1:
            path = sorted((folder / "segments").iterdir())[1]  # its own
            flipped(path, path.stat().st_size // 2, 0)
        distributed.barrier()
        with pytest.raises(DamagedStoreError, match=r"00000002.safetensors: \S+ is damaged"):
            store.restore()
        assert (place.value, optimizer.param_groups[0]["lr"]) == (2, 0.5)
        after = tensors(model, optimizer)
        assert after.keys() == before.keys()
        assert [name for name in after if not torch.equal(after[name], before[name])] == []
    distributed.barrier()


def one_fails_to_compact(folder: Path, rank: int) -> None:
    model, optimizer = made("ddp")
    store = PerpetualStore(folder, model, optimizer)
    store.save(1)

    def no_room(*args: Any) -> None:
        raise StoreError("no room")

    saving.compact = no_room
    with pytest.raises(StoreError, match="no room"):
        store.compact()
    store.save(2)
    assert store.steps == [1, 2]
    store.close()
    distributed.barrier()


def one_has_other_tensors(folder: Path, rank: int) -> None:
    model, optimizer = made("ddp")
    place = Place(rank)
    store = PerpetualStore(folder, model, optimizer, objects={"place": place})
    store.save(1)
    place.size = 2
    store.save(2)  # on all: planned again
    place.size = 2 + rank
    with pytest.raises(StoreError, match=r"the same tensors on all processes, but those of process 1 changed .* Step 2 is intact"):
        store.save(3, wait=True)
    with pytest.raises(StoreError, match="the same tensors"):
        store.save(4)
    with pytest.raises(StoreError, match="the same tensors"):
        store.close()
    distributed.barrier()


def one_cannot_collect(folder: Path, rank: int, saved: int, size: int) -> None:
    """The second process has a value that JSON cannot hold, after some saves; `size` above 1 makes the first one plan again."""
    model, optimizer = made("ddp")
    place = Place(rank)
    store = PerpetualStore(folder, model, optimizer, objects={"place": place})
    for step in range(1, saved + 1):
        store.save(step, wait=True)
    place.size = size
    with pytest.raises(StoreError, match=r"state\.x must be a tensor or a value that JSON can hold"):
        store.save(saved + 1, state={"x": object()} if rank == 1 else {"x": 0}, wait=True)
    with pytest.raises(StoreError, match=r"state\.x must be"):
        store.save(saved + 2)
    with pytest.raises(StoreError, match=r"state\.x must be"):
        store.close()
    distributed.barrier()


def one_cannot_compare(folder: Path, rank: int) -> None:
    model, optimizer = made("ddp")
    store = PerpetualStore(folder, model, optimizer)
    store.save(1, wait=True)
    if rank == 1:

        def no_memory(*args: Any) -> None:
            raise MemoryError("no room for a copy")

        store._saver._changes.find = no_memory  # type: ignore[union-attr,method-assign,assignment]
    store.save(2)
    with pytest.raises(RuntimeError, match="MemoryError: no room for a copy"):
        store.wait()
    with pytest.raises(RuntimeError, match="no room for a copy"):
        store.close()
    distributed.barrier()


TASKS = Path("/proc/self/task")


def gloo_threads(wanted: int) -> int:
    """The threads of gloo groups of this process, once they are as many as wanted, or else after five seconds."""
    end = time.monotonic() + 5
    while True:
        found = 0
        for task in TASKS.iterdir():
            with contextlib.suppress(OSError):  # it ended
                found += (task / "comm").read_text().startswith("pt_gloo")
        if found == wanted or time.monotonic() > end:
            return found
        time.sleep(0.01)  # the system lists a thread for a moment after its end


def closed(folder: Path, rank: int) -> None:
    model, optimizer = made("ddp")
    assert gloo_threads(2) == 2  # of the program's group
    store = PerpetualStore(folder, model, optimizer)
    assert gloo_threads(4) == 4
    store.save(1)
    if rank == 1:
        time.sleep(0.5)
    store.close()
    assert gloo_threads(2) == 2
    store.close()
    store = PerpetualStore(folder, model, optimizer)  # the group of the program is whole
    assert store.restore() == 1
    distributed.destroy_process_group()
    store.close()
    distributed.init_process_group("gloo", init_method=f"file://{folder}.again", rank=rank, world_size=2)


@pytest.mark.skipif(not TASKS.is_dir(), reason="needs Linux's /proc")
def test_a_closed_store_leaves_no_group(tmp_path: Path, run: Callable[..., None]) -> None:
    """Also if the other process is not done, and if the program destroyed all groups before."""
    run(2, partial(closed, tmp_path / "store"))


WORK: dict[str, Callable[[Path, int], None]] = {
    "one fails to read": one_fails_to_read,
    "one fails to compact": one_fails_to_compact,
    "one has other tensors": one_has_other_tensors,
    "one cannot collect its first save": partial(one_cannot_collect, saved=0, size=1),
    "one cannot collect a later save": partial(one_cannot_collect, saved=2, size=1),
    "one cannot collect while the other plans": partial(one_cannot_collect, saved=2, size=3),
    "one cannot compare": one_cannot_compare,
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_a_fault_of_one_process_reaches_all(tmp_path: Path, run: Callable[..., None], work: Callable[[Path, int], None]) -> None:
    run(2, partial(work, tmp_path))
