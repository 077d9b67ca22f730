"""Quantised models are converted, and converted models loaded quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf import calibrate, calibrate_experts, convert_attention, convert_mlp_to_dynmoe
from tinyonn.nn import DynMoE
from tinyonn.testing import assert_close_rms, tiny_causal_lm, token_ids

pytest.importorskip("bitsandbytes", reason="quantises the models")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}
BITS = {"4 bit": BitsAndBytesConfig(load_in_4bit=True), "8 bit": BitsAndBytesConfig(load_in_8bit=True)}


def stock() -> PreTrainedModel:
    return tiny_causal_lm("llama", hidden_size=64, intermediate_size=128, max_position_embeddings=512)


def quantised(folder: Path, bits: str) -> PreTrainedModel:
    stock().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BITS[bits])


def logits_and_gradient(model: PreTrainedModel, x: Tensor) -> tuple[Tensor, Tensor]:
    embeddings = model.get_input_embeddings()(x).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    logits.square().mean().backward()
    return logits.detach(), embeddings.grad


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_model_is_converted_and_saved(bits, tmp_path):
    model, x = quantised(tmp_path / "plain", bits), token_ids()
    logits, gradient = logits_and_gradient(model, x)
    with torch.no_grad():  # of the caller's; a forward under it packs weights of 4 bits anew
        convert_attention(model, **SMALL)
    got = logits_and_gradient(model, x)
    assert_close_rms(got[0], logits, 1e-4)
    assert_close_rms(got[1], gradient, 1e-3)
    calibrate(model, [x], 4.5)
    again = logits_and_gradient(model, x)
    assert (again[0] - logits).abs().max() > 1e-3  # sparse by now
    assert (again[1] - gradient).norm() < gradient.norm()
    model.save_pretrained(tmp_path / "converted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert_close_rms(logits_and_gradient(loaded, x)[0], again[0], 1e-5)
    assert loaded.is_quantized
    assert loaded.config.tinyonn.keys() == {"version", "dyn_nsa"}


@pytest.mark.parametrize("bits", BITS)
def test_a_converted_model_loads_quantised(bits, tmp_path):
    model, x = stock(), token_ids()
    convert_mlp_to_dynmoe(convert_attention(model, **SMALL), num_experts=8, sample=x)
    calibrate_experts(model, x, 3.0)
    calibrate(model, [x], 4.5)
    model.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=BITS[bits])
    layer, own = loaded.model.layers[1], model.model.layers[1]
    assert not layer.self_attn.q_proj.weight.is_floating_point()
    assert isinstance(layer.mlp, DynMoE)
    assert torch.equal(layer.mlp.down_proj, own.mlp.down_proj)  # experts and thresholds stay as they were
    assert torch.equal(layer.self_attn.dyn_nsa.base, own.self_attn.dyn_nsa.base)
    with torch.no_grad():
        expected = loaded(x).logits
        loaded.save_pretrained(tmp_path / "quantised")
        assert_close_rms(AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")(x).logits, expected, 1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_quantised_mlps_are_refused_with_the_remedy(bits, tmp_path):
    model = quantised(tmp_path, bits)
    kind = "Linear4bit" if bits == "4 bit" else "Linear8bitLt"
    with pytest.raises(InputError, match=f"gate_proj must be a Linear .*, got {kind} of bitsandbytes.*; convert MLPs before .* quantised"):
        convert_mlp_to_dynmoe(model, num_experts=8)
