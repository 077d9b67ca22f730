"""The same oracles on a CUDA device, and what only a device can show: offsets past 2^31, CUDA graphs, no synchronisation."""

from __future__ import annotations

import math

import pytest
import torch

from tinyonn import reference
from tinyonn.ops import block_norms, integrate_sps, token_grad_norms
from tinyonn.testing import assert_close_rms, compare_with_oracle, dtype_id

pytestmark = pytest.mark.gpu

IMPLS = ["triton", "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("features", [64, 100, 4096, 5000])
@pytest.mark.parametrize("impl", IMPLS)
def test_block_norms(impl, features, dtype):
    compare_with_oracle(
        lambda x, row_scale: block_norms(x, row_scale=row_scale, impl=impl),
        lambda x, row_scale: reference.block_norms(x, row_scale=row_scale),
        {"x": torch.randn(3, 301, features), "row_scale": torch.randn(3, 301)},
        dtype=dtype,
        device="cuda",
        grad=("x", "row_scale"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("block_size", [64, 48, None])
@pytest.mark.parametrize(("num_in", "num_out"), [(100, 40), (512, 768), (3000, 129)])
@pytest.mark.parametrize("impl", IMPLS)
def test_token_grad_norms(impl, num_in, num_out, block_size, dtype):
    compare_with_oracle(
        lambda inputs, grad_output: token_grad_norms(inputs, grad_output, block_size, impl=impl),
        lambda inputs, grad_output: reference.token_grad_norms(inputs, grad_output, block_size),
        {"inputs": torch.randn(21, num_in), "grad_output": torch.randn(21, num_out)},
        dtype=dtype,
        device="cuda",
        tolerance=1e-6,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("offsets", [[0, 37], [0, 81, 162, 243], [0, 50, 3000]], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_integrate_sps(impl, offsets, dtype):
    activation, grad_norm = (torch.randn(70, offsets[-1]).exp().to(dtype) for _ in range(2))
    activation[torch.rand(70, offsets[-1]) < 0.1] = math.nan
    mask = torch.rand(70) < 0.8
    total, scores = integrate_sps(activation.cuda(), grad_norm.cuda(), offsets, token_mask=mask.cuda(), return_per_token=True, impl=impl)
    expected_total, expected_scores = reference.integrate_sps(activation, grad_norm, torch.tensor(offsets), token_mask=mask)
    assert_close_rms(total, expected_total, 1e-12)
    assert_close_rms(scores, expected_scores, 1e-6)


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
@pytest.mark.parametrize("impl", IMPLS)
def test_norms_neither_overflow_nor_vanish(impl, magnitude):
    x = torch.full((3, 130), magnitude)
    assert_close_rms(block_norms(x.cuda(), impl=impl) / magnitude, reference.block_norms(x) / magnitude, 1e-6)


def test_auto_is_triton_on_the_device():
    x = torch.randn(5, 200, device="cuda")
    assert torch.equal(block_norms(x), block_norms(x, impl="triton"))


def test_offsets_pass_two_to_the_31():
    rows, features = 40_000, 1 << 16  # 2.6e9 elements, 5.2 GB
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free device memory")
    x = torch.zeros(rows, features, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2.0
    norms = block_norms(x)
    assert (norms[-1] == 16.0).all()
    assert not norms[:-1].any()
    grads = token_grad_norms(x, x)
    assert (grads[-1] == 16.0 * 512.0).all()
    assert not grads[:-1].any()


def test_a_cuda_graph_captures_every_op_without_synchronising():
    x, scale = torch.randn(40, 300, device="cuda"), torch.rand(40, device="cuda")
    offsets = torch.tensor([0, 2, 5], device="cuda")
    leaf = x.clone().requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        norms = block_norms(leaf, row_scale=scale)
        (grad,) = torch.autograd.grad(norms.sum(), leaf)
        plane = norms.detach()
        return norms, grad, token_grad_norms(x, grad), integrate_sps(plane, plane.square(), offsets)

    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, want)
