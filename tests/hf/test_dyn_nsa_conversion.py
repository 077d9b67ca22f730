"""Converted models do what stock models do until a budget is set; what cannot be converted is named."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
)

from tinyonn.errors import InputError
from tinyonn.hf import BudgetSchedule, convert_attention, revert_attention, statistics
from tinyonn.hf.dyn_nsa import cores
from tinyonn.testing import assert_close_rms, left_padding, tiny_causal_lm, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")
SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}
ARCHS = ("llama", "qwen3", "mistral", "gpt_neox")


def stock(arch: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    overrides = {"sliding_window": None, **overrides} if arch == "mistral" else overrides
    return tiny_causal_lm(arch, dtype=dtype, max_position_embeddings=512, **overrides)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_converted_model_reproduces_the_logits(arch, padded):
    model, x = stock(arch), token_ids()
    mask = left_padding() if padded else None
    expected = model(x, attention_mask=mask).logits
    assert convert_attention(model, **SMALL) is model
    got = model(x, attention_mask=mask).logits
    real = slice(None) if mask is None else mask.bool()
    assert_close_rms(got[real], expected[real], 1e-5)
    exact = stock(arch, torch.float64)
    expected = exact(x, attention_mask=mask).logits
    got = convert_attention(exact, **SMALL)(x, attention_mask=mask).logits
    # RMSNorm and rotation stay in float32 in some models, so not to the last digit.
    assert_close_rms(got[real], expected[real], 1e-6)
    assert all(value["mean_count"] > 4 for value in statistics(model).values())


@pytest.mark.parametrize(
    "options",
    [{"base": 15.0}, {"base": 2.0, "temperature": 10.0}, {"slope": -25.0}, {"base": 1000.0, "slope": -3.0}],
    ids=["base", "temperature", "slope", "large"],
)
def test_every_option_starts_with_all_blocks(options):
    model, x = stock(dtype=torch.float64), token_ids()  # sharp scores magnify rounding
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(20)  # sharp: some blocks have next to no importance
    expected = model(x).logits
    convert_attention(model, **SMALL, **options)
    for step in (None, 0):
        if step is not None:
            BudgetSchedule(3.0, 10, weight=0.0).apply(model, step)
        statistics(model, reset=True)
        assert_close_rms(model(x, tau=1.0).logits, expected, 1e-5)
        for value in statistics(model).values():
            assert value["mean_count"] == pytest.approx(sum(t // 16 + 1 for t in range(130)) / 130, rel=1e-5)
        for core in cores(model):
            highest = core.base + core.price - torch.minimum(core.slope, torch.zeros(()))
            assert (highest <= -20 - core.options.temperature).all()


@pytest.mark.parametrize("own", [{"slope": -25.0}, {"temperature": 9.0}, {}], ids=["slope", "temperature", "plain"])
def test_without_conversion_every_option_reads_all_blocks(own):
    model, x = stock(dtype=torch.float64), token_ids()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(20)
    expected = model(x).logits
    model.config.dyn_nsa = {**SMALL, **own}
    model.set_attn_implementation("dyn_nsa")
    assert_close_rms(model(x, tau=1.0).logits, expected, 1e-5)


def test_max_blocks_holds_from_the_start():
    model, x = stock(), token_ids()
    expected = model(x[:, :64]).logits
    convert_attention(model, **SMALL, max_blocks=4)
    assert_close_rms(model(x[:, :64]).logits, expected, 1e-5)
    statistics(model, reset=True)
    model(x)
    assert all(value["overflow"] > 0 and value["mean_count"] < 4 for value in statistics(model).values())


@pytest.mark.parametrize("arch", ARCHS)
def test_the_way_back(arch, tmp_path):
    model, x = stock(arch), token_ids()
    expected, names = model(x).logits, [name for name, _ in model.named_parameters()]
    convert_attention(model, **SMALL)
    for core in cores(model):
        core.base.fill_(3.0)
        core.price.zero_()
    assert_differs(model(x).logits, expected)
    assert revert_attention(model) is model
    assert torch.equal(model(x).logits, expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert "forward" not in vars(model)
    model.save_pretrained(tmp_path)
    assert not {"tinyonn", "transformers_weights"} & json.loads((tmp_path / "config.json").read_text()).keys()
    assert_close_rms(convert_attention(model, **SMALL)(x).logits, expected, 1e-5)
    with pytest.raises(InputError, match="model must have been converted by convert_attention before"):
        revert_attention(stock(arch))
    with pytest.raises(ValueError, match="flash_attention_9"):
        revert_attention(model, "flash_attention_9")
    assert_close_rms(model(x).logits, expected, 1e-5)
    assert next(cores(model), None) is not None
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(InputError, match="forward was replaced after convert_attention"):
        revert_attention(model)


def assert_differs(got: torch.Tensor, other: torch.Tensor) -> None:
    assert (got - other).abs().max() > 1e-3


def test_another_implementation_in_use_is_told_once():
    model, x = convert_attention(stock(), **SMALL), token_ids()
    model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match="attn_implementation is 'sdpa', so the converted layers are not used"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def test_data_parallel_is_refused():
    with pytest.raises(InputError, match=r"nn\.DataParallel does not support converted models"):
        convert_attention(stock(), **SMALL)._replicate_for_data_parallel()  # what replicate calls on each module


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_implementation_works_without_conversion(arch, padded):
    model, x = stock(arch), token_ids()
    mask = left_padding() if padded else None
    expected = model(x, attention_mask=mask).logits
    model.config.dyn_nsa = SMALL
    model.set_attn_implementation("dyn_nsa")
    real = slice(None) if mask is None else mask.bool()
    assert_close_rms(model(x, attention_mask=mask).logits[real], expected[real], 1e-5)
    model.config.dyn_nsa = {**SMALL, "base": 1.0}
    assert (model(x, attention_mask=mask).logits - expected)[real].abs().max() > 1e-2
    model.config.dyn_nsa = {**SMALL, "budget_weight": 1.0}
    with pytest.raises(InputError, match="cannot set learnable_compression"):
        model(x)


def test_it_is_registered_for_attention_and_masks():
    assert "dyn_nsa" in AttentionInterface()
    assert "dyn_nsa" in AttentionMaskInterface()


def test_layers_with_a_sliding_window_stay():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model, x = stock("qwen3", layer_types=kinds, sliding_window=20, use_sliding_window=True), token_ids()
    mask = left_padding()
    expected = [model(x).logits, model(x, attention_mask=mask).logits[mask.bool()]]
    convert_attention(model, **SMALL)
    assert list(statistics(model)) == [f"model.layers.{layer}.self_attn.dyn_nsa" for layer in (0, 2)]
    assert_close_rms(model(x).logits, expected[0], 1e-5)
    assert_close_rms(model(x, attention_mask=mask).logits[mask.bool()], expected[1], 1e-5)


@pytest.mark.parametrize(
    ("arch", "overrides", "message"),
    [
        ("mistral", {"sliding_window": 5}, "MistralForCausalLM has no full attention layer to convert; all 3 have"),
        ("bloom", {}, "BloomForCausalLM has no attention layer that uses transformers' AttentionInterface"),
        ("gemma2", {"attn_logit_softcapping": -5.0}, "Gemma2Attention passes a softcap that DynNSA does not support: .* above 0, got -5.0"),
        ("llama", {"attention_dropout": 0.1}, "attention dropout must be 0, got 0.1"),
    ],
)
def test_models_that_cannot_be_converted_are_named(arch, overrides, message):
    model = tiny_causal_lm(arch, **overrides)
    with pytest.raises(InputError, match=message):
        convert_attention(model)
    assert next(cores(model), None) is None
    assert model.config._attn_implementation != "dyn_nsa"


def test_a_model_is_converted_once():
    with pytest.raises(InputError, match="was converted before"):
        convert_attention(convert_attention(stock()))
