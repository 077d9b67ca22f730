"""DynNSA's Triton kernels against the dense float64 oracle: values, every gradient, packing, padding, decoding, any group."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tinyonn import ops, reference
from tinyonn.reference.nsa.dyn_nsa import sequences
from tinyonn.testing import IMPLS, TOLERANCE, assert_close_rms, dtype_id, impl_device

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]
DEVICE = impl_device("triton")
HALF = torch.float16  # Triton's interpreter multiplies bfloat16 as integers


def pooled(x: Tensor, size: int) -> Tensor:
    """Means of whole blocks of positions, (B, T, K, D) -> (B, T // size, K, D)."""
    whole = x.shape[1] // size * size
    return x[:, :whole].unflatten(1, (-1, size)).mean(2) if whole else x[:, :0]


def case(
    tokens: int = 120,
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
        if theirs.numel() == 0 or theirs.abs().max() < 1e-12:  # one key: nothing to choose, and what is left is rounding
            assert (mine.abs() < 1e-5).all(), f"gradient of {name}"
            continue
        # Two numbers each, sums over all tokens that mostly cancel.
        loose = 6 if name in ("base", "slope") else 1
        assert_close_rms(mine, theirs, TOLERANCE[dtype] * loose, f"gradient of {name}")


SHAPES: dict[str, dict[str, Any]] = {
    "G2-D16": {},
    "G1-D60": {"heads": 1, "kv_heads": 1, "dim": 60},
    "G3-batch": {"heads": 3, "kv_heads": 1, "batch": 2, "tokens": 70},
    "G8": {"heads": 8, "kv_heads": 1, "tokens": 70},
    "G20": {"heads": 20, "kv_heads": 1, "tokens": 45},
    "decode-1": {"queries": 1},
    "decode-50": {"queries": 50},
    "T1": {"tokens": 1},
    "T63": {"tokens": 63},
}
PACKED = torch.tensor([0, 37, 38, 86, 86, 120], dtype=torch.int32)
BOUNDS: dict[str, dict[str, Tensor]] = {
    "packed": {"cu_seqlens": PACKED},
    "left": {"key_start": torch.tensor([13, 110], dtype=torch.int32)},
    "both": {"key_start": torch.tensor([13, 0], dtype=torch.int32), "key_end": torch.tensor([90, 3], dtype=torch.int32)},
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


@pytest.mark.slow
@pytest.mark.parametrize("bounds", list(BOUNDS))
def test_window_and_compressed_within_bounds(bounds):
    tensors, where = bounded(bounds)
    check_window(tensors, where)
    check_compressed(tensors, where, 16)


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
    """Gates instead of their logs: those of gates near 0 amplify every rounding. Returns the share of rows that overflow."""
    num_keys = tensors["key"].shape[1]
    rounded = {name: tensors[name].to(dtype).double() for name in ("query", "key_compressed", "value_compressed")}
    lse = reference.compressed_attention(*rounded.values(), compress_size=compress_size, num_keys=num_keys, **bounds)[1]
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
            tensors["query"].to(device), tensors["key_compressed"].to(device), lse.to(device), torch.full((1, 120, 2), -1.0, device=device),
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


INPUTS = ("query", "key", "value", "key_compressed", "value_compressed", "gates", "base", "slope")


def check_whole(tensors: dict[str, Tensor], bounds: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """out and soft_counts with every gradient; counts, tau and overflow by value."""
    options = {"block_size": 32, "compress_size": 16, "window": 40, "temperature": 1.5, "max_blocks": 8} | options
    rest = []

    def call(function: Callable[..., Any], **own: Any) -> Callable[..., Any]:
        def run(**leaves: Tensor) -> tuple[Tensor, Tensor]:
            where = {name: bound.to(leaves["query"].device) for name, bound in bounds.items()}
            result = function(**leaves, **options, **where, **own)
            named = (
                result._asdict()
                if hasattr(result, "_asdict")
                else dict(zip(("out", "counts", "tau", "soft_counts", "overflow"), result, strict=True))
            )
            rest.append({name: named[name].detach().cpu() for name in ("counts", "tau", "overflow")})
            return named["out"], named["soft_counts"]

        return run

    compare(call(ops.dyn_nsa, impl="triton"), call(reference.dyn_nsa), {name: tensors[name] for name in INPUTS}, dtype, 8)
    assert_close_rms(rest[0]["tau"], rest[1]["tau"], dtype, "tau")
    if dtype == torch.float32:
        assert torch.equal(rest[0]["counts"], rest[1]["counts"])
        assert rest[0]["overflow"].item() == pytest.approx(rest[1]["overflow"].item())


@pytest.mark.slow
@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_whole_matches_the_oracle(shape):
    check_whole(case(**{**SHAPES[shape], "compress_size": 16}), {})


@pytest.mark.slow
@pytest.mark.parametrize("bounds", list(BOUNDS))
def test_the_whole_within_bounds(bounds):
    check_whole(*bounded(bounds))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"detach_scores": True}, {"max_blocks": 3}, {"compress_size": 32}], ids=str)
def test_the_whole_with_options(options):
    check_whole(case(compress_size=options.get("compress_size", 16)), {}, **options)


@pytest.mark.slow
def test_the_whole_in_half_precision():
    check_whole(case(100, dim=100, compress_size=16, sharpness=1.0), {}, HALF, temperature=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=dtype_id)
def test_chunks_of_tokens_change_nothing(dtype, monkeypatch):
    from tinyonn.ops.nsa import _triton_dyn_nsa

    monkeypatch.setattr(_triton_dyn_nsa, "CHUNK_ELEMENTS", 4 * 16 * 50)
    check_whole(case(compress_size=16, sharpness=1.0), {}, dtype)


class Allocations(TorchDispatchMode):
    """Bytes of the storages that live while operations run on tensors without data."""

    def __init__(self, *held: Tensor) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.note(held)

    def note(self, tensors: Any) -> None:
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in torch.utils._pytree.tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference_to = StorageWeakRef(storage)
                if reference_to.cdata not in self.live:
                    self.live[reference_to.cdata] = (reference_to, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.note(result)
        return result


LONG = {"G16": (64, 4, False), "G16-packed": (64, 4, True), "G2": (16, 8, False)}
# Of q, k, v, o and their gradients; with more key heads, the float32 sums of their gradients weigh more.
MOST = {"G16": 1.5, "G16-packed": 1.5, "G2": 1.8}


def step_at_64k(device: str, heads: int, kv_heads: int, packed: bool) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Inputs for 64k tokens, D = 128, bfloat16, and forward and backward of them."""
    from tinyonn.ops.nsa import _triton_dyn_nsa
    from tinyonn.ops.nsa._checks import Bounds
    from tinyonn.ops.nsa._tuples import Inputs, Options, Saved

    tokens, dim = 1 << 16, 128

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    query, key, value = draw(1, tokens, heads, dim), draw(1, tokens, kv_heads, dim), draw(1, tokens, kv_heads, dim)
    compressed = [draw(1, tokens // 64, kv_heads, dim) for _ in range(2)]
    inputs = Inputs(query, key, value, *compressed, draw(1, tokens, heads, 3), draw(kv_heads), draw(kv_heads), None)
    bounds = Bounds(torch.arange(0, tokens + 1, tokens // 8, dtype=torch.int32, device=device)) if packed else Bounds()
    options = Options(512, 1.0, 64, 64, 16, False, dim**-0.5)

    def step() -> None:
        results = _triton_dyn_nsa.dyn_nsa_forward(inputs, options, bounds)
        cotangents = (torch.empty_like(results.out).fill_(1e-3), torch.zeros_like(results.soft_counts))
        saved = Saved(*(getattr(results, name) for name in Saved._fields[:-2]), *cotangents)
        grads = _triton_dyn_nsa.dyn_nsa_backward(inputs._replace(tau=results.own_tau), saved, options, bounds)
        grads = [grad.to(x.dtype) for grad, x in zip(grads, inputs[:-1], strict=True)]

    return inputs, step


def computed_peak(monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, packed: bool) -> tuple[int, int]:
    """Bytes alive at the worst moment, by what is allocated without data; and q, k, v, o with their gradients. No kernel runs."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    inputs, step = step_at_64k("meta", heads, kv_heads, packed)
    query, key, value = inputs[:3]
    with monkeypatch.context() as patch, Allocations(*inputs) as allocations:
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", lambda *args, **options: None)
        step()
    return allocations.peak, 2 * sum(x.numel() * x.element_size() for x in (query, key, value, query))


@pytest.mark.parametrize("long", list(LONG))
def test_peak_memory_at_64k_tokens(long, monkeypatch):
    """Unions of lists are made a chunk at a time, and are of the size of its lists."""
    from tinyonn_kernels.nsa import block_sparse_dq, block_sparse_fwd

    merged = []
    for module in (block_sparse_fwd, block_sparse_dq):
        merge = module.merge_lists
        monkeypatch.setattr(module, "merge_lists", lambda *args, merge=merge: merged.append((args[0], merge(*args))) or merged[-1][1])
    peak, unit = computed_peak(monkeypatch, *LONG[long])
    print(f"peak {peak / 2**30:.2f} GiB, {peak / unit:.3f} of q, k, v, o and their gradients")
    assert peak <= MOST[long] * unit
    assert peak > unit  # it counts
    assert len(merged) >= 4  # chunks, forward and backward
    for indices, found in merged:
        assert (found.queries > 1) == (long == "G2")
        if found.queries > 1:
            last = found.queries * indices[0, 0].numel()
            assert found.blocks.numel() == found.members.numel() < indices.numel() + last


@pytest.mark.gpu
@pytest.mark.parametrize("long", list(LONG))
def test_measured_peak_memory_at_64k_tokens(long, monkeypatch):
    peak, unit = computed_peak(monkeypatch, *LONG[long])
    _, step = step_at_64k("cuda", *LONG[long])
    step()  # compiles, and tries configurations, which keeps copies
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated()
    print(f"peak {measured / 2**30:.2f} GiB, computed {peak / 2**30:.2f} GiB")
    assert measured <= MOST[long] * unit
    assert measured <= 1.1 * peak  # sorts and searches have buffers of their own


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    tensors = {name: x.to(DEVICE) for name, x in case(70, compress_size=16).items()}
    grads = []
    for _ in range(2):
        leaves = [tensors[name].clone().requires_grad_() for name in INPUTS]
        out = ops.dyn_nsa(*leaves, block_size=16, compress_size=16, window=20, impl="triton").out
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
def test_opcheck():
    tensors = case(40, compress_size=16)
    leaves = [tensors[name].to(DEVICE).requires_grad_() for name in INPUTS]
    options = (20, 1.5, 16, 16, 4, False, 0.25, None, None, None, "triton")
    torch.library.opcheck(torch.ops.tinyonn.dyn_nsa.default, (*leaves, None, *options))


@pytest.mark.slow
def test_strided_inputs_are_read_in_place():
    """Heads before tokens, as projections of other libraries leave them, and features that are not adjacent."""
    tensors = case(70)
    heads_first = {name: tensors[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key", "value")}
    scattered = {name: tensors[name].transpose(2, 3).contiguous().transpose(2, 3) for name in ("query", "key", "value")}
    for strided in (heads_first, scattered):
        check_window(strided, {})
        check_block_sparse(strided, {})


@pytest.mark.parametrize("function", ["sliding_window_attention", "dyn_nsa"])
def test_wide_float32_heads_are_refused(function):
    tensors = {name: x.to(DEVICE) for name, x in case(33, dim=160).items()}
    names = INPUTS if function == "dyn_nsa" else INPUTS[:3]
    options = {"compress_size": 32} if function == "dyn_nsa" else {"window": 5}
    with pytest.raises(ValueError, match=r"at most 128 dimensions a head in float32 with impl='triton', got 160: use float16 or bfloat16"):
        getattr(ops, function)(*(tensors[name] for name in names), impl="triton", **options)
