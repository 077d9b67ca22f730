"""Converted models under PEFT: what trains, what is told, and what an adapter's folder brings back."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from tinyonn.hf import (
    BudgetSchedule,
    calibrate,
    calibrate_experts,
    convert_attention,
    convert_mlp_to_dynmoe,
    expert_statistics,
    parameter_groups,
    revert_attention,
    statistics,
)
from tinyonn.hf.dyn_nsa import cores
from tinyonn.testing import assert_close_rms, tiny_causal_lm, token_ids
from tinyonn.train import HyperStep, HyperStepMixin

peft = pytest.importorskip("peft", reason="wraps the converted models")
SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}
NAMED = pytest.mark.parametrize("named", [True, False], ids=["modules_to_save", "LoRA alone"])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Folder of a model with attention and MLPs converted, at the last temperature of `BudgetSchedule`."""
    model = tiny_causal_lm("llama", intermediate_size=96, max_position_embeddings=512, num_hidden_layers=2)
    convert_mlp_to_dynmoe(convert_attention(model, **SMALL, temperature=0.1), num_experts=8, sample=token_ids())
    calibrate_experts(model, token_ids(), 3.0, max_experts=5)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, modules: list[str] | None = None) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=modules))


def logits(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x).logits


def assert_reloads(model: Any, base: Path, x: Tensor) -> Any:
    """The adapter's folder alone, beside the base model's as it was saved, gives the same logits; so does the merged model's."""
    expected, folder = logits(model, x), base.parent / "adapter"
    model.save_pretrained(folder)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert_close_rms(logits(loaded, x), expected, 1e-5)
    loaded.merge_and_unload().save_pretrained(base.parent / "merged")
    merged = AutoModelForCausalLM.from_pretrained(base.parent / "merged")
    assert_close_rms(logits(merged, x), expected, 1e-4)
    return loaded


def train(model: Any, folder: Path, *, steps: int = 4, trainer: type[Trainer] = Trainer, **kwargs: Any) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in token_ids()]
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=3e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_steps=steps,
    )
    run = trainer(model, arguments, train_dataset=data, **kwargs)
    run.train()
    return run


