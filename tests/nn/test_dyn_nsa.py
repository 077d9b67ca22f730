"""The attention module against the dense oracle; its cache, thresholds, budget and statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tinyonn import reference
from tinyonn.nn import OPEN, DynNSAAttention, DynNSACache, DynNSACore, DynNSAOptions, budget_loss, normalised_entropy
from tinyonn.ops import dyn_nsa
from tinyonn.testing import assert_close_rms, shape_id

SIZES = {"compress_size": 16, "block_size": 16, "window": 20, "max_blocks": 5, "temperature": 1.5}


def layer(seed: int = 0, **options: Any) -> DynNSAAttention:
    """Float64, hidden size 32, four query and two key heads of 8, every parameter away from its start."""
    torch.manual_seed(seed)
    module = DynNSAAttention(32, 4, 2, options=DynNSAOptions(**{**SIZES, **options})).double()
    with torch.no_grad():
        for projection in (module.q_proj, module.k_proj):
            projection.weight *= 3
        for parameter in module.core.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def tokens(length: int, batch: int = 1, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 32, generator=generator, dtype=torch.float64)


def rotated(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary embedding as a product of complex numbers."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(x.shape[1])[:, None, None] * frequency)
    turned = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
    return torch.cat([turned.real, turned.imag], -1)


def oracle(module: DynNSAAttention, x: Tensor, tau: Tensor | None = None) -> tuple[Tensor, ...]:
    core, options = module.core, module.core.options
    query, key, value = (proj(x).unflatten(-1, (-1, 8)) for proj in (module.q_proj, module.k_proj, module.v_proj))
    unit = query / query.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    gates = torch.stack([unit[:, :, h] @ core.gate_weight[h] + core.gate_bias[h] for h in range(4)], 2)
    query, key = rotated(query), rotated(key)
    mapped = None
    if options.compress_query:
        mapped = torch.stack([query[:, :, h] @ core.query_map[h] for h in range(4)], 2)
    out, *rest = reference.dyn_nsa(
        query, key, value, core.compress_key(key), core.compress_value(value), gates, core.base + core.price, core.slope, tau=tau,
        window=options.window, temperature=options.temperature, block_size=16, compress_size=16, max_blocks=options.max_blocks,
        importance=options.importance, forced_first=options.forced_first, forced_local=options.forced_local, query_compressed=mapped,
    )  # fmt: skip
    return module.o_proj(out.flatten(2)), *rest


@pytest.mark.parametrize(
    "options",
    [{}, {"importance": "relative"}, {"forced_first": 0, "forced_local": 1}, {"compress_query": False}],
    ids=["share", "relative", "one forced", "no map"],
)
def test_it_is_the_dense_formula_with_all_gradients(options):
    module, x = layer(budget_weight=0.5, **options), tokens(130, 2)
    module.core.budget_target.fill_(3.0)
    module.core.price.fill_(-0.3 if "importance" in options else -2.5)
    parameters = list(module.parameters())
    weights = torch.randn(2, 130, 32, dtype=torch.float64)
    got = module(x)
    out, counts, tau, overflow, soft_counts = oracle(module, x)
    assert_close_rms(got.out, out, 1e-12)
    assert torch.equal(got.counts, counts)
    assert got.counts.float().mean() > module.core.options.forced + 0.2
    assert_close_rms(got.tau, tau, 1e-12)
    assert_close_rms(got.soft_counts, soft_counts, 1e-12)
    assert_close_rms(got.overflow, overflow, 1e-12)
    expected_loss = 0.5 * (soft_counts.mean() / 3 - 1) ** 2
    assert_close_rms(got.budget_loss, expected_loss, 1e-12)
    ours = torch.autograd.grad((got.out * weights).sum() + got.budget_loss, parameters)
    # tau is a signal: the formula's own would carry a gradient.
    out, _, _, _, soft_counts = oracle(module, x, tau=tau.detach())
    theirs = torch.autograd.grad((out * weights).sum() + 0.5 * (soft_counts.mean() / 3 - 1) ** 2, parameters)
    for (name, _), a, b in zip(module.named_parameters(), ours, theirs, strict=True):
        assert b.abs().max() > 0, name
        assert_close_rms(a, b, 1e-10, name)


def test_all_blocks_of_the_selected_branch_are_dense_attention():
    module, x = layer(max_blocks=None, start_gates=(0.0, 1.0, 0.0)), tokens(150)
    module.core.reset_parameters()
    module.core.price.fill_(OPEN)
    query, key, value = (proj(x).unflatten(-1, (-1, 8)) for proj in (module.q_proj, module.k_proj, module.v_proj))
    dense = scaled_dot_product_attention(
        *(part.transpose(1, 2) for part in (rotated(query), rotated(key), value)), is_causal=True, enable_gqa=True
    )
    assert_close_rms(module(x).out, module.o_proj(dense.transpose(1, 2).flatten(2)), 1e-12)


def test_no_gate_is_stuck_at_the_start():
    torch.manual_seed(0)
    module = DynNSAAttention(32, 4, 2, options=DynNSAOptions(**{**SIZES, "start_gates": (0.0, 1.0, 0.0)}))
    x = tokens(100).float()
    (module(x).out * torch.randn(1, 100, 32)).sum().backward()
    for parameter in (module.core.gate_bias, module.core.gate_weight):
        assert (parameter.grad.flatten(0, -2).abs().amax(0) > 0).all()


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("steps", [(1,) * 70, (40, 1, 1, 1, 33, 7), (16, 16, 15, 2, 64)], ids=["tokens", "chunks", "edges"])
def test_decoding_in_pieces_is_the_same_as_at_once(steps, padded):
    module = layer()
    length = sum(steps)
    x = tokens(length, 2)
    start = torch.tensor([0, 21], dtype=torch.int32) if padded else None
    whole = module(x, key_start=start)
    cache, pieces, begin = DynNSACache(start), [], 0
    with torch.no_grad():
        for step in steps:
            pieces.append(module(x[:, begin : begin + step], cache=cache))
            begin += step
    assert_close_rms(torch.cat([piece.out for piece in pieces], 1), whole.out, 1e-12)
    assert torch.equal(torch.cat([piece.counts for piece in pieces], 1), whole.counts)
    assert cache.length == length


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_incremental_compression_is_whole_compression(padded):
    core = layer().core
    start = torch.tensor([0, 21], dtype=torch.int32) if padded else None
    key, value = torch.randn(2, 2, 103, 2, 8, dtype=torch.float64)
    cache, begin, compressed = DynNSACache(start), 0, []
    calls = []
    core.compress_key.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    for step in (9, 1, 1, 40, 13, 39):
        _, _, *compressed = cache.append(core, key[:, begin : begin + step], value[:, begin : begin + step])
        begin += step
    work = sum(calls)
    for got, maps, x in zip(compressed, (core.compress_key, core.compress_value), (key, value), strict=True):
        assert got.shape[1] == 6
        assert_close_rms(got[0], maps(x[:1])[0], 1e-14)
        own = maps(x[1:, 21:])[0] if padded else maps(x[1:])[0]
        assert_close_rms(got[1, : len(own)], own, 1e-14)
    assert work <= (6 if not padded else 12)


def test_padding_changes_nothing():
    module, x = layer(), tokens(90, 2)
    alone = module(x[1:, 17:])
    left = module(x, key_start=torch.tensor([0, 17], dtype=torch.int32))
    assert_close_rms(left.out[1:, 17:], alone.out, 1e-12)
    right = module(x, key_end=torch.tensor([90, 50], dtype=torch.int32))
    assert_close_rms(right.out[1:, :50], module(x[1:, :50]).out, 1e-12)
    assert not right.counts[1, 50:].any()


def test_packed_sequences_are_separate():
    module, x = layer(), tokens(120)
    packed = module(x, cu_seqlens=torch.tensor([0, 37, 37, 120], dtype=torch.int32)).out
    assert_close_rms(packed, torch.cat([module(x[:, :37]).out, module(x[:, 37:]).out], 1), 1e-12)


def test_later_tokens_do_not_reach_earlier_ones():
    module, x = layer(), tokens(100).requires_grad_()
    grad = torch.autograd.grad(module(x).out[:, :60].square().sum(), x)[0]
    assert not grad[:, 60:].any()
    assert grad[:, :60].abs().max() > 0


@pytest.mark.parametrize("shape", [(), (2,), (2, 70), (2, 70, 2)], ids=shape_id)
def test_a_given_tau_is_used_whatever_its_shape(shape):
    module, x = layer(tau_source="output"), tokens(70, 2)
    tau = torch.rand(shape, dtype=torch.float64)
    spread = tau.reshape(*shape, *[1] * (3 - len(shape))).expand(2, 70, 2)
    got = module(x, tau=tau)
    assert torch.equal(got.tau, spread)
    assert_close_rms(got.out, oracle(module, x, tau=spread.contiguous())[0], 1e-12)


def test_a_constant_tau():
    got = layer(tau_source="constant", tau=0.25)(tokens(40))
    assert (got.tau == 0.25).all()


def test_the_output_drives_tau():
    module, x = layer(tau_source="output"), tokens(30, 2)
    assert (module(x).tau == 1).all()
    for mean in (0.4, 0.8):
        entropy = torch.full((2, 30), mean)
        entropy[0, :10] = 9.0  # padding
        module.core.observe_output(entropy, torch.arange(30) >= torch.tensor([[10], [0]]))
    # The first observation replaces the start, the second enters by a twentieth.
    running = 0.4 + (0.8 - 0.4) * 0.05
    torch.testing.assert_close(module(x).tau, torch.full((2, 30, 2), running, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not module(x).tau.requires_grad

    module.eval()
    cache = DynNSACache()
    with torch.no_grad():
        module(x, cache=cache)
        module.core.observe_output(torch.tensor([[0.5, 0.1], [0.5, 0.9]]))
        step = module(x[:, :1], cache=cache)
    torch.testing.assert_close(step.tau[..., 0], torch.tensor([[0.1], [0.9]], dtype=torch.float64), rtol=0, atol=1e-6)
    # A prompt follows no token of its own.
    torch.testing.assert_close(module(x).tau, torch.full((2, 30, 2), running, dtype=torch.float64), rtol=0, atol=1e-6)


def test_normalised_entropy():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [0.0, 0.0, -200.0, -200.0]], requires_grad=True)
    got = normalised_entropy(logits)
    torch.testing.assert_close(got, torch.tensor([1.0, 0.0, 0.5]), rtol=0, atol=1e-6)
    assert not got.requires_grad
    # A masked token has probability 0, as in a vocabulary without it.
    few = torch.tensor([[1.0, 2.0, 0.5]])
    masked = normalised_entropy(torch.cat([few, torch.full((1, 5), -torch.inf)], -1))
    torch.testing.assert_close(masked, torch.distributions.Categorical(logits=few).entropy() / torch.tensor(8.0).log())
    assert normalised_entropy(torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [-torch.inf, -torch.inf]])).isnan().all()


def test_the_running_tau_keeps_its_precision_and_takes_no_padding():
    core = DynNSACore(4, 2, 16, DynNSAOptions(tau_source="output")).half().train()
    assert core.output_tau.dtype == torch.float32
    padded = torch.tensor([[torch.nan, 0.5, 0.5]])
    core.observe_output(padded, torch.tensor([[0, 1, 1]]))
    expected = 0.5
    for _ in range(200):
        core.observe_output(torch.full((1, 3), 0.503))
        expected += 0.05 * (0.503 - expected)
    assert float(core.output_tau) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("target", [1.0, 100.0], ids=["too many", "too few"])
def test_the_budget_moves_thresholds_the_right_way(target):
    module = layer(budget_weight=1.0)
    module.core.budget_target.fill_(target)
    x = tokens(150)
    result = module(x)
    base, slope = torch.autograd.grad(result.budget_loss, [module.core.base, module.core.slope])
    # Descent follows -gradient: too many blocks must raise the threshold base - slope * tau.
    sign = 1 if target == 1.0 else -1
    assert (sign * base < 0).all()
    assert (sign * slope > 0).all()
    before = module(x).soft_counts.mean()
    with torch.no_grad():
        module.core.base -= 0.1 * base.sign()
    assert sign * (before - module(x).soft_counts.mean()) > 0


def test_the_budget_pulls_where_no_block_passes():
    module = layer(budget_weight=1.0)
    module.core.budget_target.fill_(8.0)
    with torch.no_grad():
        module.core.base.fill_(6.0)
    result = module(tokens(150))
    assert result.counts.max() == 3  # the forced ones
    assert (torch.autograd.grad(result.budget_loss, module.core.base)[0] > 0).all()


def test_budget_loss_is_the_formula():
    soft = torch.tensor([[[2.0, 4.0]], [[6.0, 100.0]]])
    assert budget_loss(soft[:1], 2.0, weight=3.0).item() == 3 * (3 / 2 - 1) ** 2
    mask = torch.tensor([[[True, True]], [[True, False]]])
    assert budget_loss(soft, 2.0, mask=mask).item() == 1.0
    # Layers share one budget: what one reads more, another may read less.
    assert budget_loss([torch.full((1, 2, 1), 1.0), torch.full((2, 2, 1), 4.0)], 3.0).item() == 0.0
    assert budget_loss([soft[:1], soft], 2.0, mask=[mask[:1], mask]).item() == pytest.approx((18 / 5 / 2 - 1) ** 2)


def test_statistics_are_means_over_the_queries_of_all_calls_without_padding():
    module = layer()
    assert all(value != value for value in module.core.statistics().values())
    x, start = tokens(100, 2), torch.tensor([0, 33], dtype=torch.int32)
    results = [module(x, key_start=start), module(x[:, :60], key_start=start)]
    counts, fars, taus, shares, rows = [], [], [], [], []
    for result in results:
        length = result.counts.shape[1]
        real = torch.arange(length) >= start[:, None]
        rows.append(int(real.sum()))
        counts.append(result.counts[real].double())
        forced = ((torch.arange(length) - start[:, None]) // 16 + 1).clamp(max=3)
        fars.append((result.counts - forced[..., None])[real].double())
        taus.append(result.tau[real])
        query = module.q_proj(x[:, :length]).unflatten(-1, (-1, 8))
        size = module.core.gates(query).detach()[real].abs().sum((0, 1))
        shares.append(size / size.sum())
    got = module.core.statistics()
    assert rows[0] != rows[1]
    for name, found in (("mean_count", counts), ("far_count", fars), ("tau", taus)):
        assert got[name] == pytest.approx(float(torch.cat(found).mean()), rel=1e-5)
        assert got[name] > 0
    overflow = sum(float(result.overflow) * number for result, number in zip(results, rows, strict=True))
    assert got["overflow"] == pytest.approx(overflow / sum(rows), abs=1e-6)
    share = sum(one * number for one, number in zip(shares, rows, strict=True)) / sum(rows)
    assert [got[f"share_{name}"] for name in ("compressed", "selected", "window")] == pytest.approx(share.tolist(), rel=1e-4)
    module.core.reset_statistics()
    module(x, key_start=start)
    assert module.core.statistics()["mean_count"] == pytest.approx(float(counts[0].mean()), rel=1e-5)


def test_buffers_without_data_stay_wide():
    with torch.device("meta"):
        module = layer()
    assert {buffer.dtype for buffer in module.half().core.buffers() if buffer.is_floating_point()} == {torch.float32}


def test_it_compiles_whole():
    module, x = layer(budget_weight=1.0), tokens(80)
    eager = module(x)
    grads = torch.autograd.grad(eager.out.sum() + eager.budget_loss, list(module.parameters()))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    again = torch.autograd.grad(compiled.out.sum() + compiled.budget_loss, list(module.parameters()))
    assert_close_rms(compiled.out, eager.out, 1e-12)
    for a, b in zip(again, grads, strict=True):
        assert_close_rms(a, b, 1e-10)


@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_half_precision_at_far_positions(how):
    module, x = layer(max_blocks=None, learnable_compression=False, compress_query=False), tokens(60)  # maps of rotated keys see places
    module.core.price.fill_(OPEN)
    expected = module(x).out
    places = torch.arange(60)[None] + 5000  # only differences of positions count
    assert_close_rms(module(x, position_ids=places).out, expected, 1e-9)
    if how == "cast":
        got = module.bfloat16()(x.bfloat16(), position_ids=places).out
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got = module.float()(x.float(), position_ids=places).out
    assert got.dtype == torch.bfloat16
    assert_close_rms(got, expected, 0.05)


def test_a_saved_state_brings_everything_back():
    module, other, x = layer(0), layer(1), tokens(60)
    module.core.price.fill_(-0.5)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x).out, module(x).out)


def test_the_core_takes_any_group_of_heads():
    torch.manual_seed(0)
    core = DynNSACore(3, 1, 8, DynNSAOptions(**SIZES), dtype=torch.float64)
    query, key, value = torch.randn(1, 40, 3, 8), torch.randn(1, 40, 1, 8), torch.randn(1, 40, 1, 8)
    query, key, value = query.double(), key.double(), value.double()
    gates = core.gates(query)
    pooled = [torch.stack([x[:, :16].mean(1), x[:, 16:32].mean(1)], 1) for x in (key, value)]
    rest = (gates, torch.full((1,), -5.0).double(), torch.zeros(1).double())
    expected = dyn_nsa(query, key, value, *pooled, *rest, impl="reference", **SIZES)
    assert_close_rms(core(query, key, value, gates).out, expected.out, 1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynNSAAttention(32, 4, 3), "num_kv_heads must divide num_heads 4, got 3"),
        (lambda: DynNSAAttention(30, 4), "hidden_size must be a multiple of num_heads 4, got 30"),
        (lambda: DynNSAAttention(20, 4), "head_dim must be even, got 5"),
        (lambda: DynNSAAttention(0, 4), "hidden_size must be at least 1, got 0"),
        (lambda: DynNSAAttention(32, 4, head_dim=-2), "head_dim must be at least 1, got -2"),
        (lambda: DynNSAAttention(32, 4, rope_theta=0), "rope_theta must be above 0, got 0"),
        (lambda: DynNSAOptions(tau_source="none"), "tau_source must be one of attention, output, constant, got 'none'"),
        (lambda: DynNSAOptions(tau=2.0), r"tau must be in \[0, 1\], got 2.0"),
        (lambda: DynNSAOptions(temperature=11.0), "temperature must be above 0 and at most 10, got 11.0"),
        (lambda: DynNSAOptions(start_gates=(1.0, 2.0)), "start_gates must have 3 weights, got 2"),
        (lambda: DynNSAOptions(budget_target=0.0), "budget_target must be above 0, got 0.0"),
        (lambda: DynNSAOptions(compress_size=8), "compress_size must be one of"),
        (lambda: DynNSAOptions(window=0), "window must be at least 1, got 0"),
        (lambda: DynNSAOptions(max_blocks=2), "max_blocks must be at least 3, the number of forced blocks, got 2"),
        (
            lambda: DynNSAOptions(max_blocks=5, forced_first=2, forced_local=4),
            "max_blocks must be at least 6, the number of forced blocks, got 5",
        ),
        (lambda: DynNSAOptions(forced_first=-1), "forced_first must be at least 0, got -1"),
        (lambda: DynNSAOptions(forced_local=0), "forced_local must be at least 1, got 0"),
        (lambda: DynNSAOptions(importance="mass"), "importance must be one of share, relative, got 'mass'"),
        (lambda: DynNSAOptions(impl="fast"), "impl must be one of"),
        (lambda: DynNSAOptions(base=float("nan")), "base must be finite, got nan"),
        (lambda: DynNSAOptions(base=1e300), r"base must be at least -10000 and at most 10000, got 1e\+300"),
        (lambda: DynNSAOptions(prices=((2.0, -1.0), (1.0, -2.0))), "prices must go from few blocks to many and from high prices to low"),
        (lambda: budget_loss([], 3.0), "soft_counts must be of at least one layer, got none"),
        (lambda: budget_loss(torch.ones(1, 2, 1), 0.0), "target must be above 0, got 0.0"),
        (lambda: DynNSAOptions(budget_weight=-1.0), "budget_weight must be at least 0, got -1.0"),
        (lambda: layer()(tokens(4), cache=DynNSACache(), key_start=torch.zeros(1).int()), "must be None beside a cache"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_refused_call_leaves_the_cache_as_it_was():
    module = layer().eval()
    x = tokens(30)
    cache = DynNSACache()
    with torch.inference_mode():
        module(x[:, :20], cache=cache)
    with pytest.raises(ValueError, match=r"the cache holds 1 row\(s\), got 2: begin another"):
        module(tokens(5, 2), cache=cache)
    with pytest.raises(ValueError, match=r"the cache holds keys of \(2, 8\) in torch.float64 on cpu, got \(1, 8\) in torch.float32"):
        cache.append(module.core, torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8))
    with torch.no_grad():
        rest = module(x[:, 20:], cache=cache).out
        torch.testing.assert_close(rest, module(x).out[:, 20:])
    with pytest.raises(ValueError, match=r"key_start of the cache must have shape \(2,\), got \(3,\)"):
        module(tokens(5, 2), cache=DynNSACache(torch.zeros(3, dtype=torch.int32)))


def test_calls_of_padding_alone_are_none():
    module = layer()
    module(tokens(40))
    before = module.core.statistics()
    module(tokens(40), key_start=torch.tensor([40], dtype=torch.int32))
    assert module.core.statistics() == before
    soft = torch.ones(1, 4, 2, requires_grad=True)
    assert budget_loss(soft, 2.0, mask=torch.zeros(1, 4, 2, dtype=torch.bool)) == 0


def test_it_runs_on_meta():
    assert layer().to("meta")(tokens(40).to("meta")).out.shape == tokens(40).shape


def test_a_call_has_its_own_price():
    module, x = layer(), tokens(130)
    got = {price: module(x, price=price) for price in (-4.0, torch.tensor(-1.0))}
    for price, result in got.items():
        module.core.price.fill_(price)
        assert torch.equal(module(x).out, result.out)
    low, high = got.values()
    assert low.counts.sum() > high.counts.sum()
    with pytest.raises(ValueError, match="price must be finite, got inf"):
        module(x, price=float("inf"))


def test_statistics_of_a_model_that_transformers_loads_begin_at_0(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config) -> None:
            super().__init__(config)
            self.attention = layer()
            self.post_init()

        def _init_weights(self, module) -> None:
            pass

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x).out

    first = Model(transformers.PretrainedConfig())
    first.save_pretrained(tmp_path)
    rubbish = [torch.full((size,), 7) for size in (1, 7) for _ in range(50)]  # so that new memory is not 0
    del rubbish
    loaded, x = Model.from_pretrained(tmp_path), tokens(130)
    assert all(math.isnan(value) for value in loaded.attention.core.statistics().values())
    for model in (first, loaded):
        model.eval()(x)
    assert loaded.attention.core.statistics() == pytest.approx(first.attention.core.statistics())
