"""A converted model is saved, loaded and copied as any model of transformers."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf import BudgetSchedule, statistics
from tinyonn.hf.dyn_nsa import cores
from tinyonn.testing import assert_close_rms, poisoned, tiny_causal_lm, tiny_dyn_nsa_lm, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")
ARCHS = ("llama", "qwen3", "mistral", "gpt_neox")


def stock(arch: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    overrides = {"sliding_window": None, **overrides} if arch == "mistral" else overrides
    return tiny_causal_lm(arch, dtype=dtype, max_position_embeddings=512, **overrides)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_saves_and_loads(arch, tmp_path):
    model, x = tiny_dyn_nsa_lm(arch, tau_source="constant", tau=0.3), token_ids()
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config._attn_implementation == "dyn_nsa"
    assert torch.equal(loaded(x).logits, expected)
    assert [vars(core.options) for core in cores(loaded)] == [vars(core.options) for core in cores(model)]
    again = type(model).from_pretrained(tmp_path, attn_implementation="sdpa")
    with pytest.warns(UserWarning, match="so the converted layers are not used"):
        logits = again(x).logits
    assert_close_rms(logits, stock(arch, **({} if arch == "gpt_neox" else {"num_hidden_layers": 2}))(x).logits, 1e-6)
    loaded.save_pretrained(tmp_path / "twice")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")(x).logits, expected)


def test_a_loaded_model_is_not_a_quantised_one(tmp_path):
    tiny_dyn_nsa_lm().save_pretrained(tmp_path)
    with poisoned():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not getattr(model, "is_quantized", False)
    assert model(token_ids()).logits.isfinite().all()
    assert all(1 < value["mean_count"] <= 5 for value in statistics(model).values())
    assert model.float()(token_ids()).logits.dtype == torch.float32
    statistics(model, reset=True)
    for _ in range(300):  # more rows than bfloat16 can count
        for core in cores(model):
            core.sums += 1.0
            core.rows += 1
    assert all(value["mean_count"] == 1.0 for value in statistics(model.bfloat16()).values())


def test_a_copy_is_a_model_of_its_own():
    model, x = tiny_dyn_nsa_lm(), token_ids()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x).logits, model(x).logits)
    BudgetSchedule(3.0, 1, max_blocks=3).apply(twin, 1)
    assert {core.options.max_blocks for core in cores(model)} == {5}
    assert {core.options.max_blocks for core in cores(twin)} == {3}


def test_a_base_model_loads_what_one_with_a_head_saved_and_the_reverse(tmp_path):
    model, x = tiny_dyn_nsa_lm(), token_ids()
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(base(x).last_hidden_state, model.model(x).last_hidden_state)
    assert list(base.config.tinyonn["dyn_nsa"]["layers"]) == ["layers.0.self_attn", "layers.1.self_attn"]
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.model(x).last_hidden_state, model.model(x).last_hidden_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": {"model.layers.9.self_attn": [4, 2, 12]}}, "must name attention layers of LlamaModel, got 'model.layers.9.self"),
        ({"layers": {"model.layers.0.self_attn": [4, 2]}}, r"must give query heads, key heads and head size .*, got \[4, 2\]"),
        ({"options": {"widow": 3}}, "must have fields of DynNSAOptions, got 'widow'; did you mean 'window'"),
    ],
    ids=["layer", "sizes", "option"],
)
def test_a_damaged_conversion_is_named(change, message, tmp_path):
    tiny_dyn_nsa_lm().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["tinyonn"]["dyn_nsa"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
