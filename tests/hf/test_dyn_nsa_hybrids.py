"""Models that mix full attention with sliding windows, softcaps, sinks and head sizes, against transformers' own eager attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf import calibrate, convert_attention, revert_attention, statistics
from tinyonn.hf.dyn_nsa import cores
from tinyonn.testing import assert_close_rms
from tinyonn.testing.families import tiny_family_lm

LENGTH = 100  # beyond the windows
SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}
LOCAL_FULL = ["sliding_attention", "full_attention"] * 2
PER_LAYER: dict[str, Any] = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16}
# family: its settings, and the layers with full attention
HYBRIDS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "gemma2": ({"attn_logit_softcapping": 1.5}, [1, 3]),
    "gemma3_text": ({}, [1, 3]),
    "gemma3n_text": ({"num_kv_shared_layers": 2, **PER_LAYER}, [1, 3]),  # two layers without keys of their own
    "gemma4_text": ({"global_head_dim": 32, **PER_LAYER}, [1, 3]),  # 16 in local layers
    "ministral": ({"layer_types": LOCAL_FULL}, [1, 3]),
    "cohere2": ({}, [3]),
    "olmo3": ({}, [3]),
    "exaone4": ({}, [3]),
    "gpt_oss": ({}, [1, 3]),
    "mimo_v2_flash": ({}, [0]),  # sinks in local layers, other key heads there
    "granite_swa": ({}, [0]),
    "vaultgemma": ({"attn_logit_softcapping": 1.5}, [1, 3]),
}


def stock(family: str) -> PreTrainedModel:
    """A model with eager attention, windows of 24 tokens, and sinks that take a good share."""
    model = tiny_family_lm(family, sliding_window=24, **HYBRIDS[family][0])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1, 3, len(parameter)))
    return model


def text(tokens: int = LENGTH) -> Tensor:
    return torch.randint(2, 97, (2, tokens), generator=torch.Generator().manual_seed(3))


def padding() -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :30] = 0
    return mask


def in_steps(model: PreTrainedModel, x: Tensor) -> Tensor:
    cache, parts = None, []
    for begin, end in ((0, 60), (60, 61), (61, 62), (62, 90), (90, x.shape[1])):
        got = model(x[:, begin:end], past_key_values=cache, use_cache=True)
        cache = got.past_key_values
        parts.append(got.logits)
    return torch.cat(parts, 1)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_keeps_its_outputs(family, tmp_path):
    model, x, mask = stock(family), text(), padding()
    expected, padded = model(x).logits, model(x, attention_mask=mask).logits
    holes = mask.clone()
    holes[1, 40:50] = 0
    own_holes = model(x, attention_mask=holes).logits
    convert_attention(model, **SMALL)
    assert [int(name.split(".")[-3]) for name in statistics(model)] == HYBRIDS[family][1]
    assert_close_rms(model(x).logits, expected, 1e-4)
    mean = sum(t // 16 + 1 for t in range(LENGTH)) / LENGTH
    assert all(value["mean_count"] == pytest.approx(mean, rel=1e-5) for value in statistics(model).values())
    assert_close_rms(model(x, attention_mask=mask).logits[mask.bool()], padded[mask.bool()], 1e-4)
    assert_close_rms(model(x, attention_mask=holes).logits[holes.bool()], own_holes[holes.bool()], 1e-4)
    assert_close_rms(in_steps(model, x), expected, 1e-4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert_close_rms(revert_attention(model)(x).logits, expected, 1e-5)
    loaded.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="attn_implementation is 'eager', so the converted layers are not used"):
        assert torch.equal(loaded(x).logits, expected)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", ["gemma2", "gemma3n_text", "gemma4_text", "gpt_oss"])
def test_a_sparse_hybrid_decodes_as_it_reads(family):
    model, x = convert_attention(stock(family), **SMALL), text()
    for core in cores(model):
        core.gate_bias.copy_(core.gate_bias.new_tensor((0.3, 0.5, 0.2)))
        core.price.fill_(-1.5)
    statistics(model, reset=True)
    expected = model(x, use_cache=False).logits
    assert all(3 < value["mean_count"] + 1 < 5 for value in statistics(model).values())  # of 3.6 on average
    assert_close_rms(in_steps(model, x), expected, 1e-4)
    new = model.generate(x[:, :90], max_new_tokens=6, do_sample=False, pad_token_id=0)
    for length in range(90, new.shape[1]):
        assert torch.equal(model(new[:, :length], use_cache=False).logits[:, -1].argmax(-1), new[:, length])


def by_hand(branch: str, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """One branch alone, (B, T, H, D), from its definition."""
    tokens, groups = query.shape[1], query.shape[2] // key.shape[2]
    place = torch.arange(tokens)
    if branch == "compressed":
        whole = tokens // 16 * 16
        key, value = (x[:, :whole].unflatten(1, (-1, 16)).mean(2) for x in (key, value))
        seen = (torch.arange(whole // 16) * 16 + 15)[None] <= place[:, None]
    else:
        seen = (place[None] <= place[:, None]) & (place[None] > place[:, None] - 20)
    key, value = (x.double().repeat_interleave(groups, 2) for x in (key, value))
    scores = torch.einsum("bthd,bjhd->bhtj", query.double(), key) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.exp() * seen
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp().view(1, -1, 1, 1)
    return torch.einsum("bhtj,bjhd->bthd", weights / total.clamp(min=1e-300), value)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("branch", ["compressed", "window"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_every_branch_has_the_softcap_and_the_sinks(family, branch):
    model, calls = convert_attention(stock(family), **SMALL), []
    core = next(cores(model))
    core.gate_bias.copy_(core.gate_bias.new_tensor((1.0, 0.0, 0.0) if branch == "compressed" else (0.0, 0.0, 1.0)))
    core.register_forward_hook(lambda module, args, kwargs, result: calls.append((args, kwargs["scale"], result.out)), with_kwargs=True)
    model(text())
    (query, key, value, _), scale, got = calls[0]
    softcap, sinks = (1.5, None) if family == "gemma2" else (None, torch.linspace(-1, 3, 4))
    assert_close_rms(got.double(), by_hand(branch, query, key, value, scale, softcap, sinks), 1e-5)
    other = by_hand(branch, query, key, value, scale, None, None)
    assert (got - other).abs().max() > 0.05 * other.abs().max()  # what is tested makes a difference


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mimo_v2_flash", "gemma4_text"])
def test_a_training_step_has_the_gradients_of_eager_attention(family):
    expected, model, x = stock(family), convert_attention(stock(family), **SMALL), text()
    for each in (expected, model):
        each.train()(x, labels=x).loss.backward()
    wanted = {name: parameter.grad for name, parameter in expected.named_parameters() if parameter.grad is not None}
    got = dict(model.named_parameters())
    if family in ("gpt_oss", "mimo_v2_flash"):
        assert any(name.endswith("sinks") and gradient.abs().max() > 0 for name, gradient in wanted.items())
    for name, gradient in wanted.items():
        assert_close_rms(got[name].grad, gradient, 1e-3, name)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_hybrid_is_calibrated(family):
    model = convert_attention(stock(family), **SMALL)
    ids = torch.randint(2, 97, (2, 400), generator=torch.Generator().manual_seed(5))
    calibrate(model, [ids], target=6)
    statistics(model, reset=True)
    with torch.no_grad():
        model(ids)
    found = [value["mean_count"] for value in statistics(model).values()]
    assert sum(found) / len(found) == pytest.approx(6, rel=0.1)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_chosen_layers_alone_are_converted(family, tmp_path):
    model = tiny_family_lm(family) if family == "llama" else stock(family)
    x, mask = text(), padding()
    holes = mask.clone()
    holes[1, 40:50] = 0
    masks = [None, mask, holes]
    expected = [model(x, attention_mask=which).logits for which in masks]
    convert_attention(model, layers=[3], **SMALL)
    assert list(statistics(model)) == ["model.layers.3.self_attn.dyn_nsa"]
    for which, wanted in zip(masks, expected, strict=True):
        real = slice(None) if which is None else which.bool()
        assert_close_rms(model(x, attention_mask=which).logits[real], wanted[real], 1e-4)
    assert_close_rms(in_steps(model, x), expected[0], 1e-4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert list(statistics(loaded)) == ["model.layers.3.self_attn.dyn_nsa"]
    assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.usefixtures("no_grad")
def test_chosen_layers_read_packed_sequences_apart():
    model, x = tiny_family_lm("llama"), text(60)
    apart = torch.cat([model(x[:, :25]).logits, model(x[:, 25:]).logits], 1)
    convert_attention(model, layers=[0, 2], **SMALL)
    positions = torch.cat([torch.arange(25), torch.arange(35)]).expand(2, -1)
    assert_close_rms(model(x, position_ids=positions, use_cache=False).logits, apart, 1e-4)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([0], InputError, "layers must be numbers of full attention layers of Gemma2ForCausalLM, which are 1, 3, got 0"),
        ([1, 9], InputError, "which are 1, 3, got 9"),
        ([], InputError, "layers must name at least one layer, got none"),
        ("1", TypeError, "layers must be a list of numbers of layers, got '1'"),
        ([True], TypeError, r"layers must be a list of numbers of layers, got \[True\]"),
        (3, TypeError, "layers must be a list of numbers of layers, got 3"),
    ],
    ids=["local", "beyond", "none", "text", "bool", "number"],
)
def test_layers_that_cannot_be_chosen_are_named(layers, error, message):
    model = stock("gemma2")
    with pytest.raises(error, match=message):
        convert_attention(model, layers=layers, **SMALL)
    assert next(cores(model), None) is None
    assert not hasattr(model.config, "tinyonn")


def test_dropout_in_a_layer_that_was_not_chosen_stays():
    model = tiny_family_lm("llama")
    model.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(InputError, match=r"attention dropout must be 0, got 0\.5"):
        convert_attention(model, **SMALL)
    convert_attention(model, layers=[2], **SMALL).train()
    x = text()
    assert not torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize("number", [0, 1], ids=["local", "full"])
def test_an_argument_that_dyn_nsa_does_not_know_is_named(number):
    model = stock("gpt_oss")
    layer = model.model.layers[number].self_attn
    layer.forward = partial(layer.forward, slant=1.0)
    with pytest.raises(InputError, match="GptOssAttention passes slant to its attention, and DynNSA does not support it"):
        convert_attention(model, **SMALL)
    assert next(cores(model), None) is None


def test_sinks_of_another_shape_are_named():
    model = stock("gpt_oss")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(InputError, match=r"GptOssAttention passes sinks \(s_aux\) .* must be \(4,\), one per head, got \(3,\)"):
        convert_attention(model, **SMALL)
