"""Shares of blocks, for the measurements of a sample, against a softmax written out; and the attention that runs while they are taken."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn.hf import convert_attention
from tinyonn.hf.dyn_nsa import cores, measures, observing, shares
from tinyonn.hf.dyn_nsa.measures import HeadEffects, PriceSample
from tinyonn.nn import block_shares
from tinyonn.nn.dyn_nsa import DynNSACore
from tinyonn.nn.dyn_nsa_options import DynNSAOptions
from tinyonn.ops import dyn_nsa
from tinyonn.testing import left_padding, tiny_causal_lm, token_ids

LENGTH, HEADS, KV, DIM, SIZE = 75, 4, 2, 8, 16
CAPS = pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, False), (None, True), (2.0, True)])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scores_of(softcap: float | None, sinks: bool) -> block_shares.Scores:
    return block_shares.Scores(0.7, softcap, torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks else None)


def softmax_of(query: Tensor, keys: Tensor, softcap: float | None, sink: float | None) -> list[float]:
    """Shares of the keys (n, D) for one query (D,), by the definition."""
    products = [0.7 * float(query.double() @ key.double()) for key in keys]
    if softcap is not None:
        products = [softcap * math.tanh(product / softcap) for product in products]
    weights = [math.exp(product) for product in products]
    total = sum(weights) + (0.0 if sink is None else math.exp(sink))
    return [weight / total for weight in weights]


@CAPS
def test_shares_are_those_of_a_softmax_written_out(softcap, sinks, monkeypatch):
    monkeypatch.setattr(shares, "CHUNK", 7)
    query, key, compressed = draw(20, HEADS, DIM), draw(LENGTH, KV, DIM, seed=1), draw(LENGTH // SIZE, KV, DIM, seed=2)
    place, scores = torch.arange(20) * 3 + 15, scores_of(softcap, sinks)
    options = DynNSAOptions(compress_size=16, block_size=16)
    true = shares.true_block_shares(query, key, place, SIZE, scores)
    found = block_shares.block_shares(query, compressed, place, LENGTH, options, scores)
    for i, t in enumerate(place.tolist()):
        for head in range(HEADS):
            sink = None if scores.sinks is None else float(scores.sinks[head])
            own = softmax_of(query[i, head], key[: t + 1, head // 2], softcap, sink)
            expected = [sum(own[SIZE * b : SIZE * b + SIZE]) for b in range(5)]
            assert true[head // 2, head % 2, i].tolist() == pytest.approx(expected, abs=1e-5)
            own = softmax_of(query[i, head], compressed[: (t + 1) // SIZE, head // 2], softcap, sink)
            assert found[head // 2, head % 2, i].tolist() == pytest.approx(own + [0.0] * (5 - len(own)), abs=1e-5)


def call_of(softcap: float | None, sinks: bool, **options: Any) -> observing.Attended:
    """A call of a layer of three blocks and more, in float64."""
    core = DynNSACore(HEADS, KV, DIM, DynNSAOptions(compress_size=16, block_size=16, **options), dtype=torch.float64)
    query, key, value = (draw(1, 130, heads, DIM, seed=seed).double() for seed, heads in ((3, HEADS), (4, KV), (5, KV)))
    with torch.no_grad():
        core.slope.copy_(torch.tensor([0.6, -0.9]))
    out = torch.zeros(1, 130, HEADS, DIM, dtype=torch.float64, requires_grad=True) * 1
    gates = torch.tensor([0.0, 1.0, 0.0]).double().expand(1, 130, HEADS, 3)
    return observing.Attended(core, query, key, value, gates, None, scores_of(softcap, sinks), None, None, None, out)


@CAPS
@pytest.mark.parametrize("limit", [16, 5])
def test_a_price_reads_in_the_op_what_the_sample_of_importances_says(limit, softcap, sinks):
    """At a price between two sampled importances, the op selects as many blocks as there are importances above it."""
    call = call_of(softcap, sinks, max_blocks=limit)
    core, sample = call.core, PriceSample(1.0, 0)
    sample.add(call)
    ordered = sample.prices()
    place = len(ordered) * 2 // 3  # about where a limit of 5 holds
    price = float(ordered[place - 1] + ordered[place]) / 2
    compressed = core.compress(call.key, call.value, None, None)
    result = dyn_nsa(
        call.query, call.key, call.value, *compressed, call.gates, core.base + price, core.slope, window=20, temperature=1e-3,
        block_size=16, compress_size=16, max_blocks=limit, query_compressed=core.compressed_query(call.query), scale=0.7, softcap=softcap,
        sinks=None if call.scores.sinks is None else call.scores.sinks.double(),
    )  # fmt: skip
    assert sample.every - sample.forced == len(ordered) > 100
    assert (result.overflow > 0) == (limit == 5)
    assert int(result.counts.sum()) - sample.forced == pytest.approx(place, abs=1)


@CAPS
def test_the_effect_of_a_block_is_the_derivative_by_its_share(softcap, sinks, monkeypatch):
    """e[t, b] = |∂o/∂log m| of an attention whose share of a block is multiplied by m, and then normalised."""
    monkeypatch.setattr(measures, "LEAST_X", -100.0)  # keeps all pairs
    call = call_of(softcap, sinks)
    effects = HeadEffects(call.core)
    effects.watch(call)
    grad = draw(1, 130, HEADS, DIM, seed=6).double()
    call.out.backward(grad)
    effect, number = torch.zeros(HEADS).double(), 0
    for t in range(48, 130, 1):
        far = range(1, t // 16 - 1)
        number += len(far)
        for head in range(HEADS):
            sink = None if call.scores.sinks is None else float(call.scores.sinks[head])
            own = torch.tensor(softmax_of(call.query[0, t, head], call.key[0, : t + 1, head // 2], softcap, sink)).double()
            block = torch.arange(t + 1) // 16
            value = call.value[0, : t + 1, head // 2]
            for b in far:
                share = own[block == b].sum()
                # ∂/∂m at 1 of (Σ p v + (m - 1) Σ_b p v) / (1 + (m - 1) P_b)
                change = (own[:, None] * value)[block == b].sum(0) - share * (own[:, None] * value).sum(0)
                effect[head] += change.square().sum()
    slope = grad[0].square().sum((0, 2))
    expected, found = (effect * slope / 130).view(KV, 2).sum(1), effects.pairs()
    assert [len(pairs.effect) for pairs in found] == [number] * KV
    torch.testing.assert_close(torch.stack([(pairs.effect * pairs.weight).sum() for pairs in found]), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("how", ["plain", "padded", "holes", "packed", "bounds"])
def test_a_watched_model_gives_the_logits_and_gradients_of_the_exact_path(how):
    model = convert_attention(tiny_causal_lm("llama", max_position_embeddings=512), compress_size=16, block_size=16, window=20)
    x, given = token_ids(), {}
    positions = torch.cat([torch.arange(70), torch.arange(60)])[None]
    if how == "padded":
        given["attention_mask"] = left_padding()
    if how == "holes":
        given["attention_mask"] = left_padding()
        given["attention_mask"][1, 40:50] = 0
    if how == "packed":
        given["position_ids"] = positions.expand(2, -1)
    if how == "bounds":
        x, given = x[:1], {"position_ids": positions, "cu_seq_lens_q": torch.tensor([0, 70, 130], dtype=torch.int32)}
    real = given.get("attention_mask", torch.ones_like(x)).bool()

    def results() -> list[Tensor]:
        embedded = model.get_input_embeddings()(x).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False, **given).logits
        return [logits[real], *torch.autograd.grad(logits[real].square().mean(), embedded)]

    expected, calls, found = results(), [], list(cores(model))
    with observing.watched(found, calls.append):
        got = results()
        with torch.no_grad():
            found[1].gate_bias[0, 0] = 0.25
    exact = results()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)
    assert [call.core for call in calls] == found
    assert all(core.watch is None for core in found)
    with observing.watched(found, calls.append):  # one layer has other gates, and runs as it is
        for a, b in zip(results(), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)
        assert [core.watch is None for core in found] == [False, True, False]
    assert [call.core for call in calls] == 2 * found


def test_plain_attention_runs_where_all_blocks_are_read_and_only_there(monkeypatch):
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the op must not run")

    model, x = convert_attention(tiny_causal_lm("llama"), compress_size=16, block_size=16, window=20), token_ids()
    with observing.watched(list(cores(model)), lambda call: None), monkeypatch.context() as patch:
        patch.setattr("tinyonn.nn.dyn_nsa.dyn_nsa", refused)
        model(x, use_cache=False)
        with pytest.raises(AssertionError, match="the op must not run"):
            model(x, use_cache=False, block_price=-3.0)
    few = convert_attention(tiny_causal_lm("llama"), compress_size=16, block_size=16, window=20, max_blocks=4)
    with torch.no_grad():
        expected = few(x, use_cache=False).logits
        with observing.watched(list(cores(few)), lambda call: None):
            assert torch.equal(few(x, use_cache=False).logits, expected)
