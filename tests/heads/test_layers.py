"""Heads are found where the model keeps them: changing a head's slice changes that head alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tinyonn.errors import InputError
from tinyonn.heads.capture.layers import attention_layers
from tinyonn.testing import tiny_causal_lm, tiny_encoder

FUSED = {
    "phi3": {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "pad_token_id": 0},
    "mpt": {"vocab_size": 97, "d_model": 48, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64},
    "dbrx": {"vocab_size": 97, "d_model": 48, "n_layers": 3, "n_heads": 4,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 1e6},
             "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 48}},
}  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "deberta-v2")
DECODERS = (*FUSED, "qwen3", "llama", "mistral", "gemma2", "gpt2", "gpt_neox", "gpt_oss", "qwen3_moe", "bloom")
TOKENS = torch.arange(24).view(2, 12)


def make(arch, **options):
    if arch in FUSED:
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(arch, **FUSED[arch]), attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():  # as large as the other tiny models'
            parameter.data.normal_(std=0.25) if "norm" not in name else None
        return model
    model = tiny_encoder(arch, **options) if arch in ENCODERS else tiny_causal_lm(arch, **options)
    if arch != "deberta-v2":
        model.set_attn_implementation("eager")  # it alone returns the probabilities
    return model


@torch.no_grad()
def attentions(model):
    return model(TOKENS, output_attentions=True).attentions


@pytest.mark.parametrize("arch", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("part", ["query", "key"])
def test_a_head_of_query_and_key_changes_its_probabilities_alone(arch, part):
    model = make(arch)
    layer = attention_layers(model)[1]
    projection = getattr(layer, part)
    before = attentions(model)[1]
    projection.head(projection.module.weight.data, 1).mul_(-1.5)
    changed = (attentions(model)[1] - before).abs().amax((0, 2, 3)) > 1e-4
    group = layer.num_heads // projection.heads
    assert changed.tolist() == [head // group == 1 for head in range(layer.num_heads)]


@pytest.mark.parametrize("arch", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("head", [0, 3])
def test_a_head_of_value_reaches_the_output_through_its_columns_alone(arch, head):
    model = make(arch)
    layer = attention_layers(model)[1]
    seen = []
    handle = layer.output.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attentions(model)
    group = layer.num_heads // layer.num_kv_heads
    layer.value.head(layer.value.module.weight.data, head // group).mul_(-1.5)
    attentions(model)
    handle.remove()
    before, after = (heads.unflatten(-1, (layer.num_heads, layer.head_dim)) for heads in seen)
    changed = (after - before).abs().amax((0, 1, 3)) > 1e-4
    assert changed.tolist() == [other // group == head // group for other in range(layer.num_heads)]
    weight = layer.output.module.weight
    columns = layer.output.head(weight.data, head)
    assert columns.shape == (48, layer.head_dim)
    out = torch.nn.functional.linear(before[:, :, head], columns)
    alone = torch.zeros_like(before).index_copy_(2, torch.tensor([head]), before[:, :, [head]]).flatten(2)
    assert torch.allclose(out, layer.output.module(alone) - layer.output.module(torch.zeros_like(alone)), atol=1e-5)


@pytest.mark.parametrize("arch", [*ENCODERS, *DECODERS])
def test_layers_are_numbered_and_named_in_order(arch):
    model = make(arch)
    layers = attention_layers(model)
    names = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    assert [layer.index for layer in layers] == list(range(2 if arch in ("bloom", "gpt_neox") else 3))
    for layer in layers:
        assert names[layer.name] is layer.module
        assert names[layer.block_name] is layer.block
        for part in (layer.query, layer.key, layer.value, layer.output):
            assert parameters[part.name] is part.module.weight
        assert (layer.num_heads, layer.num_kv_heads) == (4, 2 if "num_key_value_heads" in model.config.to_dict() else 4)


def test_layers_without_attention_are_left_out():
    layers = attention_layers(tiny_causal_lm("lfm2"))
    assert [(layer.index, layer.block_name) for layer in layers] == [(0, "model.layers.1")]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("t5", {"d_model": 48, "num_layers": 1, "num_heads": 4}, "model must be an encoder or a decoder, got t5"),
        ("albert", {"hidden_size": 48, "intermediate_size": 8, "num_attention_heads": 4}, "separate weights in each layer, got albert"),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1}, "q_proj, k_proj, v_proj, or.*mamba has in_proj, "),
        ("codegen", {"n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}, "as in GPT-2, Phi-3.*; codegen has qkv_proj, "),
        ("whisper", {}, "model must be an encoder or a decoder, got whisper"),
        ("openai-gpt", {"n_layer": 1}, "as in GPT-2, Phi-3.*; openai-gpt has c_proj, c_attn, "),
        ("xlnet", {"n_layer": 1}, "q_proj, k_proj, v_proj, or.*; xlnet has layer_1, "),
        ("mamba2", {"num_hidden_layers": 1}, "q_proj, k_proj, v_proj, or.*mamba2 has in_proj, "),
        ("perceiver", {}, "model must keep its layers in a list, got the attention encoder.cross_attention"),
        ("swin", {}, "model must have one attention in each layer, got two in encoder.layers.0 of swin"),
        ("clip", {}, "model must have one list of layers, got text_model.encoder.layers, vision_model.encoder.layers in clip"),
    ],
    ids=["t5", "albert", "mamba", "codegen", "whisper", "openai-gpt", "xlnet", "mamba2", "perceiver", "swin", "clip"],
)
def test_other_models_are_refused_by_what_was_looked_for(kind, options, message):
    config = AutoConfig.for_model(kind, **({"vocab_size": 97} if kind not in ("clip", "whisper", "swin") else {}), **options)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with pytest.raises(InputError, match=message):
        attention_layers(model)


def test_a_projection_that_is_not_made_of_heads_is_named():
    model = tiny_causal_lm("llama")
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(48, 30)
    with pytest.raises(InputError, match=r"model.layers.1.self_attn must project to 4 query heads of 12 features .* k_proj 30"):
        attention_layers(model)


def test_quantised_weights_are_refused():
    model = tiny_causal_lm("llama")
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="load the model without quantisation"):
        attention_layers(model)


@pytest.mark.parametrize(
    ("kind", "options", "place"),
    [
        ("big_bird", {}, "encoder.layer.0.attention.self"),
        ("longformer", {"attention_window": 8}, "encoder.layer.0.attention.self"),
        ("vit", {}, "layers.0.attention"),
    ],
    ids=["big_bird", "longformer", "vit"],
)
def test_heads_of_models_with_attention_of_their_own_are_found(kind, options, place):
    config = AutoConfig.for_model(kind, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, **options)
    with torch.device("meta"):
        layers = attention_layers(AutoModel.from_config(config))
    assert [(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in layers] == [(4, 4, 12)] * 2
    assert layers[0].name == place
