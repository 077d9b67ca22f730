"""Saves whose copies are made while training goes on."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyonn.store import PerpetualStore, StoreError
from tinyonn.store.staging import Changes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Counting(nn.Module):
    """A linear layer that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.linear(x)
        return out


def made() -> tuple[Counting, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Counting()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def forward_and_backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(4, 16)).square().mean().backward()


def copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    return [value.clone() for value in model.state_dict().values()] + moments


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Comparisons in the other thread wait for it."""
    opened = threading.Event()
    find, main = Changes.find, threading.current_thread()

    def slow(self: Changes, tensors: Any) -> Any:
        if threading.current_thread() is not main:
            assert opened.wait(20)
        return find(self, tensors)

    monkeypatch.setattr(Changes, "find", slow)
    return opened


def test_the_optimisers_step_waits_for_the_copies(tmp_path: Path, gate: threading.Event) -> None:
    model, optimizer = made()
    with PerpetualStore(tmp_path, model, optimizer, overlap=True) as store:
        forward_and_backward(model)
        optimizer.step()
        store.save(1)  # returns, although nothing was compared
        expected = copied(model, optimizer)
        forward_and_backward(model)  # changes a buffer, which is already copied
        stepped = threading.Event()
        step = threading.Thread(target=lambda: (optimizer.step(), stepped.set()))
        step.start()
        assert not stepped.wait(0.2)
        gate.set()
        step.join()
        assert stepped.is_set()
        store.restore(1)
        assert all(map(torch.equal, copied(model, optimizer), expected))


def test_every_step_is_that_of_a_store_without_overlap(tmp_path: Path) -> None:
    found = []
    for overlap in (False, True):
        model, optimizer = made()
        with PerpetualStore(tmp_path / str(overlap), model, optimizer, keep="all", overlap=overlap) as store:
            for step in range(1, 12):
                forward_and_backward(model)
                optimizer.step()
                store.save(step)
        model, optimizer = made()
        with PerpetualStore(tmp_path / str(overlap), model, optimizer) as store:
            states = []
            for step in store.steps:
                store.restore(step)
                states.append(copied(model, optimizer))
        assert len(states) == 11
        found.append(states)
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_parameter_that_changes_while_it_is_copied_is_an_error(tmp_path: Path, gate: threading.Event) -> None:
    model, optimizer = made()
    store = PerpetualStore(tmp_path, model, optimizer, overlap=True)
    gate.set()
    store.save(1, wait=True)
    expected = copied(model, optimizer)
    gate.clear()
    store.save(2)
    with torch.no_grad():
        model.linear.weight += 1
    gate.set()
    with pytest.raises(StoreError, match=r"^model\.linear\.weight must not change between save\(\) and .* Step 1 is intact\.$"):
        store.wait()
    with pytest.raises(StoreError):
        store.close()
    with PerpetualStore(tmp_path, model, optimizer) as store:
        assert store.restore() == 1
    assert all(map(torch.equal, copied(model, optimizer), expected))


def test_an_interrupt_while_copies_are_made_leaves_them_to_the_next_call(tmp_path: Path, gate: threading.Event) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    model, optimizer = made()
    with PerpetualStore(tmp_path, model, optimizer, overlap=True) as store:
        store.save(1)
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                store.wait()
        finally:
            signal.signal(signal.SIGALRM, before)
        threading.Timer(0.2, gate.set).start()
        assert store.steps == [1]


def test_an_optimiser_does_not_wait_for_a_closed_store(tmp_path: Path) -> None:
    model, optimizer = made()
    store = PerpetualStore(tmp_path, model, optimizer, overlap=True)
    forward_and_backward(model)
    store.save(1)
    store.close()
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(StoreError, match="must be open"):
        store.save(2)
    optimizer.step()
