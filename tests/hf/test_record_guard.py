"""A caller's own configuration, which hides config.json, gives no random MLPs either; nothing else notices the guard."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from tinyonn.hf import convert_attention, convert_mlp_to_dynmoe
from tinyonn.testing import tiny_causal_lm, token_ids


def converted(arch: str = "llama", attention: bool = False) -> PreTrainedModel:
    model = convert_mlp_to_dynmoe(tiny_causal_lm(arch), num_experts=4)
    return convert_attention(model, compress_size=16, block_size=16, window=20) if attention else model


def test_own_configuration_without_tinyonn_is_refused(tmp_path: Path) -> None:
    folders = {}
    for name, model, options in [
        ("one file", converted(), {}),
        ("shards", converted(), {"max_shard_size": "20KB"}),
        ("state dict", converted(attention=True), {}),
        ("base model", converted().model, {}),
        ("gpt2", converted("gpt2"), {}),
        ("loaded again", None, {}),
    ]:
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "one file")
        if name == "state dict":
            options = {"state_dict": model.state_dict()}
        folder = tmp_path / name
        model.save_pretrained(folder, **options)
        config = json.loads((folder / "config.json").read_text())
        own = {key: value for key, value in config.items() if key not in ("tinyonn", "transformers_weights")}
        folders[str(folder)] = own
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    script = f"""
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for folder, own in {folders!r}.items():
    for cls in (AutoModelForCausalLM, AutoModel):
        try:
            cls.from_pretrained(folder, config=AutoConfig.for_model(**own))
            print("loaded", folder, cls.__name__)
        except RuntimeError as error:
            print("refused", type(error).__name__, str(error)[-200:].replace(chr(10), " "))
assert "tinyonn" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 12
    assert [line for line in lines if not line.startswith("refused RuntimeError")] == []


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("saved", ["head", "base model"])
def test_loading_tells_of_nothing(cls: type, saved: str, tmp_path: Path) -> None:
    model = converted()
    (model if saved == "head" else model.model).save_pretrained(tmp_path)
    loaded, told = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not {key for key in told["unexpected_keys"] if "mlp" in key}
    assert not told["mismatched_keys"]
    own, others = dict(model.model.named_parameters()), dict(getattr(loaded, "model", loaded).named_parameters())
    assert own.keys() == others.keys()
    assert all(torch.equal(own[name], others[name]) for name in own)


def test_the_guard_is_no_part_of_the_state(tmp_path: Path) -> None:
    model = converted()
    before = list(model.state_dict())
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == before
    file = load_file(tmp_path / "model.safetensors")
    assert set(file) - set(before) == {"model.layers.0.mlp.gate_proj.weight"}
    twin = copy.deepcopy(model)
    file["lm_head.weight"] = file.get("lm_head.weight", file["model.embed_tokens.weight"])
    for other in (model, twin):
        other.load_state_dict(dict(file), strict=True)
    twin.save_pretrained(tmp_path / "twin")
    assert load_file(tmp_path / "twin" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()


def test_trainer_resumes_from_a_guarded_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = converted()
    rows = [{"input_ids": token_ids()[0], "labels": token_ids()[0]}] * 4
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "save_steps": 1, "report_to": [], "use_cpu": True}
    Trainer(model, TrainingArguments(max_steps=1, **options), train_dataset=rows).train()
    assert "model.layers.0.mlp.gate_proj.weight" in load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    resumed = converted()
    Trainer(resumed, TrainingArguments(max_steps=1, **options), train_dataset=rows).train(resume_from_checkpoint=True)
    assert "unexpected keys" not in caplog.text
    trained = dict(model.named_parameters())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in resumed.named_parameters())
