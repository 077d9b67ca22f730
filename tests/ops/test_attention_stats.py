"""Entropy and span mass of attention, against the matrix of probabilities in float64 and against attention written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tinyonn
from tinyonn import ops, reference
from tinyonn.testing import IMPLS, impl_device

Case = dict[str, Any]


def case(
    tokens: int = 70, *, queries: int | None = None, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 16, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + dim)
    query = torch.randn(batch, queries or tokens, heads, dim, generator=generator, dtype=torch.float64) * 2
    key = torch.randn(batch, tokens, kv_heads, dim, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def mask_of(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < 0.4


def on(device: str, options: Case) -> Case:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


OPTIONS: dict[str, Case] = {
    "causal": {},
    "all-keys": {"causal": False},
    "scaled": {"scale": 0.7},
    "window": {"window": 9},
    "window-one": {"window": 1},
    "window-both-ways": {"window": 12, "causal": False},
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": torch.tensor([-3.0, 0.0, 2.0, 9.0])},
    "padding": {"key_mask": torch.arange(70) >= torch.tensor([[7], [0]])},
    "bool-bias": {"bias": torch.rand(2, 1, 70, 70, generator=torch.Generator().manual_seed(3)) < 0.5},
    "added-bias": {"bias": torch.randn(4, 1, 70, generator=torch.Generator().manual_seed(3))},
    "additive-mask": {"bias": torch.zeros(70, 70).masked_fill_(torch.rand(70, 70) < 0.4, torch.finfo(torch.float32).min)},
    "everything": {
        "window": 20, "softcap": 3.0, "sinks": torch.tensor([0.0, 1.0, -1.0, 2.0]),
        "key_mask": torch.arange(70) >= torch.tensor([[7], [0]]),
        "bias": torch.rand(1, 4, 70, 70, generator=torch.Generator().manual_seed(3)) < 0.8,
    },
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_statistics_equal_those_of_the_whole_matrix(impl, options):
    device = impl_device(impl)
    (query, key), span = case(), mask_of(2, 70)
    got = ops.attention_stats(query.to(device), key.to(device), span_mask=span.to(device), impl=impl, **on(device, options))
    entropy, mass = reference.attention_stats(query, key, span_mask=span, **options)
    torch.testing.assert_close(got.entropy.cpu().double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.span_mass.cpu().double(), mass, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("tokens", "queries", "heads", "kv_heads", "dim"),
    [(1, 1, 1, 1, 1), (200, 200, 3, 1, 20), (130, 3, 6, 6, 64), (65, 1, 8, 2, 40), (33, 33, 2, 1, 128)],
)
def test_any_shape(impl, tokens, queries, heads, kv_heads, dim):
    device = impl_device(impl)
    query, key = case(tokens, queries=queries, heads=heads, kv_heads=kv_heads, dim=dim)
    span = mask_of(2, tokens)
    got = ops.attention_stats(query.to(device), key.to(device), span_mask=span.to(device), impl=impl)
    entropy, mass = reference.attention_stats(query, key, span_mask=span)
    torch.testing.assert_close(got.entropy.cpu().double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.span_mass.cpu().double(), mass, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 300, 7_000, 10_000, 20_000, 40_000], ids=lambda n: f"steps-of-{n}")
@pytest.mark.parametrize("name", ["causal", "window", "everything", "added-bias"])
def test_steps_of_any_size_give_the_same(monkeypatch, name, elements):
    from tinyonn.ops.statistics import _torch_attention_stats

    monkeypatch.setattr(_torch_attention_stats, "CHUNK_ELEMENTS", elements)  # some queries of a head … all heads of some rows
    test_statistics_equal_those_of_the_whole_matrix("torch", OPTIONS[name])
    query, key = case(40, batch=5, heads=6, kv_heads=3)
    found = ops.attention_stats(query, key, impl="torch").entropy
    torch.testing.assert_close(found.double(), reference.attention_stats(query, key)[0], rtol=1e-5, atol=1e-5)


def test_the_oracle_is_the_entropy_of_attention_written_out():
    query, key = case(6, batch=1, heads=1, kv_heads=1, dtype=torch.float64)
    entropy, mass = reference.attention_stats(query, key, span_mask=torch.tensor([[True, False, True, False, False, True]]))
    for token in range(6):
        probs = (key[0, : token + 1, 0] @ query[0, token, 0] / 4).softmax(0)
        assert entropy[0, token, 0] == pytest.approx(float(-(probs * probs.log()).sum()), abs=1e-12)
        assert mass[0, token, 0] == pytest.approx(float(probs[[j for j in (0, 2, 5) if j <= token]].sum()), abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_scores_spread_evenly_and_a_single_key_has_no_entropy(impl):
    device = impl_device(impl)
    found = ops.attention_stats(torch.zeros(1, 8, 1, 16, device=device), torch.zeros(1, 8, 1, 16, device=device), impl=impl)
    torch.testing.assert_close(found.entropy[0, :, 0].cpu(), torch.arange(1.0, 9.0).log(), rtol=1e-6, atol=1e-6)
    assert found.span_mass is None


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_sees_nothing_has_neither(impl):
    device = impl_device(impl)
    query, key = (x.to(device) for x in case())
    hidden = torch.zeros(2, 70, dtype=torch.bool, device=device)
    hidden[1, 30:] = True
    for sinks in (None, torch.zeros(4, device=device)):
        found = ops.attention_stats(query, key, span_mask=~hidden, key_mask=hidden, sinks=sinks, impl=impl)
        assert (found.entropy[0] == 0).all()
        assert (found.span_mass == 0).all()
        assert (found.entropy[1, :30] == 0).all()
        assert (found.entropy[1, 31:] > 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_neither_overflow_nor_cancel(impl):
    device = impl_device(impl)
    query, key = case()
    query = query * 100
    found = ops.attention_stats(query.to(device), key.to(device), span_mask=mask_of(2, 70).to(device), impl=impl)
    entropy, mass = reference.attention_stats(query, key, span_mask=mask_of(2, 70))
    torch.testing.assert_close(
        found.entropy.cpu().double(), entropy, rtol=1e-3, atol=2e-3
    )  # scores of 2,000 have 4 digits behind the point
    torch.testing.assert_close(found.span_mass.cpu().double(), mass, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("impl", ["torch", IMPLS[1]])
def test_half_precision_is_widened(impl):
    device = impl_device(impl)
    query, key = case(dtype=torch.float16)
    found = ops.attention_stats(query.to(device), key.to(device), impl=impl)
    assert found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.entropy.cpu().double(), reference.attention_stats(query, key)[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    device = impl_device(impl)
    query, key = case(40)
    turned = [x.to(device).transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    wanted = ops.attention_stats(query, key, impl="torch").entropy
    found = ops.attention_stats(*turned, key_mask=torch.ones(1, 1, dtype=torch.bool, device=device).expand(2, 40), impl=impl).entropy
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_with_the_matrix():
    from tinyonn.ops.statistics._torch_attention_stats import CHUNK_ELEMENTS, Visibility, attention_stats

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    query, key = case(2048, batch=1)
    with Watch():
        attention_stats(query, key, None, None, 0.25, 0.0, Visibility(True, 0, None, None))
    assert 0 < largest <= max(query.numel(), CHUNK_ELEMENTS)


def test_it_compiles_whole_and_is_registered():
    query, key = case(20)
    span = mask_of(2, 20)
    eager = ops.attention_stats(query, key, span_mask=span)
    compiled = torch.compile(lambda q, k: ops.attention_stats(q, k, span_mask=span), fullgraph=True)(query, key)
    torch.testing.assert_close(tuple(compiled), tuple(eager))
    torch.library.opcheck(
        torch.ops.tinyonn.attention_stats.default, (query, key, span, None, None, None, 0.25, True, 0, 0.0, "torch")
    )  # fmt: skip


def test_no_gradient_flows():
    query, key = (x.requires_grad_() for x in case(10))
    assert not ops.attention_stats(query, key).entropy.requires_grad


BAD: dict[str, tuple[Case, type[Exception], str]] = {
    "integers": ({"query": torch.zeros(2, 8, 4, 16, dtype=torch.int32)}, TypeError, "query must be float16"),
    "other heads": ({"key": torch.zeros(2, 8, 3, 16)}, ValueError, "key must have a number of heads that divides query's 4"),
    "fewer keys": ({"key": torch.zeros(2, 7, 2, 16)}, ValueError, "key must have at least query's 8 positions, got 7"),
    "float mask": ({"key_mask": torch.ones(2, 8)}, TypeError, "key_mask must be a bool tensor, got torch.float32"),
    "span shape": ({"span_mask": torch.ones(8, dtype=torch.bool)}, ValueError, r"span_mask must have shape \(2, 8\), got \(8,\)"),
    "window": ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must"),
    "sinks": ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(4,\), got \(2,\)"),
    "bias": ({"bias": torch.zeros(2, 8, 7)}, ValueError, r"bias must be broadcastable to \(2, 4, 8, 8\), got \(2, 8, 7\)"),
    "bias dtype": ({"bias": torch.zeros(8, 8, dtype=torch.int64)}, TypeError, "bias must be float16"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, error, message = BAD[name]
    query, key = case(8)
    with pytest.raises(error, match=message):
        ops.attention_stats(**{"query": query, "key": key, **change})


def test_nan_is_named_in_debug_and_passed_on_otherwise():
    query, key = case(8)
    key[0, 3, 0, 2] = float("nan")
    found = ops.attention_stats(query, key).entropy
    assert found[0, 3:, :2].isnan().all()
    assert found[1].isfinite().all()
    with tinyonn.debug(), pytest.raises(ValueError, match="key must not contain NaN"):
        ops.attention_stats(query, key)
