"""The harness finds what it is there to find."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from tinyonn import ops
from tinyonn.testing import assert_close_rms, compare_with_oracle, dtype_id, poisoned, rms_error_ratio, shape_id


def test_uninitialised_memory_is_poisoned_and_then_no_longer():
    before = torch.are_deterministic_algorithms_enabled()
    x = torch.ones(3)
    with poisoned():
        for made in (torch.empty(1000), torch.empty_like(x), x.new_empty(7), torch.empty_strided((4, 4), (8, 1)), torch.empty(5).half()):
            assert made.isnan().all()
        assert (torch.empty(9, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_error_ratio_is_root_mean_square():
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert rms_error_ratio(expected + torch.tensor([0.3, -0.4]), expected) == pytest.approx(0.1)
    assert rms_error_ratio(expected, expected) == 0
    assert rms_error_ratio(torch.ones(2), torch.zeros(2)) == math.inf
    assert rms_error_ratio(torch.zeros(0), torch.zeros(0)) == 0


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ([1.0, 2.0, math.nan], "must match the oracle's isnan everywhere, got 1 differences"),
        ([1.0, 2.0, -math.inf], "must match the oracle's isposinf everywhere"),
        ([1.0, 2.001, math.inf], "must have an RMS error ratio of at most 1e-05, got 0.000447"),
        ([1.0, 2.0], r"must have shape \(3,\), got \(2,\)"),
    ],
)
def test_a_wrong_output_is_refused(actual, message):
    expected = torch.tensor([1.0, 2.0, math.inf], dtype=torch.float64)
    assert_close_rms(expected.float(), expected, torch.float32)
    with pytest.raises(AssertionError, match=f"grad {message}"):
        assert_close_rms(torch.tensor(actual), expected, torch.float32, name="grad")


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ones = torch.ones(2)
        ctx.mark_non_differentiable(ones)
        return x.square(), ones

    @staticmethod
    def backward(ctx, grad, _):
        return 2.01 * grad * ctx.saved_tensors[0]


def test_oracle_comparison_judges_outputs_and_gradients():
    tensors = {"x": torch.randn(6)}
    options = {"dtype": torch.float32, "grad": ["x"], "statistics": [1]}
    compare_with_oracle(lambda x: (x.square(), torch.ones(2)), lambda x: (x * x, torch.ones(2)), tensors, **options)
    with pytest.raises(AssertionError, match=r"gradient of x must have an RMS error ratio of at most 1e-05, got 0\.005"):
        compare_with_oracle(lambda x: (_WrongGradient.apply(x)[0], torch.ones(2)), lambda x: (x * x, torch.ones(2)), tensors, **options)
    with pytest.raises(AssertionError, match="output 0 must carry a gradient"):
        compare_with_oracle(lambda x: (x.square().detach(), torch.ones(2)), lambda x: (x * x, torch.ones(2)), tensors, **options)
    with pytest.raises(AssertionError, match="output 1 must not carry a gradient"):
        compare_with_oracle(lambda x: (x.square(), x[:2]), lambda x: (x * x, x[:2]), tensors, **options)
    with pytest.raises(AssertionError, match="output 0 must have an RMS error ratio"):
        compare_with_oracle(lambda x: x + 0.1, lambda x: x, tensors, dtype=torch.float32)
    with pytest.raises(AssertionError, match="op must return 2 tensors, got 1"):
        compare_with_oracle(lambda x: x, lambda x: (x, x), tensors, dtype=torch.float32)


def test_half_precision_is_judged_on_its_own_rounded_inputs():
    compare_with_oracle(lambda x: x.float(), lambda x: x, {"x": torch.randn(50)}, dtype=torch.bfloat16, tolerance=1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")
def test_the_interpreter_puts_the_language_back_after_each_launch():
    language = pytest.importorskip("triton").language
    before, found = dict(vars(language)), []
    for _ in range(3):
        found.append(ops.block_norms(torch.full((2, 4), 3.0), 4, impl="triton"))
        assert [name for name, value in vars(language).items() if value is not before.get(name)] == []
    assert all(torch.equal(norms, torch.full((2, 1), 6.0)) for norms in found)


WITHOUT_PYTEST = """
import sys
sys.modules["pytest"] = None  # as if it were not installed
import torch
from tinyonn import testing
from tinyonn.testing import families, timing
for name in testing.__all__:
    if name != "IMPLS":
        getattr(testing, name)
testing.compare_with_oracle(torch.square, lambda input: input * input, {"input": torch.ones(3)}, dtype=torch.float32, grad=["input"])
model = testing.tiny_causal_lm("llama", num_hidden_layers=1)
print(tuple(model(testing.token_ids(5)).logits.shape))
try:
    testing.IMPLS
except ImportError as error:
    print(error.name)
"""


def test_factories_and_oracles_need_no_pytest():
    ran = subprocess.run([sys.executable, "-c", WITHOUT_PYTEST], capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["(2, 5, 97)", "pytest"]


def test_ids_are_readable():
    assert shape_id((3, 100)) == "3x100"
    assert shape_id(()) == "scalar"
    assert shape_id(7) is None
    assert dtype_id(torch.bfloat16) == "bfloat16"
    assert dtype_id("torch") is None
