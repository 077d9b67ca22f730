"""SIGKILL at any moment leaves the last durable step readable, and a run that was killed fifty times ends as one that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
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


def train(folder: Path, pause: float = 0.0) -> None:
    """Trains up to the last step, from the newest step of the store; dropout and routing noise use the random generators."""
    lifecycle.WINDOW = 5
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    moe = DynMoE(F, 4, E - 2, max_num_experts=E, thresholds="learned", gating_loss="none", target_k=2)
    model = nn.Sequential(nn.Linear(F, F), nn.Dropout(0.3), moe, nn.Linear(F, F))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    life = ExpertLifecycle(model, optimizer, pruning_threshold=0.2, growth_threshold=0.001, seed=1)
    batches = Batches()
    objects = {"scheduler": scheduler, "lifecycle": life, "batches": batches}
    with PerpetualStore(folder, model, optimizer, objects=objects, keep="last:2,every:40") as store:
        begin = store.restore() or 0
        for step in range(begin + 1, STEPS + 1):
            x = batches.next()
            x = x + 0.01 * torch.rand(x.shape) + 0.01 * random.random() + 0.01 * float(np.random.rand())  # noqa: NPY002
            loss = (model(x) - x.roll(1, -1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            for event in life.step(float(torch.exp(-loss.detach()))):
                store.record(event.kind, step, expert=event.expert)
            store.record("metrics", step, loss=float(loss))
            store.save(step, score=-float(loss))
            time.sleep(pause)


def result(folder: Path) -> dict[str, Tensor]:
    """All that the store has of its newest step."""
    from tinyonn.store.ledger import Ledger
    from tinyonn.store.manifest import Manifest
    from tinyonn.store.segment import Files

    ledger = Ledger(folder, Manifest.read(folder))
    newest = ledger.manifest.newest
    assert newest is not None
    layout, table = ledger.at(newest)
    files = Files(ledger.segments)
    return {name: bytes(files.checked(place, name)) for name, place in zip(layout.names, table, strict=True)}  # type: ignore[misc]


def test_fifty_kills_change_nothing(tmp_path: Path, forked: Callable[..., Any]) -> None:
    whole = forked(partial(train, tmp_path / "whole"))
    whole.join(120)
    assert whole.exitcode == 0
    draw = random.Random(1)
    kills, reached = 0, 0
    while kills < KILLS:
        process = forked(partial(train, tmp_path / "killed", 0.01))
        time.sleep(draw.uniform(0.0, 0.25))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
        if (tmp_path / "killed" / "manifest.json").exists():
            found = verify(tmp_path / "killed")
            assert [
                fault for fault in found.faults if "ends in a part of a record" not in fault and "life.jsonl is missing" not in fault
            ] == []
            newest = found.readable[-1] if found.readable else 0
            assert newest >= reached  # what was durable stays
            reached = newest
    assert kills == KILLS or kills > 15
    last = forked(partial(train, tmp_path / "killed"))
    last.join(120)
    assert last.exitcode == 0
    expected, got = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert got.keys() == expected.keys()
    assert [name for name in got if got[name] != expected[name]] == []
    logs = [read_life_log(tmp_path / one / "life.jsonl").effective() for one in ("whole", "killed")]
    told = [[(one["step"], one["event"], one.get("expert"), one.get("loss")) for one in log if one["event"] != "save"] for log in logs]
    lived = [[one for one in lines if one[1] in ("metrics", "birth", "recycling")] for lines in told]
    assert lived[0] == lived[1]
    assert {line[1] for line in lived[0]} == {"metrics", "birth", "recycling"}
    assert [line[0] for line in lived[0] if line[1] == "metrics"] == list(range(1, STEPS + 1))
