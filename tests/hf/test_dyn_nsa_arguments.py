"""What a person gets wrong is named before a model is touched; what wraps or surrounds a model's attention is no obstacle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from tinyonn.errors import InputError
from tinyonn.hf import collected_budget_loss, convert_attention, statistics
from tinyonn.hf.dyn_nsa import cores
from tinyonn.testing import assert_close_rms, tiny_causal_lm, tiny_dyn_nsa_lm, token_ids

SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}
SIZES: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 80}
SEQ2SEQ: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}

BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "window text": ({"window": "512"}, TypeError, "window must be an int, got str"),
    "window share": ({"window": 20.0}, TypeError, "window must be an int, got float"),
    "window none": ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    "compress": ({"compress_size": 48}, ValueError, r"compress_size must be one of .* got 48"),
    "compress over block": ({"compress_size": 64}, ValueError, "compress_size must be one of .* that divides block_size 16, got 64"),
    "block": ({"block_size": 40}, ValueError, "block_size must be a power of two of at least 16, got 40"),
    "base nan": ({"base": float("nan")}, ValueError, "base must be finite, got nan"),
    "base none": ({"base": None}, TypeError, "base must be a number, got NoneType"),
    "slope": ({"slope": float("inf")}, ValueError, "slope must be finite, got inf"),
    "temperature": ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    "detach": ({"detach_scores": "no"}, TypeError, "detach_scores must be True or False, got 'no'"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of auto, .* got 'cuda'"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_leave_the_model_alone(name):
    options, error, message = BAD_OPTIONS[name]
    model = tiny_causal_lm("llama")
    with pytest.raises(error, match=message):
        convert_attention(model, **{**SMALL, **options})
    assert next(cores(model), None) is None
    assert model.config._attn_implementation != "dyn_nsa"
    assert not hasattr(model.config, "tinyonn")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ("all", InputError, "config.dyn_nsa must be a dict of fields of DynNSAOptions, got str"),
        ({"windw": 3}, InputError, "got 'windw'; did you mean 'window'"),
        ({"window": "x"}, TypeError, "window must be an int, got str"),
        ({"start_gates": 1}, TypeError, "start_gates must be a tuple of 3 numbers, got int"),
        ({"max_blocks": 2}, ValueError, "max_blocks must be at least 3"),
    ],
    ids=["text", "field", "type", "gates", "range"],
)
def test_bad_fields_of_a_configuration_are_named(fields, error, message):
    model = tiny_causal_lm("llama")
    model.config.dyn_nsa = fields
    model.set_attn_implementation("dyn_nsa")
    with pytest.raises(error, match=message):
        model(token_ids(9))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=48, d_kv=12, d_ff=80, num_layers=1, num_heads=4)),
            "decoder whose only input",
        ),
        (
            lambda: BartForConditionalGeneration(BartConfig(vocab_size=97, d_model=48, **SEQ2SEQ)),
            "decoder .*, got Bart",
        ),
        (lambda: ViTModel(ViTConfig(image_size=32, patch_size=8, **SIZES)), "decoder .*, got ViTModel"),
        (lambda: BertModel(BertConfig(vocab_size=97, **SIZES)), "BertSelfAttention cannot be converted: its attention is not causal"),
        (lambda: tiny_causal_lm("gpt2"), "attention dropout must be 0, got 0.1 in GPT2Attention"),
    ],
    ids=["t5", "bart", "vit", "bert", "gpt2"],
)
def test_models_of_other_kinds_are_named(model, message):
    model = model()
    training = [module.training for module in model.modules()]
    with pytest.raises(InputError, match=message):
        convert_attention(model)
    assert [module.training for module in model.modules()] == training


def test_a_model_without_weights_is_named():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_causal_lm("llama").config)
    with pytest.raises(InputError, match="model has weights on the meta device; load them before the conversion"):
        convert_attention(model)


@pytest.mark.parametrize(
    ("model", "message"), [("hub/name", "got str"), (nn.Linear(2, 2), "got Linear; convert the model inside it")], ids=["name", "module"]
)
def test_what_is_no_model_is_named(model, message):
    with pytest.raises(TypeError, match=f"model must be a PreTrainedModel of transformers, {message}"):
        convert_attention(model)


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "plain"])
def test_a_tau_is_a_number_or_of_a_shape_that_fits(converted):
    if converted:
        model = tiny_dyn_nsa_lm(layers=1)
    else:
        model = tiny_causal_lm("llama", num_hidden_layers=1)
        model.config.dyn_nsa = {**SMALL, "base": 1.0}
        model.set_attn_implementation("dyn_nsa")
    x = token_ids(50)
    with torch.no_grad():
        expected = model(x, tau=torch.full((2, 50), 0.5)).logits
        assert torch.equal(model(x, tau=0.5).logits, expected)
        assert torch.equal(model(x, tau=torch.full((2,), 0.5)).logits, expected)
    for tau, error, message in (
        (torch.rand(3, 50), InputError, r"tau must have shape \(\), \(2,\), \(2, 50\) or \(2, 50, 2\), got \(3, 50\)"),
        (torch.rand(2, 50, 2, 1), InputError, r"got \(2, 50, 2, 1\)"),
        (3.0, InputError, r"tau must be in \[0, 1\], got 3.0"),
        ("much", TypeError, "tau must be a number, got str"),
        (torch.tensor(2.0), ValueError, r"tau must be in \[0, 1\], got 2.0"),
        (torch.tensor(math.nan), ValueError, r"tau must be in \[0, 1\], got nan"),
        (torch.full((2, 50), -1.0), ValueError, r"tau must be in \[0, 1\], got others"),
        (torch.tensor(True), TypeError, "tau must be of real numbers, got torch.bool"),
    ):
        with pytest.raises(error, match=message):
            model(x, tau=tau)


class Wrapper(nn.Module):
    """Stands before a part as PEFT's `modules_to_save` does: what it lacks comes from the part in use, and only calls go through."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.part, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs)


