"""Routing by linear scores, and weights that do not sum to 1. `test_threshold_route` holds both to their float64 definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tinyonn import ops, reference

IMPLS = ("torch", "reference")


def router(tokens: int, experts: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, prototypes, thresholds."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((tokens, 12), (experts, 12), (experts,))
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("of_tokens", [1e30, 1e-30, 1.0])
def test_a_linear_score_is_a_product_with_the_token_at_rms_1(of_tokens, impl):
    """By hand: the length of a token has no part in it, that of a prototype has."""
    x, prototypes, thresholds = router(30, 8, dtype=torch.float32)
    wide = x.double().numpy()
    wanted = (wide / (wide**2).mean(1, keepdims=True) ** 0.5) @ (3 * prototypes.double().numpy()).T - thresholds.double().numpy()
    options = {"form": "linear", "combine": "sigmoid", "scale": 5.0, "impl": impl}
    found = ops.threshold_route(x * of_tokens, 3 * prototypes, thresholds, **options)
    torch.testing.assert_close(found.scores.double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.count, torch.from_numpy((wanted > 0).sum(1).clip(1, 8)).float())
    shifted = ops.threshold_route(x * of_tokens, 3 * prototypes, thresholds + 0.5, **options)
    for number, index in enumerate(shifted.top_k_index[:, 0].tolist()):  # weights do not depend on thresholds
        weight = 1 / (1 + math.exp(-wanted[number, index] - float(thresholds[index])))
        assert shifted.top_k_weights[number, 0].item() == pytest.approx(weight, rel=1e-4)
    x[1] = 0
    zero = ops.threshold_route(x, prototypes, thresholds, **options)
    torch.testing.assert_close(zero.scores[1], -thresholds)
    assert not zero.top_k_weights.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_continuous_weight_is_0_at_the_threshold(impl):
    x, prototypes, _ = router(6, 7)
    low = reference.threshold_route(x, prototypes, torch.zeros(7, dtype=torch.float64), form="linear", max_experts=7).scores[:, 2]
    for distance, weight in ((1e-9, 0.0), (-1e-9, 1e-9), (-0.5, 0.5)):
        thresholds = torch.full((7,), 99.0, dtype=torch.float64)
        thresholds[2] = low[0] + distance
        options = {"form": "linear", "combine": "relu", "min_experts": 0, "impl": impl}
        found = ops.threshold_route(x[:1], prototypes, thresholds, **options)
        assert found.top_k_weights.sum().item() == pytest.approx(weight, abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_linear_score_out_of_range_marks_the_token(value, impl):
    x, prototypes, thresholds = router(4, 6)
    prototypes[2, 0] = value
    found = ops.threshold_route(x, prototypes, thresholds, form="linear", combine="sigmoid", impl=impl)
    assert found.top_k_index[:, 0].tolist() == [2] * 4
    assert found.top_k_weights[:, 0].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("level", "rank"), [(0.3, 2), (0.7, 3), (1.0, 4), (1.0, 9), (0.5, 12)])
def test_a_level_is_subtracted_from_all_margins_of_a_token(level, rank, impl):
    """By hand: the middle between the margin at the rank and the next, or that margin if there is no next, or 0 if there is none."""
    x, prototypes, thresholds = router(30, 9)
    plain = reference.threshold_route(x, prototypes, thresholds, form="linear").scores
    rows = []
    for row in plain.tolist():
        ordered = sorted(row, reverse=True)[rank - 1 : rank + 1]
        rows.append([value - level * (sum(ordered) / len(ordered) if ordered else 0) for value in row])
    options = {"form": "linear", "level": level, "level_rank": rank, "min_experts": 0, "max_experts": 9, "combine": "sigmoid", "impl": impl}
    found = ops.threshold_route(x, prototypes, thresholds, **options)
    torch.testing.assert_close(found.scores, torch.tensor(rows, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.count, (found.scores > 0).sum(-1).double())
    if level == 1 and rank < 9:
        assert ((found.top_k_index < 9).sum(-1) == rank).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_level_is_a_constant_and_its_tokens_and_experts_are_those_that_count(impl):
    x, prototypes, thresholds = router(30, 9)
    options = {"form": "linear", "level": 0.6, "level_rank": 3, "impl": impl}
    leaves = [tensor.clone().requires_grad_() for tensor in (x, prototypes, thresholds)]
    with_level = torch.autograd.grad(ops.threshold_route(*leaves, **options).scores.sum(), leaves)
    without = torch.autograd.grad(ops.threshold_route(*leaves, form="linear", impl=impl).scores.sum(), leaves)
    for a, b in zip(with_level, without, strict=True):
        torch.testing.assert_close(a, b)
    mask = torch.arange(9) < 6
    masked = ops.threshold_route(x, prototypes, thresholds, expert_mask=mask, **options)
    fewer = ops.threshold_route(x, prototypes[:6], thresholds[:6], **options)
    torch.testing.assert_close(masked.scores[:, :6], fewer.scores)
    few = ops.threshold_route(x, prototypes, thresholds, expert_mask=torch.arange(9) < 2, **options)
    assert (few.scores[:, 2:] == -math.inf).all()
    assert few.scores[:, :2].isfinite().all()
    x[4, 2] = math.nan
    unknown = ops.threshold_route(x, prototypes, thresholds, **options)
    assert unknown.top_k_weights[4, 0].isnan()
    rest = torch.arange(30) != 4
    assert torch.equal(unknown.scores[rest], ops.threshold_route(x[rest], prototypes, thresholds, **options).scores)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": 1.5}, ValueError, "level must be at least 0 and at most 1, got 1.5"),
        ({"level": math.nan}, ValueError, "level must be finite, got nan"),
        ({"level": "all"}, TypeError, "level must be a number, got str"),
        ({"level_rank": 0}, ValueError, "level_rank must be at least 1, got 0"),
        ({"level_rank": 1.0}, TypeError, "level_rank must be an int, got float"),
    ],
)
def test_a_level_that_is_none_is_named(options, error, message):
    with pytest.raises(error, match=message):
        ops.threshold_route(*router(3, 4), form="linear", **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_thresholds_of_tokens_are_subtracted_after_the_level(impl):
    x, prototypes, thresholds = router(30, 9)
    of_tokens = torch.linspace(-1, 1, 30, dtype=torch.float64)
    options = {"form": "linear", "level": 1.0, "level_rank": 3, "min_experts": 0, "max_experts": 9, "impl": impl}
    plain = ops.threshold_route(x, prototypes, thresholds, **options)
    found = ops.threshold_route(x, prototypes, thresholds, token_thresholds=of_tokens, **options)
    torch.testing.assert_close(found.scores, plain.scores - of_tokens[:, None])
    assert ((found.top_k_index < 9).sum(-1) == (found.scores > 0).sum(-1)).all()
    with pytest.raises(ValueError, match=r"token_thresholds must have shape \(30,\), got \(9,\)"):
        ops.threshold_route(x, prototypes, thresholds, token_thresholds=of_tokens[:9], **options)
