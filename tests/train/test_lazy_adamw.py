"""`LazyAdamW`: AdamW's formulas on rows with a gradient, and the bits of all other rows."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import TrainingArguments

from tinyonn.hf import TinyOnnConfig, TinyOnnForCausalLM
from tinyonn.nn import DynMoE, DynSMHA
from tinyonn.testing.models import tiny_causal_lm
from tinyonn.train import ExpertLifecycle, LazyAdamW, OnnTrainer, expert_pools, lazy_adamw

IMPLEMENTATIONS = {"default": {}, "loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
by_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@pytest.fixture(params=["in place", "copied"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether active rows are updated in runs or copied out."""
    monkeypatch.setattr(lazy_adamw, "WIDE", 1 if request.param == "in place" else 1 << 40)
    return str(request.param)


SHAPES = {"experts": (6, 3, 4), "biases": (6, 5), "thresholds": (6,), "dense": (6, 4)}
POOLS = ("experts", "biases", "thresholds")


def parameters_of(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in SHAPES.items()}


def gradients(step: int, idle: Callable[[int], list[int]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Gradients of a step; rows of pools that are idle in it are zeros, of which some are negative."""
    generator = torch.Generator().manual_seed(100 + step)
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}
    for name in POOLS:
        found[name][idle(step)] = -0.0 if step % 2 else 0.0
    return found


def put(parameters: dict[str, nn.Parameter], found: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.grad = found[name].clone()


def nobody(step: int) -> list[int]:
    return []


def somebody(step: int) -> list[int]:
    """All rows in one step, none in another, neighbours and single ones in others."""
    return [[0, 1, 4], [5], [], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 2, 4]][step % 6]


def row_by_row(
    start: dict[str, Tensor], steps: int, rates: Callable[[int], float], *, decay: float, amsgrad: bool, maximize: bool
) -> dict[str, np.ndarray]:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), one row after another in float64."""
    weights = {name: value.double().numpy().copy() for name, value in start.items()}
    first, second, most = ({name: np.zeros_like(value) for name, value in weights.items()} for _ in range(3))
    for t in range(1, steps + 1):
        rate = rates(t - 1)
        for name, gradient in gradients(t - 1, somebody, torch.float64).items():
            for row, g in enumerate(gradient.numpy()):
                if name in POOLS and not np.any(g != 0):
                    continue
                g = -g if maximize else g
                w, m, v = weights[name][row], first[name][row], second[name][row]
                m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
                top = np.maximum(most[name][row], v)
                corrected = (top if amsgrad else v) / (1 - 0.95**t)
                weights[name][row] = w - rate * decay * w - rate * (m / (1 - 0.8**t)) / (np.sqrt(corrected) + 1e-3)
                first[name][row], second[name][row], most[name][row] = m, v, top
    return weights


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@by_implementation
def test_each_row_follows_the_formulas_of_its_active_steps(way, implementation, maximize, amsgrad):
    parameters = parameters_of(torch.float64)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    groups = [{"params": [parameters["dense"], parameters["experts"]]}, {"params": [parameters["biases"], parameters["thresholds"]]}]
    optimizer = LazyAdamW(
        groups, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3, amsgrad=amsgrad, maximize=maximize, **implementation,
        pools=[parameters[name] for name in POOLS],
    )  # fmt: skip
    schedule = LambdaLR(optimizer, lambda step: 0.9**step)
    for step in range(13):
        put(parameters, gradients(step, somebody, torch.float64))
        optimizer.step()
        schedule.step()
    wanted = row_by_row(start, 13, lambda step: 0.1 * 0.9**step, decay=0.3, amsgrad=amsgrad, maximize=maximize)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.detach().numpy(), wanted[name], rtol=1e-11, err_msg=name)


@pytest.mark.gpu
@by_implementation
def test_on_a_gpu_a_step_waits_once(way, implementation):
    parameters = {name: nn.Parameter(value.detach().cuda()) for name, value in parameters_of(torch.float64).items()}
    start = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, **implementation}
    optimizer = LazyAdamW(parameters.values(), **options, pools=[parameters[name] for name in POOLS])
    for step in range(8):
        put(parameters, {name: value.cuda() for name, value in gradients(step, somebody, torch.float64).items()})
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        assert sum("synchronizing" in str(warning.message) for warning in found) == 1
    wanted = row_by_row(start, 8, lambda step: 0.1, decay=0.3, amsgrad=False, maximize=False)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.detach().cpu().numpy(), wanted[name], rtol=1e-11, err_msg=name)


