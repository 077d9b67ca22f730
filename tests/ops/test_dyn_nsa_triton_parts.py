"""The kernels of each branch and of the selection against the dense float64 oracle: values, every gradient, packing, padding, any group."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.reference.nsa._dense import sequences
from tinyonn.testing import IMPLS

from .dyn_nsa_cases import BOUNDS, DEVICE, HALF, SHAPES, bounded, case, compare

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]


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


@pytest.mark.slow
@pytest.mark.parametrize("bounds", list(BOUNDS))
def test_window_and_compressed_within_bounds(bounds):
    tensors, where = bounded(bounds)
    check_window(tensors, where)
    check_compressed(tensors, where, 16)


def test_nan_of_padding_does_not_reach_the_gradients_of_keys():
    """Padding before a sequence shares a tile of queries with it."""
    start = torch.tensor([20], dtype=torch.int32)
    tensors = {name: torch.randn(1, 64, 1, 16, generator=torch.Generator().manual_seed(3)) for name in ("query", "key", "value")}
    grads = []
    for padding in (0.0, torch.nan):
        leaves = [torch.cat([torch.full_like(x[:, :20], padding), x[:, 20:]], 1).to(DEVICE).requires_grad_() for x in tensors.values()]
        out = ops.sliding_window_attention(*leaves, 16, key_start=start.to(DEVICE), impl="triton")
        grads.append([grad[:, 20:] for grad in torch.autograd.grad(out[:, 20:].square().sum(), leaves)])
    for clean, other in zip(*grads, strict=True):
        assert torch.equal(clean, other)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_a_start_after_the_end_is_a_row_of_padding(impl):
    x = torch.randn(1, 40, 1, 16, device=DEVICE)
    bounds = {name: torch.tensor([place], dtype=torch.int32, device=DEVICE) for name, place in (("key_start", 30), ("key_end", 20))}
    assert not ops.sliding_window_attention(x, x, x, 8, impl=impl, **bounds).any()
    assert not ops.compressed_attention(x, x[:, :2], x[:, :2], compress_size=16, num_keys=40, impl=impl, **bounds)[0].any()


def test_tiles_that_all_rows_see_are_not_masked():
    """A window of three tiles and compressed keys of two, beside their edges."""
    tensors = case(320)
    check_window(tensors, {}, window=110)
    check_compressed(case(1300, queries=60, compress_size=16), {}, 16)


def test_window_and_compressed_in_half_precision():
    tensors = case(100, dim=100)
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


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16])
def test_block_sparse_with_sequences_that_end_inside_a_tile(group):
    """Neighbouring queries share a tile of 16 rows; random lists leave every seventh query without a block."""
    ends = torch.tensor([0, 21, 22, 50], dtype=torch.int32)
    check_block_sparse(case(50, heads=group, kv_heads=1), {"cu_seqlens": ends}, block_size=16)


@pytest.mark.parametrize("group", [16, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_block_sparse_with_tiles_of_64_rows(arch, group, monkeypatch):
    """An H100 multiplies 64 rows together, so several queries of a large group share a tile; an A100 keeps them apart."""
    from tinyonn_kernels import _tune
    from tinyonn_kernels.nsa import block_sparse_dq, block_sparse_fwd

    if not torch.cuda.is_available():
        monkeypatch.setattr(_tune, "DEFAULT_ARCH", arch)
    seen = []
    for module in (block_sparse_fwd, block_sparse_dq):
        tile = module.tile_of
        monkeypatch.setattr(module, "tile_of", lambda *args, tile=tile: (seen.append(tile(*args)), seen[-1])[1])
    ends = torch.tensor([0, 21, 22, 50], dtype=torch.int32)
    check_block_sparse(case(50, heads=group, kv_heads=1), {"cu_seqlens": ends}, 16, HALF)
    if not torch.cuda.is_available():
        assert set(seen) == {(64 // group, 64) if arch == 90 else (1, group)}


@pytest.mark.slow
@pytest.mark.parametrize("bounds", list(BOUNDS))
def test_block_sparse_within_bounds(bounds):
    check_block_sparse(*bounded(bounds), block_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [16, 128])
def test_block_sparse_at_any_block_size(block_size):
    check_block_sparse(case(140), {}, block_size, biased=False)


def test_block_sparse_in_half_precision():
    check_block_sparse(case(100, dim=100), {}, 64, HALF)


def test_a_hot_block_is_worked_on_in_segments(monkeypatch):
    """The first block is on every list: its sums are made in parts, and added up."""
    from tinyonn_kernels.nsa import block_lists

    monkeypatch.setattr(block_lists, "MIN_SEGMENT", 16)
    check_block_sparse(case(100), {}, 32)


def check_select(
    tensors: dict[str, Tensor],
    bounds: dict[str, Tensor],
    compress_size: int,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> float:
    """Gates instead of their logs: those of gates near 0 amplify every rounding. Returns the share of rows that overflow.

    Thresholds are about `shift` nats above the importance of an average block.
    """
    num_keys = tensors["key"].shape[1]
    rounded = {name: tensors[name].to(dtype).double() for name in ("query", "key_compressed", "value_compressed")}
    lse = reference.compressed_attention(*rounded.values(), compress_size=compress_size, num_keys=num_keys, **bounds)[1]
    if options.get("importance", "share") == "share":
        shift -= math.log1p(num_keys / 64)
    threshold = torch.randn(*tensors["query"].shape[:2], tensors["key"].shape[2], generator=torch.Generator().manual_seed(1)) * 0.3 + shift
    parts = {"query": tensors["query"], "key_compressed": tensors["key_compressed"], "lse": lse, "threshold": threshold}
    options = {"block_size": 32, "temperature": 1.5, "num_keys": num_keys, "compress_size": compress_size, **options}
    found = []

    def gates(function: Callable[..., Any], **own: Any) -> Callable[..., Any]:
        def call(query: Tensor, key_compressed: Tensor, lse: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
            # Both sides take the same float32 lse and threshold.
            where = {name: bound.to(query.device) for name, bound in bounds.items()}
            indices, counts, bias, soft, overflow = function(query, key_compressed, lse, threshold, **where, **options, **own)
            found.append((indices.cpu(), counts.cpu(), overflow.item()))
            return bias.exp(), soft

        return call

    compare(gates(ops.select_blocks, impl="triton"), gates(reference.select_blocks), parts, dtype, 4)
    if dtype == torch.float32:
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
        assert found[0][2] == pytest.approx(found[1][2])
    return found[1][2]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "T1"])
@pytest.mark.parametrize("compress_size", [16, 32])
def test_selection_matches_the_oracle(shape, compress_size):
    check_select(case(**{**SHAPES[shape], "compress_size": compress_size}), {}, compress_size)


@pytest.mark.parametrize("importance", ["share", "relative"])
def test_selection_by_either_rule(importance):
    check_select(case(90, compress_size=16), {}, 16, importance=importance)


@pytest.mark.slow
@pytest.mark.parametrize("bounds", list(BOUNDS))
def test_selection_within_bounds(bounds):
    check_select(*bounded(bounds), 16)


@pytest.mark.parametrize(("shift", "block_size", "max_blocks"), [(-10, 32, 5), (-30, 16, 3), (-10, 16, 4)])
def test_a_selection_that_overflows_keeps_the_highest(shift, block_size, max_blocks):
    tensors = case(300 if max_blocks == 5 else 150, heads=2, kv_heads=1, compress_size=16, sharpness=5.0)
    assert check_select(tensors, {}, 16, shift, block_size=block_size, max_blocks=max_blocks) > 0.4


def test_ties_go_to_the_lower_index():
    tensors = case(120, compress_size=16)
    tensors["key_compressed"] = torch.zeros_like(tensors["key_compressed"])
    selection = [
        function.select_blocks(
            tensors["query"].to(device), tensors["key_compressed"].to(device), lse.to(device), torch.full((1, 120, 2), -5.0, device=device),
            block_size=16, compress_size=16, max_blocks=4, num_keys=120, **own,
        )
        for function, device, own in ((ops, DEVICE, {"impl": "triton"}), (reference, "cpu", {}))
        for lse in [reference.compressed_attention(
            tensors["query"], tensors["key_compressed"], tensors["value_compressed"], compress_size=16, num_keys=120
        )[1].float()]
    ]  # fmt: skip
    assert torch.equal(selection[0][0].cpu(), selection[1][0])
    assert selection[1][4] > 0.4


def test_selection_in_half_precision():
    check_select(case(150, dim=100, compress_size=16), {}, 16, dtype=HALF)


@pytest.mark.parametrize("bounds", [{}, BOUNDS["packed"]], ids=["whole", "packed"])
def test_selection_by_tiles_of_64_rows(monkeypatch, bounds):
    """Shares of a tile go through memory, and gradients of long lists are read in parts."""
    from tinyonn_kernels.nsa import select_blocks_dk

    monkeypatch.setattr(select_blocks_dk, "MAX_SLOTS", 2)
    check_select(case(heads=8, kv_heads=1, compress_size=16), bounds, 16, dtype=HALF, block_size=16, max_blocks=5)


@pytest.mark.slow
def test_strided_inputs_are_read_in_place():
    """Heads before tokens, as projections of other libraries leave them, and features that are not adjacent."""
    tensors = case(70)
    heads_first = {name: tensors[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key", "value")}
    scattered = {name: tensors[name].transpose(2, 3).contiguous().transpose(2, 3) for name in ("query", "key", "value")}
    for strided in (heads_first, scattered):
        check_window(strided, {})
        check_block_sparse(strided, {})
