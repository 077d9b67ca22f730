"""Local credit's attention against the same attention written out, with every off-diagonal key and value detached."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tinyonn.scan.engine import local_credit

B, H, K, T, D, DV = 2, 6, 2, 11, 8, 5


def written_out(query, key, value, mask, scale, softcap, sinks):
    key, value = key.repeat_interleave(H // K, 1), value.repeat_interleave(H // K, 1)
    own = torch.eye(T, dtype=torch.bool)
    scores = torch.where(own, query @ key.mT, query @ key.detach().mT) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, H, 1, 1).expand(B, H, T, 1)], -1)
    probs = scores.softmax(-1)[..., :T]
    return (probs * ~own) @ value.detach() + (probs * own) @ value


@pytest.mark.parametrize("step", [1, 4 * B * H * T, 1 << 22], ids=["a-row-at-a-time", "four-rows", "at-once"])
@pytest.mark.parametrize("masked", ["causal", "window", "per-head"])
@pytest.mark.parametrize("softcap", [None, 0.7], ids=["", "softcap"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_output_and_gradients(step, masked, softcap, sinks, monkeypatch):
    monkeypatch.setattr(local_credit, "STEP_ELEMENTS", step)
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, T, D), (B, K, T, D), (B, K, T, DV)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    sink = torch.randn(H, generator=generator, dtype=torch.float64) if sinks else None
    position = torch.arange(T)
    mask = position <= position[:, None]
    if masked == "window":
        mask = mask & (position > position[:, None] - 4)
    mask = mask.expand(B, 1, T, T)
    if masked == "per-head":
        mask = mask & ((torch.rand(B, H, T, T, generator=generator) < 0.6) | torch.eye(T, dtype=torch.bool))
    expected = written_out(*tensors, mask, 0.4, softcap, sink)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    actual, weights = local_credit.local_credit_attention(
        SimpleNamespace(), *tensors, None if masked == "causal" else mask, scaling=0.4, softcap=softcap, s_aux=sink, position_ids=position
    )
    assert weights is None
    torch.testing.assert_close(actual.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(actual.transpose(1, 2), tensors, upstream)
    for name, grad, wanted in zip("qkv", ours, torch.autograd.grad(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
