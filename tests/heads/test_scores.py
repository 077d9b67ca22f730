"""Scores of single prompts against eager attention's matrices, on tiny random models of each family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tinyonn.errors import InputError
from tinyonn.heads.score.prompts import EncodedPrompt
from tinyonn.heads.score.score import score_prompts
from tinyonn.heads.score.scores import SCORES, Observation, chosen_scores, register_score
from tinyonn.testing import tiny_causal_lm, tiny_encoder

SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
# Name, options, and the names of the value and the output projection within a layer.
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("llama", {}, "self_attn.v_proj", "self_attn.o_proj"),
    "qwen3": ("qwen3", {}, "self_attn.v_proj", "self_attn.o_proj"),
    "qwen3-sliding": ("qwen3", SLIDING, "self_attn.v_proj", "self_attn.o_proj"),
    "mistral": ("mistral", {}, "self_attn.v_proj", "self_attn.o_proj"),
    "gemma2": ("gemma2", {}, "self_attn.v_proj", "self_attn.o_proj"),
    "gpt2": ("gpt2", {}, "attn.c_attn", "attn.c_proj"),
    "bert": ("bert", {}, "attention.self.value", "attention.output.dense"),
    "roberta": ("roberta", {}, "attention.self.value", "attention.output.dense"),  # counts positions from the padding's id on
    "modernbert": ("modernbert", {}, "attn.Wqkv", "attn.Wo"),
    "deberta-v2": ("deberta-v2", {}, "attention.self.value_proj", "attention.output.dense"),
}
ENCODERS = ("bert", "roberta", "modernbert", "deberta-v2")
FUSED = ("gpt2", "modernbert")


def model_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    arch, options, _, _ = FAMILIES[family]
    return (tiny_encoder if family in ENCODERS else tiny_causal_lm)(arch, dtype=dtype, **options).base_model


def prompts_of(lengths: Sequence[int] = (17, 9, 12, 9, 1, 23)) -> list[EncodedPrompt]:
    """Random tokens; the question is in the middle, and was lost in the third prompt."""
    drawn = np.random.default_rng(0)
    found = []
    for row, length in enumerate(lengths):
        span = tuple(length // 4 <= place < max(length // 2, 1) for place in range(length))
        found.append(EncodedPrompt(tuple(drawn.integers(0, 93, length).tolist()), None if row == 2 else span, row == 2))
    return found


@torch.no_grad()
def eager_scores(family: str, prompt: EncodedPrompt, query_mode: str) -> dict[str, np.ndarray]:
    """(layers, H) of one prompt alone: matrices of probabilities times values, and the output weight's columns written out."""
    _, _, value_name, output_name = FAMILIES[family]
    model = model_of(family)
    model.set_attn_implementation("eager")
    values: dict[int, torch.Tensor] = {}
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3)
    for index, block in enumerate(blocks):
        block.get_submodule(value_name).register_forward_hook(lambda module, args, output, index=index: values.update({index: output[0]}))
    found = model(input_ids=torch.tensor([prompt.token_ids]), output_attentions=True)
    heads = found.attentions[0].shape[1]
    chosen = slice(-1, None) if query_mode == "last_token" else slice(None)
    span = torch.tensor(prompt.span or [False] * len(prompt.token_ids))
    rows: dict[str, list[torch.Tensor]] = {"out": [], "projected": [], "ent": [], "task": []}
    for index, block in enumerate(blocks):
        probs = found.attentions[index][0, :, chosen].double()  # (H, Tq, T)
        value = values[index][:, -(values[index].shape[1] // 3) :] if family in FUSED else values[index]
        weight = block.get_submodule(output_name).weight
        weight = weight.T if family == "gpt2" else weight
        dim = weight.shape[1] // heads
        value = value.unflatten(-1, (-1, dim)).transpose(0, 1).double()  # (K, T, D)
        outputs = probs @ value.repeat_interleave(heads // len(value), 0)  # (H, Tq, D)
        projected = [outputs[head] @ weight[:, head * dim : (head + 1) * dim].double().T for head in range(heads)]
        rows["out"].append(outputs.norm(dim=-1).mean(-1))
        rows["projected"].append(torch.stack(projected).norm(dim=-1).mean(-1))
        rows["ent"].append((probs * probs.clamp_min(1e-300).log()).sum(-1).mean(-1))
        rows["task"].append(probs[..., span].sum(-1).mean(-1))
    return {name: torch.stack(layers).numpy() for name, layers in rows.items()}


@pytest.mark.parametrize("query_mode", ["last_token", "all_tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_eager_attention_on_each_prompt_alone(family, query_mode):
    prompts = prompts_of()
    model = model_of(family, torch.float32)
    found = score_prompts(model, prompts, chosen_scores({}), batch_size=4, query_mode=query_mode)
    projected = score_prompts(model, prompts, {"out": SCORES["out"]}, query_mode=query_mode, out_projection=True)
    for row, prompt in enumerate(prompts):
        expected = eager_scores(family, prompt, query_mode)
        for name, table in {**found, "projected": projected["out"]}.items():
            values = [layer[row] for layer in table]
            np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5, err_msg=f"{name}, prompt {row}")


@pytest.mark.parametrize("query_mode", ["last_token", "all_tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batch_size_change_nothing_but_rounding(family, query_mode):
    prompts = prompts_of()
    model = model_of(family, torch.float32)

    def scored(batch_size: int) -> dict[str, list[np.ndarray]]:
        return score_prompts(model, prompts, chosen_scores({}), batch_size=batch_size, query_mode=query_mode, padding=95)

    alone = scored(1)
    for batch_size in (2, 6):
        for name, table in scored(batch_size).items():
            np.testing.assert_allclose(table, alone[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_changes_scores_by_its_rounding(family, dtype):
    # The same rounded weights in both, so that what differs is the arithmetic alone.
    prompts = prompts_of()
    low = model_of(family, dtype)
    scores = chosen_scores({})
    found = score_prompts(low, prompts, scores, query_mode="all_tokens")
    exact = score_prompts(low.float(), prompts, scores, query_mode="all_tokens")
    unit = torch.finfo(dtype).eps
    for name, table in found.items():
        difference = np.sqrt(np.mean((np.array(table) - np.array(exact[name])) ** 2) / np.mean(np.array(exact[name]) ** 2))
        assert difference < 16 * unit, f"{name}: {difference}"


def test_layers_with_fewer_heads_than_others_are_scored():
    model = model_of("bert")
    attention = model.encoder.layer[1].attention
    half = slice(0, 24)  # two of four heads of 12
    for name in ("query", "key", "value"):
        linear = getattr(attention.self, name)
        linear.weight, linear.bias, linear.out_features = nn.Parameter(linear.weight[half]), nn.Parameter(linear.bias[half]), 24
    attention.output.dense.weight = nn.Parameter(attention.output.dense.weight[:, half])
    attention.output.dense.in_features = 24
    found = score_prompts(model, prompts_of(), chosen_scores({}))
    assert [layer.shape for layer in found["out"]] == [(6, 4), (6, 2), (6, 4)]
    assert all(np.isfinite(layer).all() for table in found.values() for layer in table)


@pytest.fixture
def registry(monkeypatch):
    """A registry that is put back."""
    copy = dict(SCORES)
    yield
    SCORES.clear()
    SCORES.update(copy)


def largest_feature(seen: Observation) -> torch.Tensor:
    return seen.mean(seen.outputs.abs().amax(-1))


def test_a_score_of_ones_own_sees_what_the_others_see(registry):
    register_score("peak", largest_feature)
    found = score_prompts(model_of("llama"), prompts_of(), chosen_scores({"peak": 1.0}), query_mode="all_tokens")
    assert list(found) == ["out", "ent", "task", "peak"]
    peak, norm = np.array(found["peak"]), np.array(found["out"])
    assert (peak < norm).all()  # the largest of 12 features against their norm
    assert (peak > norm / np.sqrt(12)).all()


def test_scores_are_registered_once_by_a_plain_name(registry):
    register_score("peak", largest_feature)
    register_score("peak", largest_feature)  # a module that is imported twice
    with pytest.raises(ValueError, match="name must be new, got 'out', which is registered"):
        register_score("out", largest_feature)
    with pytest.raises(ValueError, match=r"name must be lower-case letters, digits and '_', got 'a,b'"):
        register_score("a,b", largest_feature)
    with pytest.raises(InputError, match=r"must name registered extra scores \(peak\), got 'peek'; did you mean 'peak'\?"):
        chosen_scores({"peek": 1.0})


def test_extra_scores_must_be_registered_first():
    with pytest.raises(InputError, match=r"must name registered extra scores \(none so far; register_score adds one\), got 'peak'"):
        chosen_scores({"peak": 1.0})


def test_a_score_of_the_wrong_shape_is_refused(registry):
    register_score("wrong", lambda seen: seen.entropy)
    with pytest.raises(ValueError, match=r"score wrong must have a value for each sample and head, \(4, 4\), got \(4, 1, 4\)"):
        score_prompts(model_of("llama"), prompts_of(), chosen_scores({"wrong": 1.0}))
