"""Conversions are recorded in a model's configuration, and every way to build the model from it has the parts."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from tinyonn.errors import InputError
from tinyonn.hf import (
    TinyOnnConfig,
    calibrate,
    calibrate_experts,
    convert_attention,
    convert_mlp_to_dynmoe,
    expert_statistics,
    revert_attention,
    statistics,
)
from tinyonn.hf.dyn_nsa import cores
from tinyonn.testing import assert_close_rms, tiny_causal_lm, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")
SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}


def stock(arch: str = "llama") -> PreTrainedModel:
    sizes = {"n_positions": 256, "attn_pdrop": 0.0} if arch == "gpt2" else {"intermediate_size": 96, "max_position_embeddings": 512}
    return tiny_causal_lm(arch, **sizes)


def converted(arch: str = "llama", order: str = "attention first") -> PreTrainedModel:
    """Attention and MLPs converted, both sparse, so that a part that is lost or built anew changes the logits."""
    model, x = stock(arch), token_ids()
    if order == "attention first":
        convert_mlp_to_dynmoe(convert_attention(model, **SMALL), num_experts=8, sample=x)
    else:
        convert_attention(convert_mlp_to_dynmoe(model, num_experts=8, sample=x), **SMALL)
    calibrate_experts(model, x, 3.0, max_experts=5)
    calibrate(model, [x], 4.5)
    return model


@pytest.mark.parametrize("order", ["attention first", "MLPs first"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_attention_and_mlps_are_converted_in_one_model(arch, order, tmp_path):
    x, dense = token_ids(), stock(arch)
    expected = dense(x).logits
    model = stock(arch)
    steps = [lambda: convert_attention(model, **SMALL), lambda: convert_mlp_to_dynmoe(model, num_experts=8)]
    for step in steps if order == "attention first" else reversed(steps):
        step()
        assert_close_rms(model(x).logits, expected, 1e-4)
    model = converted(arch, order)
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close_rms(loaded(x).logits, expected, 1e-5)
    assert statistics(loaded).keys() == statistics(model).keys()
    assert expert_statistics(loaded).keys() == expert_statistics(model).keys()
    assert set(loaded.config.tinyonn) == {"version", "dyn_nsa", "dyn_moe"}
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    revert_attention(loaded)  # and the mixtures stay
    assert set(loaded.config.tinyonn) == {"version", "dyn_moe"}
    with pytest.raises(InputError, match="before; the conversion of MLPs cannot be undone: load the unconverted model"):
        revert_attention(loaded)
    loaded.save_pretrained(tmp_path / "reverted")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "reverted")
    assert_close_rms(again(x).logits, loaded(x).logits, 1e-6)
    assert not statistics(again)
    assert "surprise_budget" in str(again.forward.__signature__)


@pytest.mark.parametrize("head", [AutoModelForCausalLM, AutoModel], ids=["head", "base"])
def test_a_configuration_alone_builds_the_parts(head):
    model, x = converted(), token_ids()
    layers = copy.deepcopy(model.config.tinyonn)
    built = head.from_config(model.config)
    assert_parts_are_whole(built)
    built.load_state_dict((model if head is AutoModelForCausalLM else model.model).state_dict())
    expected = model.model(x).last_hidden_state
    assert_close_rms(built.base_model.eval()(x).last_hidden_state, expected, 1e-5)
    assert model.config.tinyonn == layers  # the names of a base model's layers are in its own configuration
    revert_attention(built)
    assert model.config.tinyonn == layers
    assert model.config._attn_implementation == "dyn_nsa"
    assert torch.equal(model.model(x).last_hidden_state, expected)


def assert_parts_are_whole(model: PreTrainedModel) -> None:
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for core in cores(model):  # as conversion starts them
        assert (core.base == 0).all()
        assert (core.gate_bias == torch.tensor([0.0, 1.0, 0.0])).all()
        assert core.price == -30


@pytest.mark.parametrize("conversion", ["attention", "MLPs"])
def test_converting_one_model_leaves_another_from_the_same_configuration(conversion):
    config, x = stock().config, token_ids()
    other = AutoModelForCausalLM.from_config(config).eval()
    model = AutoModelForCausalLM.from_config(config).eval()
    before, text = other(x).logits, config.to_json_string()
    convert_attention(model, **SMALL) if conversion == "attention" else convert_mlp_to_dynmoe(model, num_experts=8)
    assert config.to_json_string() == text
    assert config._attn_implementation == "sdpa"
    assert torch.equal(other(x).logits, before)
    assert other.config is config
    assert {id(module.config) for module in model.modules() if hasattr(module, "config")} == {id(model.config)}


@pytest.mark.parametrize("head", [AutoModelForSequenceClassification, AutoModelForTokenClassification], ids=["sequence", "token"])
def test_another_head_has_the_parts_too(head, tmp_path):
    model, x = converted(), token_ids()
    model.save_pretrained(tmp_path)
    x = x[:1]  # a classifier of sequences takes several only with a token for padding
    loaded = head.from_pretrained(tmp_path)
    assert torch.equal(loaded.model(x).last_hidden_state, model.model(x).last_hidden_state)
    assert loaded(x).logits.isfinite().all()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(head.from_pretrained(tmp_path / "again")(x).logits, loaded(x).logits)


def test_copies_and_pickles_have_the_parts():
    model, x = converted(), token_ids()
    expected = model(x).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x).logits, expected)
        calibrate_experts(twin, x, 1.0)
        revert_attention(twin)
        assert torch.equal(model(x).logits, expected)
        assert set(model.config.tinyonn) == {"version", "dyn_nsa", "dyn_moe"}


WITHOUT_TINYONN = {
    "auto class": "AutoModelForCausalLM.from_pretrained(folder)",
    "model class": "LlamaForCausalLM.from_pretrained(folder)",
    "base model": "AutoModel.from_pretrained(folder)",
    "own configuration": "AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))",
    "other attention": "AutoModelForCausalLM.from_pretrained(folder, attn_implementation='sdpa')",
    "remote code": "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
    "pipeline": "pipeline('text-generation', model=folder)",
    "adapter": "AutoPeftModelForCausalLM.from_pretrained(adapter)",
}


def test_without_tinyonn_no_door_gives_random_weights(tmp_path):
    """Importing it opens them, and registers its own kind of model."""
    TinyOnnConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "own type")
    assert json.loads((tmp_path / "own type" / "config.json").read_text())["model_type"] == "tiny_onn"
    peft = pytest.importorskip("peft", reason="loads an adapter's base model")
    for kind in ("attention", "MLPs"):
        folder, adapter = tmp_path / kind, tmp_path / f"{kind} adapter"
        model = convert_attention(stock(), **SMALL) if kind == "attention" else convert_mlp_to_dynmoe(stock(), num_experts=8)
        model.save_pretrained(folder)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
            adapter
        )
    script = f"""
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline
for kind in ("attention", "MLPs"):
    folder = {str(tmp_path)!r} + "/" + kind
    adapter = folder + " adapter"
    for name, door in {list(WITHOUT_TINYONN.items())!r}:
        try:
            eval(door)
            print(name, "| loaded")
        except Exception as error:
            print(name, "|", str(error).strip().splitlines()[-1])