def test_a_wrapped_part_keeps_its_budget_loss_and_its_blocks():
    plain, model = tiny_dyn_nsa_lm().train(), tiny_dyn_nsa_lm().train()
    for layer in model.model.layers:
        layer.self_attn.dyn_nsa = Wrapper(layer.self_attn.dyn_nsa)
    x = token_ids(60)
    assert torch.equal(model(x, labels=x).loss, plain(x, labels=x).loss)
    for each in (plain, model):
        each(x)
    assert torch.equal(collected_budget_loss(model), collected_budget_loss(plain))
    model.eval()
    seen: list[int] = []
    next(cores(model)).compress_key.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model.generate(x, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert seen == [3, 1]  # the prompt's blocks; then the one that 64 completes, and no other before 80


def test_projections_may_be_wrapped_and_weights_stored_in_bytes():
    model, x = tiny_causal_lm("llama"), token_ids(60)
    expected = model(x).logits
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj)
        own = dict(layer.self_attn._parameters)
        layer.self_attn._parameters = {"packed": nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False), **own}
    convert_attention(model, **SMALL)
    assert {parameter.dtype for core in cores(model) for parameter in core.parameters()} == {torch.float32}
    assert_close_rms(model(x).logits, expected, 1e-5)


def test_parts_added_under_inference_mode_can_be_trained():
    model, x = tiny_causal_lm("llama", num_hidden_layers=1), token_ids(40)
    with torch.inference_mode():
        convert_attention(model, **SMALL)
    model.train()(x, labels=x).loss.backward()
    assert all(core.gate_weight.grad.abs().max() > 0 for core in cores(model))


def test_a_budget_needs_no_loss_where_another_attention_runs():
    model, x = tiny_dyn_nsa_lm().train(), token_ids(40)
    model.set_attn_implementation("sdpa")
    output = model(x, labels=x)
    plain = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(output.loss, plain)


def test_a_vision_tower_keeps_its_attention(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, image_size=28, patch_size=14
    )  # fmt: skip
    text = tiny_causal_lm("llama", num_hidden_layers=2).config
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=90)).eval()
    x = token_ids(60).clamp(max=80)
    x[:, :4] = 90
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(x, pixel_values=pixels).logits

    expected = logits(model)
    convert_attention(model, **SMALL)
    got = logits(model)
    assert_close_rms(got, expected, 1e-5)
    assert all(value["mean_count"] > 1 for value in statistics(model).values())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlavaForConditionalGeneration.from_pretrained(tmp_path)), got)


def test_a_forward_that_fails_leaves_no_layer_counting():
    model = tiny_dyn_nsa_lm(layers=1)
    with pytest.raises(InputError, match="tau must have shape"):
        model(token_ids(50), tau=torch.rand(3, 50))
    assert not any(core.collecting for core in cores(model))
