"""Which weights are recorded, and in which columns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from tinyonn.errors import InputError
from tinyonn.mscan.layout import check_layout, layout_groups
from tinyonn.scan.engine import capture
from tinyonn.scan.engine.engine import ScanEngine
from tinyonn.scan.engine.targets import find_targets
from tinyonn.testing import tiny_causal_lm


@pytest.mark.parametrize("arch", ["qwen3", "gpt2", "qwen3_moe", "gpt_oss", "bloom", "lfm2"])
def test_layout_covers_every_weight_once_by_layer(arch):
    model = tiny_causal_lm(arch)
    layout = ScanEngine(model).layout
    check_layout(layout)
    names, offsets = layout_groups(layout)
    assert names[-1] == "lm_head"
    assert names[:-1] == sorted(names[:-1])
    assert len(names) == 1 + model.config.num_hidden_layers
    assert offsets[-1] == sum(-(-entry.out_features // 64) for entry in layout)
    wanted = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    wanted |= {
        f"{name}.{expert}"
        for name, parameter in model.named_parameters()
        if name.endswith(("gate_up_proj", "down_proj"))
        for expert in range(len(parameter))
    }
    assert {entry.name for entry in layout} == wanted


def test_out_features_follow_each_kind_of_weight():
    sizes = {entry.name: entry.out_features for entry in ScanEngine(tiny_causal_lm("gpt2")).layout}
    assert sizes["transformer.h.0.attn.c_attn.weight"] == 144
    sizes = {entry.name: entry.out_features for entry in ScanEngine(tiny_causal_lm("gpt_oss")).layout}
    assert sizes["model.layers.0.mlp.experts.gate_up_proj.3"] == 160  # transposed: (experts, in, out)
    assert sizes["model.layers.0.mlp.experts.down_proj.0"] == 48


@pytest.mark.parametrize(
    ("targets", "endings"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_up_proj", "down_proj"}),
        ("q_proj, lm_head", {"q_proj", "lm_head"}),
        ("self_attn.[qk]_proj", {"q_proj", "k_proj"}),
        ("q_proj.weight,lm_head.weight", {"q_proj", "lm_head"}),
        ("model.layers.1.*", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}),
        (r"re:layers\.[02]\..*experts\.down", {"down_proj"}),
    ],
)
def test_patterns_choose_modules(targets, endings):
    found = find_targets(tiny_causal_lm("qwen3_moe"), targets).targets
    assert {target.name.removesuffix(".weight").rsplit(".", 1)[-1] for target in found} == endings
    assert found[0].base == 0
    assert all(after.base == before.end for before, after in pairwise(found))


def test_chosen_targets_store_what_all_targets_store():
    tokens = torch.arange(11)[None]
    model = tiny_causal_lm("qwen3_moe")
    with ScanEngine(model) as engine:
        (everything,) = engine.scan(tokens)
    with ScanEngine(model, targets="down_proj,o_proj") as some:
        (chosen,) = some.scan(tokens)
    columns = {entry.name: slice(entry.base, entry.base + entry.blocks) for entry in engine.layout}
    for entry in some.layout:
        np.testing.assert_array_equal(
            chosen.grad_norm[:, entry.base : entry.base + entry.blocks], everything.grad_norm[:, columns[entry.name]]
        )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "w_proj",
            r"targets must match a module, got 'w_proj'; there are q_proj, k_proj, .*, lm_head",
        ),
        ("q_proj,nothing", "got 'nothing'"),
        (" , ", "targets must be 'all' or comma-separated patterns"),
        ("re:(", "valid regular expression after 're:'"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(targets, message):
    with pytest.raises(InputError, match=message):
        ScanEngine(tiny_causal_lm("qwen3"), targets=targets)


def test_expert_weights_outside_the_interface_are_left_out_and_refused_by_name():
    class OwnExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 48, 48))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.einsum("btf,efo->bto", x, self.weight)

    model = tiny_causal_lm("llama")
    model.model.layers[2].mlp = OwnExperts()
    why = "OwnExperts multiplies this 3-D parameter itself"
    with ScanEngine(model) as engine:
        assert engine.scan(torch.arange(5)[None])[0].activation.shape == (5, engine.blocks)
    assert [name for name, reason in engine.not_measured.items() if reason.startswith(why)] == ["model.layers.2.mlp.weight"]
    assert all("layers.2.mlp" not in entry.name for entry in engine.layout)
    with pytest.raises(InputError, match=rf"leave out model\.layers\.2\.mlp\.weight: {why}"):
        ScanEngine(model, targets="attention,layers.2.*")


@pytest.mark.parametrize(
    ("targets", "endings"),
    [
        ("all,!lm_head", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("!lm_head, !attention", {"gate_up_proj", "down_proj"}),
        ("!mlp,all", {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}),
        ("attention,lm_head,![qk]_proj", {"v_proj", "o_proj", "lm_head"}),
        (r"re:(q,k|q|k)_proj", {"q_proj", "k_proj"}),
        (r"re:[q,k]_proj,lm_head", {"q_proj", "k_proj", "lm_head"}),
        (r"re:layers\.\d{1,2}\..*o_proj,!re:layers\.[1,2]\.", {"o_proj"}),
        (r"re:o_proj|no\,thing", {"o_proj"}),
        (r"re:o_proj|[],]|[^],x]{99}", {"o_proj"}),  # a bracket that begins a set is one of its members
        (r"[!],x]_proj,[o]_proj", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_patterns_leave_out_and_hold_commas(targets, endings):
    found = find_targets(tiny_causal_lm("qwen3_moe"), targets).targets
    assert {target.name.removesuffix(".weight").rsplit(".", 1)[-1] for target in found} == endings
    if "[1,2]" in targets:
        assert [target.name for target in found] == ["model.layers.0.self_attn.o_proj.weight"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("all,!w_proj", "targets must match a module, got '!w_proj'"),
        ("lm_head,!lm_head", "targets must include at least one weight, got 'lm_head,!lm_head'"),
        ("!all", "targets must include at least one weight"),
    ],
)
def test_patterns_that_leave_nothing_or_exclude_nothing_are_refused(targets, message):
    with pytest.raises(InputError, match=message):
        ScanEngine(tiny_causal_lm("qwen3"), targets=targets)


def test_a_model_without_linear_layers_is_refused():
    model = tiny_causal_lm("llama", num_hidden_layers=1)
    model.model.layers = nn.ModuleList()
    model.lm_head = nn.Identity()
    with pytest.raises(InputError, match="model must have linear layers"):
        ScanEngine(model)


def test_biases_are_no_part_of_the_measure():
    """Two layers that differ by a constant gradient path through the bias only have the same weight norms."""
    tokens = torch.arange(9)[None]
    model = tiny_causal_lm("llama")
    with ScanEngine(model, targets="lm_head") as engine:
        (before,) = engine.scan(tokens)
    model.lm_head.bias = nn.Parameter(torch.full((97,), 3.0))  # the same for every logit: probabilities stay
    with ScanEngine(model, targets="lm_head") as engine:
        (after,) = engine.scan(tokens)
    np.testing.assert_allclose(after.grad_norm, before.grad_norm, rtol=1e-3, atol=1e-5)
    assert (np.abs(after.activation - before.activation)[:-1] > 1).all()


def test_the_norm_of_a_shared_input_is_taken_once(monkeypatch):
    """q, k and v share an input, gate and up another: four norms a layer and one for the head, not seven and one."""
    taken, norm = [], capture._row_norm
    monkeypatch.setattr(capture, "_row_norm", lambda x: taken.append(x.shape) or norm(x))
    model = tiny_causal_lm("llama")
    with ScanEngine(model) as engine:
        taken.clear()  # those of the proof
        engine.scan(torch.arange(12)[None])
    assert len(taken) == 4 * model.config.num_hidden_layers + 1