def bits_of(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    states = {f"{name}.{key}": x for name, parameter in parameters.items() for key, x in optimizer.state[parameter].items()}
    return {name: value.detach().clone() for name, value in {**parameters, **states}.items()}


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@by_implementation
def test_with_all_rows_active_it_has_the_bits_of_adamw_also_where_each_goes_on_with_the_state_of_the_other(implementation, amsgrad):
    kept = []
    for kinds in (["plain"] * 3, ["lazy"] * 3, ["plain", "lazy", "plain"], ["lazy", "plain", "lazy"]):
        parameters = parameters_of()
        state, schedules = None, None
        for part, kind in enumerate(kinds):
            options = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": amsgrad, **implementation}
            values = list(parameters.values())
            pools = [parameters[name] for name in POOLS]
            optimizer = torch.optim.AdamW(values, **options) if kind == "plain" else LazyAdamW(values, **options, pools=pools)
            schedule = LambdaLR(optimizer, lambda step: 0.8**step)
            if state is not None:
                optimizer.load_state_dict(state)
                schedule.load_state_dict(schedules)
            for step in range(4):
                put(parameters, gradients(4 * part + step, nobody))
                optimizer.step()
                schedule.step()
            state, schedules = copy.deepcopy(optimizer.state_dict()), schedule.state_dict()
        kept.append(bits_of(optimizer, parameters))
    for found in kept[1:]:
        assert_same_bits(found, kept[0])
    assert kept[0]["experts.step"] == 12


def test_its_state_dict_is_that_of_adamw():
    found = []
    for kind, options in ((torch.optim.AdamW, {}), (LazyAdamW, {"pools": []})):
        parameters = parameters_of()
        optimizer = kind(parameters.values(), **options)
        put(parameters, gradients(0, nobody))
        optimizer.step()
        found.append(optimizer.state_dict())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@by_implementation
def test_idle_rows_keep_their_bits_over_many_steps(way, implementation):
    parameters = parameters_of()
    optimizer = LazyAdamW(parameters.values(), lr=0.1, weight_decay=0.5, **implementation, pools=[parameters[name] for name in POOLS])
    for step in range(3):  # so that there is momentum
        put(parameters, gradients(step, nobody))
        optimizer.step()
    before = bits_of(optimizer, parameters)
    for step in range(3, 60):
        put(parameters, gradients(step, lambda step: [0, 2, 3]))
        optimizer.step()
    after = bits_of(optimizer, parameters)
    assert after["experts.step"] == after["dense.step"] == 60
    for name in POOLS:
        for key in (name, f"{name}.exp_avg", f"{name}.exp_avg_sq"):
            assert [torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True)] == [True, False, True, True, False, False], key


def test_a_step_without_any_active_row_counts(way):
    """As in AdamW, which counts a gradient of zeros."""
    parameters = parameters_of()
    optimizer = LazyAdamW(parameters.values(), pools=[parameters[name] for name in POOLS])
    start = {name: parameters[name].detach().clone() for name in POOLS}
    for step in range(5):
        put(parameters, gradients(step, lambda step: list(range(6))))
        optimizer.step()
    for name, value in start.items():
        assert torch.equal(parameters[name], value)
        assert optimizer.state[parameters[name]]["step"] == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_value_but_zero_makes_a_row_active(dtype):
    """Denormals whose square is 0, infinities and NaN, at the end of a wide row, and values that add up to 0."""
    tiny = torch.finfo(dtype).smallest_normal / 2
    grad = torch.zeros(8, 3, 100, dtype=dtype)
    for row, value in enumerate((tiny, -tiny, math.inf, -math.inf, math.nan), start=1):
        grad[row, -1, -1] = value
    grad[6, 0, :2] = torch.tensor([1.0, -1.0])
    pool = nn.Parameter(torch.ones(8, 3, 100, dtype=dtype))
    pool.grad = grad
    LazyAdamW([pool], lr=0.1, weight_decay=0.5, pools=[pool]).step()
    assert [bool((row != 1).all()) for row in pool] == [False, True, True, True, True, True, True, False]
    assert [bool((row != 1).any()) for row in pool] == [False, True, True, True, True, True, True, False]


