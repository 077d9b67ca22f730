"""What is saved comes back bit for bit."""

from __future__ import annotations

import copy
import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinyonn.store import DamagedStoreError, PerpetualStore, StoreError, verify
from tinyonn.store.manifest import CHAPTER, Manifest

from .conftest import assert_same, copied, flipped, lived, segments, small, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_every_kept_step_comes_back_bit_for_bit(tmp_path: Path) -> None:
    expected = lived(tmp_path, 5)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.steps == [1, 2, 3, 4, 5]
        for step in (5, 1, 3, 2, 4):
            assert store.restore(step) == step
            assert_same(copied(model, optimizer), expected[step])
        assert store.restore() == 5
        assert_same(copied(model, optimizer), expected[5])


def test_chunks_may_lie_in_more_segments_than_a_process_may_open(tmp_path: Path) -> None:
    """Experts that were used last in different steps."""
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(100, 1024))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
        with PerpetualStore(tmp_path, model, pools=[model.experts], keep="last:1", auto_compact=False) as store:
            for step in range(1, 101):
                nn.init.constant_(model.experts[step - 1], step)
                store.save(step)
            for compacted in (False, True):
                if compacted:
                    store.compact()
                nn.init.zeros_(model.experts)
                assert store.restore() == 100
                assert torch.equal(model.experts, torch.arange(1, 101.0)[:, None].expand(100, 1024))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def test_state_before_the_first_step_of_the_optimiser_has_none(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        store.save(0)
        train(model, optimizer)
        store.save(1)
        assert optimizer.state
        store.restore(0)
        assert not optimizer.state
        store.restore(1)
        assert len(optimizer.state) == 4


def test_random_states_objects_groups_and_further_values_come_back(tmp_path: Path) -> None:
    class Loader:
        def __init__(self) -> None:
            self.place: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {"place": self.place}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.place = state["place"]

    model, optimizer = small()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    loader = Loader()
    place = {"epoch": 2, "order": torch.tensor([3, 1, 2]), "pair": (1, 2.5, None), 7: ["x", True]}
    loader.place = place
    train(model, optimizer)
    scheduler.step()
    with PerpetualStore(tmp_path, model, optimizer, objects={"scheduler": scheduler, "loader": loader}) as store:
        store.save(1, state={"epoch": 0.1 + 0.2, "names": ["a", None]})
        store.wait()
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
        train(model, optimizer)
        scheduler.step()
        loader.place = None
        assert store.restore() == 1
        assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn  # noqa: NPY002
        assert store.random_restored
        assert store.state == {"epoch": 0.1 + 0.2, "names": ["a", None]}
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert scheduler.last_epoch == 1
    assert torch.equal(loader.place.pop("order"), place.pop("order"))
    assert loader.place == place


def test_a_run_that_goes_on_equals_one_that_did_not_stop(tmp_path: Path) -> None:
    model, optimizer = small()
    train(model, optimizer, 7)
    expected = copied(model, optimizer)
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        for step in range(1, 5):
            train(model, optimizer)
            store.save(step)
    model, optimizer = small(seed=5)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.restore() == 4
        for step in range(5, 8):
            train(model, optimizer)
            store.save(step)
    assert_same(copied(model, optimizer), expected)


@pytest.mark.parametrize("compacted", [False, True], ids=["chain", "compacted"])
@pytest.mark.parametrize("target", [3, CHAPTER, CHAPTER + 2])
def test_rewind_forgets_later_steps(tmp_path: Path, target: int, compacted: bool) -> None:
    states = lived(tmp_path, CHAPTER + 5)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        if compacted:
            store.compact()
        with pytest.raises(StoreError, match="restore"):
            store.save(target + 1)
        assert store.restore(target) == target
        with pytest.raises(StoreError, match="restore"):
            store.save(target + 1)
        assert store.restore(target, rewind=True) == target
        assert_same(copied(model, optimizer), states[target])
        assert store.steps == list(range(1, target + 1))
        train(model, optimizer)
        store.save(target + 1)
        new = copied(model, optimizer)
        store.restore(2)
        assert_same(copied(model, optimizer), states[2])
        store.restore()
        assert_same(copied(model, optimizer), new)
    assert verify(tmp_path).faults == []


def test_rewind_that_cannot_be_written_keeps_the_later_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: Any) -> None:
        raise StoreError("no room")

    model = nn.Linear(2, 2)
    with PerpetualStore(tmp_path, model, keep="all") as store:
        for step in (1, 2, 3):
            nn.init.constant_(model.weight, step)
            store.save(step, wait=True)
        with monkeypatch.context() as patched:
            patched.setattr(Manifest, "write", no_room)
            with pytest.raises(StoreError, match="no room"):
                store.rewind(1)
        assert store.steps == [1, 2, 3]
        store.save(4)  # as step 3
        for step, value in ((4, 3), (2, 2)):
            nn.init.zeros_(model.weight)
            store.restore(step)
            assert model.weight.unique().tolist() == [value]
    assert verify(tmp_path).faults == []


