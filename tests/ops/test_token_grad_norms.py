from __future__ import annotations

import math

import pytest
import torch

from tinyonn import debug, reference
from tinyonn.ops import block_norms, token_grad_norms
from tinyonn.testing import IMPLS, assert_close_rms, compare_with_oracle, dtype_id, impl_device, shape_id

SHAPES = [((), 5, 3), ((1,), 1, 1), ((7,), 100, 130), ((2, 9), 33, 64), ((65,), 64, 200)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("block_size", [64, 10, None])
@pytest.mark.parametrize(("leading", "num_in", "num_out"), SHAPES, ids=shape_id)
@pytest.mark.parametrize("impl", IMPLS)
def test_token_grad_norms_match_written_out_gradients(impl, leading, num_in, num_out, block_size, dtype):
    compare_with_oracle(
        lambda inputs, grad_output: token_grad_norms(inputs, grad_output, block_size, impl=impl),
        lambda inputs, grad_output: reference.token_grad_norms(inputs, grad_output, block_size),
        {"inputs": torch.randn(*leading, num_in), "grad_output": torch.randn(*leading, num_out)},
        dtype=dtype,
        device=impl_device(impl),
        tolerance=1e-6,
    )


def test_token_grad_norms_are_the_gradients_of_one_weight_per_token():
    inputs = torch.randn(6, 5, dtype=torch.float64)
    weights = torch.randn(6, 7, 5, dtype=torch.float64, requires_grad=True)  # each token has a copy of its own
    outputs = torch.einsum("toi,ti->to", weights, inputs)
    outputs.retain_grad()
    outputs.sin().prod(dim=0).sum().backward()
    expected = torch.stack([block.flatten(1).norm(dim=1) for block in weights.grad.split(3, dim=1)], dim=1)
    assert_close_rms(token_grad_norms(inputs, outputs.grad, 3), expected, 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_wrt_output_leaves_the_inputs_out(impl):
    grad_output = torch.randn(5, 100, device=impl_device(impl))
    expected = reference.block_norms(grad_output.cpu())
    assert_close_rms(token_grad_norms(None, grad_output, wrt="output", impl=impl), expected, 1e-6)
    ones = torch.full((5, 3), 1e6, device=grad_output.device)
    assert_close_rms(token_grad_norms(ones, grad_output, wrt="output", impl=impl), expected, 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_shared_input_norm_gives_the_same(impl):
    inputs, grad_output = (torch.randn(8, width, device=impl_device(impl)) for width in (70, 130))
    shared = block_norms(grad_output, row_scale=inputs.norm(dim=-1), impl=impl)
    assert_close_rms(shared, token_grad_norms(inputs, grad_output, impl=impl).cpu().double(), 1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("impl", IMPLS)
def test_large_norms_times_small_ones(impl):
    inputs, grad_output = torch.full((2, 64), 1e25), torch.full((2, 64), 1e-25)
    norms = token_grad_norms(inputs.to(impl_device(impl)), grad_output.to(impl_device(impl)), impl=impl)
    assert_close_rms(norms, torch.full((2, 1), 64.0), 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("num_tokens", "num_in", "num_out"), [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_tensors(impl, num_tokens, num_in, num_out):
    device = impl_device(impl)
    inputs, grad_output = torch.ones(num_tokens, num_in, device=device), torch.ones(num_tokens, num_out, device=device)
    blocks = token_grad_norms(inputs, grad_output, impl=impl)
    whole = token_grad_norms(inputs, grad_output, None, impl=impl)
    assert torch.equal(blocks.cpu(), torch.zeros(num_tokens, -(-num_out // 64)))
    assert torch.equal(whole.cpu(), torch.zeros(num_tokens))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_weight_without_inputs_has_no_gradient_whatever_comes_in(impl):
    device = impl_device(impl)
    grad_output = torch.full((2, 4), torch.nan, device=device)
    assert torch.equal(token_grad_norms(torch.ones(2, 0, device=device), grad_output, impl=impl).cpu(), torch.zeros(2, 1))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_block_wider_than_the_layer_costs_no_more_than_the_layer(impl):
    x = torch.randn(3, 70, device=impl_device(impl))
    assert_close_rms(token_grad_norms(x, x, 10**9, impl=impl), reference.token_grad_norms(x.cpu(), x.cpu(), 70), 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    inputs = torch.randn(70, 6, 2, device=impl_device(impl))[..., 1].T
    grad_output = torch.randn(6, 300, device=impl_device(impl))[:, ::3]
    expected = reference.token_grad_norms(inputs.cpu(), grad_output.cpu())
    assert_close_rms(token_grad_norms(inputs, grad_output, impl=impl), expected, 1e-6)


@pytest.mark.parametrize("wrt", ["weight", "output"])
def test_the_result_carries_no_gradient(wrt):
    inputs, grad_output = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    assert not token_grad_norms(inputs, grad_output, wrt=wrt).requires_grad


BAD_CALLS = {
    "tokens": (
        lambda: token_grad_norms(torch.ones(4, 3), torch.ones(5, 3)),
        ValueError,
        r"inputs must have leading shape \(5,\), got \(4,\)",
    ),
    "wrt": (lambda: token_grad_norms(torch.ones(4), torch.ones(4), wrt="bias"), ValueError, "wrt must be one of weight, output, got"),
    "no inputs": (lambda: token_grad_norms(None, torch.ones(4)), TypeError, "inputs must be a torch.Tensor for wrt='weight', got None"),
    "integers": (lambda: token_grad_norms(torch.ones(4), torch.ones(4, dtype=torch.int32)), TypeError, "grad_output must be float16"),
    "block size": (lambda: token_grad_norms(torch.ones(4), torch.ones(4), -1), ValueError, "block_size must be at least 1, got -1"),
    "impl": (lambda: token_grad_norms(torch.ones(4), torch.ones(4), impl="cuda"), ValueError, "impl must be one of"),
    "device": (lambda: token_grad_norms(torch.ones(4, device="meta"), torch.ones(4)), ValueError, "inputs must be on cpu, got meta"),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_input_is_named(call):
    function, error, message = BAD_CALLS[call]
    with pytest.raises(error, match=message):
        function()


def test_debug_finds_nan():
    bad = torch.tensor([[1.0, math.nan]])
    with debug(), pytest.raises(ValueError, match="grad_output must not contain NaN, got NaN in 1 of 2 values"):
        token_grad_norms(torch.ones(1, 2), bad)
    with debug(), pytest.raises(ValueError, match="inputs must not contain NaN, got NaN in 1 of 2 values"):
        token_grad_norms(bad, torch.ones(1, 2))


def test_opcheck():
    torch.library.opcheck(torch.ops.tinyonn.token_grad_norms.default, (torch.randn(3, 5), torch.randn(3, 70), 64, "torch"))
