"""One rule in all ops: TypeError for an argument of another type or dtype, ValueError for a value out of range."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tinyonn import ops

Q, K, KC = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 1, 16), torch.randn(1, 2, 1, 16)
LISTS = torch.zeros(1, 64, 1, 1, dtype=torch.int32)
X, P, G = torch.randn(4, 8), torch.randn(5, 8), torch.zeros(5)
INDEX = torch.zeros(4, 2, dtype=torch.long)


def attention_stats(**options):
    return ops.attention_stats(Q, K, **options)


def block_norms(**options):
    return ops.block_norms(X, **options)


def block_sparse_attention(**options):
    return ops.block_sparse_attention(Q, K, K, LISTS, LISTS[..., 0] + 1, **options)


def compressed_attention(**options):
    return ops.compressed_attention(Q, KC, KC, **{"compress_size": 32, **options})


def dyn_nsa(**options):
    return ops.dyn_nsa(Q, K, K, KC, KC, Q[..., :3], torch.zeros(1), torch.zeros(1), **{"compress_size": 32, **options})


def expert_mlp(**options):
    return ops.expert_mlp(X, torch.ones(2, 6, 8), torch.ones(2, 8, 3), INDEX, torch.ones(4, 2), activation="clamped_silu", **options)


def integrate_sps(**options):
    return ops.integrate_sps(X, X, [0, 8], **options)


def scatter_surprise(num_experts):
    return ops.scatter_surprise(torch.ones(4, 2), INDEX, num_experts)


def select_blocks(**options):
    return ops.select_blocks(Q, KC, Q[..., 0], K[..., 0], **{"compress_size": 32, **options})


def select_by_budget(budget=0.5, **options):
    return ops.select_by_budget(X, budget, **options)


def sliding_window_attention(window=8, **options):
    return ops.sliding_window_attention(Q, K, K, window, **options)


def sparse_diversity_loss(target_k=1.0, **options):
    return ops.sparse_diversity_loss(P, torch.ones(4), target_k, **options)


def surprise_min_loss(**options):
    return ops.surprise_min_loss(X, X.abs(), **options)


def threshold_route(**options):
    return ops.threshold_route(X, P, G, **options)


def token_grad_norms(**options):
    return ops.token_grad_norms(X, X, **options)


SIZES = [
    (attention_stats, "window"), (block_norms, "block_size"), (block_sparse_attention, "block_size"),
    (compressed_attention, "compress_size"), (compressed_attention, "num_keys"), (dyn_nsa, "block_size"), (dyn_nsa, "max_blocks"),
    (dyn_nsa, "window"), (scatter_surprise, "num_experts"), (select_blocks, "compress_size"), (select_blocks, "max_blocks"),
    (select_blocks, "num_keys"), (select_by_budget, "max_experts"), (sliding_window_attention, "window"),
    (threshold_route, "max_experts"), (threshold_route, "min_experts"), (token_grad_norms, "block_size"),
]  # fmt: skip
NUMBERS = [
    (attention_stats, "scale"), (attention_stats, "softcap"), (block_sparse_attention, "scale"), (compressed_attention, "scale"),
    (dyn_nsa, "scale"), (dyn_nsa, "temperature"), (expert_mlp, "limit"), (select_blocks, "temperature"), (select_by_budget, "budget"),
    (sliding_window_attention, "scale"), (sparse_diversity_loss, "target_k"), (surprise_min_loss, "temperature"),
    (surprise_min_loss, "w_ce"), (surprise_min_loss, "w_kl"), (threshold_route, "scale"),
    *((op, "softcap") for op in (block_sparse_attention, compressed_attention, dyn_nsa, select_blocks, sliding_window_attention)),
]  # fmt: skip
CHOICES = [
    (expert_mlp, "surprise_kind"), (select_by_budget, "combine"), (threshold_route, "combine"), (threshold_route, "form"),
    (token_grad_norms, "wrt"), *((op, "impl") for op in (attention_stats, dyn_nsa, expert_mlp, integrate_sps, select_by_budget)),
]  # fmt: skip
FLAGS = [
    (attention_stats, "causal"), (dyn_nsa, "detach_scores"), (expert_mlp, "gated"), (expert_mlp, "interleaved"),
    (expert_mlp, "transposed"), (integrate_sps, "return_per_token"), (select_blocks, "detach_scores"),
]  # fmt: skip
MASKS = [
    (attention_stats, "key_mask", (1, 64)), (attention_stats, "span_mask", (1, 64)), (integrate_sps, "token_mask", (4,)),
    (sparse_diversity_loss, "expert_mask", (5,)), (sparse_diversity_loss, "token_mask", (4,)), (surprise_min_loss, "token_mask", (4,)),
    (threshold_route, "expert_mask", (5,)),
]  # fmt: skip


def name_of(value: object) -> str | None:
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize(("op", "name"), SIZES, ids=name_of)
@pytest.mark.parametrize("value", ["8", 8.0, True], ids=repr)
def test_a_size_must_be_an_int(op, name, value):
    with pytest.raises(TypeError, match=f"{name} must be an int, got {type(value).__name__}"):
        op(**{name: value})


@pytest.mark.parametrize(("op", "name"), SIZES, ids=name_of)
def test_a_negative_size_is_a_wrong_value(op, name):
    with pytest.raises(ValueError, match=r"must"):
        op(**{name: -1})


@pytest.mark.parametrize(("op", "name"), NUMBERS, ids=name_of)
@pytest.mark.parametrize("value", ["1", [1.0], True], ids=repr)
def test_a_number_must_be_a_number(op, name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number, got {type(value).__name__}"):
        op(**{name: value})


@pytest.mark.parametrize(("op", "name"), NUMBERS, ids=name_of)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf], ids=repr)
def test_a_number_out_of_range_is_a_wrong_value(op, name, value):
    with pytest.raises(ValueError, match=f"{name} must be (finite|above 0|at least 0|at least 0 and at most 1), got {value}"):
        op(**{name: value})


@pytest.mark.parametrize(("op", "name"), CHOICES, ids=name_of)
def test_a_choice_names_what_there_is(op, name):
    with pytest.raises(ValueError, match=f"{name} must be one of [a-z_]+, .*, got 'other'"):
        op(**{name: "other"})


@pytest.mark.parametrize(("op", "name"), CHOICES, ids=name_of)
@pytest.mark.parametrize("value", [np.zeros(2), torch.zeros(2), ["torch"], None], ids=lambda x: type(x).__name__)
def test_a_choice_that_is_no_string_is_a_wrong_value(op, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be one of [a-z_]+, [^\n]*, got [^\n]*\.$"):
        op(**{name: value})


@pytest.mark.parametrize(("op", "name"), FLAGS, ids=name_of)
@pytest.mark.parametrize("value", ["no", 0, None, np.ones(2)], ids=lambda x: type(x).__name__)
def test_a_flag_must_be_true_or_false(op, name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be True or False, got [^\n]*\.$"):
        op(**{name: value})


@pytest.mark.parametrize(("op", "name"), NUMBERS, ids=name_of)
@pytest.mark.parametrize("value", [10**400, -(10**5000)], ids=["1e400", "-1e5000"])
def test_a_number_that_no_float_holds_is_a_wrong_value(op, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number that a float holds, got .{{5,60}}\\.$"):
        op(**{name: value})


@pytest.mark.parametrize(("op", "name"), NUMBERS, ids=name_of)
def test_a_number_may_be_of_numpy(op, name):
    for impl in ("auto", "reference") if op not in (sparse_diversity_loss, surprise_min_loss) else (None,):
        options = {} if impl is None else {"impl": impl}
        for got, wanted in zip(*(results(op(**{name: number, **options})) for number in (np.float64(0.5), 0.5)), strict=True):
            assert torch.equal(got, wanted)


def results(found: object) -> list[torch.Tensor]:
    return [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]


@pytest.mark.parametrize(("op", "name", "shape"), MASKS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_a_mask_must_be_bool(op, name, shape, dtype):
    with pytest.raises(TypeError, match=f"{name} must be a bool tensor, got {dtype}"):
        op(**{name: torch.ones(shape, dtype=dtype)})


@pytest.mark.parametrize(("op", "name", "shape"), MASKS, ids=name_of)
def test_a_mask_must_be_a_tensor_of_the_shape_on_the_device(op, name, shape):
    op(**{name: torch.ones(shape, dtype=torch.bool)})
    with pytest.raises(TypeError, match=f"{name} must be a bool tensor, got list"):
        op(**{name: torch.ones(shape).bool().tolist()})
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        op(**{name: torch.ones(shape[-1] + 1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=f"{name} must be on cpu, got meta"):
        op(**{name: torch.ones(shape, dtype=torch.bool, device="meta")})
