"""The loss that keeps estimated shares of blocks near the true ones while a model trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tinyonn.nn import DynNSAAttention
from tinyonn.nn.block_shares import Scores
from tinyonn.nn.dyn_nsa import DynNSACore
from tinyonn.nn.dyn_nsa_options import DynNSAOptions
from tinyonn.nn.share_distillation import sampled_divergence

HEADS, KV, DIM, BLOCK, COMPRESS = 4, 2, 8, 32, 16


def core(tokens: int, *, dtype: torch.dtype = torch.float64, **options: object) -> DynNSACore:
    """A core that looks at every query, because it draws as many places as there are, one from each part."""
    torch.manual_seed(0)
    chosen = {"compress_size": COMPRESS, "block_size": BLOCK, "window": 20, "distil_weight": 0.3, "distil_queries": tokens, **options}
    made = DynNSACore(HEADS, KV, DIM, DynNSAOptions(**chosen), dtype=dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.estimate_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def inputs(tokens: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(batch, tokens, heads, DIM, generator=generator, dtype=torch.float64) for heads in (HEADS, KV))
    return 2 * query.to(dtype), key.to(dtype)


def oracle(made: DynNSACore, query: Tensor, key: Tensor, softcap: float | None = None, sinks: Tensor | None = None) -> tuple[Tensor, int]:
    """Sum over the queries and heads of one text, and their number, written out: query (T, H, D), key (T, K, D)."""
    options, total, number = made.options, query.new_zeros(()), 0
    if options.learnable_compression:
        parts = made.compress_key

        def compressed(keys: Tensor) -> Tensor:
            keys = keys + parts.position
            hidden = torch.nn.functional.silu(torch.einsum("ckd,kde->cke", keys, parts.up))
            return keys.mean(0) + torch.einsum("ckd,kde->cke", hidden, parts.down).mean(0)
    else:

        def compressed(keys: Tensor) -> Tensor:
            return keys.mean(0)

    short = [compressed(key[at : at + COMPRESS]) for at in range(0, len(key) - COMPRESS + 1, COMPRESS)]

    def softmax(scores: Tensor, head: int) -> Tensor:
        scores = scores / math.sqrt(DIM)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return scores.softmax(0) if sinks is None else torch.cat([scores, sinks[head : head + 1]]).softmax(0)[:-1]

    for t in range(len(query)):
        far = range(options.forced_first, t // BLOCK - options.forced_local + 1)
        if not far:
            continue
        for head in range(HEADS):
            true = softmax(key[: t + 1, head // 2] @ query[t, head], head)
            mapped = query[t, head] if made.query_map is None else query[t, head] @ made.query_map[head]
            found = softmax(torch.stack(short[: (t + 1) // COMPRESS])[:, head // 2] @ mapped, head)
            p = [true[BLOCK * b : BLOCK * b + BLOCK].sum() for b in far]
            q = [found[2 * b : 2 * b + 2].sum() for b in far]
            pairs = [*zip(p, q, strict=True), ((1 - sum(p)).clamp(min=1e-6), (1 - sum(q)).clamp(min=1e-6))]
            total = total + sum(a * (a / b).log() for a, b in pairs)
            number += 1
    return total, number


@pytest.mark.parametrize(
    "options",
    [{}, {"forced_first": 0, "forced_local": 1}, {"compress_query": False}, {"learnable_compression": False}],
    ids=["default", "one forced", "no map", "means"],
)
def test_it_is_the_formula_with_gradients_of_the_estimate_alone(options):
    made, (query, key) = core(150, **options), inputs(150)
    query.requires_grad_()
    key.requires_grad_()
    total, pairs = sampled_divergence(made, query, key, Scores(DIM**-0.5))
    expected, number = oracle(made, query[0].detach(), key[0].detach())
    assert pairs == number > 0
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
    learned = made.estimate_parameters()
    ours, theirs = torch.autograd.grad(total, learned.values()), torch.autograd.grad(expected, learned.values())
    for name, a, b in zip(learned, ours, theirs, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    total, _ = sampled_divergence(made, query, key, Scores(DIM**-0.5))
    total.backward()
    assert query.grad is None
    assert key.grad is None
    assert all(parameter.grad is None for name, parameter in made.named_parameters() if name.removeprefix("compress_key.") not in learned)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_softcap_and_sinks_shape_both_shares(softcap):
    made, (query, key) = core(130), inputs(130)
    sinks = torch.randn(HEADS, dtype=torch.float64)
    total, _ = sampled_divergence(made, query, key, Scores(DIM**-0.5, softcap, sinks))
    expected, _ = oracle(made, query[0], key[0], softcap, sinks)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)


def test_padding_does_not_count_and_texts_begin_where_they_begin():
    made, (query, key) = core(160), inputs(160, 3)
    start, end = torch.tensor([0, 21, 130]), torch.tensor([150, 160, 160])  # the last text is read whole by every query
    total, pairs = sampled_divergence(made, query, key, Scores(DIM**-0.5), key_start=start, key_end=end)
    rows = [oracle(made, query[i, b:e], key[i, b:e]) for i, (b, e) in enumerate(zip(start.tolist(), end.tolist(), strict=True))]
    assert rows[2][1] == 0
    assert pairs == sum(number for _, number in rows)
    torch.testing.assert_close(total, rows[0][0] + rows[1][0], rtol=1e-10, atol=0)


def test_packed_texts_do_not_see_each_other():
    made, (query, key) = core(330), inputs(330)
    bounds = torch.tensor([0, 141, 150, 330], dtype=torch.int32)
    total, pairs = sampled_divergence(made, query, key, Scores(DIM**-0.5), cu_seqlens=bounds)
    texts = [oracle(made, query[0, b:e], key[0, b:e]) for b, e in ((0, 141), (141, 150), (150, 330))]
    assert pairs == sum(number for _, number in texts)
    torch.testing.assert_close(total, sum(one for one, _ in texts), rtol=1e-10, atol=0)


def test_queries_may_be_the_last_positions():
    """As after a prefix: the last 90 of 150 positions."""
    made, (query, key) = core(90), inputs(150)
    total, pairs = sampled_divergence(made, query[:, 60:], key, Scores(DIM**-0.5))
    whole, number = oracle(made, query[0], key[0])
    before, earlier = oracle(made, query[0, :60], key[0, :60])
    assert earlier == 0  # the first three blocks of 32 are read whole up to position 96
    assert pairs == number
    torch.testing.assert_close(total, whole - before, rtol=1e-10, atol=0)


def test_nothing_has_no_loss():
    made = core(10)
    for shape in ((0, 40), (2, 0)):
        query, key = (torch.zeros(*shape, heads, DIM, dtype=torch.float64) for heads in (HEADS, KV))
        assert made.distillation_loss(query, key) == 0


def test_positions_are_exact_whatever_the_default_dtype():
    from tinyonn.nn.share_distillation import _drawn

    torch.set_default_dtype(torch.bfloat16)
    try:
        place, _ = _drawn(16, torch.zeros(50, 32768, 1), 32768)
    finally:
        torch.set_default_dtype(torch.float32)
    assert place.unique().numel() > 780
    assert (place % 128 == 0).float().mean() < 0.05


def test_batch_sizes_share_their_graphs():
    made = core(16, dtype=torch.float32, distil_queries=8)
    compiled = torch.compile(made.distillation_loss, fullgraph=True, backend="eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for batch in (2, 3, 4, 5, 6, 7):
        loss = compiled(*inputs(150, batch, torch.float32))
        assert loss > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_places_are_drawn_anew_from_equal_parts_of_a_row():
    made, (query, key) = core(320, distil_queries=10), inputs(320)
    seen = [torch.div(*sampled_divergence(made, query, key, Scores(DIM**-0.5))).item() for _ in range(60)]
    assert len(set(seen)) > 50
    every, (whole, number) = torch.tensor(seen, dtype=torch.float64), oracle(made, query[0], key[0])
    assert abs(every.mean() - whole / number) < 4 * every.std() / 60**0.5
    pairs = [int(sampled_divergence(made, query, key, Scores(DIM**-0.5))[1]) for _ in range(20)]
    assert set(pairs) == {7 * HEADS}  # the first three of ten parts, of 32 places each, read every block


def test_texts_that_are_read_whole_have_a_loss_of_0():
    made, (query, key) = core(60), inputs(60)
    loss = made.distillation_loss(query, key)
    assert loss == 0
    loss.backward()
    assert all(not parameter.grad.any() for parameter in made.estimate_parameters().values())


def test_bfloat16_is_near_float64():
    made, (query, key) = core(150), inputs(150)
    exact = made.distillation_loss(query, key)
    half = made.to(torch.bfloat16).distillation_loss(query.bfloat16(), key.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, rtol=0.05, atol=0)


def test_a_layer_returns_the_loss_in_training():
    torch.manual_seed(0)
    options = DynNSAOptions(compress_size=16, block_size=32, window=20, distil_weight=0.3, distil_queries=150)
    layer, x = DynNSAAttention(32, HEADS, KV, options=options, dtype=torch.float64), torch.randn(2, 150, 32, dtype=torch.float64)
    calls: list[tuple[Tensor, Tensor]] = []
    layer.core.register_forward_hook(lambda module, args, out: calls.append((args[0].detach(), args[1].detach())))
    result = layer(x)
    ((query, key),) = calls
    rows = [oracle(layer.core, query[i], key[i]) for i in range(2)]
    expected = 0.3 * (rows[0][0] + rows[1][0]) / (rows[0][1] + rows[1][1])
    torch.testing.assert_close(result.distillation_loss, expected, rtol=1e-8, atol=0)
    for weight in layer.q_proj.weight, layer.k_proj.weight:
        assert torch.autograd.grad(result.distillation_loss, weight, retain_graph=True, allow_unused=True) == (None,)
    assert layer.eval()(x).distillation_loss == 0
    options.distil_weight = 0.0
    assert layer.train()(x).distillation_loss == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distil_weight": -1.0}, "distil_weight must be at least 0, got -1.0"),
        ({"distil_weight": math.nan}, "distil_weight must be finite, got nan"),
        ({"distil_queries": 0}, "distil_queries must be at least 1, got 0"),
        (
            {"distil_weight": 0.1, "learnable_compression": False, "compress_query": False},
            "distil_weight must be 0 without learnable_compression or compress_query, got 0.1",
        ),
    ],
    ids=["negative", "nan", "no query", "nothing to learn"],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DynNSAOptions(**options)
