"""What the attention module and its cache accept, and how they refuse the rest."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tinyonn.nn import DynNSAAttention, DynNSACache, DynNSAOptions

OPTIONS = DynNSAOptions(compress_size=16, block_size=16, window=20)


def layer(seed: int = 0) -> DynNSAAttention:
    torch.manual_seed(seed)
    return DynNSAAttention(32, 4, 2, options=OPTIONS, dtype=torch.float64).eval()


def tokens(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_a_cache_of_one_layer_is_refused_by_another():
    first, second, cache, x = layer(0), layer(1), DynNSACache(), tokens(40)
    first(x[:, :30], cache=cache)
    with pytest.raises(ValueError, match="cache belongs to another layer; use one DynNSACache per layer"):
        second(x[:, :30], cache=cache)
    assert cache.length == 30
    torch.testing.assert_close(first(x[:, 30:], cache=cache).out, first(x).out[:, 30:])


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deepcopy", "pickle"])
def test_a_copied_cache_goes_on_without_a_copy_of_the_layer(copied):
    module, cache, x = layer(), DynNSACache(), tokens(40)
    module(x[:, :30], cache=cache)
    branch = copied(cache)
    module(torch.zeros_like(x[:, :5]), cache=cache)
    torch.testing.assert_close(module(x[:, 30:], cache=branch).out, module(x).out[:, 30:])
    assert (cache.length, branch.length) == (35, 40)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ([0, 3], "key_start must be a torch.Tensor, got list"),
        (torch.zeros(2), "key_start must be int32 or int64, got torch.float32"),
    ],
    ids=["list", "float"],
)
def test_a_cache_names_a_bad_start(start, message):
    with pytest.raises(TypeError, match=message):
        DynNSACache(start)


def test_a_cache_refuses_a_start_on_another_device():
    cache = DynNSACache(torch.zeros(1, dtype=torch.int32, device="meta"))
    with pytest.raises(ValueError, match="key_start must be on cpu, got meta"):
        layer()(tokens(4), cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("name", ["key_start", "key_end", "cu_seqlens"])
def test_bounds_that_are_no_tensors_are_named(name):
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
        layer()(tokens(9), **{name: [0, 9]})


@pytest.mark.parametrize("shape", [(5, 32), (32,), (1, 5, 31), (1, 1, 5, 32)], ids=str)
def test_hidden_states_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(B, T, 32\), got \(" + ", ".join(map(str, shape))):
        layer()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (7, 2), (2, 7, 4), (2, 7, 2, 1)], ids=str)
def test_a_tau_of_another_shape_is_refused_and_the_cache_kept(shape):
    cache = DynNSACache()
    with pytest.raises(ValueError, match=r"tau must have shape \(\), \(2,\), \(2, 7\) or \(2, 7, 2\), got \(" + ", ".join(map(str, shape))):
        layer()(tokens(7, 2), tau=torch.zeros(shape), cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize(
    ("tau", "error", "message"),
    [
        (1.5, ValueError, r"tau must be in \[0, 1\], got 1.5"),
        (float("nan"), ValueError, r"tau must be in \[0, 1\], got nan"),
        ("much", TypeError, "tau must be a number or a torch.Tensor, got str"),
        ([0.5], TypeError, "tau must be a number or a torch.Tensor, got list"),
        (torch.tensor(float("nan")), ValueError, r"tau must be in \[0, 1\], got nan"),
        (torch.tensor(1j), TypeError, "tau must be of real numbers, got torch.complex64"),
    ],
    ids=str,
)
def test_a_tau_that_is_no_share_is_refused(tau, error, message):
    with pytest.raises(error, match=message):
        layer()(tokens(7), tau=tau)


def test_a_subnormal_temperature_is_refused_at_once():
    with pytest.raises(ValueError, match=r"temperature must be at least 1.18e-38, the smallest normal float32, got 1e-39"):
        DynNSAOptions(temperature=1e-39)


@pytest.mark.parametrize("bounds", [{"cu_seqlens": [0, 37, 37, 120]}, {"key_start": [17]}, {"key_end": [99]}], ids=lambda x: next(iter(x)))
def test_int64_bounds_are_those_of_int32(bounds):
    module, x = layer(), tokens(120)
    narrow, wide = ({name: torch.tensor(value, dtype=dtype) for name, value in bounds.items()} for dtype in (torch.int32, torch.int64))
    assert torch.equal(module(x, **wide).out, module(x, **narrow).out)


@torch.no_grad()
def test_an_int64_start_of_a_cache_is_that_of_int32():
    module, x = layer(), tokens(60, 2)
    start = torch.tensor([0, 21])
    cache = DynNSACache(start)
    pieces = torch.cat([module(part, cache=cache).out for part in x.split(25, 1)], 1)
    torch.testing.assert_close(pieces, module(x, key_start=start.int()).out)


def test_device_and_dtype_are_those_of_every_parameter():
    options = DynNSAOptions(compress_size=16, block_size=16)
    module = DynNSAAttention(32, 4, 2, bias=True, options=options, device="meta", dtype=torch.bfloat16)
    assert {(parameter.device.type, parameter.dtype) for parameter in module.parameters()} == {("meta", torch.bfloat16)}
    assert module(torch.empty(1, 40, 32, device="meta", dtype=torch.bfloat16)).out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": 10**400}, ValueError, "base must be a number that a float holds, got 1000"),
        ({"budget_target": 10**400}, ValueError, "budget_target must be a number that a float holds, got 1000"),
        ({"start_gates": (0, "1", 0)}, TypeError, "start_gates must be 3 numbers, got str among them"),
        ({"start_gates": (0, True, 0)}, TypeError, "start_gates must be 3 numbers, got bool among them"),
        ({"start_gates": (0, float("nan"), 0)}, ValueError, "start_gates must be finite, got nan"),
        ({"prices": [[1]]}, TypeError, r"prices must be pairs of two numbers, got \[\[1\]\]"),
        ({"prices": 5}, TypeError, "prices must be pairs of two numbers, got 5"),
        ({"prices": "ab"}, TypeError, "prices must be pairs of two numbers, got 'ab'"),
        ({"start_gates": (0, 1)}, ValueError, "start_gates must have 3 weights, got 2"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_options_that_are_no_numbers_are_named(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        DynNSAOptions(**options)


def test_options_of_a_layer_are_options():
    with pytest.raises(TypeError, match="options must be DynNSAOptions, got dict"):
        DynNSAAttention(32, 4, options={"window": 20})
