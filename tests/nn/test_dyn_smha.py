"""DynSMHA: values, gradients and surprise against a dense form with masks, written out in float64; padding, packing, modes, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyonn.nn import DynSMHA, DynSMHACache, dyn_smha, token_mask_of
from tinyonn.testing import assert_close_rms
from tinyonn.train import HyperStep, capture_surprise

MODES = ("per_head", "composite")


def layer(mode: str = "per_head", **options: Any) -> DynSMHA:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"target_k": 2.5, "dtype": torch.float64} | options
    return DynSMHA(12, 4, 6, mode=mode, **arguments)


def tokens_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary embedding as a product of complex numbers: feature i is the real part, feature i + D / 2 the imaginary one."""
    half = x.shape[-1] // 2
    number = torch.complex(x[..., :half], x[..., half:])
    speed = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    number = number * torch.polar(torch.ones_like(speed), position[..., None] * speed)
    return torch.cat([number.real, number.imag], -1)


def dense(module: DynSMHA, x: Tensor, spans: list[tuple[int, int, int]], position: Tensor) -> Tensor:
    """Every head over every token, with a mask; (B, T, F). A span is (row, begin, end) of one sequence."""
    routing = module.route(x.flatten(0, 1))
    heads = len(module.o_proj)
    weights = torch.zeros(len(routing.top_k_index), heads + 1, dtype=x.dtype).scatter(1, routing.top_k_index, routing.top_k_weights)
    weights, active = weights[:, :heads].view(*x.shape[:2], heads), torch.zeros(*x.shape[:2], heads, dtype=torch.bool)
    active.view(-1, heads)[torch.arange(x[..., 0].numel())[:, None], routing.top_k_index.clamp(max=heads - 1)] = True
    active &= weights != 0
    bias = 0 if module.qkv_bias is None else module.qkv_bias
    q, k, v = (torch.einsum("btf,eof->bteo", x, module.qkv_proj) + bias).chunk(3, -1)
    if module.mode == "composite":
        q, k, v = (torch.einsum("bteo,bte->bto", y, weights)[:, :, None].expand_as(y) for y in (q, k, v))
    q, k = (turned(y, position[:, :, None], module.rope_theta) for y in (q, k))
    mixed = torch.zeros_like(q)
    for row, begin, end in spans:
        scores = torch.einsum("teo,seo->ets", q[row, begin:end], k[row, begin:end]) / module.head_dim**0.5
        seen = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()[None].expand(heads, -1, -1)
        if module.mode == "per_head":
            seen = seen & active[row, begin:end].T[:, None, :] | torch.eye(end - begin, dtype=torch.bool)
        found = torch.einsum("ets,seo->teo", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[row, begin:end])
        mixed = torch.cat([mixed[:row], torch.cat([mixed[row, :begin], found, mixed[row, end:]])[None], mixed[row + 1 :]])
    each = torch.einsum("bteo,efo->btef", mixed, module.o_proj) + (0 if module.o_bias is None else module.o_bias)
    out = torch.einsum("btef,bte->btf", each, weights * active)
    kept = torch.zeros(x.shape[:2], dtype=torch.bool)
    for row, begin, end in spans:
        kept[row, begin:end] = True
    return out * kept[..., None]


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


