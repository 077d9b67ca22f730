"""Predictive integrity against a formula in Python's own floats, at the limits of what numbers can hold."""

from __future__ import annotations

import math

import pytest
import torch

from tinyonn.train import output_entropy, predictive_integrity, regeneration_rate

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def by_hand(loss: float, tau: float, surprise: float, alpha: float, gamma: float) -> float:
    return math.exp(-alpha * ((1 - gamma) * loss / max(tau, 1e-3) + gamma * surprise))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_formula_of_each_token(alpha, gamma):
    loss = torch.tensor([[0.0, 0.5, 2.0], [4.0, 1.5, 0.01]], dtype=torch.float64)
    tau = torch.tensor([[1.0, 0.5, 1e-5], [3.0, 0.0, 2.0]], dtype=torch.float64)
    surprise = torch.tensor([[0.0, 1.0, 0.1], [0.3, 0.0, 5.0]], dtype=torch.float64)
    found = predictive_integrity(loss, tau, surprise, alpha=alpha, gamma=gamma)
    for place in ((row, column) for row in range(2) for column in range(3)):
        numbers = (loss[place].item(), tau[place].item(), surprise[place].item())
        expected = max(by_hand(*numbers, alpha, gamma), torch.finfo(torch.float64).tiny)
        assert found.integrity[place].item() == pytest.approx(expected, rel=1e-12)
        assert found.accuracy[place].item() == pytest.approx(alpha * (1 - gamma) * numbers[0] / max(numbers[1], 1e-3))
        assert found.complexity[place].item() == pytest.approx(alpha * gamma * numbers[2])


def test_means_over_sequences_and_the_batch_are_taken_before_the_formula():
    generator = torch.Generator().manual_seed(0)
    loss, tau, surprise = (torch.rand(3, 7, generator=generator, dtype=torch.float64) * 2 for _ in range(3))
    mask = torch.rand(3, 7, generator=generator) < 0.6
    of_sequences = predictive_integrity(loss, tau, surprise, alpha=0.7, gamma=0.4, over="sequence", token_mask=mask)
    of_batch = predictive_integrity(loss, tau, surprise, alpha=0.7, gamma=0.4, over="batch", token_mask=mask.long() * 5)
    for row in range(3):
        means = [sum(x[row][mask[row]].tolist()) / int(mask[row].sum()) for x in (loss, tau, surprise)]
        assert of_sequences.integrity[row].item() == pytest.approx(by_hand(*means, 0.7, 0.4))
    assert of_sequences.integrity.shape == (3,)
    assert of_batch.integrity.item() == pytest.approx(
        by_hand(*[sum(x[mask].tolist()) / int(mask.sum()) for x in (loss, tau, surprise)], 0.7, 0.4)
    )
    whole = predictive_integrity(loss, tau, surprise, over="sequence")
    assert whole.integrity[1].item() == pytest.approx(by_hand(*[x[1].mean().item() for x in (loss, tau, surprise)], 1.0, 0.5))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 1e308])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_finite_input_gives_a_number_above_0_and_at_most_1(dtype, alpha, gamma):
    most = torch.finfo(dtype).max
    ends = torch.tensor([-most, -1.0, -0.0, 0.0, torch.finfo(dtype).tiny, 1e-3, 1.0, most], dtype=dtype)
    loss, tau, surprise = (x.reshape(-1) for x in torch.meshgrid(ends, ends, ends, indexing="ij"))
    for over in ("token", "sequence", "batch"):
        found = predictive_integrity(loss[None], tau[None], surprise[None], alpha=alpha, gamma=gamma, over=over)
        for x in found:
            assert x.isfinite().all()
        assert (found.integrity > 0).all()
        assert (found.integrity <= 1).all()


def test_a_large_loss_leaves_the_smallest_number_and_more_loss_never_more_integrity():
    loss = torch.linspace(0, 200, 2001)
    integrity = predictive_integrity(loss, torch.ones(()), torch.zeros(()), gamma=0.0).integrity
    assert (integrity.diff() <= 0).all()
    assert integrity[0] == 1
    assert integrity[-1] == torch.finfo(torch.float32).tiny


