"""Folders that were converted when importance was measured against a uniform share load, and give what they gave then.

The folder is made here as version 0.2 wrote it: its record, its names of weights, and weights from a formula. The numbers were computed
by that version.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tinyonn.hf import calibrate, statistics
from tinyonn.hf.dyn_nsa import cores
from tinyonn.nn import DynNSACore, DynNSAOptions
from tinyonn.testing import tiny_causal_lm, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")

RECORD = {
    "options": {
        "compress_size": 16, "block_size": 32, "window": 20, "temperature": 1.5, "max_blocks": 4, "detach_scores": False,
        "learnable_compression": True, "start_gates": [0.0, 1.0, 0.0], "base": 0.0, "slope": 1.0, "tau_source": "attention", "tau": 0.5,
        "budget_weight": 0.0, "budget_target": 16.0, "impl": "auto",
    },
    "layers": {"model.layers.0.self_attn": [4, 2, 12], "model.layers.1.self_attn": [4, 2, 12]},
}  # fmt: skip
SHAPES = {
    "compress_key.position": (16, 2, 12), "compress_key.up": (2, 12, 12), "compress_key.down": (2, 12, 12),
    "compress_value.position": (16, 2, 12), "compress_value.up": (2, 12, 12), "compress_value.down": (2, 12, 12),
    "gate_weight": (4, 12, 3), "gate_bias": (4, 3), "base": (2,), "slope": (2,), "opening": (), "budget_target": (), "output_tau": (),
    "observed": (),
}  # fmt: skip
LENGTH = 260
# Of the last position of each row, every twelfth logit.
LOGITS = [
    [
        4.72329310565816, -4.76004027418546, 4.565680592192741, -4.149650503779523, 3.5321488723888828, -2.7431562967102043,
        1.8209795091932135, -0.8103915287074392, -0.23954213439539906,
    ],
    [
        4.600712357348501, -4.3553427233605975, 3.8985148911732184, -3.2524085137805026, 2.4483929917356355, -1.5255044432956069,
        0.5285504443399522, 0.4940654443189077, -1.4926937399710432,
    ],
]  # fmt: skip
MEAN_COUNTS = [3.261538505554199, 3.0326921939849854]


def wave(number: int, shape: tuple[int, ...], scale: float) -> Tensor:
    """Weights that no generator has to draw."""
    size = torch.Size(shape).numel()
    return (scale * torch.sin(torch.arange(size, dtype=torch.float64) * (1.7 + 0.13 * number) + number)).reshape(shape)


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    model = tiny_causal_lm("llama", num_hidden_layers=2, max_position_embeddings=512, dtype=torch.float64)
    for number, (name, weight) in enumerate(model.named_parameters()):
        if "norm" not in name:
            weight.copy_(wave(number, tuple(weight.shape), 0.5))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for layer in range(2):
        for number, (name, shape) in enumerate(SHAPES.items()):
            scalars = {"opening": -0.25, "budget_target": 3.0, "output_tau": 1.0, "observed": 0.0}
            dtype = torch.float32 if name in scalars else torch.float64
            part = wave(100 * layer + number, shape, 0.3) if name not in scalars else torch.tensor(scalars[name])
            weights[f"model.layers.{layer}.self_attn.dyn_nsa.{name}"] = part.to(dtype)
    save_file(weights, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["tinyonn"] = {"version": 1, "dyn_nsa": RECORD}
    config["transformers_weights"] = "this model has parts from tinyonn: run `import tinyonn.hf` before from_pretrained"
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def measured(model: Any) -> tuple[list[list[float]], list[float]]:
    logits = model(token_ids(LENGTH)).logits[:, -1, ::12]
    return logits.tolist(), [value["mean_count"] for value in statistics(model, reset=True).values()]


RULE = r"records no importance: it keeps the rule that it was converted with, importance='relative'"


def test_a_folder_of_the_old_rule_keeps_it(old_folder, tmp_path):
    with pytest.warns(UserWarning, match=RULE) as told:
        model, info = AutoModelForCausalLM.from_pretrained(old_folder, output_loading_info=True)
    assert len(told) == 1
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    options = next(cores(model)).options
    assert (options.importance, options.compress_size, options.slope, options.compress_query) == ("relative", 16, 1.0, False)
    assert all(core.price == -0.25 for core in cores(model))
    assert all((core.gain == 1).all() for core in cores(model))  # a buffer that the folder lacks
    logits, counts = measured(model)
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(LOGITS), rtol=0, atol=1e-5)
    assert counts == pytest.approx(MEAN_COUNTS, rel=1e-6)
    # Saved again it has the new names, and says its rule.
    model.save_pretrained(tmp_path / "again")
    names = load_file(tmp_path / "again" / "model.safetensors")
    assert not any("opening" in name for name in names)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tinyonn"]["dyn_nsa"]["options"]["importance"] == "relative"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert measured(again)[0] == logits


def test_the_held_logits_tell_the_rules_apart(old_folder):
    """Else the test above could not fail."""
    config = json.loads((old_folder / "config.json").read_text())
    config["tinyonn"]["dyn_nsa"]["options"] |= {"importance": "share", "compress_query": False}
    (old_folder / "config.json").write_text(json.dumps(config))
    logits, counts = measured(AutoModelForCausalLM.from_pretrained(old_folder))
    assert abs(counts[0] - MEAN_COUNTS[0]) > 0.1
    assert (torch.tensor(logits) - torch.tensor(LOGITS)).abs().max() > 1e-3


def test_an_old_state_dict_is_read_into_a_core():
    core = DynNSACore(4, 2, 8, DynNSAOptions(compress_query=False))
    state = core.state_dict()
    state["opening"] = torch.tensor(-1.5)
    del state["price"]
    del state["gain"]
    core.gain.fill_(0.7)
    core.load_state_dict(state)
    assert core.price == -1.5
    assert (core.gain == 1).all()
    assert "gain" not in state
    state = core.state_dict()
    del state["base"]
    with pytest.raises(RuntimeError, match="base"):
        core.load_state_dict(state)
    with pytest.raises(RuntimeError, match="opening"):
        core.load_state_dict({**core.state_dict(), "opening": torch.tensor(0.0)})


def test_an_old_folder_goes_on_training_by_its_rule(old_folder):
    with pytest.warns(UserWarning, match=RULE):
        model = AutoModelForCausalLM.from_pretrained(old_folder)
    reached = calibrate(model, [token_ids(LENGTH)], 3.0, price="none")
    assert reached == pytest.approx(3.0, abs=0.05)
    assert next(cores(model)).options.importance == "relative"
