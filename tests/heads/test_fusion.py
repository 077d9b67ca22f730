"""Ranks and norms against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tinyonn.errors import InputError
from tinyonn.heads.score.fusion import RankedHead, average_ranks, fuse, normalise, top_heads


@pytest.mark.parametrize("heads", [1, 2, 9, 64])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
def test_ranks_and_percentiles_and_z_scores_are_those_of_scipy(heads, ties):
    values = np.random.default_rng(heads).normal(size=heads)
    values = values.round() if ties else values
    assert average_ranks(values).tolist() == stats.rankdata(values, method="average").tolist()
    if heads > 1 and np.ptp(values):
        np.testing.assert_allclose(normalise(values, "zscore"), stats.zscore(values, ddof=0), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(normalise(values, "percentile"), (stats.rankdata(values) - 1) / (heads - 1), rtol=1e-12)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
def test_a_percentile_is_the_share_of_the_other_heads_that_score_lower(ties):
    values = np.random.default_rng(3).normal(size=9)
    values = values.round() if ties else values
    shares = [stats.percentileofscore(np.delete(values, head), values[head], kind="mean") / 100 for head in range(9)]
    np.testing.assert_allclose(normalise(values, "percentile"), shares, rtol=1e-12, atol=1e-15)
    by_hand = [(np.sum(values < value) + (np.sum(values == value) - 1) / 2) / 8 for value in values]
    np.testing.assert_allclose(normalise(values, "percentile"), by_hand, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
@pytest.mark.parametrize("heads", [1, 3, 7])
def test_equal_scores_are_in_the_middle(value, heads):
    row = [value] * heads
    assert normalise(row, "zscore").tolist() == [0.0] * heads
    assert normalise(row, "percentile").tolist() == [0.5] * heads
    assert average_ranks(row).tolist() == [(heads + 1) / 2] * heads


def test_percentiles_span_zero_to_one():
    assert normalise([3.0, -1.0, 100.0, 3.0, 4.0], "percentile").tolist() == [0.375, 0.0, 1.0, 0.375, 0.75]


def test_fusion_by_hand():
    scores = {
        "out": [[1.0, 5.0, 3.0], [2.0, 2.0]],
        "ent": [[-1.0, -3.0, -2.0], [-0.5, -0.4]],
        "task": [[0.2, 0.2, 0.9], [0.0, 1.0]],
    }
    fused = fuse(scores, {"out": 1.0, "ent": 0.5, "task": 2.0})
    # layer 0: out 1 3 2, ent 3 1 2, task 1.5 1.5 3; layer 1: out 1.5 1.5, ent 1 2, task 1 2
    assert [row.tolist() for row in fused] == [[1 + 1.5 + 3, 3 + 0.5 + 3, 2 + 1 + 6], [1.5 + 0.5 + 2, 1.5 + 1 + 4]]


def test_a_weight_of_zero_leaves_a_score_out():
    scores = {"out": [[1.0, 2.0]], "ent": [[9.0, 3.0]]}
    assert fuse(scores, {"out": 1.0, "ent": 0.0})[0].tolist() == [1.0, 2.0]


def test_the_best_heads_come_first_and_equal_ones_in_the_models_order():
    combined = [np.array([2.0, 5.0]), np.array([5.0, 1.0, 7.0])]
    assert top_heads(combined, 3) == [RankedHead(1, 1, 2, 7.0), RankedHead(2, 0, 1, 5.0), RankedHead(3, 1, 0, 5.0)]
    assert [head.rank for head in top_heads(combined, 99)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_has_no_rank(bad):
    with pytest.raises(InputError, match=f"scores must be finite to be ranked, got {bad} at head 1"):
        fuse({"out": [[1.0, bad]]}, {"out": 1.0})
    with pytest.raises(InputError, match="scores must be finite"):
        normalise([bad, 1.0])


def test_weights_must_be_of_the_scores():
    with pytest.raises(InputError, match=r"weights must have the names out, got out, ent\."):
        fuse({"out": [[1.0]]}, {"out": 1.0, "ent": 1.0})
    with pytest.raises(InputError, match="norm_mode must be one of zscore, percentile, got 'minmax'"):
        normalise([1.0, 2.0], "minmax")
