"""`push_to_hub` of a converted model: what it would upload opens as the same model, and only with tinyonn."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import hub

from tinyonn.hf import convert_attention, convert_mlp_to_dynmoe
from tinyonn.testing import tiny_causal_lm


def test_what_is_pushed_to_the_hub_opens_as_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_causal_lm("llama")
    convert_attention(model, compress_size=16, block_size=16, window=32)
    convert_mlp_to_dynmoe(model, num_experts=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
    tokens = torch.arange(40)[None]
    uploaded = tmp_path / "uploaded"

    def upload(self: PreTrainedModel, working_dir: str, *args: Any, **kwargs: Any) -> None:
        shutil.copytree(working_dir, uploaded)

    api = SimpleNamespace(create_repo=lambda name, **kwargs: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(hub, "hf_api", lambda *args, **kwargs: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: SimpleNamespace(save=lambda path: None))
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model.push_to_hub("someone/converted")
    again = AutoModelForCausalLM.from_pretrained(uploaded)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert set(again.config.tinyonn) == {"version", "dyn_nsa", "dyn_moe"}
    assert "import tinyonn.hf" in (uploaded / "config.json").read_text()