assert "tinyonn" not in sys.modules
import tinyonn.hf
AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))
print("with tinyonn | loaded", type(AutoConfig.from_pretrained({str(tmp_path / "own type")!r})).__name__)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if " | " in line]
    assert lines.pop() == "with tinyonn | loaded TinyOnnConfig", run.stderr
    assert [line.split(" | ")[0] for line in lines] == [*WITHOUT_TINYONN] * 2
    for line in lines:
        assert line.endswith("this model has parts from tinyonn: run `import tinyonn.hf` before from_pretrained"), line


@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.dyn_nsa.base", "model.layers.0.mlp.router.prototypes"])
@pytest.mark.parametrize("change", ["missing", "another shape"])
def test_parts_without_weights_are_an_error(lost, change, tmp_path):
    converted().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weight = weights.pop(lost)
    if change == "another shape":
        weights[lost] = torch.cat([weight, weight])
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError,
        match=f"{tmp_path} lacks weights of parts .* or has another shape for them: {lost.removeprefix('model.')}",
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_parts_left_on_disk_are_not_missing(tmp_path):
    model = converted()
    model.save_pretrained(tmp_path / "model")
    places = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.rotary_emb", "model.norm", "lm_head")
    device_map = {**dict.fromkeys(places, "cpu"), "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    state = dict(model.named_parameters())
    there = {name: parameter for name, parameter in loaded.named_parameters() if not parameter.is_meta}
    assert "model.layers.1.self_attn.dyn_nsa.base" in there
    assert "model.layers.2.mlp.router.thresholds" not in there
    assert all(torch.equal(parameter, state[name]) for name, parameter in there.items())
    with pytest.raises(InputError, match="weights of the converted LlamaAttention are offloaded; use a device_map that keeps its layer on"):
        loaded(token_ids())


@pytest.mark.parametrize("kind", ["dyn_nsa", "dyn_moe"])
def test_folders_of_earlier_versions_load_and_save_in_the_new_way(kind, tmp_path):
    x = token_ids()
    if kind == "dyn_nsa":
        model = convert_attention(stock(), **SMALL)
        calibrate(model, [x], 4.5)
    else:
        model = convert_mlp_to_dynmoe(stock(), num_experts=8, sample=x)
        calibrate_experts(model, x, 3.0, max_experts=5)
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": kind, **config.pop("tinyonn")[kind]}
    del config["transformers_weights"]
    file.write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close_rms(loaded(x).logits, expected, 1e-5)
    assert not hasattr(loaded, "hf_quantizer")
    loaded.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["tinyonn"][kind] == json.loads(json.dumps(model.config.tinyonn[kind]))
    assert "quantization_config" not in config
    assert_close_rms(AutoModelForCausalLM.from_pretrained(tmp_path / "new")(x).logits, expected, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"config.tinyonn must be a dict of version 1, got version 2: update tinyonn"),
        ({"dyn_mamba": {"options": {}, "layers": {}}}, "config.tinyonn must record .*dyn_nsa.*, got 'dyn_mamba': update tinyonn"),
        ({"dyn_nsa": {"layers": {}}}, "config.tinyonn.dyn_nsa must have options and layers, got layers"),
        (None, "config.tinyonn must be a dict of version 1, got NoneType"),
    ],
    ids=["version", "kind", "entry", "null"],
)
def test_a_record_that_cannot_be_read_is_named(change, message, tmp_path: Path):
    convert_attention(stock(), **SMALL).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["tinyonn"] = None if change is None else config["tinyonn"] | change
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["dyn_nsa", "dyn_moe"])
@pytest.mark.parametrize("door", ["own configuration", "entry taken out", "layer taken out"])
def test_weights_of_parts_that_were_not_built_are_an_error(kind: str, door: str, tmp_path: Path) -> None:
    """A configuration built by hand, or one whose record was cut, would leave what was converted at random."""
    model = stock()
    plain = copy.deepcopy(model.config)
    convert_attention(model, **SMALL) if kind == "dyn_nsa" else convert_mlp_to_dynmoe(model, num_experts=4)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    if door == "own configuration":
        config = plain
    elif door == "entry taken out":
        config.tinyonn = {"version": 1}
    else:
        config.tinyonn[kind]["layers"].popitem()
    with pytest.raises(InputError, match=r"has no record of .* leave config out, or start from AutoConfig.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert_close_rms(AutoModelForCausalLM.from_pretrained(tmp_path)(token_ids()).logits, model(token_ids()).logits, 1e-6)
