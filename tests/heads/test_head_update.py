"""Change of weights per head, against slices written down by hand."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyonn.errors import InputError
from tinyonn.heads.capture.layers import attention_layers
from tinyonn.heads.plasticity.head_update import Checkpoint, checkpoint_update, head_update

# Head 2 of layer 1: name of the weight, whether the head is columns of it, the first of them and how many. Llama's head 2 has key head 1.
PREFIX = {"bert": "bert.encoder.layer.1.attention.", "deberta-v2": "deberta.encoder.layer.1.attention."}
SLICES = {
    "llama": [(f"model.layers.1.self_attn.{p}_proj.weight", p == "o", 12 if p in "kv" else 24, 12) for p in "qkvo"],
    "qwen3": [(f"model.layers.1.self_attn.{p}_proj.weight", p == "o", 24 if p in "kv" else 48, 24) for p in "qkvo"],
    "gpt2": [
        *(("transformer.h.1.attn.c_attn.weight", True, first + 24, 12) for first in (0, 48, 96)),  # Conv1D: rows are columns
        ("transformer.h.1.attn.c_proj.weight", False, 24, 12),
    ],
    "bert": [
        (PREFIX["bert"] + f"{p}.weight", p == "output.dense", 24, 12) for p in ("self.query", "self.key", "self.value", "output.dense")
    ],
    "deberta-v2": [
        (PREFIX["deberta-v2"] + f"{p}.weight", p == "output.dense", 24, 12)
        for p in ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense")
    ],
}


def by_hand(arch, before, after):
    """Uq, Uk, Uv, Uo, U and Urel of head 2 in layer 1."""
    moved, norms = [], []
    for name, columns, first, size in SLICES[arch]:
        old, new = (weights[name].double().numpy() for weights in (before, after))
        old, new = (w[:, first : first + size] if columns else w[first : first + size] for w in (old, new))
        moved.append(np.sqrt(((new - old) ** 2).sum()))
        norms.append(np.sqrt((old**2).sum()))
    total = np.sqrt(np.square(moved).sum())
    return [*moved, total, total / sum(norms)]


def save_pair(tiny_classifier, folder, arch, dtype=torch.float32, **save):
    """A model before and after every weight moved, as checkpoints."""
    model = tiny_classifier(arch, dtype=dtype)
    model.save_pretrained(folder / "before", **save)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.03 * (1 + number % 5))
    model.save_pretrained(folder / "after", **save)
    return folder / "before", folder / "after"


@pytest.mark.parametrize("arch", SLICES)
def test_update_of_a_head_by_hand(tiny_classifier, tmp_path, arch):
    before, after = save_pair(tiny_classifier, tmp_path, arch)
    found = checkpoint_update(before, after)
    expected = by_hand(arch, load_file(before / "model.safetensors"), load_file(after / "model.safetensors"))
    assert [float(part[1, 2]) for part in found] == pytest.approx(expected, rel=1e-12)
    assert all(part.shape == (3, 4) and part.dtype == torch.float64 for part in found)
    assert len(set(found.total.flatten().tolist())) == 12


def test_shared_keys_and_values_count_for_each_of_their_heads(tiny_classifier, tmp_path):
    found = checkpoint_update(*save_pair(tiny_classifier, tmp_path, "llama"))
    for part in (found.key, found.value):
        assert torch.equal(part[:, 0], part[:, 1])
        assert torch.equal(part[:, 2], part[:, 3])
        assert (part[:, 1] != part[:, 2]).all()


def test_half_precision_and_sharded_files_are_read(tiny_classifier, tmp_path):
    before, after = save_pair(tiny_classifier, tmp_path, "bert", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(before.glob("*.safetensors"))) > 3
    found = checkpoint_update(before, after)
    expected = by_hand("bert", dict(Checkpoint(before)), dict(Checkpoint(after)))
    assert [float(part[1, 2]) for part in found] == pytest.approx(expected, rel=1e-12)


def test_state_dicts_serve_as_well(tiny_classifier):
    model = tiny_classifier("bert")
    state = model.state_dict()
    moved = {name: value + 1 if name.endswith("layer.2.attention.self.query.weight") else value for name, value in state.items()}
    found = head_update(attention_layers(model), state, moved)
    assert found.query[2].tolist() == pytest.approx([(12 * 48) ** 0.5] * 4, rel=1e-6)
    assert found.query[:2].abs().max() == found.key.abs().max() == found.value.abs().max() == found.output.abs().max() == 0
    assert torch.equal(found.total, found.query)


def test_no_weights_are_read_but_those_of_attention(tiny_classifier, tmp_path, monkeypatch):
    before, after = save_pair(tiny_classifier, tmp_path, "bert")
    read = []
    own = Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: read.append(name) or own(self, name))
    checkpoint_update(before, after)
    assert len(read) == 2 * 3 * 4
    assert all(".attention." in name for name in read)


def change(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


KEY = "bert.encoder.layer.2.attention.self.key.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(KEY), rf"after must hold the tensors of before, got {KEY} in only one of them"),
        (lambda w: w.update(extra=torch.ones(1)), "after must hold the tensors of before, got extra in only one of them"),
        (lambda w: w.update({KEY: torch.ones(48, 50)}), rf"{KEY} must have shape \(48, 48\) as in before, got \(48, 50\) in .*after"),
        (lambda w: w[KEY][3, 4].fill_(torch.nan), f"{KEY} has values after training that are not finite floating-point numbers"),
        (lambda w: w.update({KEY: w[KEY].to(torch.int8)}), f"{KEY} has values after training that are not finite floating-point numbers"),
    ],
    ids=["missing", "extra", "shape", "nan", "int8"],
)
def test_checkpoints_that_do_not_match_name_the_tensor(tiny_classifier, tmp_path, edit, message):
    before, after = save_pair(tiny_classifier, tmp_path, "bert")
    change(after, edit)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint_update(before, after)
    assert "\n" not in str(caught.value)


def test_other_heads_in_weights_of_the_same_shape_are_refused(tiny_classifier, tmp_path):
    before, after = save_pair(tiny_classifier, tmp_path, "bert")
    config = (after / "config.json").read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 6')
    (after / "config.json").write_text(config)
    wanted = r"whose bert\.encoder\.layer\.0\.attention\.self\.query\.weight of 4 heads \(4 for keys\) of 12 features, got .* of 6 heads"
    with pytest.raises(InputError, match=wanted):
        checkpoint_update(before, after)


def test_damaged_and_other_files_are_refused(tiny_classifier, tmp_path):
    before, after = save_pair(tiny_classifier, tmp_path, "bert")
    whole = (after / "model.safetensors").read_bytes()
    (after / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"after/model\.safetensors must be a whole safetensors file"):
        checkpoint_update(before, after)
    (after / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"after must hold weights in safetensors files, got none"):
        checkpoint_update(before, after)
    shutil.copy(before / "model.safetensors", after / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"after must hold weights in safetensors files, got pytorch_model\.bin"):
        checkpoint_update(before, after)


def test_a_head_without_weights_has_no_relative_update(tiny_classifier):
    model = tiny_classifier("bert")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("self.query", "self.key", "self.value"):
        state[f"bert.encoder.layer.1.attention.{name}.weight"][24:36] = 0
    state["bert.encoder.layer.1.attention.output.dense.weight"][:, 24:36] = 0
    with pytest.raises(InputError, match=r"all weights of head 2 in bert\.encoder\.layer\.1\.attention\.self were 0"):
        head_update(attention_layers(model), state, state)


def test_a_weight_that_a_state_dict_lacks_or_has_in_another_shape_is_named(tiny_classifier):
    model = tiny_classifier("bert")
    state = dict(model.state_dict())
    with pytest.raises(InputError, match=f"the weights after training lack {KEY}"):
        head_update(attention_layers(model), state, {name: value for name, value in state.items() if name != KEY})
    with pytest.raises(InputError, match=rf"{KEY} must have shape \(48, 48\) as in the model, got \(48, 50\) before training"):
        head_update(attention_layers(model), {**state, KEY: torch.ones(48, 50)}, state)