def test_nan_stays_with_its_token_and_a_sequence_without_tokens_is_nan():
    loss = torch.tensor([[1.0, torch.nan, 2.0], [1.0, 1.0, 1.0]])
    ones = torch.ones(2, 3)
    assert predictive_integrity(loss, ones, ones).integrity.isnan().tolist() == [[False, True, False], [False] * 3]
    mask = torch.tensor([[True, False, True], [False] * 3])
    assert predictive_integrity(loss, ones, ones, over="sequence", token_mask=mask).integrity.isnan().tolist() == [False, True]
    assert predictive_integrity(loss, ones, ones, over="batch", token_mask=mask).integrity.item() == pytest.approx(
        math.exp(-(0.5 * 1.5 + 0.5))
    )


def test_gradients_and_broadcasting():
    loss = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    surprise = torch.tensor([[0.2], [0.4], [0.6]], dtype=torch.float64, requires_grad=True)
    assert predictive_integrity(loss, tau, surprise).integrity.shape == (3, 2)
    assert torch.autograd.gradcheck(lambda *x: predictive_integrity(*x, alpha=0.8, gamma=0.3), (loss, tau, surprise))


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_of_outputs(dtype, chunk):
    logits = (torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    logits[0, 1, 3:] = -torch.inf
    found = output_entropy(logits.requires_grad_(), chunk=chunk)
    for row in range(2):
        for token in range(5):
            weights = [math.exp(x) for x in logits[row, token].tolist()]
            shares = [weight / sum(weights) for weight in weights if weight]
            assert found[row, token].item() == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-4)
    assert not found.requires_grad
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output_entropy(torch.zeros(4, 50)).tolist() == pytest.approx([math.log(50)] * 4)
    assert output_entropy(torch.zeros(0, 3, 5)).shape == (0, 3)
    assert output_entropy(torch.tensor([[0.0, torch.nan], [-torch.inf, -torch.inf]])).isnan().all()


def test_the_rate_falls_from_its_ceiling_to_its_floor():
    assert regeneration_rate(0.0, floor=0.1, ceiling=0.6) == pytest.approx(0.6)
    assert regeneration_rate(1.0, floor=0.1, ceiling=0.6) == pytest.approx(0.1)
    rates = regeneration_rate(torch.linspace(0, 1, 11), floor=0.2, ceiling=0.2)
    assert isinstance(rates, torch.Tensor)
    assert torch.allclose(rates, torch.tensor(0.2))
    assert (regeneration_rate(torch.linspace(0, 1, 11)).diff() < 0).all()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x: predictive_integrity(x.long(), x, x), TypeError, "loss must be float16, bfloat16, float32 or float64, got torch.int64."),
        (lambda x: predictive_integrity(x, x[:2], x), ValueError, "loss, tau, surprise and token_mask must have shapes that broadcast"),
        (lambda x: predictive_integrity(x, x, x, gamma=1.5), ValueError, "gamma must be at least 0 and at most 1, got 1.5."),
        (lambda x: predictive_integrity(x, x, x, alpha=-1), ValueError, "alpha must be at least 0, got -1."),
        (lambda x: predictive_integrity(x, x, x, over="tokens"), ValueError, "over must be"),
        (lambda x: predictive_integrity(x, x, x, token_mask=x > 0), ValueError, "token_mask must be left out with over='token'"),
        (lambda x: predictive_integrity(x, x, x, over="batch", token_mask=x), TypeError, "token_mask must be a tensor of bool or integers"),
        (lambda x: output_entropy(x[:0]), ValueError, "logits must have shape (..., V) with V of at least 1, got (0,)."),
        (lambda x: output_entropy(x, chunk=0), ValueError, "chunk must be"),
        (lambda x: regeneration_rate(0.5, floor=0.7, ceiling=0.6), ValueError, "floor must be at least 0 and at most 0.6, got 0.7."),
        (lambda x: regeneration_rate(1.5), ValueError, "integrity must be at least 0 and at most 1, got 1.5."),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error) as caught:
        call(torch.rand(3))
    assert says in str(caught.value)
