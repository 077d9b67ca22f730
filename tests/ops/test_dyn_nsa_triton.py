"""DynNSA's Triton kernels against the dense float64 oracle: values, every gradient, packing, padding, decoding, any group."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.testing import IMPLS, TOLERANCE, assert_close_rms, dtype_id, impl_device

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]
sequences = importlib.import_module("tinyonn.reference.dyn_nsa").sequences  # the package has a function of the module's name
DEVICE = impl_device("triton")
HALF = torch.float16  # Triton's interpreter multiplies bfloat16 as integers


def pooled(x: Tensor, size: int) -> Tensor:
    """Means of whole blocks of positions, (B, T, K, D) -> (B, T // size, K, D)."""
    whole = x.shape[1] // size * size
    return x[:, :whole].unflatten(1, (-1, size)).mean(2) if whole else x[:, :0]


def case(
    tokens: int = 200,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    queries: int | None = None,
    compress_size: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharpness: float = 3.0,
) -> dict[str, Tensor]:
    """Unit-scale inputs; keys of a position share a part, so that compressed keys are not all alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries = tokens if queries is None else queries
    topics = draw(batch, -(-tokens // 16), kv_heads, dim).repeat_interleave(16, 1)[:, :tokens]
    key = draw(batch, tokens, kv_heads, dim) * 0.6 + topics * 0.8
    value = draw(batch, tokens, kv_heads, dim)
    tensors = {
        "query": draw(batch, queries, heads, dim) * sharpness**0.5,
        "key": key,
        "value": value,
        "key_compressed": pooled(key, compress_size) * sharpness**0.5,
        "value_compressed": pooled(value, compress_size),
        "gates": draw(batch, queries, heads, 3),
        "base": draw(kv_heads) * 0.3,
        "slope": draw(kv_heads) * 0.3,
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def compare(function: Callable[..., Any], oracle: Callable[..., Any], tensors: dict[str, Tensor], dtype: torch.dtype, grads: int) -> None:
    """Outputs and the gradients of random sums of them, by the first `grads` tensors; outputs of integers must be equal."""
    ours = {name: x.to(DEVICE, dtype if x.is_floating_point() else x.dtype).clone() for name, x in tensors.items()}
    exact = {name: x.double().cpu() if x.is_floating_point() else x.cpu() for name, x in ours.items()}
    for leaves in (ours, exact):
        for name in list(leaves)[:grads]:
            leaves[name].requires_grad_()
    results = []
    for call, leaves in ((function, ours), (oracle, exact)):
        outputs = call(**leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        generator = torch.Generator().manual_seed(2)
        loss = torch.zeros((), dtype=torch.float64)
        for out in outputs:
            if out.requires_grad:
                cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).double()
                loss = loss + (out.cpu().double().masked_fill(out.cpu().isinf(), 0) * cotangent).sum()
        wanted = list(leaves.values())[:grads]
        found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True) if loss.requires_grad else wanted
        results.append((outputs, found if loss.requires_grad else [torch.zeros_like(leaf) for leaf in wanted]))
    for number, (mine, theirs) in enumerate(zip(results[0][0], results[1][0], strict=True)):
        if not mine.is_floating_point():
            assert torch.equal(mine.cpu(), theirs), f"output {number}"
        else:
            assert_close_rms(mine, theirs, dtype, f"output {number}")
    for name, mine, theirs in zip(tensors, results[0][1], results[1][1], strict=False):
        # Two numbers each, sums over all tokens that mostly cancel.
        loose = 6 if name in ("base", "slope") else 1
        assert_close_rms(mine, theirs, TOLERANCE[dtype] * loose, f"gradient of {name}")


SHAPES: dict[str, dict[str, Any]] = {
    "G2-D16": {},
    "G1-D60": {"heads": 1, "kv_heads": 1, "dim": 60, "tokens": 130},
    "G3-batch": {"heads": 3, "kv_heads": 1, "batch": 2, "tokens": 97},
    "G8": {"heads": 8, "kv_heads": 1, "tokens": 70},
    "G20": {"heads": 20, "kv_heads": 1, "tokens": 70},
    "decode-1": {"queries": 1},
    "decode-70": {"queries": 70},
    "T1": {"tokens": 1},
    "T63": {"tokens": 63},
}
PACKED = torch.tensor([0, 50, 51, 115, 115, 200], dtype=torch.int32)
BOUNDS: dict[str, dict[str, Tensor]] = {
    "packed": {"cu_seqlens": PACKED},
    "left": {"key_start": torch.tensor([13, 190], dtype=torch.int32)},
    "both": {"key_start": torch.tensor([13, 0], dtype=torch.int32), "key_end": torch.tensor([150, 3], dtype=torch.int32)},
}


def bounded(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, with rows that nothing may read set to something large, and the bounds."""
    tensors = case(batch=1 if name == "packed" else 2, compress_size=16)
    bounds = BOUNDS[name]
    if name == "packed":
        for part in ("key_compressed", "value_compressed"):
            used = torch.zeros(tensors[part].shape[1], dtype=torch.bool)
            for start, end in pairwise(PACKED.tolist()):
                used[start // 16 : start // 16 + (end - start) // 16] = True
            tensors[part][:, ~used] = 1e3
    return tensors, bounds


def with_bounds(function: Callable[..., Any], bounds: dict[str, Tensor], **options: Any) -> Callable[..., Any]:
    def call(**leaves: Tensor) -> Any:
        device = next(iter(leaves.values())).device
        return function(**leaves, **{name: bound.to(device) for name, bound in bounds.items()}, **options)

    return call


def check_window(tensors: dict[str, Tensor], bounds: dict[str, Tensor], dtype: torch.dtype = torch.float32, window: int = 37) -> None:
    parts = {name: tensors[name] for name in ("query", "key", "value")}
    compare(
        with_bounds(ops.sliding_window_attention, bounds, window=window, impl="triton"),
        with_bounds(reference.sliding_window_attention, bounds, window=window),
        parts, dtype, 3,
    )  # fmt: skip


def check_compressed(tensors: dict[str, Tensor], bounds: dict[str, Tensor], size: int, dtype: torch.dtype = torch.float32) -> None:
    parts = {name: tensors[name] for name in ("query", "key_compressed", "value_compressed")}
    options = {"compress_size": size, "num_keys": tensors["key"].shape[1]}
    compare(
        with_bounds(ops.compressed_attention, bounds, **options, impl="triton"),
        with_bounds(reference.compressed_attention, bounds, **options),
        parts, dtype, 3,
    )  # fmt: skip


@pytest.mark.parametrize("shape", list(SHAPES))
def test_window_and_compressed_match_the_oracle(shape):
    tensors = case(**SHAPES[shape])
    check_window(tensors, {})
    check_compressed(tensors, {}, 32)


@pytest.mark.parametrize("bounds", list(BOUNDS))
def test_window_and_compressed_within_bounds(bounds):
    tensors, where = bounded(bounds)
    check_window(tensors, where)
    check_compressed(tensors, where, 16)


def test_window_and_compressed_in_half_precision():
    tensors = case(130, dim=100)
    check_window(tensors, {}, HALF)
    check_compressed(tensors, {}, 32, HALF)


def random_lists(batch: int, queries: int, tokens: int, kv_heads: int, block_size: int, bounds: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Up to four ascending blocks of each query's own sequence up to its own block, the first among them; some lists are empty."""
    generator = torch.Generator().manual_seed(5)
    indices = torch.full((batch, queries, kv_heads, 4), -1, dtype=torch.int32)
    query = torch.zeros(batch, queries, 1, 1)
    named = {"cu_seqlens": None, "key_start": None, "key_end": None} | bounds
    for span in sequences(query, tokens, block_size, **named):
        for row in range(span.queries.start, span.queries.stop):
            own = (row - span.queries.start + span.first) // block_size
            for head in range(kv_heads):
                chosen = {0, *torch.randint(0, own + 1, (3,), generator=generator).tolist()} if row % 7 else set()
                indices[span.batch, row, head, : len(chosen)] = torch.tensor(sorted(chosen), dtype=torch.int32)
    return indices, (indices >= 0).sum(-1, dtype=torch.int32)


def check_block_sparse(
    tensors: dict[str, Tensor], bounds: dict[str, Tensor], block_size: int = 32, dtype: torch.dtype = torch.float32, biased: bool = True
) -> None:
    parts = {name: tensors[name] for name in ("query", "key", "value")}
    batch, queries = tensors["query"].shape[:2]
    tokens, kv_heads = tensors["key"].shape[1:3]
    indices, counts = random_lists(batch, queries, tokens, kv_heads, block_size, bounds)
    if biased:
        parts["bias"] = torch.randn(indices.shape, generator=torch.Generator().manual_seed(6))
    grads = len(parts)
    parts |= {"indices": indices, "counts": counts}
    compare(
        with_bounds(ops.block_sparse_attention, bounds, block_size=block_size, impl="triton"),
        with_bounds(reference.block_sparse_attention, bounds, block_size=block_size),
        parts, dtype, grads,
    )  # fmt: skip


@pytest.mark.parametrize("shape", list(SHAPES))
def test_block_sparse_matches_the_oracle(shape):
    check_block_sparse(case(**SHAPES[shape]), {})


@pytest.mark.parametrize("bounds", list(BOUNDS))
def test_block_sparse_within_bounds(bounds):
    check_block_sparse(*bounded(bounds), block_size=16)


@pytest.mark.parametrize("block_size", [16, 128])
def test_block_sparse_at_any_block_size(block_size):
    check_block_sparse(case(150), {}, block_size, biased=False)


def test_block_sparse_in_half_precision():
    check_block_sparse(case(130, dim=100), {}, 64, HALF)


def test_a_hot_block_is_worked_on_in_segments(monkeypatch):
    """The first block is on every list: its sums are made in parts, and added up."""
    from tinyonn_kernels import block_sparse_bwd

    monkeypatch.setattr(block_sparse_bwd, "MIN_SEGMENT", 16)
    check_block_sparse(case(150, batch=2), {}, 32)
