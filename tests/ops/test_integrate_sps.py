from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tinyonn import debug, reference
from tinyonn.ops import integrate_sps
from tinyonn.testing import IMPLS, assert_close_rms, dtype_id, impl_device

LAYOUTS = {
    "one layer": (9, [0, 37]),
    "equal layers": (10, [0, 12, 24, 36]),
    "uneven, with an empty layer": (19, [0, 1, 1, 40, 60]),
    "layers of one block": (5, [0, 1, 2, 3]),
    "wider than a tile": (3, [0, 3, 1503]),
    "one token": (1, [0, 10, 30]),
}


def planes(num_tokens: int, num_blocks: int, missing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms over several orders of magnitude; with `missing`, that share of each plane is NaN, and the last token of both."""
    activation, grad_norm = torch.randn(num_tokens, num_blocks).exp(), torch.randn(num_tokens, num_blocks).mul(2).exp() * 1e-4
    if missing:
        activation[torch.rand(num_tokens, num_blocks) < missing] = math.nan
        grad_norm[torch.rand(num_tokens, num_blocks) < missing] = math.nan
        activation[-1] = grad_norm[-1] = math.nan
    return activation, grad_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("missing", [0.0, 0.2], ids=["complete", "gaps"])
@pytest.mark.parametrize("masked", [False, True], ids=["all-tokens", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_integrate_sps_matches_float64(impl, layout, masked, missing, dtype):
    num_tokens, offsets = LAYOUTS[layout]
    activation, grad_norm = (plane.to(dtype) for plane in planes(num_tokens, offsets[-1], missing))
    mask = torch.rand(num_tokens) < 0.7 if masked else None
    device = impl_device(impl)
    total, scores = integrate_sps(
        activation.to(device),
        grad_norm.to(device),
        offsets,
        token_mask=None if mask is None else mask.to(device),
        return_per_token=True,
        impl=impl,
    )
    expected_total, expected_scores = reference.integrate_sps(activation, grad_norm, torch.tensor(offsets), token_mask=mask)
    assert total.dtype == torch.float64
    assert scores.dtype == torch.float32
    assert_close_rms(total, expected_total, 1e-12)  # float64 inside, whatever comes in
    assert_close_rms(scores, expected_scores, 1e-6)


def test_float64_planes_give_float64_scores():
    activation, grad_norm = (plane.double() for plane in planes(17, 60, 0.1))
    total, scores = integrate_sps(activation, grad_norm, [0, 20, 60], return_per_token=True)
    expected_total, expected_scores = reference.integrate_sps(activation, grad_norm, torch.tensor([0, 20, 60]))
    assert_close_rms(total, expected_total, 1e-12)
    assert_close_rms(scores, expected_scores, 1e-12)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_scores_worked_by_hand(impl):
    activation = torch.tensor([[1.0, 3.0, 5.0, 5.0], [0.0, 4.0, 1.0, math.nan], [2.0, 2.0, 7.0, 9.0]])
    grad_norm = torch.tensor([[3.0, 1.0, 2.0, 6.0], [0.0, 2.0, 1.0, 1.0], [1.0, 2.0, 9.0, 7.0]])
    device = impl_device(impl)
    total, scores = integrate_sps(activation.to(device), grad_norm.to(device), [0, 2, 4], return_per_token=True, impl=impl)
    # Two blocks always stand at z = -1 and +1, equal ones and a block alone at 0.
    expected = torch.tensor([[-2.0, 2.0, 1.0, -1.0], [0.0, 0.0, 0.0, math.nan], [1.0, -1.0, -2.0, 2.0]])
    assert torch.equal(scores.isnan().cpu(), expected.isnan())
    assert torch.allclose(scores.cpu().nan_to_num(), expected.nan_to_num())
    assert torch.allclose(total.cpu(), torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("value", [1234.567, 0.0, 1e-30, 3e38, 1e-3])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_constant_layer_scores_zero(impl, value):
    # A one-pass float32 variance of 1234.567 comes out as -0.375.
    constant = torch.full((4, 81), value, device=impl_device(impl))
    total, scores = integrate_sps(constant, constant, [0, 81], return_per_token=True, impl=impl)
    assert torch.equal(total, torch.zeros_like(total))
    assert torch.equal(scores, torch.zeros_like(scores))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_spread_under_a_millionth_of_the_mean_is_rounding(impl):
    device = impl_device(impl)
    flat = torch.full((1, 8), 1000.0)
    below, above = flat.clone(), flat.clone()
    below[0, ::2] += 0.0018  # std 0.0009
    above[0, ::2] += 0.0024  # std 0.0012
    _, scores = integrate_sps(below.to(device), flat.to(device), [0, 8], return_per_token=True, impl=impl)
    assert torch.equal(scores.cpu(), torch.zeros(1, 8))
    _, scores = integrate_sps(above.to(device), flat.to(device), [0, 8], return_per_token=True, impl=impl)
    assert torch.allclose(scores.cpu(), torch.tensor([[1.0, -1.0] * 4]), atol=1e-4)


@pytest.mark.parametrize("factor", [1e-35, 1e-25, 1e25, 1e34])
@pytest.mark.parametrize("impl", IMPLS)
def test_scores_do_not_depend_on_the_unit(impl, factor):
    activation, grad_norm = (plane.to(impl_device(impl)) for plane in planes(6, 40))
    total = integrate_sps(activation, grad_norm, [0, 10, 40], impl=impl)
    assert_close_rms(integrate_sps(activation * factor, grad_norm, [0, 10, 40], impl=impl), total, 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_block_that_no_token_has_sums_to_zero(impl):
    activation, grad_norm = planes(5, 6)
    activation[:, 2] = math.nan
    total, scores = integrate_sps(
        activation.to(impl_device(impl)), grad_norm.to(impl_device(impl)), [0, 6], return_per_token=True, impl=impl
    )
    assert total[2] == 0
    assert scores[:, 2].isnan().all()
    assert not total.isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_infinity_is_not_missing(impl):
    activation, grad_norm = planes(3, 6)
    activation[1, 0] = math.inf
    activation[1, 1] = math.nan  # missing, so untouched by its neighbour
    total = integrate_sps(activation.to(impl_device(impl)), grad_norm.to(impl_device(impl)), [0, 3, 6], impl=impl)
    assert total[[0, 2]].isnan().all()
    assert total[[1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("num_tokens", "offsets"), [(0, [0, 5]), (4, [0]), (4, [0, 0]), (0, [0])])
def test_empty_planes(impl, num_tokens, offsets):
    plane = torch.ones(num_tokens, offsets[-1], device=impl_device(impl))
    total, scores = integrate_sps(plane, plane, offsets, return_per_token=True, impl=impl)
    assert torch.equal(total.cpu(), torch.zeros(offsets[-1], dtype=torch.float64))
    assert scores.shape == plane.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_kinds_of_offsets(impl):
    device = impl_device(impl)
    wide = [plane.to(device) for plane in planes(11, 120, 0.1)]
    activation, grad_norm = wide[0][:, 10:70], wide[1].T.contiguous().T[:, ::2]
    mask = (torch.arange(22, device=device) % 3 > 0)[::2]
    expected, _ = reference.integrate_sps(activation.cpu(), grad_norm.cpu(), torch.tensor([0, 25, 60]), token_mask=mask.cpu())
    for offsets in ([0, 25, 60], np.array([0, 25, 60]), torch.tensor([0, 25, 60], dtype=torch.int32), torch.tensor([0, 25, 60]).to(device)):
        assert_close_rms(integrate_sps(activation, grad_norm, offsets, token_mask=mask, impl=impl), expected, 1e-12)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_out_is_overwritten(impl):
    device = impl_device(impl)
    activation, grad_norm = (plane.to(device) for plane in planes(7, 20))
    table = torch.full((20, 3), math.nan, dtype=torch.float64, device=device)
    returned, scores = integrate_sps(activation, grad_norm, [0, 20], out=table[:, 1], return_per_token=True, impl=impl)
    assert returned.data_ptr() == table[:, 1].data_ptr()
    assert scores.shape == (7, 20)
    expected, _ = reference.integrate_sps(activation.cpu(), grad_norm.cpu(), torch.tensor([0, 20]))
    assert_close_rms(table[:, 1], expected, 1e-12)
    assert table[:, ::2].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_every_run_gives_the_same_bits(impl):
    activation, grad_norm = (plane.to(impl_device(impl)) for plane in planes(40, 90, 0.1))
    runs = [integrate_sps(activation, grad_norm, [0, 30, 90], impl=impl) for _ in range(2)]
    assert torch.equal(*runs)


def test_the_result_carries_no_gradient():
    plane = torch.rand(3, 4, requires_grad=True)
    assert not integrate_sps(plane, plane, [0, 4]).requires_grad
    with pytest.raises(ValueError, match="out is not differentiable, but it or an input requires grad"):
        integrate_sps(plane, plane, [0, 4], out=torch.empty(4, dtype=torch.float64))


P = torch.ones(3, 4)
BAD_CALLS = {
    "one dimension": (lambda: integrate_sps(P[0], P[0], [0, 4]), ValueError, r"activation must have shape \(tokens, blocks\), got \(4,\)"),
    "shapes": (lambda: integrate_sps(P, P[:2], [0, 4]), ValueError, r"grad_norm must have shape \(3, 4\), got \(2, 4\)"),
    "dtypes": (lambda: integrate_sps(P, P.double(), [0, 4]), TypeError, "grad_norm must be torch.float32, got torch.float64"),
    "integers": (lambda: integrate_sps(P.int(), P, [0, 4]), TypeError, "activation must be float16"),
    "offsets end": (lambda: integrate_sps(P, P, [0, 3]), ValueError, r"group_offsets must ascend from 0 to 4, got \[0, 3\]"),
    "offsets start": (lambda: integrate_sps(P, P, [1, 4]), ValueError, r"group_offsets must ascend from 0 to 4, got \[1, 4\]"),
    "offsets descend": (
        lambda: integrate_sps(P, P, [0, 3, 2, 4]),
        ValueError,
        r"group_offsets must ascend from 0 to 4, got \[0, 3, 2, 4\]",
    ),
    "offsets dtype": (lambda: integrate_sps(P, P, [0.0, 4.0]), TypeError, "group_offsets must be int32 or int64, got float64"),
    "offsets none": (
        lambda: integrate_sps(P, P, None),
        TypeError,
        "group_offsets must be a tensor, array or list of integers, got NoneType",
    ),
    "offsets text": (lambda: integrate_sps(P, P, "04"), TypeError, "group_offsets must be a tensor, array or list of integers, got str"),
    "offsets shape": (lambda: integrate_sps(P, P, [[0, 4]]), ValueError, r"group_offsets must have shape \(layers \+ 1,\), got \(1, 2\)"),
    "mask shape": (
        lambda: integrate_sps(P, P, [0, 4], token_mask=torch.ones(4, dtype=torch.bool)),
        ValueError,
        r"token_mask must have shape \(3,\), got \(4,\)",
    ),
    "mask dtype": (
        lambda: integrate_sps(P, P, [0, 4], token_mask=torch.ones(3)),
        TypeError,
        "token_mask must be a bool tensor, got torch.float32",
    ),
    "out dtype": (lambda: integrate_sps(P, P, [0, 4], out=torch.ones(4)), TypeError, "out must be torch.float64, got torch.float32"),
    "impl": (lambda: integrate_sps(P, P, [0, 4], impl="cuda"), ValueError, "impl must be one of"),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_input_is_named(call):
    function, error, message = BAD_CALLS[call]
    with pytest.raises(error, match=message):
        function()


def test_debug_refuses_what_is_no_norm():
    bad = torch.tensor([[1.0, -2.0, math.nan]])
    good = torch.tensor([[1.0, 2.0, math.nan]])
    integrate_sps(bad, good, [0, 3])
    with debug(), pytest.raises(ValueError, match=r"activation must contain only NaN and finite norms of at least 0, got -2.0"):
        integrate_sps(bad, good, [0, 3])
    with debug(), pytest.raises(ValueError, match=r"grad_norm must contain only NaN and finite norms of at least 0, got inf"):
        integrate_sps(good, good * math.inf, [0, 3])


@pytest.mark.parametrize("per_token", [False, True])
def test_opcheck(per_token):
    arguments = (*planes(4, 9), torch.tensor([0, 4, 9]), torch.ones(4, dtype=torch.bool), per_token, "torch")
    torch.library.opcheck(torch.ops.tinyonn.integrate_sps.default, arguments)
