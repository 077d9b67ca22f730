"""Two processes count together and decide alike, under DistributedDataParallel and sharded, also where one of them saw no token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from tinyonn.nn import DynMoE, token_mask_of
from tinyonn.train import ExpertLifecycle, lifecycle

F, E, LIVE, WINDOW, STEPS = 8, 5, 4, 3, 9
RANKS = 2


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    options = {"thresholds": "learned", "form": "linear", "gating_loss": "none", "target_k": 1, "max_experts": E, "bias": True}
    model = nn.Sequential(nn.Identity(), DynMoE(F, 4, LIVE, max_num_experts=E, **options))
    with torch.no_grad():
        model[1].router.prototypes.copy_(torch.eye(E, F))
        model[1].router.thresholds.fill_(1)
    return model


def batch(rank: int, step: int) -> Tensor:
    """Tokens along axes: experts 0 … 2 have some, expert 3 has none. Tokens along axis 6, in both directions, have no expert."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    axis = torch.tensor([0, 0, 1, 2, 6, 6, 6, 1, 2, 2])
    sign = torch.where(torch.arange(10) == 6, -1, 1).unsqueeze(-1)
    return nn.functional.one_hot(axis, F) * sign * (0.5 + torch.rand(10, 1, generator=generator))


def sharded(model: nn.Sequential) -> nn.Module:
    fully_shard(model[1])
    return fully_shard(model)


def by_columns(model: nn.Sequential) -> nn.Module:
    return fully_shard(model, shard_placement_fn=lambda parameter: Shard(min(1, parameter.dim() - 1)))


# How the model is wrapped, whether the lifecycle is made before that, and what the second process sees.
CASES: dict[str, tuple[Callable[[nn.Sequential], nn.Module], bool, str]] = {
    "ddp": (DistributedDataParallel, False, "all"),
    "ddp, wrapped later": (DistributedDataParallel, True, "all"),
    "ddp, nothing": (DistributedDataParallel, False, "nothing"),
    "ddp, masked": (DistributedDataParallel, True, "masked"),
    "sharded": (sharded, False, "all"),
    "sharded, nothing": (sharded, False, "nothing"),
    "sharded, wrapped later": (sharded, True, "masked"),
    "sharded at the root": (fully_shard, False, "all"),  # evaluation leaves its parameters gathered
    "sharded by columns": (by_columns, False, "all"),
}


def seen(case: str, rank: int) -> str:
    return "all" if rank == 0 else CASES[case][2]


def integrity(case: str, rank: int) -> float:
    return 0.25 * rank if CASES[case][2] == "all" else (0.125, float("nan"))[rank]


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def run(case: str, rank: int) -> dict:
    """Events, the model, the state of the optimiser and the smoothed PI after nine steps."""
    lifecycle.WINDOW = WINDOW
    wrap, early, _ = CASES[case]
    model = model_of()
    settings = {"pruning_threshold": 0.05, "growth_threshold": 0.05, "seed": 7}
    if early:  # buffers that exist are sent to the others from the first process
        ExpertLifecycle(model, torch.optim.SGD(model.parameters(), lr=0.0), **settings)
    model = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    life = ExpertLifecycle(model, optimizer, **settings)
    events = []
    for step in range(STEPS):
        x = batch(rank, step)
        mask = torch.full((10,), seen(case, rank) != "masked")
        if seen(case, rank) == "nothing":
            x, mask = x[:0], mask[:0]
        with life.recording(), token_mask_of(model, mask):
            (model(x) * RANKS).sum().backward()  # as gradients are averaged
        optimizer.step()
        optimizer.zero_grad()
        for state in optimizer.state.values():
            for value in state.values():
                value += 1
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
        events += life.step(integrity(case, rank))
    states = {
        f"{name}.{key}": whole(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if key != "step"
    }
    found = {name.removeprefix("module."): whole(value) for name, value in {**model.state_dict(), **states}.items()}
    return {"events": [tuple(event) for event in events], "found": found, "integrity": life.integrity}


def work(folder: Path, rank: int) -> None:
    torch.save({case: run(case, rank) for case in CASES}, folder / f"{rank}.pt")
    distributed.barrier()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, two_ranks: Callable[..., None]) -> list[dict[str, dict]]:
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks(partial(work, folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def alone(case: str) -> tuple[list[tuple], dict[str, Tensor]]:
    """Events and state of one process that sees the tokens of both; surprise is summed in the same units."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    life = ExpertLifecycle(model, optimizer, pruning_threshold=0.05, growth_threshold=0.05, seed=7)
    events = []
    for step in range(STEPS):
        x = torch.cat([batch(rank, step) for rank in range(RANKS) if seen(case, rank) == "all"])
        with life.recording():
            (model(x) * RANKS).sum().backward()
        events += life.step(0.125)
    return [tuple(event) for event in events], model.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_two_processes_decide_alike_and_as_one_with_the_tokens_of_both(found, case, monkeypatch):
    monkeypatch.setattr(lifecycle, "WINDOW", WINDOW)
    first, second = (found[rank][case] for rank in range(RANKS))
    assert first["events"] == second["events"]
    assert first["integrity"] == second["integrity"] == 0.125
    assert first["found"].keys() == second["found"].keys()
    for name, value in first["found"].items():
        assert torch.equal(value, second["found"][name]), name
    events, state = alone(case)
    name = "module.1" if case.startswith("ddp") else "1"
    assert first["events"] == [(step, name, *rest) for step, _, *rest in events]
    assert {event[2] for event in first["events"]} == {"birth", "recycling"}
    for key, value in state.items():
        torch.testing.assert_close(first["found"][key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_state_of_the_optimiser_is_forgotten_in_the_row_of_a_new_expert(found, case):
    step, _, _, expert, *_ = found[0][case]["events"][-1]
    assert step == STEPS
    states = {name: value for name, value in found[0][case]["found"].items() if ".exp_avg" in name}
    assert len(states) == 2 * 6  # four parameters of the experts, prototypes and thresholds
    for name, value in states.items():
        assert [bool(row.any()) for row in value] == [row != expert for row in range(E)], name
