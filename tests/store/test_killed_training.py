"""SIGKILL at any moment leaves the last durable step readable, and a run that was killed fifty times ends as one without a store."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinyonn.nn import DynMoE
from tinyonn.store import PerpetualStore, read_life_log, verify
from tinyonn.train import ExpertLifecycle, lifecycle

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS, KILLS = 150, 50
F, E = 16, 8


class Batches:
    """Rows in a shuffled order that depends on the epoch; its place is saved."""

    def __init__(self) -> None:
        self.epoch = self.place = 0

    def next(self) -> Tensor:
        if self.place == 10:
            self.epoch, self.place = self.epoch + 1, 0
        order = torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch))
        rows = order[self.place * 4 : self.place * 4 + 4]
        self.place += 1
        return torch.stack([torch.randn(F, generator=torch.Generator().manual_seed(int(row))) for row in rows])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


class Life:
    """A training with dropout, routing noise, births, and draws of each random generator."""

    def __init__(self) -> None:
        lifecycle.WINDOW = 5
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)
        moe = DynMoE(F, 4, E - 2, max_num_experts=E, thresholds="learned", gating_loss="none", target_k=2)
        self.model = nn.Sequential(nn.Linear(F, F), nn.Dropout(0.3), moe, nn.Linear(F, F))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        experts = ExpertLifecycle(self.model, self.optimizer, pruning_threshold=0.2, growth_threshold=0.001, seed=1)
        self.objects: dict[str, Any] = {"scheduler": scheduler, "lifecycle": experts, "batches": Batches()}

    def step(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """One step; what happened in it."""
        x = self.objects["batches"].next()
        x = x + 0.01 * torch.rand(x.shape) + 0.01 * random.random() + 0.01 * float(np.random.rand())  # noqa: NPY002
        loss = (self.model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objects["scheduler"].step()
        for event in self.objects["lifecycle"].step(float(torch.exp(-loss.detach()))):
            yield event.kind, {"expert": event.expert}
        yield "metrics", {"loss": float(loss)}

    def write(self, file: Path) -> None:
        """All of the state, for a comparison."""
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
        objects = {name: one.state_dict() for name, one in self.objects.items()}
        torch.save([self.model.state_dict(), self.optimizer.state_dict(), objects, drawn], file)


def train_without_a_store(folder: Path) -> None:
    life, lines = Life(), []
    for step in range(1, STEPS + 1):
        lines += [[step, event, fields] for event, fields in life.step()]
    life.write(folder / "whole.pt")
    (folder / "whole.json").write_text(json.dumps(lines))


def train(folder: Path, last: int = STEPS, state: Path | None = None) -> None:
    """Goes on from the newest step of the store up to `last`; one that is not the end of the life waits to be killed there."""
    life = Life()
    with PerpetualStore(folder, life.model, life.optimizer, objects=life.objects, keep="last:2,every:40") as store:
        begin = store.restore() or 0
        for step in range(begin + 1, last + 1):
            for event, fields in life.step():
                store.record(event, step, **fields)
            store.save(step, score=-step)
        if state is not None:
            life.write(state)
        if last < STEPS:
            time.sleep(60)


def test_fifty_kills_change_nothing(tmp_path: Path, forked: Callable[..., Any]) -> None:
    def done(work: Callable[[], None]) -> None:
        process = forked(work)
        process.join(120)
        assert process.exitcode == 0

    folder = tmp_path / "store"
    done(partial(train_without_a_store, tmp_path))
    draw = random.Random(1)
    reached = 0
    for kill in range(KILLS):
        process = forked(partial(train, folder, last=STEPS * (kill + 1) // (KILLS + 1)))
        time.sleep(draw.uniform(0.0, 0.2))
        assert process.exitcode is None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (folder / "manifest.json").exists():
            found = verify(folder)
            assert [
                fault for fault in found.faults if "ends in a part of a record" not in fault and "life.jsonl is missing" not in fault
            ] == []
            newest = found.readable[-1] if found.readable else 0
            assert newest >= reached  # what was durable stays
            reached = newest
    done(partial(train, folder))
    done(partial(train, folder, state=tmp_path / "killed.pt"))  # restores the last step, and does no more
    expected, got = (with_bytes(torch.load(tmp_path / f"{one}.pt")) for one in ("whole", "killed"))
    assert got == expected
    told = [
        [one["step"], one["event"], {name: one[name] for name in ("expert", "loss") if name in one}]
        for one in read_life_log(folder / "life.jsonl").effective()
        if one["event"] in ("metrics", "birth", "recycling")
    ]
    lines = json.loads((tmp_path / "whole.json").read_text())
    assert told == lines
    assert {event for _, event, _ in lines} == {"metrics", "birth", "recycling"}


def with_bytes(value: Any) -> Any:
    """Nested values with the bytes of tensors in place of tensors."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: with_bytes(one) for key, one in value.items()}
    return [with_bytes(one) for one in value] if isinstance(value, list | tuple) else value