def test_parameters_without_a_gradient_are_left_alone():
    parameters = parameters_of()
    optimizer = LazyAdamW(parameters.values(), pools=[parameters[name] for name in POOLS])
    put(parameters, gradients(0, somebody))
    parameters["experts"].grad = parameters["dense"].grad = None
    start = parameters_of()
    optimizer.step()
    assert set(optimizer.state) == {parameters["biases"], parameters["thresholds"]}
    for name in ("experts", "dense"):
        assert torch.equal(parameters[name], start[name])


def test_sparse_gradients_are_refused_as_by_adamw():
    pool = nn.Parameter(torch.ones(4, 3))
    pool.grad = torch.eye(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        LazyAdamW([pool], pools=[pool]).step()


@pytest.mark.parametrize("transposed", ["weight", "gradient", "state"])
@by_implementation
def test_rows_that_are_not_contiguous(transposed, implementation, monkeypatch):
    monkeypatch.setattr(lazy_adamw, "WIDE", 1)
    torch.manual_seed(0)
    start, found = torch.randn(2, 5, 4, 3)
    found[[0, 3]] = 0
    results = []
    for turned in (False, True):
        flip = (lambda x: x.transpose(0, 2).contiguous().transpose(0, 2)) if turned else (lambda x: x.clone())
        pool = nn.Parameter(flip(start) if transposed == "weight" else start.clone())
        optimizer = LazyAdamW([pool], lr=0.1, **implementation, pools=[pool])
        for step in range(3):
            pool.grad = (flip if transposed in ("weight", "gradient") else torch.clone)(found * (step + 1))
            if transposed == "state" and step:
                for key in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[pool][key] = flip(optimizer.state[pool][key])
            optimizer.step()
        results.append(pool.detach())
    assert torch.equal(*results)
    assert torch.equal(results[0][[0, 3]], start[[0, 3]])


@by_implementation
def test_a_gradient_scaler_changes_nothing_but_the_steps_it_skips(way, implementation):
    """AMP's scaler divides gradients itself, or lets a fused optimiser do it; powers of 2 are exact."""
    kept = []
    for scaled in (False, True):
        parameters = parameters_of()
        optimizer = LazyAdamW(parameters.values(), lr=0.1, **implementation, pools=[parameters[name] for name in POOLS])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaled)
        for step in range(6):
            found = gradients(step, somebody)
            for name, parameter in parameters.items():
                parameter.grad = scaler.scale(found[name].clone())
            if step == 3 and not scaled:
                continue
            if step == 3:
                parameters["experts"].grad[0, 0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            if scaled and step != 3:
                for name, parameter in parameters.items():
                    assert torch.equal(parameter.grad, found[name]), name
        kept.append(bits_of(optimizer, parameters))
    assert kept[0]["experts.step"] == 5
    assert_same_bits(kept[1], kept[0])


def test_closure_and_hooks_run_once():
    parameters = parameters_of()
    torch.optim.AdamW(parameters.values())  # wraps the class's own step
    optimizer = LazyAdamW(parameters.values(), pools=[parameters["experts"]])
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure() -> Tensor:
        called.append("closure")
        assert torch.is_grad_enabled()
        loss = parameters["experts"][:2].square().sum()
        loss.backward()
        return loss

    start = parameters["experts"].detach().clone()
    assert optimizer.step(closure) == start[:2].square().sum()
    assert called == ["before", "closure", "after"]
    assert torch.equal(parameters["experts"][2:], start[2:])
    assert not torch.equal(parameters["experts"][:2], start[:2])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_keep_their_pools(copied):
    parameters = parameters_of()
    optimizer = LazyAdamW(parameters.values(), lr=0.1, pools=[parameters[name] for name in POOLS])
    put(parameters, gradients(0, nobody))
    optimizer.step()
    others, other = copied((parameters, optimizer))
    assert [tuple(pool.shape) for pool in other.pools] == [SHAPES[name] for name in POOLS]
    for one, kept in ((optimizer, parameters), (other, others)):
        put(kept, gradients(1, lambda step: [2]))
        one.step()
    assert_same_bits(bits_of(other, others), bits_of(optimizer, parameters))


def test_a_parameter_that_takes_the_place_of_a_pool_is_one():
    """Accelerate replaces parameters of the groups when it shards a model."""
    pool, other = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = LazyAdamW([{"params": [nn.Parameter(torch.ones(2))]}, {"params": [pool]}], pools=[pool])
    optimizer.param_groups[1]["params"] = [other]
    optimizer.add_param_group({"params": [pool]})
    for parameter in (pool, other):
        parameter.grad = torch.eye(4, 3)
    optimizer.step()
    assert [bool((row != 1).any()) for row in other] == [True, True, True, False]
    assert [bool((row != 1).any()) for row in pool] == [True, True, True, True]


BAD: dict[str, tuple[Callable[[nn.Parameter], dict[str, Any]], type[Exception], str]] = {
    "another tensor": (lambda _: {"pools": [torch.ones(2, 3)]}, ValueError, r"pools must be among params, got a tensor of shape \(2, 3\)"),
    "0-d": (lambda pool: {"pools": [pool]}, ValueError, "pools must have a row for each expert, got a 0-d tensor"),
    "a name": (lambda _: {"pools": ["experts"]}, TypeError, "pools must be an iterable of tensors, got one with str"),
    "a tensor": (lambda pool: {"pools": pool}, TypeError, "pools must be an iterable of tensors, got a tensor"),
    "capturable": (lambda _: {"capturable": True}, ValueError, "capturable must be False for LazyAdamW"),
    "differentiable": (lambda _: {"differentiable": True}, ValueError, "differentiable must be False for LazyAdamW"),
    "lr": (lambda _: {"lr": -1.0}, ValueError, "Invalid learning rate"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_options(options, error, message):
    pool = nn.Parameter(torch.ones(()))
    with pytest.raises(error, match=message):
        LazyAdamW([pool], **options(pool))


def test_a_capturable_group_or_state_is_refused_and_changes_nothing():
    pool = nn.Parameter(torch.ones(4, 3))
    optimizer = LazyAdamW([pool], pools=[pool])
    with pytest.raises(ValueError, match="capturable must be False"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "capturable": True})
    state = torch.optim.AdamW([pool], capturable=True, lr=0.5).state_dict()
    with pytest.raises(ValueError, match="capturable must be False"):
        optimizer.load_state_dict(state)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 1e-3


# ---- pools of models ----


def names_of(model: nn.Module) -> set[str]:
    pools = {id(pool) for pool in expert_pools(model)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in pools}


def test_pools_of_mixtures_are_their_experts_prototypes_and_learned_thresholds():
    experts = DynMoE(16, 4, 6, thresholds="learned", bias=True)
    heads = DynSMHA(16, 4, 6)
    model = nn.ModuleDict({"a": experts, "b": heads, "c": nn.Linear(6, 6)})
    assert names_of(model) == {
        "a.gate_up_proj", "a.gate_up_bias", "a.down_proj", "a.down_bias", "a.router.prototypes", "a.router.thresholds",
        "b.qkv_proj", "b.o_proj", "b.router.prototypes",
    } | {f"b.{name}" for name in ("qkv_bias", "o_bias") if getattr(heads, name) is not None}  # fmt: skip
    experts.down_proj.requires_grad_(False)
    assert "a.down_proj" not in names_of(model)


MIXTURES = {"qwen3_moe": ("gate_up_proj", "down_proj"), "gpt_oss": ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")}


@pytest.mark.parametrize("family", MIXTURES)
def test_pools_of_transformers_models_are_their_stacked_experts(family):
    model = tiny_causal_lm(family)
    wanted = {f"model.layers.{layer}.mlp.experts.{name}" for layer in range(len(model.model.layers)) for name in MIXTURES[family]}
    assert names_of(model) == wanted
    assert all(len(pool) == model.config.num_local_experts for pool in expert_pools(model))


def test_a_dense_model_has_no_pools():
    assert expert_pools(tiny_causal_lm("llama")) == []


def routed(kind: str) -> tuple[nn.Module, Callable[[], Tensor], Callable[[], list[bool]], str]:
    """A model, its loss, which experts of a pool got a token in the last forward, and the pool's name."""
    torch.manual_seed(0)
    if kind == "transformers":
        model = tiny_causal_lm("qwen3_moe", num_experts=16, num_experts_per_tok=1)
        gate, chosen = model.model.layers[0].mlp.gate, []
        gate.register_forward_hook(lambda module, given, out: chosen.append(out[2]))
        ids = torch.tensor([[1, 2, 3, 4]])
        return (
            model,
            lambda: model(ids, labels=ids).loss,
            lambda: [bool((chosen[-1] == expert).any()) for expert in range(16)],
            "model.layers.0.mlp.experts.down_proj",
        )
    layer = DynMoE(8, 4, 6, thresholds="learned", form="linear", gating_loss="none", target_k=1, max_experts=6)
    with torch.no_grad():
        layer.router.prototypes.copy_(torch.eye(6, 8))
        layer.router.thresholds.fill_(1)
    x = nn.functional.one_hot(torch.tensor([0, 2, 2, 5]), 8).float()

    def served() -> list[bool]:
        return [bool(count) for count in layer.expert_counts]

    return layer, lambda: layer(x).square().sum(), served, "down_proj"


@pytest.mark.parametrize("kind", ["DynMoE", "transformers"])
def test_experts_without_a_token_stay_and_others_learn(kind):
    model, loss, served, name = routed(kind)
    plain = copy.deepcopy(model)
    optimizer = LazyAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, pools=expert_pools(model))
    pool = model.get_parameter(name)
    start = pool.detach().clone()
    loss().backward()
    optimizer.step()
    used = served()
    assert 0 < sum(used) < len(used)
    assert [not torch.equal(row, old) for row, old in zip(pool, start, strict=True)] == used
    other = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for parameter, source in zip(plain.parameters(), model.parameters(), strict=True):
        parameter.grad = source.grad
    other.step()
    assert not any(torch.equal(row, old) for row, old in zip(plain.get_parameter(name), start, strict=True))
    assert torch.equal(plain.get_parameter(name)[used], pool[used])


def test_a_recycled_expert_begins_anew(monkeypatch):
    """The lifecycle writes weights and state in place; the next active step uses them."""
    monkeypatch.setattr("tinyonn.train.lifecycle.WINDOW", 2)
    model, loss, served, _ = routed("DynMoE")
    optimizer = LazyAdamW(model.parameters(), lr=1e-2, pools=expert_pools(model))
    life = ExpertLifecycle(model, optimizer, pruning_threshold=0.01)
    with torch.no_grad():  # momentum of experts without a token
        for pool in optimizer.pools:
            pool.grad = torch.ones_like(pool)
    optimizer.step()
    events = []
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        events += life.step()
    recycled = [event.expert for event in events]
    assert recycled
    assert recycled == [expert for expert, used in enumerate(served()) if not used]
    averages = optimizer.state[model.down_proj]["exp_avg"]
    assert [bool(row.any()) for row in averages] == served()


# ---- OnnTrainer ----


class Rows(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        row = (torch.arange(12) + place) % 48
        return {"input_ids": row, "labels": row}


def trainer_of(folder: Path, options: dict[str, Any] | None = None, **given: Any) -> OnnTrainer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "head_dim": 16, "num_hidden_layers": 1, "init_num_experts": 6, "max_num_experts": 8}
    arguments = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.5,
        "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3,
    }  # fmt: skip
    model = TinyOnnForCausalLM(TinyOnnConfig(attention="full", **sizes))
    return OnnTrainer(model=model, args=TrainingArguments(**(arguments | given)), train_dataset=Rows(), **(options or {}))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize(("freeze_idle", "frozen"), [(None, True), (True, True), (False, False)])
def test_the_trainer_freezes_experts_that_are_not_live(optim, freeze_idle, frozen, tmp_path):
    trainer = trainer_of(tmp_path, {"freeze_idle": freeze_idle}, optim=optim)
    pools = {name: pool.detach().clone() for name, pool in trainer.model.named_parameters() if name in names_of(trainer.model)}
    assert len(pools) == 3
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is (LazyAdamW if frozen else torch.optim.AdamW)
    assert {group["fused"] for group in optimizer.param_groups} == {True if optim == "adamw_torch_fused" else None}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    for name, start in pools.items():
        pool = trainer.model.get_parameter(name)
        assert not torch.equal(pool[:6], start[:6])
        assert torch.equal(pool[6:], start[6:]) == frozen, name
    assert trainer.optimizer_cls_and_kwargs is None


def test_the_trainer_goes_on_from_a_checkpoint_of_either_optimiser(tmp_path):
    for first, then in ((False, True), (True, False)):
        folder = tmp_path / str(first)
        trainer_of(folder, {"freeze_idle": first}, save_strategy="steps", save_steps=2, max_steps=2).train()
        trainer = trainer_of(folder, {"freeze_idle": then})
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        steps = {float(state["step"]) for state in trainer.optimizer.state.values()}
        assert steps == {4.0}


def test_where_the_trainer_does_not_make_an_adamw_none_is_no_and_true_an_error(tmp_path):
    assert type(trainer_of(tmp_path, optim="sgd").create_optimizer()) is torch.optim.SGD
    with pytest.raises(ValueError, match="freeze_idle must be False or None with optim='sgd', which is not adamw_torch"):
        trainer_of(tmp_path, {"freeze_idle": True}, optim="sgd")
    own = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert trainer_of(tmp_path, {"optimizers": (own, None)}).create_optimizer() is own
    with pytest.raises(ValueError, match="freeze_idle must be False or None with an optimizer of your own, got True"):
        trainer_of(tmp_path, {"optimizers": (own, None), "freeze_idle": True})
    with pytest.raises(ValueError, match="with an optimizer of your own"):
        trainer_of(tmp_path, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}), "freeze_idle": True})
    with pytest.raises(TypeError, match="freeze_idle must be True or False"):
        trainer_of(tmp_path, {"freeze_idle": 1})


