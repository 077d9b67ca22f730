"""Tolerances, comparisons with an oracle, and where an implementation's tests run. Needs no pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
"""Largest accepted error ratio by dtype: root mean square of the error over that of the value, for the same rounded inputs."""


def impl_device(impl: str) -> str:
    """Where an implementation's tests put their tensors: Triton's on the GPU if there is one."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def shape_id(value: object) -> str | None:
    """Test id of a shape: (3, 100) -> "3x100"; None (pytest's own choice) for anything else."""
    if isinstance(value, tuple) and all(isinstance(size, int) for size in value):
        return "x".join(map(str, value)) or "scalar"
    return None


def dtype_id(value: object) -> str | None:
    """Test id of a dtype: torch.float16 -> "float16"; None for anything else."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@contextmanager
def poisoned() -> Iterator[None]:
    """Within this context uninitialised memory is NaN (integers: the largest), so output that a kernel forgot to write shows.

    It is torch's own deterministic fill, which reaches every `torch.empty` and its kin, from C++ too.
    """
    enabled, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def rms_error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of `actual - expected` over that of `expected`, in float64; 0 where they are equal or empty."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if torch.equal(actual, expected):
        return 0.0
    scale = expected.square().mean().sqrt().item()
    return (actual - expected).square().mean().sqrt().item() / scale if scale else float("inf")


def assert_close_rms(actual: Tensor, expected: Tensor, tolerance: float | torch.dtype, name: str = "output") -> float:
    """Shapes agree, NaN and infinities stand in the same places, and the error ratio of the rest is within `tolerance`.

    Args:
        actual: the tensor under test.
        expected: the oracle's, in float64.
        tolerance: a ratio, or the dtype the op ran in, which stands for that of `TOLERANCE`.
        name: name of the tensor in the message.

    Returns:
        the error ratio.
    """
    limit = TOLERANCE[tolerance] if isinstance(tolerance, torch.dtype) else tolerance
    assert actual.shape == expected.shape, f"{name} must have shape {tuple(expected.shape)}, got {tuple(actual.shape)}."
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        differ = kind(actual) != kind(expected)
        assert not differ.any(), f"{name} must match the oracle's {kind.__name__} everywhere, got {int(differ.sum())} differences."
    finite = expected.isfinite()
    ratio = rms_error_ratio(actual[finite], expected[finite])
    assert ratio <= limit, f"{name} must have an RMS error ratio of at most {limit:g}, got {ratio:.3g}."
    return ratio


def compare_with_oracle(
    op: Callable[..., Any],
    oracle: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    grad: Sequence[str] = (),
    statistics: Sequence[int] = (),
    tolerance: float | None = None,
) -> None:
    """Runs `op` in `dtype` and `oracle` in float64 on the same rounded values, and compares outputs and gradients.

    Args:
        op: called with `tensors` as keywords, floating-point ones cast to `dtype`; returns a tensor or a tuple of tensors.
        oracle: called with the same values in float64 on the CPU; returns as many.
        tensors: inputs by name.
        dtype: the op's.
        device: the op's.
        grad: names of the inputs whose gradients are compared too, under one random cotangent per differentiable output.
        statistics: outputs, by number, that carry no gradient, even where the oracle's formula could be differentiated; all others must.
        tolerance: error ratio; by default that of `dtype`.
    """
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    low = {name: (t.to(dtype) if t.is_floating_point() else t).to(device).detach().clone() for name, t in tensors.items()}
    exact = {name: t.detach().cpu().double() if t.is_floating_point() else t.cpu() for name, t in low.items()}
    for name in grad:
        low[name].requires_grad_()
        exact[name].requires_grad_()
    outputs, references = _tuple(op(**low)), _tuple(oracle(**exact))
    assert len(outputs) == len(references), f"op must return {len(references)} tensors, got {len(outputs)}."
    for number, (output, expected) in enumerate(zip(outputs, references, strict=True)):
        assert_close_rms(output, expected, limit, f"output {number}")
    if not grad:
        return
    for number, output in enumerate(outputs):
        assert output.requires_grad != (number in statistics), f"output {number} must {'not ' * (number in statistics)}carry a gradient."
    pairs = [(o, r) for number, (o, r) in enumerate(zip(outputs, references, strict=True)) if number not in statistics]
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o, r in pairs]
    actual = torch.autograd.grad([o for o, _ in pairs], [low[name] for name in grad], [c.to(device) for c in cotangents])
    wanted = torch.autograd.grad([r for _, r in pairs], [exact[name] for name in grad], [c.double() for c in cotangents])
    for name, got, want in zip(grad, actual, wanted, strict=True):
        assert_close_rms(got, want, limit, f"gradient of {name}")


def pooled(x: Tensor, size: int) -> Tensor:
    """Means of whole blocks of positions, (B, T, K, D) -> (B, T // size, K, D)."""
    whole = x.shape[1] // size * size
    return x[:, :whole].unflatten(1, (-1, size)).mean(2) if whole else x[:, :0]


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
