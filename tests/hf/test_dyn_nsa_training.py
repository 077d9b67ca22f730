"""Gradients of converted models: at the start, with checkpointing, compiled, under autocast and Trainer."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from tinyonn.hf import BudgetSchedule, convert_attention, statistics
from tinyonn.hf.dyn_nsa import cores
from tinyonn.nn import OPEN
from tinyonn.testing import assert_close_rms, left_padding, rms_error_ratio, tiny_causal_lm, tiny_dyn_nsa_lm, token_ids

SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}


def stock(arch: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    overrides = {"sliding_window": None, **overrides} if arch == "mistral" else overrides
    return tiny_causal_lm(arch, dtype=dtype, max_position_embeddings=512, **overrides)


def test_it_starts_at_gates_that_can_move():
    model = convert_attention(stock(), **SMALL).train()
    for core in cores(model):
        assert core.price == OPEN
        assert torch.equal(core.gates(torch.randn(1, 5, 4, 12)), torch.tensor([0.0, 1.0, 0.0]).expand(1, 5, 4, 3))
    x = token_ids()
    model(x, labels=x).loss.backward()
    for core in cores(model):
        for parameter in (core.gate_bias, core.gate_weight):
            assert (parameter.grad.flatten(0, -2).abs().amax(0) > 0).all()


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_gradients_at_the_start_are_those_of_the_stock_model(arch):
    x = token_ids()
    plain, model = stock(arch).train(), convert_attention(stock(arch), **SMALL).train()
    plain(x, labels=x).loss.backward()
    model(x, labels=x).loss.backward()
    converted = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert_close_rms(converted[name].grad, parameter.grad, 1e-4, name)


def gradients(model: PreTrainedModel, x: Tensor, **inputs: Any) -> dict[str, Tensor]:
    model(x, labels=x, **inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_no_forward_keeps_its_graph():
    model, x = tiny_dyn_nsa_lm().train(), token_ids(60)
    seen: list[Any] = []
    next(cores(model)).register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out.out.grad_fn)))
    model(x, labels=x).loss.backward()
    model.eval()
    model(x, labels=x)
    model(x)
    gc.collect()
    assert [graph() for graph in seen] == [None] * 3


@pytest.mark.parametrize("tau_source", ["attention", "output"])
def test_gradient_checkpointing_selects_the_same_blocks(tau_source):
    x, mask = token_ids(), left_padding()
    plain, model = tiny_dyn_nsa_lm(tau_source=tau_source).train(), tiny_dyn_nsa_lm(tau_source=tau_source).train()
    expected = gradients(plain, x, attention_mask=mask)
    model.gradient_checkpointing_enable()
    seen: dict[int, list[Any]] = {}
    for core in cores(model):
        core.register_forward_hook(lambda module, args, out: seen.setdefault(id(module), []).append(out))
    got = gradients(model, x, attention_mask=mask)
    assert [len(calls) for calls in seen.values()] == [2, 2]
    for forward, recomputed in seen.values():
        for a, b in zip(forward, recomputed, strict=True):
            assert torch.equal(a, b)
    for name, grad in expected.items():
        assert torch.equal(got[name], grad), name
    assert statistics(model) == statistics(plain)


def test_recomputation_after_another_forward_selects_the_same_blocks():
    """Two forwards before one backward: the running tau has moved on, recomputation must not."""
    x, y = token_ids(), token_ids().flip(0, 1)
    grads = []
    for checkpointing in (False, True):
        model = tiny_dyn_nsa_lm(tau_source="output").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        (model(x, labels=x).loss + model(y, labels=y).loss).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_reentrant_checkpointing_would_lose_the_budget_and_is_refused():
    model, x = tiny_dyn_nsa_lm().train(), token_ids(60)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="the budget loss has no gradient; gradient checkpointing needs use_reentrant=False"):
        model(x, labels=x)


@pytest.mark.parametrize(
    ("tau_source", "padded", "layers"),
    [("attention", False, 2), ("attention", True, 1), ("output", False, 1), ("output", True, 2)],
    ids=["attention-plain", "attention-padded", "output-plain", "output-padded"],
)
def test_it_compiles_whole(tau_source, padded, layers):
    x = token_ids()
    inputs = {"attention_mask": left_padding()} if padded else {}
    eager, model = (tiny_dyn_nsa_lm(layers=layers, tau_source=tau_source).train() for _ in range(2))
    expected = gradients(eager, x, **inputs)
    torch._dynamo.reset()
    got = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x, **inputs)
    for name, grad in expected.items():
        assert_close_rms(got[f"_orig_mod.{name}"], grad, 1e-4, name)
    for name, value in statistics(eager).items():
        assert statistics(model)[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
def test_inductor_agrees():
    """The attention module alone: g++ takes two seconds for each kernel, and the rest of the model is transformers' own."""
    x = token_ids(70)
    eager, model = tiny_dyn_nsa_lm(layers=1).train(), tiny_dyn_nsa_lm(layers=1).train()
    expected = gradients(eager, x)
    torch._dynamo.reset()
    model.model.layers[0].self_attn.compile(fullgraph=True)
    with torch.compiler.config.patch(force_disable_caches=True):
        got = gradients(model, x)
    for name, grad in expected.items():
        assert_close_rms(got[name], grad, 1e-4, name)
    for name, value in statistics(eager).items():
        assert statistics(model)[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_it_runs_under_trainer(checkpointing, tmp_path):
    model = convert_attention(stock(num_hidden_layers=2), **SMALL)
    row = token_ids(200, 1)[0]
    data = [{"input_ids": row, "labels": row}] * 8
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.01, report_to=[],
        use_cpu=True, gradient_checkpointing=checkpointing, logging_steps=1, lr_scheduler_type="constant", save_steps=8, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[BudgetSchedule(3.0, 4, start=3.0, weight=1.0)])
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    moved = {name: (parameter - start[name]).abs().max() for name, parameter in model.named_parameters()}
    assert all(moved.values())
    assert all(core.price > -8 for core in cores(model))  # the budget wants fewer blocks than all
    model.eval()
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")(row[None]).logits
        assert torch.equal(again, model(row[None]).logits)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_autocast_costs_no_more_than_it_costs_the_stock_model(arch):
    x = token_ids()
    expected = stock(arch)(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = stock(arch)(x).logits
        model = convert_attention(stock(arch), **SMALL).train()
        got = model(x, labels=x)
    assert got.logits.dtype == torch.bfloat16
    assert rms_error_ratio(got.logits, expected) < 1.2 * rms_error_ratio(rounded, expected)
    got.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_checkpointing_within_compilation():
    x = token_ids()
    plain, model = tiny_dyn_nsa_lm().train(), tiny_dyn_nsa_lm().train()
    expected = gradients(plain, x)
    model.gradient_checkpointing_enable()
    torch._dynamo.reset()
    got = gradients(torch.compile(model, backend="aot_eager"), x)
    for name, grad in expected.items():
        assert_close_rms(got[f"_orig_mod.{name}"], grad, 1e-4, name)
    assert statistics(model) == statistics(plain)


def test_a_loop_that_resumes_a_schedule_moves_the_price_as_one_that_went_on():
    prices = []
    for resumes in (False, True):
        torch.manual_seed(0)
        model = convert_attention(tiny_causal_lm("llama", max_position_embeddings=512), compress_size=16, block_size=16)
        schedule = BudgetSchedule(target=4.0, steps=8)
        model.train()
        for step in range(8):
            if resumes and step == 5:
                state = schedule.state_dict()
                schedule = BudgetSchedule(target=4.0, steps=8)
                schedule.load_state_dict(state)
            schedule.apply(model, step)
            ids = token_ids(256, 1)
            model(ids, labels=ids).loss.backward()
        schedule.apply(model, 8)
        prices.append([float(core.price) for core in cores(model)])
    assert prices[0] == prices[1]
    with pytest.raises(ValueError, match="state must have the keys start, gap and growth, got price"):
        schedule.load_state_dict({"price": 1.0})
