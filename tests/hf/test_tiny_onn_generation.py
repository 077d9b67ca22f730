"""Generation with TinyOnn: with a cache as without, beams, several answers, left padding, continued caches."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import DynamicCache

from tinyonn.errors import InputError

from .tiny_onn import KINDS, SPARSE, left_padded, model, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several of the beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(270,), (1, 1), (280, 15, 3)], ids=["long", "one token", "padded"])
def test_decoding_with_a_cache_is_the_whole_forward(kind, lengths):
    built = model(kind).double()
    ids, mask = left_padded(*lengths)
    more = token_ids(len(lengths), 40, seed=1)
    every, whole = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    wanted = built(every, attention_mask=whole, use_cache=False).logits[:, -41:]
    out = built(ids, attention_mask=mask)
    cache, got, end = out.past_key_values, [out.logits[:, -1:]], ids.shape[1]
    for size in (1, 1, 30, 1, 7):
        assert cache.get_seq_length() == end
        out = built(every[:, end : end + size], attention_mask=whole[:, : end + size], past_key_values=cache)
        got.append(out.logits)
        end += size
    torch.testing.assert_close(torch.cat(got, 1), wanted, rtol=1e-9, atol=1e-9)
    if kind == "dyn_nsa" and len(ids[0]) > 200:  # beyond the blocks that every query reads
        assert all(layer.attention.core.statistics()["far_count"] > 0.01 for layer in built.model.layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_gives_the_same_with_a_cache_as_without(kind, way):
    built = model(kind).double()
    ids, mask = left_padded(30, 12)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        found.append(built.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, pad_token_id=0, **WAYS[way]))
    assert found[0].shape == (2 * WAYS[way].get("num_return_sequences", 1), 42)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch_generates_what_its_rows_do(kind):
    built = model(kind).double()
    ids, mask = left_padded(30, 12, 1)
    together = built.generate(ids, attention_mask=mask, max_new_tokens=10, pad_token_id=0)
    for row, real, got in zip(ids, mask.bool(), together, strict=True):
        assert torch.equal(got[30:], built.generate(row[real][None], max_new_tokens=10, pad_token_id=0)[0, real.sum() :])


@pytest.mark.parametrize("kind", KINDS)
def test_beams_are_those_of_an_exhaustive_search(kind):
    """With as many beams as pairs of tokens begin with, the best two tokens are found; scores are from whole forwards."""
    built, ids = model(kind).double(), token_ids(1, 9)
    best = built.generate(ids, max_new_tokens=2, num_beams=50, pad_token_id=0, eos_token_id=None)[0, 9:]
    first = built(ids).logits[0, -1].log_softmax(-1)
    rows = torch.cat([ids.expand(50, -1), torch.arange(50)[:, None]], 1)
    total = first[:, None] + built(rows, use_cache=False).logits[:, -1].log_softmax(-1)
    assert best.tolist() == [int(total.argmax()) // 50, int(total.argmax()) % 50]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_a_prompt_serves_several_continuations(kind):
    built, ids = model(kind).double(), token_ids(2, 40)
    cache = built(ids[:, :30]).past_key_values
    wanted = built.generate(ids, max_new_tokens=5, pad_token_id=0)
    for _ in range(2):
        assert torch.equal(built.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=5, pad_token_id=0), wanted)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.crop(-4)
    assert cache.get_seq_length() == 26
    got = built(ids[[1, 0], 26:], past_key_values=cache).logits
    torch.testing.assert_close(got, built(ids[[1, 0]]).logits[:, 26:], rtol=1e-9, atol=1e-9)
    if kind != "full":
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(built(ids, past_key_values=cache).logits, built(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_assistant_changes_nothing(kind):
    built, ids = model(kind).double(), token_ids(1, 12)
    given = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 0}
    wanted = built.generate(ids, **given)
    assert torch.equal(built.generate(ids, prompt_lookup_num_tokens=3, **given), wanted)
    helper = model(kind, hidden_size=16).double()
    assert torch.equal(built.generate(ids, assistant_model=helper, **given), wanted)


@pytest.mark.parametrize("given", [DynamicCache, lambda: DynamicCache(config=model().config)], ids=["empty", "by configuration"])
def test_any_dynamic_cache_is_filled(given):
    built, ids, cache = model(), token_ids(2, 20), given()
    built(ids[:, :15], past_key_values=cache)
    assert len(cache) == 2
    torch.testing.assert_close(built(ids[:, 15:], past_key_values=cache).logits, built(ids).logits[:, 15:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SPARSE)
def test_caches_of_other_kinds_have_one_line(kind):
    built, ids = model(kind), token_ids(1, 8)
    for name in ("static", "offloaded", "quantized"):
        message = re.escape(f"cache_implementation must be dynamic with attention='{kind}', got '{name}'.")
        with pytest.raises(InputError, match=message):
            built.generate(ids, max_new_tokens=3, cache_implementation=name)
    with pytest.raises(InputError, match="past_key_values must not be offloaded"):
        built(ids, past_key_values=DynamicCache(offloading=True))


@pytest.mark.parametrize("kind", SPARSE)
def test_padding_that_changes_in_mid_row_has_one_line(kind):
    built = model(kind)
    ids, mask = left_padded(10, 6)
    cache = built(ids, attention_mask=mask).past_key_values
    with pytest.raises(InputError, match="attention_mask must mark the padding of each row as in the call that began the cache"):
        built(ids[:, :1], past_key_values=cache)
    with pytest.raises(InputError, match="attention_mask must have no padding between tokens"):
        built(ids[:, :1], past_key_values=cache, attention_mask=torch.cat([mask.flip(1), torch.ones(2, 1)], 1))


def test_a_static_cache_serves_full_attention():
    built, ids = model("full"), token_ids(1, 8)
    wanted = built.generate(ids, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(built.generate(ids, max_new_tokens=4, pad_token_id=0, cache_implementation="static", disable_compile=True), wanted)
