"""A converted model is saved, loaded and copied as any model of transformers."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf.dyn_moe import calibrate_experts, convert_mlp_to_dynmoe, expert_statistics
from tinyonn.hf.dyn_moe.calibration import mixtures
from tinyonn.testing import assert_close_rms, poisoned, tiny_causal_lm, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")


def sparse(arch: str = "llama", **options: Any) -> PreTrainedModel:
    overrides = {"n_positions": 256} if arch == "gpt2" else {"intermediate_size": 96}
    model = convert_mlp_to_dynmoe(tiny_causal_lm(arch, **overrides), num_experts=8, sample=token_ids(), **options)
    calibrate_experts(model, token_ids(), 3.0, max_experts=5)
    return model


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_it_saves_and_loads(arch, tmp_path):
    model, x = sparse(arch, scale=3.0, gating_loss="both", surprise_kind="expert", checkpoint=True), token_ids(50)
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own_state, state = model.state_dict(), loaded.state_dict()
    assert own_state.keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in own_state.items())
    # Not to the bit: where weights lie in memory decides which of two products of the same matrices runs.
    assert_close_rms(loaded(x).logits, expected, 1e-5)
    for name, module in mixtures(loaded).items():
        own = model.get_submodule(name)
        assert module.router.extra_repr() == own.router.extra_repr()
        for key in ("gating_loss_kind", "surprise_kind", "checkpoint", "activation", "gated"):
            assert getattr(module, key) == getattr(own, key)
        assert (module.router.scale, module.router.min_experts, module.dropout.p) == (3.0, 1, own.dropout.p)
    calibrate_experts(loaded, x, 2.0)  # what was loaded can be calibrated, saved and loaded again
    again_expected = loaded(x).logits
    loaded.save_pretrained(tmp_path / "twice")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert_close_rms(again(x).logits, again_expected, 1e-5)
    assert {module.router.max_experts for module in mixtures(again).values()} == {8}


def test_a_loaded_model_is_not_a_quantised_one(tmp_path):
    sparse().save_pretrained(tmp_path)
    with poisoned():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not getattr(model, "is_quantized", False)
    assert model(token_ids()).logits.isfinite().all()
    assert all(1 < found["mean_k"] <= 5 for found in expert_statistics(model).values())
    assert model.float()(token_ids()).logits.dtype == torch.float32


def test_a_copy_is_a_model_of_its_own():
    model, x = sparse(), token_ids()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x).logits, model(x).logits)
    parts = [module.router.target_k for module in mixtures(model).values()]
    calibrate_experts(twin, x, 1.0)
    assert [module.router.target_k for module in mixtures(model).values()] == parts
    assert model.config.tinyonn["dyn_moe"]["options"]["target_k"] == 3.0


def test_a_base_model_loads_what_one_with_a_head_saved_and_the_reverse(tmp_path):
    model, x = sparse(), token_ids()
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(base(x).last_hidden_state, model.model(x).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(head.model(x).last_hidden_state, base(x).last_hidden_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": {"model.layers.9.mlp": {}}}, "must name MLPs of LlamaModel, got 'model.layers.9.mlp'"),
        ({"layers": ["model.layers.0.mlp"]}, "config.tinyonn.dyn_moe.layers must be a dict by layer name, got list"),
        ({"layers": {"model.layers.0.mlp": {"hidden_size": 48}}}, r"layers of layers.0.mlp must have all fields of LayerSizes: "),
        ({"options": {"num_expert": 3}}, "must have fields of DynMoEOptions, got 'num_expert'; did you mean 'num_experts'"),
        ({"options": 3}, "config.tinyonn.dyn_moe.options must be a dict of fields of DynMoEOptions, got int"),
    ],
    ids=["layer", "list", "sizes", "option", "options"],
)
def test_a_damaged_conversion_is_named(change, message, tmp_path):
    sparse().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["tinyonn"]["dyn_moe"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