def test_without_trained_experts_the_trainer_uses_adamw(tmp_path):
    trainer = trainer_of(tmp_path)
    for pool in expert_pools(trainer.model):
        pool.requires_grad_(False)
    assert type(trainer.create_optimizer()) is torch.optim.AdamW


# ---- two processes ----

EXPERTS = 5
OPTIONS = {"lr": 0.1, "weight_decay": 0.4}


class Stacked(nn.Module):
    """A loss whose gradients are what a batch says, times weights."""

    num_experts = EXPERTS

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EXPERTS, 4, 3))
        self.bias = nn.Parameter(torch.randn(EXPERTS, 4))
        self.dense = nn.Parameter(torch.randn(3, 2))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return sum((batch[name] * parameter).sum() for name, parameter in self.named_parameters())  # type: ignore[return-value]


def batch(rank: int, step: int) -> dict[str, Tensor]:
    """Expert 0 is idle, 1 active on the second process only, 2 on the first, 3 in its first column in every other step, 4 on both."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    found = {"weight": torch.randn(EXPERTS, 4, 3, generator=generator), "bias": torch.randn(EXPERTS, 4, generator=generator)}
    for value in found.values():
        value[0] = value[2 - rank] = value[3, 1:] = 0
        if step % 2:
            value[3] = 0
    return found | {"dense": torch.randn(3, 2, generator=generator)}


def by_columns(model: nn.Module) -> nn.Module:
    return fully_shard(model, shard_placement_fn=lambda _: Shard(1))


CASES: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, Any]]] = {
    f"{name}, {implementation}": (wrap, options)
    for name, wrap in (("ddp", DistributedDataParallel), ("sharded", fully_shard), ("sharded by columns", by_columns))
    for implementation, options in (("loop", {}), ("fused", {"fused": True}))
}


def work(folder: Path, rank: int) -> None:
    found = {}
    for case, (wrap, options) in CASES.items():
        for wide in (1, 1 << 40):
            lazy_adamw.WIDE = wide
            model = wrap(Stacked())
            optimizer = LazyAdamW(model.parameters(), **OPTIONS, **options, pools=expert_pools(model))
            assert len(optimizer.pools) == 2
            for step in range(5):
                model(batch(rank, step)).backward()
                optimizer.step()
                optimizer.zero_grad()
            state = model.state_dict()
            whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state.items()}
            found[case, wide] = {name.removeprefix("module."): value.clone() for name, value in whole.items()}
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, two_ranks: Callable[..., None]) -> list[dict[Any, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks(partial(work, folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("wide", [1, 1 << 40], ids=["in place", "copied"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_move_the_experts_that_one_of_them_used(ranks, case, wide):
    model = Stacked()
    start = model.weight.detach().clone()
    optimizer = LazyAdamW(model.parameters(), **OPTIONS, **CASES[case][1], pools=expert_pools(model))
    for step in range(5):
        optimizer.zero_grad()
        for rank in range(2):
            (model(batch(rank, step)) / 2).backward()
        optimizer.step()
    for found in ranks:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[case, wide][name], value, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(found[case, wide]["weight"][0], start[0])
        assert not torch.equal(found[case, wide]["weight"][1:], start[1:])
