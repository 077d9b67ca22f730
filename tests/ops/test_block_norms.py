from __future__ import annotations

import math

import pytest
import torch

from tinyonn import debug, reference
from tinyonn.ops import block_norms
from tinyonn.testing import IMPLS, assert_close_rms, compare_with_oracle, dtype_id, impl_device, shape_id

SHAPES = [(1, 1), (3, 64), (63, 100), (257, 192), (2, 3, 5, 70), (130,), (2, 1500)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("impl", IMPLS)
def test_block_norms_match_float64(impl, shape, dtype):
    tensors = {"x": torch.randn(shape), "row_scale": torch.rand(shape[:-1])}
    # Inputs are rounded before either side sees them, so half precision is held to float32's bound.
    compare_with_oracle(
        lambda x, row_scale: block_norms(x, row_scale=row_scale, impl=impl),
        lambda x, row_scale: reference.block_norms(x, row_scale=row_scale),
        tensors,
        dtype=dtype,
        device=impl_device(impl),
        tolerance=1e-6,
    )


@pytest.mark.parametrize("block_size", [1, 7, 48, 64, 100, 1500])
@pytest.mark.parametrize("impl", IMPLS)
def test_any_block_size(impl, block_size):
    x = torch.randn(5, 1499, device=impl_device(impl))
    assert_close_rms(block_norms(x, block_size, impl=impl), reference.block_norms(x.cpu(), block_size), 1e-6)


def test_float64_stays_float64():
    x, scale = torch.randn(31, 200, dtype=torch.float64), torch.randn(31, dtype=torch.float64)
    norms = block_norms(x, row_scale=scale)
    assert norms.dtype == torch.float64
    assert_close_rms(norms, reference.block_norms(x, row_scale=scale), 1e-12)


def test_reference_is_the_definition():
    x = torch.tensor([[3.0, 4.0, -5.0, 12.0, 8.0]])
    assert reference.block_norms(x, 2).tolist() == [[5.0, 13.0, 8.0]]
    assert block_norms(x, 2, row_scale=torch.tensor([-2.0]), impl="reference").tolist() == [[-10.0, -26.0, -16.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_match_float64(impl, dtype):
    tensors = {"x": torch.randn(4, 7, 150), "row_scale": torch.randn(4, 7)}
    compare_with_oracle(
        lambda x, row_scale: block_norms(x, row_scale=row_scale, impl=impl),
        lambda x, row_scale: reference.block_norms(x, row_scale=row_scale),
        tensors,
        dtype=dtype,
        device=impl_device(impl),
        grad=("x", "row_scale"),
    )


def test_gradcheck():
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: block_norms(x, 4, row_scale=s), (x, scale))
    assert torch.autograd.gradgradcheck(lambda x, s: block_norms(x, 4, row_scale=s), (x, scale))
    assert torch.autograd.gradcheck(lambda x: block_norms(x, 4), (x,))
    assert torch.autograd.gradgradcheck(lambda x: block_norms(x, 4), (x,))


def test_gradient_of_a_zero_norm_is_zero():
    x = torch.tensor([[0.0, 0.0, 3.0, 4.0]], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    block_norms(x, 2, row_scale=scale).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 0.0, 0.3, 0.4]]))
    assert scale.grad.item() == 5.0


