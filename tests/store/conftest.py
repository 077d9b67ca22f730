"""A small model, and stores of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyonn.store import PerpetualStore


class Small(nn.Module):
    """A linear layer, a pool of experts, a buffer, a tied weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.experts = nn.Parameter(torch.randn(16, 32, 32))
        self.num_experts = 16
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.inner.weight
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.narrow = nn.Parameter(torch.randn(4, 3).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.head(self.inner(x)).sum() + self.experts.square().mean() + self.narrow.float().sum()


def small(seed: int = 0, width: int = 8) -> tuple[Small, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Small(width)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        model(torch.randn(2, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()


def copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a run, by names of our own."""
    found = {f"m.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {f"o.{name}.{key}": value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


def lived(folder: Path, steps: int = 4, **options: Any) -> dict[int, dict[str, Tensor]]:
    """A store of some steps, and the tensors of each."""
    model, optimizer = small()
    found = {}
    with PerpetualStore(folder, model, optimizer, **({"keep": "all"} | options)) as store:
        store.restore()
        for step in range(1, steps + 1):
            train(model, optimizer)
            store.save(step, score=step % 3)
            found[step] = copied(model, optimizer)
    return found


def flipped(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