CASES: dict[str, tuple[int, dict[str, Any], list[tuple[int, int, int]]]] = {
    "two rows": (2, {}, [(0, 0, 9), (1, 0, 9)]),
    "left padding": (2, {"key_start": [3, 0]}, [(0, 3, 9), (1, 0, 9)]),
    "padding on both sides": (3, {"key_start": [2, 0, 9], "key_end": [8, 5, 9]}, [(0, 2, 8), (1, 0, 5)]),
    "packed": (1, {"cu_seqlens": [0, 4, 4, 9]}, [(0, 0, 4), (0, 4, 9)]),
}


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("rows", "bounds", "spans"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients_are_those_of_a_dense_form(mode, rows, bounds, spans, biased):
    module = layer(mode, bias=biased).eval()
    x = tokens_of(rows, 9).requires_grad_()
    position = torch.zeros(rows, 9, dtype=torch.float64)
    for row, begin, end in spans:
        position[row, begin:end] = torch.arange(end - begin)
    given = {name: torch.tensor(value, dtype=torch.int32) for name, value in bounds.items()}
    out, expected = module(x, **given), dense(module, x, spans, position)
    assert_close_rms(out, expected, 1e-12, "output")
    cotangent = tokens_of(rows, 9, seed=5)
    watched = [x, *parameters(module).values()]
    grads = (torch.autograd.grad(y, watched, cotangent, allow_unused=True, materialize_grads=True) for y in (out, expected))
    for name, got, right in zip(["x", *parameters(module)], *grads, strict=True):
        assert_close_rms(got, right, 1e-12, f"gradient of {name}")
        assert right.any() or name == "router.thresholds"


@pytest.mark.parametrize("mode", MODES)
def test_positions_may_be_given(mode):
    module = layer(mode).eval()
    x, position = tokens_of(2, 7), torch.tensor([[0, 1, 2, 5, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9]])
    expected = dense(module, x, [(0, 0, 7), (1, 0, 7)], position.double())
    assert_close_rms(module(x, position_ids=position), expected, 1e-12, "output")
    shared = module(x, position_ids=position[:1])
    assert_close_rms(shared, dense(module, x, [(0, 0, 7), (1, 0, 7)], position[:1].expand(2, -1).double()), 1e-12, "one row of positions")


@pytest.mark.parametrize("kind", ["o_proj", "head"])
@pytest.mark.parametrize("mode", MODES)
def test_surprise_is_that_of_each_pair_alone(mode, kind):
    """Brute force: the pair's own projections get weights of their own, which autograd differentiates."""
    module = layer(mode, bias=True, surprise_kind=kind, gating_loss="surprise", thresholds="balanced", form="linear").eval()
    x, cotangent = tokens_of(1, 6), tokens_of(1, 6, seed=3)
    with capture_surprise(module) as surprise:
        (module(x) * cotangent).sum().backward()
    (found,) = surprise.values()
    routing = module.route(x[0])
    for token in range(6):
        heads = routing.top_k_index[token]
        heads = heads[heads < 6].tolist()
        assert found[token].isfinite().nonzero().flatten().tolist() == sorted(heads)
        for head in heads:
            assert found[token, head].item() == pytest.approx(norm_of_pair(module, x, routing, cotangent, token, head, kind), rel=1e-9)


def norm_of_pair(module: DynSMHA, x: Tensor, routing: Any, cotangent: Tensor, token: int, head: int, kind: str) -> float:
    """Norm of the gradients of weights that this pair alone uses; all others use the module's. One sequence."""
    own = {name: getattr(module, name)[head].detach().clone().requires_grad_() for name in ("qkv_proj", "qkv_bias", "o_proj", "o_bias")}
    weights = torch.zeros(6, 7, dtype=x.dtype).scatter(1, routing.top_k_index, routing.top_k_weights.detach())[:, :6]
    qkv = torch.einsum("tf,eof->teo", x[0], module.qkv_proj.detach()) + module.qkv_bias.detach()
    chosen = torch.zeros(6, 6, 1, dtype=x.dtype)
    chosen[token, head] = 1
    qkv = qkv * (1 - chosen) + chosen * (own["qkv_proj"] @ x[0, token] + own["qkv_bias"])
    position = torch.arange(6, dtype=x.dtype)
    if module.mode == "composite":
        qkv = torch.einsum("teo,te->to", qkv, weights)[:, None].expand_as(qkv)
    q, k, v = qkv.chunk(3, -1)
    q, k = (turned(y, position[:, None], module.rope_theta) for y in (q, k))
    scores = torch.einsum("teo,seo->ets", q, k) / module.head_dim**0.5
    seen = torch.ones(6, 6, dtype=torch.bool).tril()[None]
    if module.mode == "per_head":
        seen = seen & (weights != 0).T[:, None] | torch.eye(6, dtype=torch.bool)
    mixed = torch.einsum("ets,seo->teo", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    each = torch.einsum("teo,efo->tef", mixed, module.o_proj.detach()) + module.o_bias.detach()
    each = each * (1 - chosen) + chosen * (own["o_proj"] @ mixed[token, head] + own["o_bias"])
    watched = [own["o_proj"], own["o_bias"]] if kind == "o_proj" else [*own.values()]
    grads = torch.autograd.grad((torch.einsum("tef,te->tf", each, weights) * cotangent[0]).sum(), watched)
    return float(torch.cat([grad.flatten() for grad in grads]).norm())


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_through_the_heads(mode):
    module = layer(mode, bias=True).eval()
    x = tokens_of(1, 4)
    routing = module.route(x[0])
    weights = routing.top_k_weights.detach().requires_grad_()
    names = list(module.expert_parameters())
    values = [parameter.detach().clone().requires_grad_() for parameter in module.expert_parameters().values()]
    turn = (torch.rand(4, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64))

    def run(hidden: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
        arguments = (hidden, routing._replace(top_k_weights=weights), turn, (torch.Size((1, 4)), None, None, None))
        bound = Bound(module)
        return torch.func.functional_call(bound, {f"inner.{name}": x for name, x in zip(names, values, strict=True)}, arguments)

    class Bound(nn.Module):
        def __init__(self, inner: DynSMHA) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *arguments: Any) -> Tensor:
            return self.inner.execute(*arguments)

    assert torch.autograd.gradcheck(run, (x[0].requires_grad_(), weights, *values))


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(mode):
    module = layer(mode).eval()
    x = tokens_of(2, 6)
    padded = torch.cat([torch.full((1, 4, 12), torch.nan, dtype=x.dtype), x[:1]], 1)
    whole = torch.cat([padded, tokens_of(1, 10, seed=9)])
    out = module(whole, key_start=torch.tensor([4, 0]))
    assert_close_rms(out[0, 4:], module(x[:1])[0], 1e-12, "row with padding")
    assert_close_rms(out[1], module(whole[1:])[0], 1e-12, "other row")
    assert (out[0, :4] == 0).all()


def test_padded_tokens_are_not_counted():
    module = layer(target_k=2).eval()
    module(tokens_of(2, 8), key_start=torch.tensor([3, 0]), key_end=torch.tensor([8, 6]))
    assert int(module.tokens_seen) == 5 + 6
    module.reset_statistics()
    with token_mask_of(module, torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 2)):
        module(tokens_of(2, 8), key_start=torch.tensor([5, 0]))
    assert int(module.tokens_seen) == 3 + 4


def test_a_single_head_is_ordinary_attention():
    module = DynSMHA(12, 4, 1, dtype=torch.float64).eval()
    x = tokens_of(1, 9)
    q, k, v = (x[0] @ module.qkv_proj[0].T).chunk(3, -1)
    q, k = (turned(y, torch.arange(9, dtype=torch.float64), 10000.0) for y in (q, k))
    attended = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    weight = module.route(x[0]).top_k_weights[:, :1]
    assert_close_rms(module(x)[0], weight * (attended @ module.o_proj[0].T), 1e-12, "output")


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_gives_the_same_gradients(mode):
    found = []
    for checkpoint in (False, True):
        module = layer(mode, checkpoint=checkpoint, surprise_kind="head", gating_loss="surprise", thresholds="balanced", form="linear")
        with capture_surprise(module) as surprise:
            module(tokens_of(2, 9)).square().sum().backward()
        (one,) = surprise.values()
        found.append([one.nan_to_num(posinf=-1), *(parameter.grad for parameter in module.parameters() if parameter.grad is not None)])
    assert len(found[0]) > 3
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_it_gives_the_same(mode):
    module = layer(mode, dtype=torch.float32, target_k=2)
    x = tokens_of(2, 9).float()
    expected = module(x)
    expected.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in module.expert_parameters().values()]
    module.zero_grad()
    again = layer(mode, dtype=torch.float32, target_k=2)
    out = torch.compile(again, backend="aot_eager", fullgraph=True)(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for got, right in zip((parameter.grad for parameter in again.expert_parameters().values()), grads, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("mode", MODES)
def test_surprise_trains_the_router(mode):
    torch.manual_seed(0)
    module = DynSMHA(12, 4, 6, mode=mode, target_k=2, gating_loss="surprise", surprise_kind="head")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step = HyperStep(module, optimizer)
    x, before = tokens_of(2, 8).float(), module.router.prototypes.detach().clone()
    result = step(lambda: module(x).square().mean())
    assert result.gating_loss > 0
    assert not torch.equal(before, module.router.prototypes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_and_autocast(mode, dtype):
    module = layer(mode, target_k=2, dtype=torch.float32).eval()
    x = tokens_of(2, 9).float()
    expected = module(x)
    with torch.autocast("cpu", dtype):
        out = module(x)
    assert out.dtype == dtype
    assert_close_rms(out, expected, 3e-2, "autocast")
    half = module.to(dtype)
    assert half(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_few_tokens(mode, rows, tokens):
    out = layer(mode)(tokens_of(rows, tokens).requires_grad_())
    assert out.shape == (rows, tokens, 12)
    out.sum().backward()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "head_dim": ({"head_dim": 3}, ValueError, "head_dim must be even, got 3"),
    "mode": ({"mode": "dense"}, ValueError, "mode must be"),
    "kind": ({"surprise_kind": "down_proj"}, ValueError, "surprise_kind must be"),
    "heads": ({"max_num_experts": 3}, ValueError, "max_num_experts must be at least num_experts 6, got 3"),
    "theta": ({"rope_theta": 0}, ValueError, "rope_theta must be above 0"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        DynSMHA(**({"hidden_size": 12, "head_dim": 4, "num_experts": 6} | options))


def test_bad_inputs_are_refused():
    module = layer()
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(B, T, 12\), got \(9, 12\)"):
        module(tokens_of(9))
    with pytest.raises(TypeError, match=r"hidden_states must be torch.float64 like the heads"):
        module(tokens_of(1, 9).float())
    with pytest.raises(TypeError, match="hidden_states must be a tensor, got list"):
        module([])
    with pytest.raises(ValueError, match=r"key_start must have shape \(1,\)"):
        module(tokens_of(1, 9), key_start=torch.tensor([0, 0]))


@pytest.mark.parametrize("mode", MODES)
def test_one_sort_serves_all_projections_and_routing_is_not_computed_again(mode, monkeypatch):
    """One sort a call, also of a first call with a cache, and one routing in forward and backward together."""
    module = layer(mode, checkpoint=True)
    sorts, routings = [], []
    sort, route = dyn_smha.sort_slots, module.router.forward
    monkeypatch.setattr(dyn_smha, "sort_slots", lambda *given: sorts.append(1) or sort(*given))
    monkeypatch.setattr(module.router, "forward", lambda *given: routings.append(1) or route(*given))
    module(tokens_of(2, 9)).sum().backward()
    assert (len(sorts), len(routings)) == (2, 1)  # backward runs the heads again
    with torch.no_grad():
        module(tokens_of(2, 9), cache=DynSMHACache())
    assert len(sorts) == 3


@pytest.mark.parametrize("bounds", [[0, 5], [0, 5, 20], [3, 9], [0, 7, 4, 9]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_bounds_of_packed_sequences_are_checked(mode, bounds):
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 9"):
        layer(mode)(tokens_of(1, 9), cu_seqlens=torch.tensor(bounds))


def test_bad_positions_and_caches_are_refused():
    module, x = layer(), tokens_of(2, 9)
    with pytest.raises(TypeError, match=r"position_ids must be a tensor of integers, got torch\.float32"):
        module(x, position_ids=torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"position_ids must have shape \(2, 9\) or \(1, 9\), got \(2, 8\)"):
        module(x, position_ids=torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="cache must be a DynSMHACache, got dict"):
        module(x, cache={})
