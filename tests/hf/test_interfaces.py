"""Registered functions run in the models that are switched to them, and in no other."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tinyonn import hf
from tinyonn.errors import InputError
from tinyonn.hf.interfaces import (
    attention_implementation,
    configurations,
    experts_implementation,
    register_attention,
    register_experts,
    uses_experts_interface,
)
from tinyonn.testing import tiny_causal_lm

TOKENS = torch.arange(14).view(2, 7)
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


@pytest.fixture
def spied_attention():
    """Registers SDPA under a name of its own; yields the name and the masks that reached it."""
    masks = []

    def forward(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    name = "tinyonn_test_attention"
    register_attention(name, forward)
    yield name, masks
    del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


def test_registered_attention_gets_the_padding_mask(spied_attention):
    name, masks = spied_attention
    model = tiny_causal_lm("llama")
    with torch.no_grad():
        stock = model(TOKENS, attention_mask=PADDING).logits
        with attention_implementation(model, name):
            ours = model(TOKENS, attention_mask=PADDING).logits
    assert torch.equal(ours, stock)
    assert len(masks) == 3
    assert not masks[0][0, 0, 6, :2].any()
    assert masks[0][1, 0, 6].all()


def test_attention_is_switched_for_one_model_and_back_again(spied_attention):
    name, masks = spied_attention
    ours, other = tiny_causal_lm("llama"), tiny_causal_lm("llama")
    with pytest.raises(KeyboardInterrupt), attention_implementation(ours, name):  # noqa: PT012
        other(TOKENS)
        assert not masks
        raise KeyboardInterrupt
    assert ours.config._attn_implementation == "sdpa"
    ours(TOKENS)
    assert not masks


def test_registered_experts_run_and_are_switched_back():
    calls = []

    def forward(module, hidden_states, top_k_index, top_k_weights):
        calls.append(tuple(top_k_index.shape))
        return torch.zeros_like(hidden_states)

    register_experts("tinyonn_test_experts", forward)
    try:
        model = tiny_causal_lm("qwen3_moe")
        before = model.config._experts_implementation
        stock = model(TOKENS).logits
        with experts_implementation(model, "tinyonn_test_experts"):
            assert not torch.allclose(model(TOKENS).logits, stock)
        assert calls == [(14, 2)] * 3
        assert model.config._experts_implementation == before
        assert torch.equal(model(TOKENS).logits, stock)
    finally:
        del ExpertsInterface._global_mapping["tinyonn_test_experts"]


def test_nested_configurations_keep_their_own_choice():
    model = tiny_causal_lm("llama")
    inner = tiny_causal_lm("llama").config
    model.model.layers[1].self_attn.config = inner
    inner._attn_implementation = "eager"
    assert [id(config) for config in configurations(model)] == [id(model.config), id(inner)]
    with attention_implementation(model, "flex_attention"):
        assert {config._attn_implementation for config in configurations(model)} == {"flex_attention"}
    assert (model.config._attn_implementation, inner._attn_implementation) == ("sdpa", "eager")


def test_unregistered_names_are_refused():
    model = tiny_causal_lm("llama")
    with pytest.raises(InputError, match="attention implementation must be a registered name, got 'nothing'"):
        attention_implementation(model, "nothing").__enter__()
    with pytest.raises(InputError, match="experts implementation must be a registered name, got 'nothing'"):
        experts_implementation(model, "nothing").__enter__()
    with pytest.raises(ValueError, match="mask must be one of"):
        register_attention("tinyonn_test_attention", lambda: None, mask="nothing")
    assert "tinyonn_test_attention" not in AttentionInterface()


def dense(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (1, {}, TypeError, "name must be a string, got int"),
        (None, {}, TypeError, "name must be a string, got NoneType"),
        ("", {}, ValueError, "name must not be empty, got ''"),
        (" ", {}, ValueError, "name must not be empty, got ' '"),
        ("mine", {"forward": None}, TypeError, "forward must be a function, got NoneType"),
        ("mine", {"forward": "f"}, TypeError, "forward must be a function, got str"),
        ("mine", {"mask": 1}, TypeError, "mask must be a function or the name of a registered one, got int"),
        ("mine", {"mask": None}, TypeError, "mask must be a function or the name of a registered one, got NoneType"),
        *[
            (taken, {}, ValueError, f"name must not be that of another implementation, got '{taken}'")
            for taken in ("sdpa", "eager", "flash_attention_2", "dyn_nsa")
        ],
    ],
    ids=str,
)
def test_what_cannot_be_registered_is_named_and_changes_nothing(name, options, error, message):
    before = AttentionInterface._global_mapping | AttentionMaskInterface._global_mapping
    with pytest.raises(error, match=f"^{re.escape(message)}\\.$"):
        hf.register_attention(name, **{"forward": dense, **options})
    assert AttentionInterface._global_mapping | AttentionMaskInterface._global_mapping == before


def test_a_name_of_ones_own_can_be_registered_again(spied_attention):
    name, masks = spied_attention
    hf.register_attention(name, dense, mask="eager")
    model = tiny_causal_lm("llama")
    with torch.no_grad():
        stock = model(TOKENS).logits
        model.set_attn_implementation(name)
        torch.testing.assert_close(model(TOKENS).logits, stock)
    assert not masks


def test_experts_modules_are_recognised():
    moe, dense = tiny_causal_lm("gpt_oss").model.layers[0].mlp, tiny_causal_lm("llama").model.layers[0].mlp
    assert uses_experts_interface(moe.experts)
    assert not uses_experts_interface(moe)
    assert not uses_experts_interface(dense)
