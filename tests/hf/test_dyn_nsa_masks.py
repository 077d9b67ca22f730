"""Padding, packed sequences, and masks that are neither."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import create_causal_mask

from tinyonn.errors import InputError
from tinyonn.hf import convert_attention
from tinyonn.testing import assert_close_rms, left_padding, rms_error_ratio, tiny_causal_lm, tiny_dyn_nsa_lm, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")
ARCHS = ("llama", "qwen3", "mistral", "gpt_neox")
LENGTH = 130


@pytest.mark.parametrize("arch", ARCHS)
def test_padding_is_not_attended_to(arch):
    model, x = tiny_dyn_nsa_lm(arch), token_ids()
    alone = model(x[:1, 21:]).logits
    mask = left_padding()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(x, attention_mask=mask, position_ids=positions).logits
    assert_close_rms(padded[0, 21:], alone[0], 1e-5)
    assert_close_rms(padded[1], model(x[1:]).logits[0], 1e-5)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 80:] = 0
    assert_close_rms(model(x, attention_mask=mask).logits[0, :80], model(x[:1, :80]).logits[0], 1e-5)


def restarting(*lengths: int) -> Tensor:
    """(1, sum of lengths), positions of sequences packed in one row."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens_q", "both"])
def test_packed_sequences_are_separate(arch, told):
    model, x = tiny_dyn_nsa_lm(arch), token_ids(batch=1)
    bounds = torch.tensor([0, 50, LENGTH], dtype=torch.int32)
    inputs: dict[str, Any] = {"position_ids": restarting(50, LENGTH - 50)}
    if told != "position_ids":
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "use_cache": told == "cu_seq_lens_q"}
    else:
        inputs |= {"use_cache": False}
    expected = torch.cat([model(x[:, :50]).logits, model(x[:, 50:]).logits], 1)
    assert_close_rms(model(x, **inputs).logits, expected, 1e-5)
    assert rms_error_ratio(model(x, position_ids=torch.arange(LENGTH)[None]).logits, expected) > 1e-2


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "plain"])
def test_rows_may_be_packed_each_in_its_own_way(converted):
    x, tau = token_ids(), torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0))
    if converted:
        model = tiny_dyn_nsa_lm()
    else:
        model = tiny_causal_lm("llama", num_hidden_layers=1)
        model.config.dyn_nsa = {"compress_size": 16, "block_size": 16, "window": 20, "base": 0.3, "slope": 0.5}
        model.set_attn_implementation("dyn_nsa")
    positions = torch.cat([restarting(50, 1, 79), restarting(LENGTH)])
    packed = model(x, position_ids=positions, use_cache=False, tau=tau).logits
    for row, begin, end in ((0, 0, 50), (0, 50, 51), (0, 51, LENGTH), (1, 0, LENGTH)):
        alone = model(x[row, begin:end][None], tau=tau[row, begin:end][None]).logits
        assert_close_rms(packed[row, begin:end], alone[0], 1e-5)


def test_no_mask_of_all_pairs_is_made_for_packed_sequences():
    packed = {"position_ids": restarting(50, 30, 50), "attention_mask": None, "past_key_values": None}
    model = tiny_dyn_nsa_lm()
    mask = create_causal_mask(config=model.config, inputs_embeds=torch.zeros(1, LENGTH, 48), **packed)
    assert mask.dtype == torch.int32
    assert mask.flatten().tolist() == [0, 50, 80, LENGTH]


def test_blocks_that_see_ahead_are_refused():
    """As some models mask the tokens of one image, which is neither padding nor packing."""
    model = tiny_dyn_nsa_lm(layers=1)
    images = torch.full((1, 50), -1)
    images[:, 10:20] = 3
    mask = create_causal_mask(
        config=model.config, inputs_embeds=torch.zeros(1, 50, 48), attention_mask=None, past_key_values=None, block_sequence_ids=images
    )
    with pytest.raises(InputError, match=r"attention_mask must be None or .* got a mask of shape \(1, 1, 50, 50\)"):
        model(token_ids(50, 1), attention_mask=mask)


