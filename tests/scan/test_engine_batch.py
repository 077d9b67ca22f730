"""Padding and batch composition do not change a stored value; bad batches are refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tinyonn.errors import InputError
from tinyonn.scan.engine.engine import ScanEngine, SequenceScan
from tinyonn.testing import tiny_causal_lm

LENGTHS = [9, 14, 1, 6]


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (length,), generator=generator) for length in LENGTHS]


def padded(rows: list[torch.Tensor], side: str, width: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for ids_row, mask_row, row in zip(ids, mask, rows, strict=True):
        start = {"left": width - len(row), "right": 0, "both": (width - len(row)) // 2}[side]
        ids_row[start : start + len(row)] = row
        mask_row[start : start + len(row)] = 1
    return ids, mask


def assert_same(result: SequenceScan, alone: SequenceScan) -> None:
    for name in ("activation", "grad_norm", "loss"):
        stored, expected = getattr(result, name), getattr(alone, name)
        assert stored.shape == expected.shape
        np.testing.assert_allclose(stored, expected, rtol=2e-4, atol=2e-5 * np.nanmax(expected, initial=0), err_msg=name)
    np.testing.assert_array_equal(result.integral.count, alone.integral.count)
    np.testing.assert_allclose(result.integral.grad_mean, alone.integral.grad_mean, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("credit", ["full", "local"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gpt2", "qwen3_moe"])
def test_padding_and_neighbours_change_nothing(arch, side, credit):
    rows = sequences()
    with ScanEngine(tiny_causal_lm(arch), credit=credit) as engine:
        alone = [engine.scan(row[None])[0] for row in rows]
        together = engine.scan(*padded(rows, side, 17, pad=3))
        pair = engine.scan(*padded([rows[3], rows[1]], side, 14, pad=-100))
    assert [len(result.loss) for result in together] == LENGTHS
    for result, expected in zip(together, alone, strict=True):
        assert_same(result, expected)
    assert_same(pair[0], alone[3])
    assert_same(pair[1], alone[1])


def test_rotary_embeddings_that_look_at_the_longest_sequence_do_not_see_its_neighbours():
    """longrope turns every sequence of a batch to its long factors as soon as one is longer than the original context."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 10, "factor": 4.0, **factors}
    model = tiny_causal_lm("llama", rope_parameters=rope)
    rows = sequences()
    with ScanEngine(model) as engine:
        alone = [engine.scan(row[None])[0] for row in rows]
        together = engine.scan(*padded(rows, "right", 14, pad=0))
    for result, expected in zip(together, alone, strict=True):
        assert_same(result, expected)
    ids, _ = padded(rows[:2], "right", 14, pad=0)
    stock = model(input_ids=ids).logits[0, :9]  # what would have been scanned, had the batch not been split
    assert not torch.allclose(stock, model(input_ids=rows[0][None]).logits[0], atol=1e-4)


def test_rotary_embeddings_that_keep_what_ran_before_are_bounded():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with ScanEngine(tiny_causal_lm("llama", rope_parameters=rope, max_position_embeddings=10)) as engine:
        assert len(engine.scan(torch.arange(10)[None])[0].loss) == 10
        with pytest.raises(InputError, match=r"input_ids must be at most 10 tokens long for this model, .* got 11"):
            engine.scan(torch.arange(11)[None])


def test_the_last_token_is_missing_and_no_other():
    with ScanEngine(tiny_causal_lm("llama")) as engine:
        results = engine.scan(*padded(sequences(), "right", 14, pad=0))
    for result, length in zip(results, LENGTHS, strict=True):
        for values in (result.activation, result.grad_norm, result.loss[:, None]):
            assert values.dtype == np.float32
            assert np.isnan(values[-1]).all()
            assert np.isfinite(values[:-1]).all()
        assert (result.integral.count == length - 1).all()


def test_integral_holds_the_moments_of_the_planes():
    with ScanEngine(tiny_causal_lm("qwen3_moe")) as engine:
        result = engine.scan(*padded(sequences(), "left", 14, pad=0))[1]
    integral = result.integral
    np.testing.assert_array_equal(integral.count, (~np.isnan(result.activation)).sum(0))
    seen = integral.count > 0
    for plane, mean, m2 in (
        (result.activation, integral.activation_mean, integral.activation_m2),
        (result.grad_norm, integral.grad_mean, integral.grad_m2),
    ):
        exact = plane.astype(np.float64)[:, seen]
        np.testing.assert_allclose(mean[seen], np.nanmean(exact, 0), rtol=1e-12)
        np.testing.assert_allclose(m2[seen], np.nansum((exact - np.nanmean(exact, 0)) ** 2, 0), rtol=1e-9)
    assert (mean[~seen] == 0).all()
    assert (m2[~seen] == 0).all()


def test_integral_of_sps_sums_standardised_layers():
    with ScanEngine(tiny_causal_lm("llama")) as engine:
        (result,) = engine.scan(sequences()[1][None])
        offsets = engine.group_offsets.tolist()
    assert len(offsets) == 5  # three layers and the output head
    expected = np.zeros(engine.blocks)
    for start, stop in pairwise(offsets):
        for plane, sign in ((result.activation, 1), (result.grad_norm, -1)):
            values = plane[:-1, start:stop].astype(np.float64)
            expected[start:stop] += sign * ((values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)).sum(0)
    np.testing.assert_allclose(result.integral.sps, expected, rtol=1e-6, atol=1e-6)


def test_gradients_do_not_depend_on_the_number_of_tokens_that_follow_in_local_credit():
    row = sequences()[1]
    with ScanEngine(tiny_causal_lm("llama"), credit="local") as engine:
        long, short = engine.scan(row[None])[0], engine.scan(row[None, :8])[0]
    np.testing.assert_allclose(long.grad_norm[:7], short.grad_norm[:7], rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.tensor([1, 2, 3]), None, r"input_ids must be \(sequences, tokens\) integers"),
        (torch.zeros(1, 3), None, "input_ids must be .* integers, got torch.float32"),
        (torch.zeros(1, 0, dtype=torch.long), None, "input_ids must be"),
        (torch.tensor([[1, 2, 97]]), None, r"input_ids must be 0 … 96, got 1 … 97"),
        (torch.tensor([[1, 2, 3]]), torch.ones(1, 2), r"attention_mask must have the shape of input_ids \(1, 3\), got \(1, 2\)"),
        (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 1], [0, 0]]), "attention_mask must mark at least one token in each row, .* 1"),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]]), "attention_mask must mark one unbroken run"),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[0, -1, -1]]), "attention_mask must hold 1 for tokens and 0 for padding, got -1"),
        (torch.tensor([[True, False]]), None, "input_ids must be .* integers, got torch.bool"),
    ],
    ids=["one-dimensional", "float", "empty", "vocabulary", "mask-shape", "empty-row", "hole", "mask-values", "bool"],
)
def test_bad_batches_are_refused(ids, mask, message):
    with ScanEngine(tiny_causal_lm("qwen3")) as engine, pytest.raises(InputError, match=message):
        engine.scan(ids, mask)


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_shortest_sequences(tokens):
    with ScanEngine(tiny_causal_lm("qwen3_moe"), credit="local") as engine:
        (result,) = engine.scan(torch.arange(tokens)[None])
    assert result.activation.shape == (tokens, engine.blocks)
    assert np.isnan(result.loss[-1])
    assert np.isfinite(result.loss[:-1]).all()
    assert result.integral.count.max() == tokens - 1
