"""Running thresholds through Trainer, compiled models, transforms, export and files."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from tinyonn.nn import DynMoE
from tinyonn.testing import tiny_causal_lm
from tinyonn.train import HyperStep, HyperStepMixin

QUANTILE = {"thresholds": "quantile", "form": "linear", "combine": "sigmoid", "level": 0.0}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(**options) -> DynMoE:
    torch.manual_seed(0)
    return DynMoE(16, 8, 8, **{"target_k": 2.0, **QUANTILE, **options})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = DynMoE(48, 8, 8, target_k=2.0, **QUANTILE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
def test_a_trainer_updates_each_step_once_by_what_the_mask_holds(reentrant, tmp_path):
    model = tiny_causal_lm("llama")
    for layer in model.model.layers:
        layer.mlp = Block()
    seen: list[int] = []
    mixtures = [layer.mlp.moe for layer in model.model.layers]
    mixtures[0].router.register_forward_hook(lambda *_: seen.append(int(mixtures[0].router.updates)))
    mask = torch.ones(30, dtype=torch.long)
    mask[20:] = 0
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": (ids := torch.randint(50, (30,), generator=generator)), "labels": ids, "attention_mask": mask} for _ in range(24)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=reentrant is not None, gradient_checkpointing_kwargs={"use_reentrant": bool(reentrant)}, learning_rate=1e-3,
    )  # fmt: skip
    type("SurpriseTrainer", (HyperStepMixin, Trainer), {})(model=model, args=arguments, train_dataset=rows).train()
    assert sorted(set(seen)) == [0, 1, 2, 3, 4, 5]
    for module in mixtures:
        assert module.tokens_seen == 6 * 4 * 20
        assert module.router.pending[-1] == 4 * 20  # of the last step
        assert module.statistics()["mean_k"] == pytest.approx(2, rel=0.25)


def test_a_compiled_model_trains_like_an_eager_one():
    models = [nn.Sequential(nn.Linear(16, 16), mixture()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    calls = [models[0], torch.compile(models[1], fullgraph=True)]
    for model, call in zip(models, calls, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for number in range(3):
            (call(tokens(50, 16, seed=number)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert int(models[1][1].router.updates) == 2
    for name, value in models[1].state_dict().items():
        torch.testing.assert_close(value, models[0].state_dict()[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_step_compiles_whole_where_no_router_has_a_loss():
    model = nn.Sequential(nn.Linear(16, 16), mixture())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    step = HyperStep(model, torch.optim.SGD(model.parameters(), lr=0.5))
    results = [step(lambda: (compiled(tokens(50, 16)) - 1).square().mean()) for _ in range(3)]
    assert results[2].loss < results[0].loss
    assert int(model[1].router.updates) == 2


@pytest.mark.parametrize("given", [{"gating_weight": 2.0}, {"w_kl": 0.5}], ids=str)
def test_options_that_no_router_uses_are_named(given):
    model = mixture()
    with pytest.warns(UserWarning, match="no router has a loss of its own, so gating_weight and surprise_loss have no effect"):
        HyperStep(model, torch.optim.SGD(model.parameters(), lr=0.5), **given)


def test_thresholds_that_wait_for_a_forgotten_graph_say_so():
    model = mixture()
    kept = model(tokens(50, 16)).sum()  # no backward

    def steps() -> None:
        for number in range(101):
            model(tokens(50, 16, seed=number)).sum().backward()

    with pytest.warns(UserWarning, match="have not moved for 100 calls, because the graph of an earlier forward in training mode still"):
        steps()
    assert int(model.router.updates) == 0
    del kept
    model(tokens(50, 16)).sum().backward()
    assert int(model.router.updates) == 1


def test_transforms_leave_thresholds_as_they_are():
    module, x = mixture(), tokens(20, 16)
    before = copy.deepcopy(module.state_dict())
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def loss(parameters):
        return torch.func.functional_call(module, (parameters, buffers), (x,)).square().mean()

    for _ in range(2):
        found = torch.func.grad(loss)(parameters)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    module(x).square().mean().backward()
    torch.testing.assert_close(found["router.prototypes"], module.router.prototypes.grad)


def test_an_exported_mixture_routes_by_its_thresholds():
    module, x = mixture(), tokens(20, 16)
    module.router.calibrate(tokens(400, 16) + 1)
    module.eval()
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


def test_a_file_keeps_thresholds_price_and_what_was_recorded(tmp_path):
    module = mixture()
    for number in range(3):
        module(tokens(50, 16, seed=number)).square().mean().backward()
    save_file(module.state_dict(), tmp_path / "mixture.safetensors")
    other = mixture()
    other.load_state_dict(load_file(tmp_path / "mixture.safetensors"))
    x = tokens(30, 16)
    assert torch.equal(other.eval()(x), module.eval()(x))
    other.train()(x)
    module.train()(x)
    assert torch.equal(other.router.thresholds, module.router.thresholds)


def test_a_state_of_the_other_kind_of_thresholds_is_named():
    learned = DynMoE(16, 8, 8, thresholds="learned")
    message = (
        "router was saved with thresholds='learned', but this one has thresholds='quantile'; make it with the options it was saved with"
    )
    with pytest.raises(RuntimeError, match=message):
        mixture().load_state_dict(learned.state_dict())
    with pytest.raises(RuntimeError, match="router was saved with running thresholds, but this one has thresholds='learned'"):
        learned.load_state_dict(mixture().state_dict())


def test_a_state_of_earlier_versions_loads_with_the_learned_rule():
    """Names and shapes of the version before running thresholds; the output by hand."""
    state = {
        "router.prototypes": tokens(4, 16), "router.thresholds": torch.tensor([0.0, 0.1, -0.1, 9.0]),
        "router.expert_mask": torch.tensor([True, True, True, False]), "gate_up_proj": tokens(4, 6, 16, seed=1),
        "down_proj": tokens(4, 16, 3),
    }  # fmt: skip
    module = DynMoE(16, 3, 4, thresholds="learned")
    module.load_state_dict(state)
    x = tokens(9, 16, seed=2)
    margins = (
        nn.functional.cosine_similarity(x[:, None], state["router.prototypes"][None], dim=-1).sigmoid()
        - state["router.thresholds"].sigmoid()
    )
    margins[:, 3] = -torch.inf
    chosen = (margins > 0) | (margins == margins.amax(1, keepdim=True))
    weights = torch.where(chosen, margins, -torch.inf).softmax(-1)
    gate, up = torch.einsum("nf,eif->nei", x, state["gate_up_proj"]).chunk(2, -1)
    wanted = torch.einsum("ne,nei,efi->nf", weights, nn.functional.silu(gate) * up, state["down_proj"])
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
