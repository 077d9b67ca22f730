"""The loss on surprise is a `SurpriseLoss` or a mapping of its numbers, wherever it is given; anything else is named."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tinyonn.nn import DynMoE
from tinyonn.testing import tiny_causal_lm
from tinyonn.train import HyperStep, HyperStepMixin, SurpriseLoss, gating_gradients

ROW = {"input_ids": torch.arange(24), "labels": torch.arange(24)}


def language_model() -> nn.Module:
    model = tiny_causal_lm("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = DynMoE(48, 8, num_experts=6, target_k=2.0, max_experts=4, gating_loss="surprise")
    return model.train()


def by_trainer(folder: Any, **attributes: Any) -> float:
    trained = type("SurpriseTrainer", (HyperStepMixin, Trainer), attributes)
    arguments = TrainingArguments(
        str(folder), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", per_device_train_batch_size=1
    )
    trainer = trained(model=language_model(), args=arguments, train_dataset=[ROW])
    trainer.train()
    return trainer.last_gating_loss.item()


def by_hyper_step(folder: Any, **options: Any) -> float:
    model = language_model()
    batch = {name: value[None] for name, value in ROW.items()}
    return HyperStep(model, torch.optim.SGD(model.parameters(), 0.1), **options)(lambda: model(**batch).loss).gating_loss.item()


def by_context(folder: Any, **options: Any) -> float:
    model = language_model()
    with gating_gradients(model, **options) as gating:
        model(**{name: value[None] for name, value in ROW.items()}).loss.backward()
    return gating.loss.item()


def by_layer(folder: Any, **options: Any) -> float:
    model, losses = language_model(), []
    layers = [layer.mlp for layer in model.model.layers]
    for layer in layers:
        with layer.capturing() as visits:
            model(**{name: value[None] for name, value in ROW.items()}).loss.backward()
            losses.append(layer.gating_loss(visits[0], **options).item())
    return sum(losses) / len(losses)


DOORS: dict[str, Callable[..., float]] = {"Trainer": by_trainer, "HyperStep": by_hyper_step, "context": by_context, "layer": by_layer}


def wanted(**numbers: float) -> float:
    return by_context(None, **numbers)


@pytest.mark.parametrize(
    "given", [SurpriseLoss(w_kl=0.0), {"w_kl": 0.0}, MappingProxyType({"w_kl": 0.0})], ids=["object", "dict", "mapping"]
)
@pytest.mark.parametrize("door", DOORS)
def test_the_loss_is_an_object_or_a_mapping(door, given, tmp_path):
    assert DOORS[door](tmp_path, surprise_loss=given) == pytest.approx(wanted(w_kl=0.0), rel=1e-5)
    assert wanted(w_kl=0.0) < 0.9 * wanted()


@pytest.mark.parametrize(
    ("given", "error", "rest"),
    [
        (0, TypeError, "must be a SurpriseLoss or a mapping of its numbers, got int"),
        (False, TypeError, "must be a SurpriseLoss or a mapping of its numbers, got bool"),
        ("", TypeError, "must be a SurpriseLoss or a mapping of its numbers, got str"),
        ("x", TypeError, "must be a SurpriseLoss or a mapping of its numbers, got str"),
        (1.0, TypeError, "must be a SurpriseLoss or a mapping of its numbers, got float"),
        ([], TypeError, "must be a SurpriseLoss or a mapping of its numbers, got list"),
        (SurpriseLoss, TypeError, "must be a SurpriseLoss or a mapping of its numbers, got the class SurpriseLoss"),
        ({"w": 1}, ValueError, "must have no keys but w_ce, w_kl, temperature, among, got 'w'"),
        ({1: 1, "w_ce": 1.0}, ValueError, "must have no keys but w_ce, w_kl, temperature, among, got 1"),
        ({"w_ce": "1"}, TypeError, "w_ce must be a number, got str"),
        ({"among": "some"}, ValueError, "among must be one of all, chosen, got 'some'"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("door", ["Trainer", "HyperStep", "context", "layer", "gating_options"])
def test_what_is_no_loss_is_named(door, given, error, rest, tmp_path):
    name = "gating_options" if door == "gating_options" else "surprise_loss"
    message = f"{name} {rest}." if rest.startswith("must") else f"{rest}."
    with pytest.raises(error) as found:
        DOORS.get(door, by_trainer)(tmp_path, **{name: given})
    assert str(found.value) == message


@pytest.mark.parametrize("given", [{}, None], ids=repr)
def test_an_empty_earlier_name_is_not_set(given, tmp_path):
    assert by_trainer(tmp_path, gating_options=given) == pytest.approx(wanted(), rel=1e-5)
    assert by_trainer(tmp_path, gating_options=given, surprise_loss={"w_kl": 0.0}) == pytest.approx(wanted(w_kl=0.0), rel=1e-5)


def test_the_earlier_name_can_be_extended(tmp_path):
    options = {**HyperStepMixin.gating_options, "w_kl": 0.0}
    assert by_trainer(tmp_path, gating_options=options) == pytest.approx(wanted(w_kl=0.0), rel=1e-5)


@pytest.mark.parametrize("door", [by_hyper_step, by_context, by_layer])
def test_a_mapping_and_a_number_are_refused(door):
    with pytest.raises(TypeError, match=r"^surprise_loss already contains w_kl; give one or the other\.$"):
        door(None, surprise_loss={"w_ce": 1.0}, w_kl=1.0)
