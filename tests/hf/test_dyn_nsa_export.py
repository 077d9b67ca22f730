"""A converted model goes through torch.export."""

from __future__ import annotations

import pytest
import torch

from tinyonn.testing import assert_close_rms, left_padding, tiny_dyn_nsa_lm, token_ids


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_converted_model_is_exported(padded):
    model, x, y = tiny_dyn_nsa_lm(layers=1), token_ids(60), token_ids(120)[:, 60:]
    inputs = {"attention_mask": left_padding(60)} if padded else {}
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": x, "use_cache": False, **inputs}, strict=False).module()
        for ids in (x, y):
            got, expected = (run(input_ids=ids, use_cache=False, **inputs).logits for run in (exported, model))
            real = slice(None) if not padded else left_padding(60).bool()
            assert_close_rms(got[real], expected[real], 1e-5)
