"""Padding, packed sequences, and masks that are neither."""

from __future__ import annotations

import pytest
import torch

from tinyonn.errors import InputError
from tinyonn.testing import assert_close_rms, left_padding, tiny_dyn_nsa_lm, token_ids

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


def test_packed_sequences_are_separate():
    model, x = tiny_dyn_nsa_lm(), token_ids(batch=1)
    bounds = torch.tensor([0, 50, LENGTH], dtype=torch.int32)
    positions = torch.cat([torch.arange(50), torch.arange(LENGTH - 50)])[None]
    packed = model(x, position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).logits
    assert_close_rms(packed, torch.cat([model(x[:, :50]).logits, model(x[:, 50:]).logits], 1), 1e-5)
    with pytest.raises(InputError, match="packed sequences are told by cu_seq_lens_q"):
        model(x, position_ids=positions, use_cache=False)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="sequences must not be packed under"):
        torch.compile(model, backend="aot_eager")(x, position_ids=positions, use_cache=False)


def test_masks_that_are_not_padding_are_refused():
    model, x = tiny_dyn_nsa_lm(), token_ids()
    holes = torch.ones(2, LENGTH, dtype=torch.long)
    holes[1, 40:50] = 0
    with pytest.raises(InputError, match="padding only before or after a row's tokens"):
        model(x, attention_mask=holes)
    with pytest.raises(InputError, match="attention_mask must be None or"):
        model(x, attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril())


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
    with pytest.raises(InputError, match="attention_mask must be None beside cu_seq_lens_q"):
        model(x, attention_mask=mask, cu_seq_lens_q=bounds)


def test_compiling_refuses_padding_between_tokens():
    model, x = tiny_dyn_nsa_lm(layers=1), token_ids(50)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    mask = left_padding(50)
    assert_close_rms(compiled(x, attention_mask=mask).logits[mask.bool()], model(x, attention_mask=mask).logits[mask.bool()], 1e-5)
    mask[1, 20:30] = 0
    with pytest.raises(RuntimeError, match="padding only before or after"):
        compiled(x, attention_mask=mask)
