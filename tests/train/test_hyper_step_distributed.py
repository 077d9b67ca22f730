"""Two processes have the mean of both gradients: under DistributedDataParallel, where one leaves mixtures out, sharded; accumulated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tinyonn.nn import DynMoE
from tinyonn.train import HyperStep

BATCHES = 2


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DynMoE(16, 8, 6, target_k=2.5, max_experts=4, **{"thresholds": "learned", **options}) for _ in range(3))

    def forward(self, x: Tensor, used: int) -> Tensor:
        for layer in self.layers[:used]:
            x = x + layer(x)
        return x


class NoStep(torch.optim.SGD):
    """Leaves gradients to be looked at."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=0.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


def model_of(**options) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def batch(rank: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + number)
    return torch.randn(9, 16, generator=generator), torch.randn(9, 16, generator=generator)


def sharded(model: Model) -> nn.Module:
    for layer in model.layers[1:]:
        fully_shard(layer)
    return fully_shard(model)


# What wraps the model, and how many mixtures each process uses.
CASES: dict[str, tuple[Callable[[Model], nn.Module], tuple[int, int]]] = {
    "plain": (DistributedDataParallel, (3, 3)),
    "views": (lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True), (3, 3)),
    "unused": (lambda model: DistributedDataParallel(model, find_unused_parameters=True), (2, 1)),
    "compiled": (lambda model: torch.compile(DistributedDataParallel(model), backend="eager"), (3, 3)),
    "sharded": (sharded, (3, 3)),
    "wrapped after the step was made": (lambda model: model, (3, 3)),
}


def run(model: nn.Module, rank: int, used: int, accumulation_steps: int = BATCHES, wrap_later: bool = False) -> dict[str, Tensor]:
    step = HyperStep(model, NoStep(model.parameters()), accumulation_steps=accumulation_steps)
    if wrap_later:
        step.model = model = DistributedDataParallel(model)
    for number in range(BATCHES):
        x, y = batch(rank, number)
        step(lambda x=x, y=y: (model(x, used) - y).square().mean())
    names = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone() for name, grad in names.items()}
    return {name.replace("module.", "").replace("_orig_mod.", ""): grad for name, grad in whole.items()}


QUANTILE = {"thresholds": "quantile", "form": "linear", "combine": "sigmoid", "level": 0.0, "demand": 0.5}


def thresholds_of(model: nn.Module, rank: int, loop: str) -> dict[str, Tensor]:
    """Buffers of the routers after three steps and one more forward."""
    step = HyperStep(model, NoStep(model.parameters())) if loop == "step" else None
    for number in range(3):
        x, y = batch(rank, number)
        if step is None:
            (model(x, 3) - y).square().mean().backward()
        else:
            step(lambda x=x, y=y: (model(x, 3) - y).square().mean())
    model(batch(rank, 3)[0], 3)
    names = ("thresholds", "price", "spread", "head.head", "head.centre")
    return {name.removeprefix("module."): buffer.clone() for name, buffer in model.named_buffers() if name.endswith(names)}


LOOPS = {"step, DDP": DistributedDataParallel, "step, sharded": sharded, "own, DDP": DistributedDataParallel}


def work(folder: Path, rank: int) -> None:
    running = {name: thresholds_of(wrap(model_of(**QUANTILE)), rank, name.split(",")[0]) for name, wrap in LOOPS.items()}
    torch.save(running, folder / f"thresholds{rank}.pt")
    found = {name: run(wrap(model_of()), rank, used[rank], wrap_later="after" in name) for name, (wrap, used) in CASES.items()}
    torch.save(found, folder / f"{rank}.pt")
    refused = model_of()
    fully_shard(refused, ignored_params={parameter for layer in refused.layers for parameter in layer.router.parameters()})
    with pytest.raises(TypeError, match=r"layers.0.router.prototypes must be sharded where the model is"):
        HyperStep(refused, NoStep(refused.parameters()))
    apart = model_of()
    fully_shard(apart.layers[0].router)
    fully_shard(apart)
    with pytest.raises(RuntimeError, match="a router is sharded during backward"):
        run(apart, rank, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, two_ranks: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks(partial(work, folder))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_mean_of_both_gradients(found, case):
    _, used = CASES[case]
    alone = [run(model_of(), rank, used[rank]) for rank in range(2)]
    assert found[0][case].keys() == found[1][case].keys() == alone[0].keys() | alone[1].keys()
    for name, grad in found[0][case].items():
        assert torch.equal(grad, found[1][case][name]), name
        wanted = sum(grads.get(name, torch.zeros_like(grad)) for grads in alone) / 2
        torch.testing.assert_close(grad, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", LOOPS)
def test_two_processes_have_the_same_running_thresholds(folder, case):
    """The mean of both with a step; those of the first process in a loop of one's own, where DistributedDataParallel sends its buffers."""
    first, second = (torch.load(folder / f"thresholds{rank}.pt")[case] for rank in range(2))
    # No parameter moves, so the first mixture sees in each process what it sees alone.
    alone = [thresholds_of(model_of(**QUANTILE), rank, "own") for rank in range(2)]
    name = "layers.0.router.thresholds"
    assert (alone[0][name] - alone[1][name]).abs().max() > 1e-3
    torch.testing.assert_close(first[name], alone[0][name] if "own" in case else (alone[0][name] + alone[1][name]) / 2)
    assert len(first) == 15
    for key, value in first.items():
        assert key.endswith("spread") or (value != model_of(**QUANTILE).state_dict()[key]).any(), key
        assert torch.equal(value, second[key]), key