def test_sequences_packed_beside_a_cache_are_refused():
    """transformers then takes a row for one sequence, whatever its positions."""
    model, x = tiny_dyn_nsa_lm(layers=1), token_ids(50, 1)
    with pytest.raises(InputError, match=r"position_ids must not restart within a row .* uses a cache; pass use_cache=False"):
        model(x, position_ids=restarting(20, 30))
    cache = model(x, position_ids=restarting(50)).past_key_values
    model(x[:, :2], position_ids=torch.tensor([[50, 51]]), past_key_values=cache)


def test_packed_sequences_compile_with_their_bounds():
    x, positions = token_ids(batch=1), restarting(50, LENGTH - 50)
    bounds = torch.tensor([0, 50, LENGTH], dtype=torch.int32)
    model = tiny_dyn_nsa_lm()
    expected = torch.cat([model(x[:, :50]).logits, model(x[:, 50:]).logits], 1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close_rms(compiled(x, position_ids=positions, cu_seq_lens_q=bounds, use_cache=False).logits, expected, 1e-5)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"under torch\.compile, dyn_nsa supports neither packed sequences without cu_seq_lens_q"):
        compiled(x, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("flash", [True, False], ids=["bounds", "positions"])
def test_a_flattening_collator_packs_a_batch(flash):
    model, rows = tiny_dyn_nsa_lm().train(), [token_ids(length, 1)[0] for length in (40, 70, 20)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)([{"input_ids": row, "labels": row} for row in rows])
    got = model(**batch, use_cache=False)
    alone = [model(input_ids=row[None], use_cache=False).logits for row in rows]
    assert_close_rms(got.logits, torch.cat(alone, 1), 1e-5)


def test_masks_of_pairs_are_refused():
    with pytest.raises(InputError, match="attention_mask must be None or"):
        tiny_dyn_nsa_lm()(token_ids(), attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril())


def test_arguments_of_another_shape_are_named():
    model, x = tiny_dyn_nsa_lm(layers=1), token_ids(50, 1)
    with pytest.raises(InputError, match=r"attention_mask must be None or \(batch, tokens\), got shape \(50,\)"):
        model(x, attention_mask=torch.ones(50))
    for given, found in (([0, 20, 50], "list"), (torch.tensor([[0, 50]]), r"\(1, 2\)"), (torch.tensor([]).int(), r"\(0,\)")):
        with pytest.raises(InputError, match=rf"cu_seq_lens_q must be a tensor \(sequences \+ 1,\), got {found}"):
            model(x, cu_seq_lens_q=given)


def test_lists_have_no_more_places_than_there_are_blocks():
    x = token_ids(50, 1)
    model = tiny_causal_lm("llama")
    expected = model(x).logits
    convert_attention(model, block_size=16, compress_size=16, max_blocks=2**30, forced_first=2**20)
    with torch.no_grad():
        assert_close_rms(model(x).logits, expected, 1e-5)


def test_only_bounds_of_its_own_are_taken_for_bounds():
    model, x = tiny_dyn_nsa_lm(layers=1), token_ids(50)
    for dtype in (torch.long, torch.int32, torch.uint8):
        with pytest.raises(InputError, match=r"attention_mask must be None or .* got a mask of shape \(2, 1, 50, 50\)"):
            model(x, attention_mask=torch.ones(2, 1, 50, 50, dtype=dtype).tril())
    with pytest.raises(InputError, match="got a mask of shape"):
        model(x, attention_mask=torch.ones(2, 1, 1, 2, dtype=torch.long))


def test_padding_beside_packed_sequences_is_refused():
    model, x = tiny_dyn_nsa_lm(layers=1), token_ids(50, 1)
    bounds, mask = torch.tensor([0, 20, 50], dtype=torch.int32), torch.ones(1, 50, dtype=torch.long)
    expected = model(x, cu_seq_lens_q=bounds).logits
    assert torch.equal(model(x, attention_mask=mask, cu_seq_lens_q=bounds).logits, expected)
    mask[0, 45:] = 0
    with pytest.raises(InputError, match="attention_mask must be None with cu_seq_lens_q"):
        model(x, attention_mask=mask, cu_seq_lens_q=bounds)