@NAMED
def test_a_schedule_under_trainer_opens_an_adapted_model(named, base, tmp_path):
    model, x = adapted(base, ["dyn_nsa"] if named else None), token_ids()
    start = [core.base.detach().clone() for core in cores(model)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = train(model, tmp_path / "run", callbacks=[BudgetSchedule(4.0, 4, start=8.0, weight=1.0)])
    messages = [str(warning.message) for warning in told if re.search("thresholds|is saved with", str(warning.message))]
    if named:
        assert not messages
    else:
        assert len(messages) == 1
        assert "thresholds of 2 of 2 layers require no gradient" in messages[0]
        assert "give PEFT's configuration modules_to_save=['dyn_nsa']" in messages[0]
    found = list(cores(model))
    assert len(found) == 2
    moved = [not torch.equal(core.base, before) for core, before in zip(found, start, strict=True)]
    assert moved == [named] * 2
    assert all(core.price > -8 for core in found)
    blocks = [log["key_blocks"] for log in run.state.log_history if "key_blocks" in log]
    assert len(blocks) == 4
    assert all(3 <= count <= 5 for count in blocks)
    assert_reloads(model, base, x)
    checkpoint = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert_close_rms(logits(checkpoint, x), logits(model, x), 1e-5)


@NAMED
def test_thresholds_calibrated_under_an_adapter_come_back_with_it(named, base):
    model, x = adapted(base, ["dyn_nsa"] if named else None), token_ids()
    dense = logits(model, x)
    reached = calibrate(model, [x], 4.5)
    assert 4 < reached < 5
    assert (logits(model, x) - dense).abs().max() > 1e-3
    assert_reloads(model, base, x)
    with model.disable_adapter():
        assert_close_rms(logits(model, x), logits(AutoModelForCausalLM.from_pretrained(base), x), 1e-6)


@NAMED
def test_statistics_are_those_of_the_parts_that_run(named, base):
    model, x = adapted(base, ["dyn_nsa", "mlp"] if named else None), token_ids()
    statistics(model, reset=True)
    expert_statistics(model, reset=True)
    logits(model, x)
    prefix = "base_model.model.model.layers"
    assert list(statistics(model)) == [f"{prefix}.{layer}.self_attn.dyn_nsa" for layer in range(2)]
    assert list(expert_statistics(model)) == [f"{prefix}.{layer}.mlp" for layer in range(2)]
    assert all(math.isfinite(found["mean_count"]) for found in statistics(model).values())
    means = [found["mean_k"] for found in expert_statistics(model).values()]
    assert 2 < sum(means) / len(means) < 4


def test_the_groups_of_an_optimiser_hold_the_copies(base):
    model = adapted(base, ["dyn_nsa"])
    own, parts, thresholds = parameter_groups(model, lr=1e-4)
    assert {id(p) for p in thresholds["params"]} == {id(p) for core in cores(model) for p in (core.base, core.slope)}
    assert all(parameter.requires_grad for group in (own, parts, thresholds) for parameter in group["params"])
    assert sum(len(group["params"]) for group in (own, parts, thresholds)) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("modules", [["mlp"], ["router"], None], ids=["mlp", "router", "LoRA alone"])
def test_a_hyper_step_teaches_the_routers_that_an_adapter_saves(modules, base):
    model, x = adapted(base, modules).train(), token_ids()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if modules is None:
        with pytest.warns(UserWarning, match=r"no router requires a gradient.*modules_to_save=\['router'\]"):
            step = HyperStep(model, optimizer)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step = HyperStep(model, optimizer)
    for _ in range(3):
        step(lambda: model(x, labels=x).loss)
    moved = [name for name, p in model.named_parameters() if "router" in name and not torch.equal(p, before[name])]
    assert len(moved) == (0 if modules is None else 4)
    assert all("original_module" not in name for name in moved)
    assert_reloads(model, base, x)


class SurpriseTrainer(HyperStepMixin, Trainer):
    """A Trainer whose routers learn from surprise."""


@pytest.mark.parametrize("modules", [["router"], None], ids=["router", "LoRA alone"])
def test_routers_of_an_adapted_model_learn_under_trainer(modules, base, tmp_path):
    model, x = adapted(base, modules), token_ids()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(model, tmp_path / "run", trainer=SurpriseTrainer)
    assert sum("no router requires a gradient" in str(warning.message) for warning in told) == (modules is None)
    assert any("router" in name and not torch.equal(p, before[name]) for name, p in model.named_parameters()) == (modules is not None)
    assert_reloads(model, base, x)


@pytest.mark.parametrize("modules", [["mlp"], ["router"], None], ids=["mlp", "router", "LoRA alone"])
def test_routers_calibrated_under_an_adapter_come_back_with_it(modules, base):
    model, x = adapted(base, modules), token_ids()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reached = calibrate_experts(model, x, 3.0, max_experts=5, shift=True)
    assert 2.9 < sum(reached.values()) / len(reached) < 3.1
    with pytest.warns(UserWarning, match="target_k, min_experts, max_experts are saved with the base model, not with an adapter"):
        calibrate_experts(model, x, 2.0, max_experts=5)
    logits(model, x)
    means = [found["mean_k"] for found in expert_statistics(model).values()]
    assert sum(means) / len(means) < 2.5
    assert_reloads(model, base, x)


def test_an_adapter_lacks_a_limit_of_blocks_and_the_schedule_tells(base):
    model = adapted(base, ["dyn_nsa"])
    with pytest.warns(UserWarning, match="max_blocks=3 is saved with the base model, not with an adapter; pass it to convert_attention"):
        BudgetSchedule(3.0, 2, max_blocks=3, temperature=None).apply(model, 0)


def test_an_adapter_lacks_the_last_temperature_and_the_schedule_tells(base):
    model = adapted(base, ["dyn_nsa"])
    with pytest.warns(UserWarning, match="temperature=0.2, max_blocks=3 are saved with the base model, not with an adapter; pass them to"):
        BudgetSchedule(3.0, 2, max_blocks=3, temperature=(1.0, 0.2)).apply(model, 0)


def test_a_base_model_with_the_last_temperature_gives_the_logits_of_the_trained_adapter(base):
    model, schedule, x = adapted(base, ["dyn_nsa"]), BudgetSchedule(4.0, 4), token_ids()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            schedule.apply(model, step)
            model.train()(x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.apply(model, 4)
    assert_reloads(model, base, x)


@pytest.mark.parametrize("named", [False, True], ids=["added", "named"])
def test_adapters_of_transformers_keep_the_thresholds_too(base, named):
    model, x = AutoModelForCausalLM.from_pretrained(base), token_ids()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["dyn_nsa"] if named else None))
    calibrate(model, [x], 4.5)
    expected = logits(model, x)
    model.save_pretrained(base.parent / "adapter")
    again: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    again.load_adapter(base.parent / "adapter")
    assert_close_rms(logits(again, x), expected, 1e-5)


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "peft.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*saved with the base model")
        exec(compile(example, "docs/peft.md", "exec"), names)
    x = token_ids()
    expected = logits(names["trainer"].model, x)
    assert_close_rms(logits(names["again"], x), expected, 1e-5)
    names["merged"].save_pretrained("merged")
    assert_close_rms(logits(AutoModelForCausalLM.from_pretrained("merged"), x), expected, 1e-4)
    assert any("key_blocks" in log for log in names["trainer"].state.log_history)


@pytest.mark.parametrize("convert", [convert_attention, lambda model: convert_mlp_to_dynmoe(model, num_experts=4)], ids=["nsa", "moe"])
def test_an_adapter_of_a_model_converted_in_memory_does_not_load_on_the_unconverted_one(convert, tmp_path):
    tiny_causal_lm("llama", intermediate_size=96).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    convert(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="converted in memory: save_pretrained it, and load it before get_peft_model"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_an_adapter_of_a_reverted_model_names_the_folder_it_came_from(tmp_path):
    tiny_causal_lm("llama", intermediate_size=96).save_pretrained(tmp_path / "dense")
    model = revert_attention(convert_attention(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "dense")
