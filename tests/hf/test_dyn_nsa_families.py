"""Conversion of families of causal language models: each works beyond its windows and chunks, or is refused before it is changed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf import convert_attention
from tinyonn.hf.dyn_nsa import cores
from tinyonn.testing import assert_close_rms
from tinyonn.testing.families import LOCAL, causal_families, tiny_family_lm

pytestmark = pytest.mark.usefixtures("no_grad")
LENGTH = 2 * LOCAL + 20  # beyond two chunks, and many blocks
SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}


def text() -> Tensor:
    return torch.randint(2, 97, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def outputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits of a text, of one with padding, and of a token after a cache; what the family itself cannot do is left out."""
    x, mask = text(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :30] = 0
    found = {"plain": model(x).logits}
    try:
        found["padded"] = model(x, attention_mask=mask).logits[mask.bool()]
        cache = model(x[:, :-1], use_cache=True).past_key_values
        found["cached"] = model(x[:, -1:], past_key_values=cache, use_cache=True).logits
    except InputError:
        raise
    except Exception:
        if next(cores(model), None) is not None:
            raise
    return found


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """What conversion might leave behind."""
    modules = [(name, module.training, type(module)) for name, module in model.named_modules()]
    return model.config._attn_implementation, set(vars(model)), modules, model.config.to_dict()


def check(model: PreTrainedModel, folder: Any) -> int:
    """Converts a model and compares; returns the number of converted layers, 0 where it is refused."""
    expected, before = outputs(model), state(model)
    try:
        convert_attention(model, **SMALL)
    except InputError:
        assert state(model) == before
        assert torch.equal(model(text()).logits, expected["plain"])
        return 0
    got = outputs(model)
    for name, wanted in expected.items():
        assert_close_rms(got[name], wanted, 1e-4, name)
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert_close_rms(again(text()).logits, got["plain"], 1e-5)  # loaded weights lie elsewhere in memory, and products may round apart
    return len(list(cores(model)))


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama4_text", 1), ("diffllama", 4), ("cohere2", 1), ("bert", 4), ("lfm2_moe", 2)],
    ids=["chunks", "two calls a layer", "window", "encoder's", "convolution"],
)
def test_families_convert(family, layers, tmp_path):
    assert check(tiny_family_lm(family), tmp_path) == layers


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("doge", "DogeAttention cannot be converted: it does not use transformers' causal mask"),
        ("mpt", "MptForCausalLM does not run with an attention function and masks of AttentionInterface: AttributeError"),
        ("gemma4_text", "Gemma4TextAttention cannot be converted: heads of keys and values .* at most 256, got 512 and 512"),
        ("deepseek_v3", "DeepseekV3Attention cannot be converted: heads of keys and values .* at most 256, got 24 and 16"),
        ("mistral", "has no full attention layer to convert; all 4 have sliding windows or chunks"),
        ("gptj", "GPTJForCausalLM has no attention layer that uses transformers' AttentionInterface"),
    ],
    ids=["own masks", "own attention", "heads of 512", "mla", "all local", "no interface"],
)
def test_families_that_cannot_run_are_refused_before_they_are_changed(family, message, tmp_path):
    with pytest.raises(InputError, match=message):
        convert_attention(tiny_family_lm(family), **SMALL)
    assert check(tiny_family_lm(family), tmp_path) == 0


def test_local_layers_without_conversion_run_as_they_are():
    model, x = tiny_family_lm("llama4_text"), text()
    expected = model(x).logits
    model.set_attn_implementation("dyn_nsa")
    model.config.dyn_nsa = SMALL
    assert_close_rms(model(x).logits, expected, 1e-5)
    sinks = tiny_family_lm("mimo_v2_flash")
    expected = sinks(x).logits
    sinks.set_attn_implementation("dyn_nsa")
    assert_close_rms(sinks(x).logits, expected, 1e-5)


def test_two_calls_a_layer_keep_their_own_blocks():
    """DiffLlama attends twice with one key and two values: what one call compressed must not serve the other when decoding."""
    model, x = convert_attention(tiny_family_lm("diffllama"), **SMALL), text()[:, :60]
    for core in cores(model):
        core.gate_bias[:, 0] = 1.0  # the compressed branch
    expected = model(x, use_cache=False).logits
    cache, parts = None, []
    for begin, end in ((0, 40), (40, 41), (41, 60)):
        got = model(x[:, begin:end], past_key_values=cache, use_cache=True)
        cache = got.past_key_values
        parts.append(got.logits)
    assert_close_rms(torch.cat(parts, 1), expected, 1e-5)


def test_layers_beside_ones_without_keys_decode(tmp_path):
    """Zamba2's attention layers do not know their place among the layers of a cache, and others of it hold no keys."""
    kinds = ["mamba", "mamba", "hybrid"] * 2
    assert check(tiny_family_lm("zamba2", num_hidden_layers=6, layers_block_type=kinds), tmp_path) == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", causal_families())
def test_every_family_works_or_is_refused(family, tmp_path):
    try:
        model = tiny_family_lm(family)
        model(text())
    except Exception as error:
        pytest.skip(f"it does not run by itself, shrunk so: {type(error).__name__}: {error}")
    check(model, tmp_path)


@pytest.mark.parametrize("family", ["nemotron", "stablelm"])
def test_keywords_that_do_not_reach_the_attention_are_refused(family):
    """The decoder layers of these two take keywords, and drop them."""
    model, x = convert_attention(tiny_family_lm(family), **SMALL), text()
    expected = model(x).logits
    why = f"because the layers of {type(model).__name__} do not pass keywords to their attention"
    price = f"{why}. calibrate sets one price for all calls."
    for core in cores(model):
        core.options.prices = ((1.0, -3.0), (4.0, -5.0))
    for given, message in (
        ({"block_price": 50.0}, f"block_price must not be given, {price}"),
        ({"block_budget": 5.5}, f"block_budget must not be given, {price}"),
        ({"tau": 1.0}, f"tau must not be given, {why}."),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            model(x, **given)
        if "tau" not in given:
            with pytest.raises(InputError, match=re.escape(message)):
                model.generate(x, max_new_tokens=2, do_sample=False, pad_token_id=0, **given)
    assert torch.equal(model(x, block_price=None).logits, expected)
    model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match="the converted layers are not used"):
        model(x, block_price=50.0)
    message = re.escape(f"tau_source must be 'attention' or 'constant', got 'output', {why}.")
    other = tiny_family_lm(family)
    before = state(other)
    with pytest.raises(InputError, match=message):
        convert_attention(other, **SMALL, tau_source="output")
    assert state(other) == before
    model.set_attn_implementation("dyn_nsa")
    for core in cores(model):  # as in a folder saved by an earlier version
        core.options.tau_source = "output"
    with pytest.raises(InputError, match=message):
        model(x)
