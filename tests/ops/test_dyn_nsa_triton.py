"""DynNSA by Triton's kernels against the dense float64 oracle: values, every gradient, packing, padding, decoding, any group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.testing import IMPLS, assert_close_rms, dtype_id

from .dyn_nsa_cases import BOUNDS, DEVICE, HALF, INPUTS, SHAPES, bounded, case, compare

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]


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
@pytest.mark.parametrize(
    "options", [{"detach_scores": True}, {"max_blocks": 3}, {"compress_size": 32}, {"importance": "relative"}], ids=str
)
def test_the_whole_with_options(options):
    check_whole(case(compress_size=options.get("compress_size", 16), importance=options.get("importance", "share")), {}, **options)


@pytest.mark.slow
def test_the_whole_in_half_precision():
    check_whole(case(100, dim=100, compress_size=16, sharpness=1.0), {}, HALF, temperature=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=dtype_id)
def test_chunks_of_tokens_change_nothing(dtype, monkeypatch):
    from tinyonn.ops.nsa import _triton_dyn_nsa

    monkeypatch.setattr(_triton_dyn_nsa, "CHUNK_ELEMENTS", 4 * 16 * 50)
    check_whole(case(compress_size=16, sharpness=1.0), {}, dtype)


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
    sinks = torch.randn(4, device=DEVICE, requires_grad=True)
    options = (20, 1.5, 16, 16, 4, "share", 1, 2, False, 0.25, 2.0, None, None, None, "triton")
    torch.library.opcheck(torch.ops.tinyonn.dyn_nsa.default, (*leaves, None, None, sinks, *options))


@pytest.mark.parametrize("function", ["sliding_window_attention", "dyn_nsa"])
def test_wide_float32_heads_are_refused(function):
    tensors = {name: x.to(DEVICE) for name, x in case(33, dim=160).items()}
    names = INPUTS if function == "dyn_nsa" else INPUTS[:3]
    options = {"compress_size": 32} if function == "dyn_nsa" else {"window": 5}
    with pytest.raises(ValueError, match=r"at most 128 dimensions a head in float32 with impl='triton', got 160: use float16 or bfloat16"):
        getattr(ops, function)(*(tensors[name] for name in names), impl="triton", **options)
