"""A converted model trains: with HyperStep, and with Trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from tinyonn.hf.dyn_moe import calibrate_experts, convert_mlp_to_dynmoe, expert_statistics
from tinyonn.hf.dyn_moe.calibration import mixtures
from tinyonn.testing import assert_close_rms, left_padding, tiny_causal_lm, token_ids
from tinyonn.train import HyperStep, HyperStepMixin, capture_surprise


def sparse(arch: str = "llama", **options: Any) -> PreTrainedModel:
    overrides = {"n_positions": 256} if arch == "gpt2" else {"intermediate_size": 96}
    model = convert_mlp_to_dynmoe(tiny_causal_lm(arch, **overrides), num_experts=8, sample=token_ids(), **options)
    calibrate_experts(model, token_ids(), 3.0)
    return model.train()


@pytest.mark.parametrize(
    ("kind", "surprise"),
    [("surprise", "down_proj"), ("sdl", "down_proj"), ("both", "down_proj"), ("both", "saving"), ("none", "down_proj")],
)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_hyper_step_trains_experts_and_routers(arch, kind, surprise):
    model, x, mask = sparse(arch, gating_loss=kind, surprise_kind=surprise), token_ids(40), left_padding(40)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "mlp" in name}
    step = HyperStep(model, torch.optim.Adam(model.parameters(), lr=3e-3))
    torch.manual_seed(0)
    results = [step(lambda: model(x, attention_mask=mask, labels=x).loss, token_mask=mask) for _ in range(12)]
    assert results[-1].loss < results[0].loss - 0.2
    assert all((result.gating_loss > 0) == (kind != "none") for result in results)
    assert all(not torch.equal(model.get_parameter(name), old) for name, old in before.items())


def test_the_surprise_of_every_expert_can_be_read():
    model, x = sparse(), token_ids(40)
    with capture_surprise(model) as surprise:
        model(x, labels=x).loss.backward()
    assert list(surprise) == [f"model.layers.{layer}.mlp" for layer in range(3)]
    for name, found in surprise.items():
        assert found.shape == (80, 8)
        routed = found.isfinite().sum().item() / 80
        assert routed == pytest.approx(expert_statistics(model)[name]["mean_k"])
        assert (found[found.isfinite()] >= 0).all()


def test_sparse_diversity_draws_towards_the_calibrated_number_of_experts():
    model, x = sparse(gating_loss="sdl"), token_ids(60)
    calibrate_experts(model, x, 6.0)
    for module in mixtures(model).values():
        module.router.target_k = 3.0
    routers = [parameter for module in mixtures(model).values() for parameter in module.router.parameters()]
    model.requires_grad_(False)
    for parameter in routers:
        parameter.requires_grad_(True)
    step = HyperStep(model, torch.optim.Adam(routers, lr=5e-3))
    for _ in range(40):
        step(lambda: model(x, labels=x).loss)
    expert_statistics(model, reset=True)
    model(x)
    assert all(2 < found["mean_k"] < 4.5 for found in expert_statistics(model).values())


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointed in (False, True):
        model, x = sparse(), token_ids(40)
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(x, labels=x).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


class SurpriseTrainer(HyperStepMixin, Trainer):
    gating_weight = 0.5


def test_trainer_trains_saves_and_loads(tmp_path):
    row = token_ids(60, 1)[0]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    model = sparse()
    before = [module.router.prototypes.detach().clone() for module in mixtures(model).values()]
    trainer = SurpriseTrainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 6)
    assert math.isfinite(trainer.train().training_loss)
    assert trainer.last_gating_loss > 0
    assert all(not torch.equal(module.router.prototypes, old) for module, old in zip(mixtures(model).values(), before, strict=True))
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert_close_rms(loaded(row[None]).logits, model.eval()(row[None]).logits, 1e-6)
