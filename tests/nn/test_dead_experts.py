"""Live experts that get no token are told once, in one line."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tinyonn.nn import DynMoE
from tinyonn.testing import tiny_causal_lm
from tinyonn.train import HyperStep, HyperStepMixin

E, K = 6, 2.0
ENOUGH = 3000  # 1,000 · E / target_k


def tokens(number: int) -> torch.Tensor:
    return torch.randn(number, 16, generator=torch.Generator().manual_seed(0))


def mixture(dead: int = 2, features: int = 16, **options) -> DynMoE:
    torch.manual_seed(0)
    module = DynMoE(features, 8, E, target_k=K, max_experts=4, **{"thresholds": "learned", **options})
    with torch.no_grad():
        module.router.thresholds[:dead] = 9.0
        module.router.thresholds[dead:] -= 0.3  # every token has another expert
    return module


def test_statistics_tell_once():
    module = mixture()
    module(tokens(ENOUGH - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.statistics()["dead_experts"] == 2
    module(tokens(1))
    message = r"^live experts got none of the last 3,000 tokens: 2 of 6; thresholds='balanced' gives every expert tokens\.$"
    with pytest.warns(UserWarning, match=message):
        module.statistics()
    module(tokens(2 * ENOUGH))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.statistics()


def test_an_expert_that_dies_later_is_told_and_resets_do_not_hide_it():
    module = mixture(dead=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(tokens(2 * ENOUGH))
        module.statistics()
        module.router.expert_mask[1] = False  # excluded, not dead
        with torch.no_grad():
            module.router.thresholds[3] = 9.0
        for _ in range(4):
            module.reset_statistics()
            module(tokens(ENOUGH // 6))
            module.statistics()
    module.reset_statistics()
    module(tokens(ENOUGH // 6))
    with pytest.warns(UserWarning, match="none of the last 2,500 tokens: 1 of 5;"):
        module.statistics()


def test_a_step_names_the_mixtures():
    model = nn.Sequential(mixture(), mixture(dead=0), mixture(dead=1, routing="budget", surprise_budget=0.2))
    with torch.no_grad():
        model[2].router.thresholds[2:] = -9.0
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    step = HyperStep(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            step(lambda: model(tokens(40)).square().mean())
    with pytest.warns(UserWarning, match=r"none of the last 4,000 tokens: 2 of 6 of 0, . of 6 of 2; thresholds='balanced' gives"):
        step(lambda: model(tokens(40)).square().mean())


def test_a_trainer_names_them_too(tmp_path):
    model = tiny_causal_lm("llama")
    model.model.layers[0].mlp = mixture(features=48)
    row = {"input_ids": torch.arange(40), "labels": torch.arange(40)}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=100, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", per_device_train_batch_size=1,
        learning_rate=0.0,
    )  # fmt: skip
    trainer = type("SurpriseTrainer", (HyperStepMixin, Trainer), {})(model=model, args=arguments, train_dataset=[row] * 100)
    with pytest.warns(UserWarning, match=r"none of the last 4,000 tokens: 2 of 6 of model\.layers\.0\.mlp;"):
        trainer.train()
