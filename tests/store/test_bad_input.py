"""Bad input gets one line that says what would be right, and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinyonn.life.forking import fork_life
from tinyonn.store import PerpetualStore, StoreError, rewind, verify
from tinyonn.store.overview import overview

from .conftest import assert_same, copied, lived, small, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_store_of_another_model_names_three_tensors(tmp_path: Path) -> None:
    lived(tmp_path, 2)
    model, optimizer = small(width=9)
    before = copied(model, optimizer)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        with pytest.raises(StoreError, match=r"inner.weight, float32 \(8, 8\) in the store and float32 \(9, 9\) here; .*inner.bias.*head"):
            store.restore()
        assert_same(copied(model, optimizer), before)
        with pytest.raises(StoreError, match="restore"):
            store.save(3)
    other = nn.Linear(3, 3)
    with (
        PerpetualStore(tmp_path, other, torch.optim.AdamW(other.parameters())) as store,
        pytest.raises(StoreError, match=r"which this model does not have; .*; 6 more differ"),
    ):
        store.restore()


def test_two_trainers_on_one_store(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        store.save(1)
        with pytest.raises(StoreError, match="no other run writes into"):
            PerpetualStore(tmp_path, model, optimizer)
        with pytest.raises(StoreError, match="no other run writes into"):
            rewind(tmp_path)
        store.save(2)
    PerpetualStore(tmp_path, model, optimizer).close()


def test_a_newer_format_is_told(tmp_path: Path) -> None:
    from tinyonn.store.layout import digest, hex_digest

    lived(tmp_path, 1)
    line = (tmp_path / "manifest.json").read_text().splitlines()[0].replace('"format":2', '"format":3')
    (tmp_path / "manifest.json").write_text(f"{line}\n{hex_digest(digest(line.encode()))}\n")
    with pytest.raises(StoreError, match="has format 3, and this version of tinyonn reads 2; update tinyonn"):
        PerpetualStore(tmp_path, *small())


def test_a_folder_without_a_store_is_named_as_the_argument(tmp_path: Path) -> None:
    for call, name in ((overview, "folder"), (lambda folder: fork_life(folder, tmp_path / "new"), "source")):
        with pytest.raises(StoreError, match=f"^{name} must be a store or a folder with one, got .*, which has no manifest.json"):
            call(tmp_path)


def test_steps_must_rise(tmp_path: Path) -> None:
    with PerpetualStore(tmp_path, *small()) as store:
        store.save(5)
        store.save(9)
        with pytest.raises(StoreError, match=r"step must be above 9, the newest, got 7; rewind\(\) goes back to a step that is kept\."):
            store.save(7)
        with pytest.raises(ValueError, match="step"):
            store.save(-1)


def test_values_that_json_cannot_hold(tmp_path: Path) -> None:
    with PerpetualStore(tmp_path, *small()) as store:
        with pytest.raises(StoreError, match=r"state\.a\.b must be a tensor or a value that JSON can hold, got <object"):
            store.save(1, state={"a": {"b": object()}})
        store.save(1, state={"a": float("inf")})
        store.restore()
        assert store.state == {"a": float("inf")}


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    lived(tmp_path, 3)
    model, optimizer = small(seed=1)
    before = copied(model, optimizer)
    store = PerpetualStore(tmp_path, model, optimizer, keep="all")
    store.close()
    with PerpetualStore(tmp_path, *small(), keep="all") as other:  # no longer that of the first
        for call in (
            lambda: store.save(4),
            store.restore,
            lambda: store.restore(1, rewind=True),
            lambda: store.rewind(1),
            store.compact,
            lambda: store.record("metrics", 4, loss=1.0),
        ):
            with pytest.raises(StoreError, match="the store must be open"):
                call()
        assert other.steps == [1, 2, 3]
        assert other.restore() == 3
        other.save(4, wait=True)
    assert verify(tmp_path).readable == [1, 2, 3, 4]
    assert_same(copied(model, optimizer), before)


def test_a_step_that_an_empty_store_does_not_have(tmp_path: Path) -> None:
    with PerpetualStore(tmp_path, *small()) as store:
        with pytest.raises(StoreError, match="step must be a kept one, of which there is none, got 5"):
            store.restore(5)
        store.save(1)


def test_a_closed_store_is_free_although_a_worker_still_runs(tmp_path: Path, forked: Callable[..., Any]) -> None:
    with PerpetualStore(tmp_path, *small()):
        worker = forked(partial(time.sleep, 60))  # inherits the descriptor of the lock
    PerpetualStore(tmp_path, *small()).close()
    assert worker.is_alive()


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    with PerpetualStore(tmp_path, *small()) as store:
        with pytest.raises(StoreError, match="only tensor of that name"):
            store.save(1, state={"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}})
        store.save(1, state={"a": torch.ones(2)})
        store.restore()
        assert torch.equal(store.state["a"], torch.ones(2))


def test_wrappers_whose_state_is_a_copy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"model must be sharded by fully_shard .* got DataParallel"):
        PerpetualStore(tmp_path, nn.DataParallel(nn.Linear(2, 2)))


@pytest.mark.parametrize("place", ["parameter", "optimiser"])
def test_tensors_that_cannot_be_written_are_refused_before_they_are_saved(tmp_path: Path, place: str) -> None:
    model, optimizer = small()
    wide = torch.ones(1, 3, dtype=torch.bfloat16).expand(4, 3)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        train(model, optimizer)
        store.save(1)
    if place == "parameter":
        model.narrow.data = wide
        name = "model.narrow"
    else:
        optimizer.state[model.narrow]["exp_avg"] = wide
        name = "optimizer.narrow.exp_avg"
    before = copied(model, optimizer)
    with PerpetualStore(tmp_path, model, optimizer) as store:
        if place == "parameter":
            with pytest.raises(StoreError, match=f"{name} must have memory for each of its values, got an expanded tensor; clone"):
                store.restore()
            assert_same(copied(model, optimizer), before)
            model.narrow.data = wide.clone()
            store.restore()
            model.narrow.data = wide
        else:
            store.restore()
            optimizer.state[model.narrow]["exp_avg"] = wide
        with pytest.raises(StoreError, match=f"{name} must have memory for each of its values, got an expanded tensor; clone"):
            store.save(2)


def test_a_parameter_with_states_in_two_optimisers_is_refused(tmp_path: Path) -> None:
    model, optimizer = small()
    plain = torch.optim.SGD(model.parameters())
    with PerpetualStore(tmp_path, model, [optimizer, plain]) as store:  # the second has no state
        train(model, optimizer)
        store.save(1)
    second = torch.optim.AdamW(model.parameters())
    with PerpetualStore(tmp_path / "other", model, [optimizer, second]) as store:
        model(torch.randn(2, 8)).backward()
        second.step()
        with pytest.raises(StoreError, match="experts must have the state of one optimiser, got that of two"):
            store.save(1)


def test_a_step_that_the_index_cannot_hold_is_refused(tmp_path: Path) -> None:
    model, optimizer = small()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        store.save(2**63 - 1)
        train(model, optimizer)
        with pytest.raises(ValueError, match="step must be below 2\\*\\*63, got 9223372036854775808"):
            store.save(2**63)
        assert store.steps == [2**63 - 1]


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with PerpetualStore(tmp_path, *small(), keep="best:1") as store:
        with pytest.raises(TypeError, match=r"^score must be a number, got str 'high'\.$"):
            store.save(1, score="high")  # type: ignore[arg-type]
        store.save(1, score=torch.tensor(0.5))  # type: ignore[arg-type]
        store.save(2, score=torch.tensor(0.25))  # type: ignore[arg-type]
        assert store.steps == [1, 2]  # the best one and the newest


def test_parameters_without_values_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, device="meta")
    with (
        PerpetualStore(tmp_path, model) as store,
        pytest.raises(StoreError, match=r"^parameters must have values, got weight, bias on the"),
    ):
        store.save(1)
