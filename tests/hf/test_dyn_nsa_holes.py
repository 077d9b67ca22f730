"""Masks with padding between tokens, as of a batch of conversations whose turns were padded one by one: what is masked is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tinyonn.hf import convert_attention, statistics
from tinyonn.testing import assert_close_rms, tiny_causal_lm, tiny_dyn_nsa_lm, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")
ARCHS = ("llama", "qwen3", "mistral", "gpt_neox")
LENGTH = 130


def with_holes() -> Tensor:
    """(2, LENGTH), one row with padding before, within and after its tokens, one with a hole across a block's border."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    for row, begin, end in ((0, 0, 7), (0, 30, 61), (0, 90, 91), (0, 125, LENGTH), (1, 40, 50)):
        mask[row, begin:end] = 0
    return mask


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def alone(model: PreTrainedModel, x: Tensor, mask: Tensor, row: int, **inputs: Any) -> Tensor:
    """Logits of a row's tokens without its padding, (tokens, vocabulary)."""
    return model(x[row, mask[row].bool()][None], **inputs).logits[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_row_with_holes_is_the_row_without_its_padding(arch):
    model, x, mask = tiny_dyn_nsa_lm(arch), token_ids(), with_holes()
    got = model(x, attention_mask=mask, position_ids=places(mask)).logits
    for row in range(2):
        assert_close_rms(got[row, mask[row].bool()], alone(model, x, mask, row), 1e-5)


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "plain"])
@pytest.mark.parametrize("arch", ARCHS)
def test_with_all_blocks_holes_are_what_a_dense_model_makes_of_them(arch, converted):
    model = tiny_causal_lm(arch, max_position_embeddings=512, **({"sliding_window": None} if arch == "mistral" else {}))
    x, mask = token_ids(), with_holes()
    expected = model(x, attention_mask=mask).logits
    if converted:
        convert_attention(model, compress_size=16, block_size=16, window=20)
    else:
        model.config.dyn_nsa = {"compress_size": 16, "block_size": 16, "window": 20}
        model.set_attn_implementation("dyn_nsa")
    got = model(x, attention_mask=mask).logits
    assert_close_rms(got[mask.bool()], expected[mask.bool()], 1e-5)


def test_gradients_and_losses_are_those_of_the_rows_alone():
    model, x, mask = tiny_dyn_nsa_lm().train(), token_ids(), with_holes()
    with torch.enable_grad():
        rows = [model(x[row, mask[row].bool()][None], use_cache=False).logits.square().sum() for row in range(2)]
        expected = torch.autograd.grad(sum(rows), list(model.parameters()))
        logits = model(x, attention_mask=mask, position_ids=places(mask), use_cache=False).logits
        got = torch.autograd.grad((logits.square() * mask[..., None]).sum(), list(model.parameters()))
    for one, other, (name, _) in zip(got, expected, model.named_parameters(), strict=True):
        assert_close_rms(one, other, 1e-4, name)


def test_holes_do_not_count():
    model, x, mask = tiny_dyn_nsa_lm(layers=1), token_ids(), with_holes()
    counts, tokens = 0.0, mask.sum(-1).tolist()
    for row in range(2):
        statistics(model, reset=True)
        alone(model, x, mask, row)
        (found,) = statistics(model, reset=True).values()
        counts += found["mean_count"] * tokens[row]
    model(x, attention_mask=mask, position_ids=places(mask))
    (found,) = statistics(model).values()
    assert found["mean_count"] == pytest.approx(counts / sum(tokens), rel=1e-5)


def test_a_tau_of_each_token_stays_with_its_token():
    model, x, mask = tiny_dyn_nsa_lm(layers=1), token_ids(), with_holes()
    tau = torch.rand(2, LENGTH, 2, generator=torch.Generator().manual_seed(0))
    got = model(x, attention_mask=mask, position_ids=places(mask), tau=tau).logits
    for row in range(2):
        real = mask[row].bool()
        assert_close_rms(got[row, real], alone(model, x, mask, row, tau=tau[row, real][None]), 1e-5)


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_generation_after_holes_is_generation_of_each_row_alone(arch, cache):
    model, x, mask = tiny_dyn_nsa_lm(arch), token_ids(), with_holes()
    mask[0, 125:] = 1  # a prompt ends with a token
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    got = model.generate(x, attention_mask=mask, **options)[:, LENGTH:]
    for row in range(2):
        prompt = x[row, mask[row].bool()][None]
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        assert torch.equal(got[row], expected)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_turns_padded_one_by_one_are_each_row_alone(static):
    """Two turns into one cache, the second padded on the left, then tokens one by one; the first row idles in the last step but one."""
    model, x = tiny_dyn_nsa_lm(dtype=torch.float64), token_ids(100)
    cache: Any = StaticCache(config=model.config, max_cache_len=128) if static else DynamicCache(config=model.config)
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, :9], mask[1, 50:65], mask[0, 98] = 0, 0, 0
    parts = []
    for begin, end in ((0, 50), (50, 97), (97, 98), (98, 99), (99, 100)):
        inputs: dict[str, Any] = {"attention_mask": mask[:, :end], "position_ids": places(mask)[:, begin:end]}
        parts.append(model(x[:, begin:end], past_key_values=cache, **inputs).logits)
    got = torch.cat(parts, 1)
    for row in range(2):
        assert_close_rms(got[row, mask[row].bool()], alone(model, x, mask, row), 1e-6)


def test_holes_that_appear_later_are_heeded():
    """A token in the cache that a later mask leaves out: nothing compressed from it is kept."""
    model, x = tiny_dyn_nsa_lm(dtype=torch.float64, layers=1), token_ids(100)
    mask, cache = torch.ones(2, 100, dtype=torch.long), DynamicCache(config=model.config)
    model(x[:, :90], attention_mask=mask[:, :90], past_key_values=cache)  # a view: what is written to the mask below is seen in it
    mask[0, 20:30] = 0
    got = model(x[:, 90:], attention_mask=mask, past_key_values=cache, position_ids=torch.arange(90, 100)[None]).logits
    real = mask[0].bool()
    expected = alone(model, x, mask, 0, position_ids=torch.arange(100)[None, real])
    assert_close_rms(got[0], expected[-10:], 1e-6)


def test_with_holes_each_block_is_compressed_once():
    model, x, mask = tiny_dyn_nsa_lm(layers=1), token_ids(), with_holes()
    mask[0, 125:] = 1
    seen: list[int] = []
    model.model.layers[0].self_attn.dyn_nsa.compress_key.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model.generate(x, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert seen[1:] == [1] * 19


def test_a_row_of_padding_alone_changes_no_other():
    model, x, mask = tiny_dyn_nsa_lm(layers=1), token_ids(), with_holes()
    mask[0] = 0
    got = model(x, attention_mask=mask, position_ids=places(mask)).logits
    assert bool(got.isfinite().all())
    assert_close_rms(got[1, mask[1].bool()], alone(model, x, mask, 1), 1e-5)


def test_holes_compile():
    model, x, mask = tiny_dyn_nsa_lm(layers=1), token_ids(), with_holes()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for given in (mask, torch.ones_like(mask)):
        got = compiled(x, attention_mask=given, position_ids=places(given)).logits
        for row in range(2):
            assert_close_rms(got[row, given[row].bool()], alone(model, x, given, row), 1e-5)
