"""The compressed branch taught by the model's own attention."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf import calibrate, convert_attention, distil_compression
from tinyonn.hf.dyn_nsa import cores, distillation
from tinyonn.testing import left_padding, tiny_causal_lm, token_ids

SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}


def stock(**overrides: Any) -> PreTrainedModel:
    model = tiny_causal_lm("llama", max_position_embeddings=512, num_hidden_layers=2, **overrides)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(2)  # far from what the mean of a block tells
    return model


def divergences(model: PreTrainedModel, row: Tensor) -> list[float]:
    """Of each layer, in float64: KL of true shares of far blocks, and of the rest as one, to those that the compressed branch gives."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        core.register_forward_hook(lambda module, args, out: seen.append((args[0][0].detach().double(), args[1][0].detach().double())))
        for core in cores(model)
    ]
    with torch.no_grad():
        model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for core, (query, key) in zip(cores(model), seen, strict=True):
        key_compressed = core.compress_key(key[None].float())[0].detach().double()
        mapped = torch.einsum("thd,hde->the", query, core.query_map.detach().double())
        total, number = 0.0, 0
        for t in range(48, len(row)):
            far = range(1, t // 16 - 1)
            for head in range(4):
                true = (key[: t + 1, head // 2] @ query[t, head] / math.sqrt(12)).softmax(0)
                own = (key_compressed[: (t + 1) // 16, head // 2] @ mapped[t, head] / math.sqrt(12)).softmax(0)
                p = [float(true[16 * b : 16 * b + 16].sum()) for b in far]
                q = [float(own[b]) for b in far]
                pairs = [*zip(p, q, strict=True), (1 - sum(p), 1 - sum(q))]
                total += sum(a * math.log(max(a, 1e-12) / max(b, 1e-12)) for a, b in pairs)
                number += 1
        found.append(total / number)
    return found


@pytest.mark.parametrize("how", ["plain", "padded", "packed"])
def test_the_shares_that_the_compressed_branch_gives_come_near_the_true_ones(how):
    model, x = convert_attention(stock(), **SMALL), token_ids(150)
    batch: dict[str, Any] = {"input_ids": x}
    if how == "padded":
        batch["attention_mask"] = left_padding(150)
    if how == "packed":
        batch["position_ids"] = torch.cat([torch.arange(70), torch.arange(80)])[None].expand(2, -1)
    text = x[1, 70:] if how == "packed" else x[1]
    before, price = divergences(model, text), next(cores(model)).price.clone()
    logits = model(x).logits
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    reported = distil_compression(model.train(), [batch], 120)
    assert model.training
    assert list(reported) == [f"model.layers.{layer}.self_attn.dyn_nsa" for layer in (0, 1)]
    after = divergences(model, text)
    for own_before, own_after, (first, last) in zip(before, after, reported.values(), strict=True):
        assert own_after < 0.7 * own_before
        assert last < 0.8 * first  # of one text or the other
    if how == "plain":  # the first step draws nearly all queries of one text, or of the other
        assert [first for first, _ in reported.values()] == pytest.approx(before, rel=0.5)
    learned = {name for name, value in model.state_dict().items() if not torch.equal(value, frozen[name])}
    assert {name.split("dyn_nsa.")[-1] for name in learned} == {
        "compress_key.position",
        "compress_key.up",
        "compress_key.down",
        "query_map",
    }
    assert next(cores(model)).price == price
    torch.testing.assert_close(model.eval()(x).logits, logits, rtol=1e-4, atol=1e-4)  # every block is still read
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_distilled_model_is_calibrated_and_comes_back(tmp_path):
    model, x = convert_attention(stock(), **SMALL), token_ids(150)
    distil_compression(model, [x], 10)
    reached = calibrate(model, [x], 3.5)
    assert reached == pytest.approx(3.5, abs=0.05)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, model(x).logits)
    assert model(x, block_budget=4).logits.isfinite().all()
    distil_compression(model, [x], 1)
    with pytest.raises(InputError, match="block_budget must follow calibrate"):  # what a price reads has changed
        model(x, block_budget=4)


def test_a_last_step_that_learns_no_finite_value_is_told_and_nothing_changes(monkeypatch):
    model, x = convert_attention(stock(), **SMALL), token_ids(150)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setitem(distillation.RATES, "query_map", math.inf)
    with pytest.raises(InputError, match=r"must learn finite values, got others for query_map of model\.layers\.0\.self_attn\.dyn_nsa"):
        distil_compression(model, [x], 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_distilled_is_named_and_nothing_changes():
    model, x = convert_attention(stock(), **SMALL), token_ids(150)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="sample must have texts of more than 48 tokens, got none: every block of shorter ones is read"):
        distil_compression(model, [x[:, :48]])
    with pytest.raises(InputError, match="sample contains no batch"):
        distil_compression(model, [])
    with pytest.raises(InputError, match="model must be converted by convert_attention, got an unconverted Llama"):
        distil_compression(stock(), [x])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        distil_compression(model, [x], 0)
    bare = convert_attention(stock(), **SMALL, learnable_compression=False, compress_query=False)
    words = r"model.layers.0.self_attn.dyn_nsa must have learnable_compression or compress_query to distil, got neither"
    with pytest.raises(InputError, match=words):
        distil_compression(bare, [x])
    weight = model.model.layers[1].self_attn.q_proj.weight
    with torch.no_grad():
        held = weight[3, 3].clone()
        weight[3, 3] = math.nan
    message = "distil_compression must have a finite loss, got nan in model.layers.1.self_attn.dyn_nsa at step 1"
    with pytest.raises(InputError, match=re.escape(message)):
        distil_compression(model, [x])
    with torch.no_grad():
        weight[3, 3] = held
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