def test_rewind_to_a_step_that_cannot_be_read_keeps_the_later_ones(tmp_path: Path) -> None:
    states = lived(tmp_path, 3)
    flipped(segments(tmp_path)[1], segments(tmp_path)[1].stat().st_size - 5, 0)
    model, optimizer = small(seed=1)
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        with pytest.raises(DamagedStoreError, match="Step 1 is whole"):
            store.restore(2, rewind=True)
        with pytest.raises(DamagedStoreError):
            store.rewind(2)
        assert store.steps == [1, 2, 3]
        with pytest.raises(StoreError, match="restore"):
            store.save(4)
    other = nn.Linear(3, 3)
    with PerpetualStore(tmp_path, other) as store:
        with pytest.raises(StoreError):
            store.restore(1, rewind=True)
        assert store.steps == [1, 2, 3]
    with PerpetualStore(tmp_path, model, optimizer, keep="all") as store:
        assert store.restore(1, rewind=True) == 1
        assert_same(copied(model, optimizer), states[1])
        store.save(2)


class Fussy:
    """An object whose state is only loaded into one of its kind."""

    def __init__(self, kind: str, place: int) -> None:
        self.kind, self.place = kind, place

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]
        if state["kind"] != self.kind:
            raise ValueError(f"kind must be {self.kind}, got {state['kind']}.")


@pytest.mark.parametrize("fault", ["segment", "table", "object", "other object", "groups", "order", "optimisers"])
def test_a_restore_that_fails_changes_nothing(tmp_path: Path, fault: str) -> None:
    model, optimizer = small()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    objects = {"scheduler": scheduler, "fussy": Fussy("cat", 1)}
    with PerpetualStore(tmp_path, model, optimizer, objects=objects, keep="all") as store:
        for step in range(1, CHAPTER + 3):
            optimizer.param_groups[0]["lr"] = 1 / step
            store.save(step)
            train(model, optimizer)
    model, optimizer = small(seed=1)
    optimizer.param_groups[0]["lr"] = 7.0
    train(model, optimizer, 2)
    optimizer.state[model.narrow]["name"] = "mine"
    optimizer.state[model.inner.weight]["exp_avg"] = optimizer.state[model.inner.weight]["exp_avg"].double()
    del optimizer.state[model.experts]
    optimizers: list[torch.optim.Optimizer] = [optimizer]
    objects = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.25), "fussy": Fussy("cat", 2)}
    match fault:
        case "segment":
            for path in segments(tmp_path):
                flipped(path, path.stat().st_size // 2, 0)  # in a tensor
        case "table":
            for path in (tmp_path / "index").glob("table-*"):
                flipped(path, path.stat().st_size - 5, 0)
        case "object":
            objects["fussy"] = Fussy("dog", 2)
        case "other object":
            objects["other"] = Fussy("cat", 3)
        case "groups":
            optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()], "lr": 0.5})
        case "order":
            optimizer.param_groups[0]["params"].reverse()
        case "optimisers":
            optimizers.append(torch.optim.SGD(model.parameters()))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), [one.state_dict() for one in objects.values()]])
    with PerpetualStore(tmp_path, model, optimizers, objects=objects) as store:
        drawn = torch.get_rng_state()
        with pytest.raises((StoreError, ValueError)):
            store.restore()
        assert torch.equal(torch.get_rng_state(), drawn)
        assert store.state == {}
    after = [model.state_dict(), optimizer.state_dict(), [one.state_dict() for one in objects.values()]]
    assert_equal(after, before)


def assert_equal(got: Any, expected: Any) -> None:
    """Of nested lists and dicts with tensors."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        got, expected = list(got.values()), list(expected.values())
    if isinstance(expected, Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_equal(one, other)
    else:
        assert got == expected


def test_values_that_the_optimiser_got_later_are_gone(tmp_path: Path) -> None:
    model, optimizer = small()
    train(model, optimizer)
    optimizer.state[model.narrow]["kept"] = "early"
    with PerpetualStore(tmp_path, model, optimizer) as store:
        store.save(1)
        optimizer.state[model.narrow] |= {"kept": "late", "note": "late", "average": torch.ones(2)}
        store.restore()
    values = {key: value for key, value in optimizer.state[model.narrow].items() if not isinstance(value, Tensor)}
    assert values == {"kept": "early"}
    assert optimizer.state[model.narrow].keys() == {"step", "exp_avg", "exp_avg_sq", "kept"}


class Own(nn.Linear):
    """A layer with a value of its own in its state dict."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.value = 0.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.value)

    def set_extra_state(self, state: Tensor) -> None:
        self.value = float(state)


class Copies(nn.Linear):
    """A layer whose state dict has copies."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {name: value.clone() for name, value in super().state_dict(*args, **options).items()}


def test_what_a_state_dict_makes_anew_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(Own(), nn.Linear(2, 2))
    model[0].value = 7.0
    with PerpetualStore(tmp_path / "own", model) as store:
        store.save(1)
    weight = model[1].weight.detach().clone()
    model[0].value = 0.0
    nn.init.zeros_(model[1].weight)
    with PerpetualStore(tmp_path / "own", model) as store:
        store.restore()
    assert model[0].value == 7.0
    assert torch.equal(model[1].weight, weight)

    copies = Copies(2, 2)
    weight = copies.weight.detach().clone()
    with PerpetualStore(tmp_path / "copies", copies) as store:
        store.save(1)
    nn.init.zeros_(copies.weight)
    with PerpetualStore(tmp_path / "copies", copies) as store:
        store.restore()
    assert torch.equal(copies.weight, weight)