@pytest.mark.parametrize("impl", IMPLS)
def test_tiny_norms_keep_their_gradient(impl):
    x = torch.full((1, 4), 1e-30, device=impl_device(impl), requires_grad=True)
    block_norms(x, 4, impl=impl).sum().backward()
    assert_close_rms(x.grad, torch.full((1, 4), 0.5), 1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("magnitude", [1e37, 1e25, 1e18, 1e-15, 1e-18, 1e-30, 1e-37])
@pytest.mark.parametrize("impl", IMPLS)
def test_norms_neither_overflow_nor_vanish(impl, magnitude, dtype):
    x = torch.ones(4, 130)
    x[0] = magnitude  # a whole row
    x[1, 70] = magnitude  # one value among ordinary ones
    x[2, :64:2] = magnitude
    x = x.to(dtype).to(impl_device(impl))
    norms = block_norms(x, impl=impl).cpu()
    expected = reference.block_norms(x.cpu())
    assert ((norms - expected).abs() <= 2e-6 * expected).all()


@pytest.mark.parametrize("features", [1024, 5000])
@pytest.mark.parametrize("magnitude", [1e18, 5e15, 1e14, 1e-15])
@pytest.mark.parametrize("impl", IMPLS)
def test_norms_of_wide_blocks_neither_overflow_nor_vanish(impl, magnitude, features):
    x = torch.full((2, features), magnitude, device=impl_device(impl))
    expected = magnitude * math.sqrt(features)
    assert block_norms(x, features, impl=impl).flatten().tolist() == pytest.approx([expected, expected], rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_reaches_the_gradient_of_its_block(impl):
    x = torch.ones(1, 8)
    x[0, 1] = math.nan
    x = x.to(impl_device(impl)).requires_grad_()
    block_norms(x, 4, impl=impl).sum().backward()
    assert x.grad[0, :4].isnan().all()
    assert x.grad[0, 4:].tolist() == [0.5] * 4


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("impl", IMPLS)
def test_infinity_nan_and_overflow_pass_through(impl):
    x = torch.ones(5, 128)
    x[0, 3], x[1, 3], x[2, :64] = math.inf, math.nan, 3e38
    x[3, :2] = torch.tensor([math.nan, 1e30])
    x[4, :64] = 1e-30
    x[4, 5] = math.nan
    norms = block_norms(x.to(impl_device(impl)), impl=impl).cpu()
    assert norms[0, 0] == math.inf
    assert norms[2, 0] == math.inf  # 8 * 3e38 is no float32
    assert norms[[1, 3, 4], 0].isnan().all()
    assert torch.equal(norms[:, 1], torch.full((5,), 8.0))


def test_float64_norms_neither_overflow_nor_vanish():
    norms = block_norms(torch.tensor([[1e200] * 4, [1e-200] * 4], dtype=torch.float64), 4)
    assert_close_rms(norms[0], torch.tensor([2e200], dtype=torch.float64), 1e-12)
    assert_close_rms(norms[1] * 1e200, torch.tensor([2.0], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 128), (4, 0), (2, 0, 100)], ids=shape_id)
def test_empty_tensors(impl, shape):
    norms = block_norms(torch.zeros(shape, device=impl_device(impl)), impl=impl)
    assert norms.shape == (*shape[:-1], -(-shape[-1] // 64))


VIEWS = {
    "columns": lambda: torch.randn(6, 300)[:, 7:207],
    "every other feature": lambda: torch.randn(6, 300)[:, ::2],
    "transposed": lambda: torch.randn(150, 6).T,
    "expanded": lambda: torch.randn(1, 150).expand(6, 150),
    "permuted leading": lambda: torch.randn(5, 6, 150).transpose(0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl, view):
    x = VIEWS[view]().to(impl_device(impl))
    scale = torch.rand(*x.shape[:-1], 2, device=x.device)[..., 1]
    expected = reference.block_norms(x.cpu(), row_scale=scale.cpu())
    assert_close_rms(block_norms(x, row_scale=scale, impl=impl), expected, 1e-6)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_out_may_be_a_column_slice(impl):
    device = impl_device(impl)
    x, scale = torch.randn(2, 9, 150, device=device), torch.rand(2, 9, device=device)
    plane = torch.full((2, 9, 10), -7.0, device=device)
    returned = block_norms(x, row_scale=scale, out=plane[..., 4:7], impl=impl)
    assert returned.data_ptr() == plane[..., 4:7].data_ptr()
    assert_close_rms(plane[..., 4:7], reference.block_norms(x.cpu(), row_scale=scale.cpu()), 1e-6)
    assert (plane[..., :4] == -7).all()
    assert (plane[..., 7:] == -7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_out_may_have_rows_that_no_single_stride_reaches(impl):
    x = torch.randn(4, 5, 100, device=impl_device(impl))
    out = torch.zeros(5, 4, 2, device=x.device).transpose(0, 1)
    block_norms(x, out=out, impl=impl)
    assert_close_rms(out, reference.block_norms(x.cpu()), 1e-6)


@pytest.mark.parametrize("magnitude", [1.0, 1e-30], ids=["ordinary", "tiny"])
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_out_may_overlap_the_inputs(impl, magnitude):
    plane = torch.randn(6, 130, device=impl_device(impl)) * magnitude
    for columns in (slice(0, 3), slice(127, 130)):
        x = plane.clone()
        expected = reference.block_norms(x.cpu(), row_scale=x[:, 1].cpu())
        block_norms(x, row_scale=x[:, 1], out=x[:, columns], impl=impl)
        if magnitude == 1:
            assert_close_rms(x[:, columns], expected, 1e-6)
        x = plane.clone()
        block_norms(x, out=x[:, columns], impl=impl)
        assert_close_rms(x[:, columns], reference.block_norms(plane.cpu()), 1e-6)


@pytest.mark.parametrize("block_size", [10**9, 2**40], ids=["past-a-tile", "past-int32"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_block_wider_than_the_row_costs_no_more_than_the_row(impl, block_size):
    x = torch.randn(3, 70, device=impl_device(impl))
    assert_close_rms(block_norms(x, block_size, impl=impl), reference.block_norms(x.cpu(), 70), 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_is_refused_rather_than_zero():
    x = torch.randn(4, 64)
    with pytest.raises(RuntimeError, match="does not support forward-mode differentiation"):
        torch.func.jvp(block_norms, (x,), (x,))
    with pytest.raises(RuntimeError, match="forward-mode differentiation"):
        torch.func.jvp(lambda s: block_norms(x, row_scale=s), (torch.ones(4),), (torch.ones(4),))


def test_out_refuses_to_cut_a_graph():
    x, out = torch.randn(3, 64, requires_grad=True), torch.empty(3, 1)
    with pytest.raises(ValueError, match="out is not differentiable, but it or an input requires grad"):
        block_norms(x, out=out)
    with pytest.raises(ValueError, match="out is not differentiable, but it or an input requires grad"):
        block_norms(x.detach(), row_scale=torch.ones(3, requires_grad=True), out=out)
    with torch.no_grad():
        block_norms(x, out=out)
    assert_close_rms(out, reference.block_norms(x.detach()), 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_run_gives_the_same_bits(impl):
    x = torch.randn(64, 500, device=impl_device(impl))
    assert torch.equal(block_norms(x, impl=impl), block_norms(x, impl=impl))


BAD_CALLS = {
    "list": (lambda: block_norms([1.0]), TypeError, "x must be a torch.Tensor, got list"),
    "integers": (lambda: block_norms(torch.ones(3, dtype=torch.int64)), TypeError, "x must be float16, bfloat16, float32 or float64, got"),
    "scalar": (lambda: block_norms(torch.tensor(1.0)), ValueError, r"x must have at least 1 dimension\(s\), got shape \(\)"),
    "block size 0": (lambda: block_norms(torch.ones(3), 0), ValueError, "block_size must be at least 1, got 0"),
    "block size 1.5": (lambda: block_norms(torch.ones(3), 1.5), TypeError, "block_size must be an int, got float"),
    "rows": (lambda: block_norms(torch.ones(4, 3), row_scale=torch.ones(5)), ValueError, "row_scale must have 4 rows, got 5"),
    "row shape": (
        lambda: block_norms(torch.ones(4, 2, 3), row_scale=torch.ones(8)),
        ValueError,
        r"row_scale must have shape \(4, 2\), got \(8,\)",
    ),
    "out shape": (
        lambda: block_norms(torch.ones(4, 65), out=torch.ones(4, 1)),
        ValueError,
        r"out must have shape \(4, 2\), got \(4, 1\)",
    ),
    "out dtype": (
        lambda: block_norms(torch.ones(4, 64), out=torch.ones(4, 1, dtype=torch.float16)),
        TypeError,
        "out must be torch.float32, got torch.float16",
    ),
    "sparse": (lambda: block_norms(torch.ones(4, 3).to_sparse()), TypeError, "x must be dense, got torch.sparse_coo"),
    "nested": (
        lambda: block_norms(torch.nested.nested_tensor([torch.ones(3)], layout=torch.jagged)),
        TypeError,
        "x must be dense, got a nested tensor",
    ),
    "out in one place": (
        lambda: block_norms(torch.ones(4, 65), out=torch.ones(1, 2).expand(4, 2)),
        ValueError,
        r"out must not overlap itself in memory, got shape \(4, 2\) with strides \(0, 1\)",
    ),
    "device": (
        lambda: block_norms(torch.ones(4, 64), row_scale=torch.ones(4, device="meta")),
        ValueError,
        "row_scale must be on cpu, got meta",
    ),
    "impl": (lambda: block_norms(torch.ones(3), impl="cuda"), ValueError, "impl must be one of auto, triton, torch, reference, got 'cuda'"),
    "float64 kernel": (
        lambda: block_norms(torch.ones(3, dtype=torch.float64), impl="triton"),
        ValueError,
        "impl='triton' needs float16, bfloat16 or float32 tensors, got torch.float64",
    ),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_input_is_named(call):
    function, error, message = BAD_CALLS[call]
    with pytest.raises(error, match=message):
        function()


def test_debug_finds_nan():
    x = torch.tensor([[1.0, math.nan], [math.nan, 2.0]])
    block_norms(x)
    with debug():
        with pytest.raises(ValueError, match="x must not contain NaN, got NaN in 2 of 4 values"):
            block_norms(x)
        with debug(False):
            block_norms(x)
    block_norms(x)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_opcheck(scaled):
    x = torch.randn(3, 70, requires_grad=True)
    scale = torch.rand(3, requires_grad=True) if scaled else None
    torch.library.opcheck(torch.ops.tinyonn.block_norms.default, (x, scale, 64, "torch"))
    plain = None if scale is None else scale.detach()
    torch.library.opcheck(torch.ops.tinyonn.block_norms_out.default, (x.detach(), plain, torch.empty(3, 2), 64, "torch"))
