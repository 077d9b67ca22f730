"""DynNSA beside dense attention: the whole function and its parts, forward, backward and decoding.

Unless a row says otherwise, peers compute dense causal attention over the same query, key and value: the benchmark measures what sparse
attention saves. Outputs are checked against the dense oracle on the last rows, which attend to all keys. In timed runs all thresholds are
open, so each row reads the maximum number of blocks. A short sequence with the same block sizes first checks gates between 0 and 1 and all
gradients. `bench_dyn_nsa_long.py` has training lengths on a GPU.
"Random" selections differ from query to query. "Clustered" selections are shared by neighbouring queries, as in text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tinyonn import ops, reference
from tinyonn.nn import DynNSAAttention, DynNSAOptions
from tinyonn.testing import assert_close_rms, dyn_nsa_case

HEADS, KV_HEADS, DIM = 8, 2, 64
BLOCKS, WINDOW, COMPRESS = 16, 512, 64
CHECKED = 64  # number of last rows that are compared with the oracle
SHORT, FEW_BLOCKS = 777, 8  # length of the short sequence; its last rows choose among up to 12 blocks
PARTLY_OPEN = 0.2  # minimum share of optional blocks with a gate strictly between 0 and 1


def inputs(
    tokens: int, choices: str, device: str = "cpu", heads: int = HEADS, kv_heads: int = KV_HEADS, dim: int = DIM
) -> dict[str, Tensor]:
    """Unit-scale tensors. Every row has more than BLOCKS blocks above the threshold, so it reads exactly BLOCKS."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    key, value = draw(1, tokens, kv_heads, dim), draw(1, tokens, kv_heads, dim)
    key_compressed, value_compressed = (x.unflatten(1, (-1, COMPRESS)).mean(2) * COMPRESS**0.5 for x in (key, value))
    query = draw(1, tokens, heads, dim)
    if choices == "clustered":  # all queries of a 256-token segment select similar blocks
        query = 0.3 * query + draw(1, -(-tokens // 256), heads, dim).repeat_interleave(256, 1)[:, :tokens]
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_compressed": key_compressed,
        "value_compressed": value_compressed,
        "gates": torch.sigmoid(draw(1, tokens, heads, 3)),
        "base": torch.full((kv_heads,), -30.0, device=device),
        "slope": torch.zeros(kv_heads, device=device),
    }


def dyn_nsa(tensors: dict[str, Tensor]) -> ops.DynNSAOutput:
    return ops.dyn_nsa(*tensors.values(), window=WINDOW, max_blocks=BLOCKS, compress_size=COMPRESS)


def expected_rows(tensors: dict[str, Tensor]) -> Tensor:
    """Dense oracle of the last rows."""
    last = {name: x[:, -CHECKED:] if name in ("query", "gates") else x for name, x in tensors.items()}
    return reference.dyn_nsa(*(x.cpu() for x in last.values()), window=WINDOW, max_blocks=BLOCKS, compress_size=COMPRESS).out


@cache
def check_short(
    name: str,
    device: str,
    *,
    queries: int = SHORT,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    dim: int = DIM,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    """Checks outputs and gradients of `dyn_nsa`, or of one part, against the float64 oracle; many gates are strictly between 0 and 1."""
    case = dyn_nsa_case(SHORT, queries=queries, heads=heads, kv_heads=kv_heads, dim=dim, compress_size=COMPRESS, dtype=dtype)
    qkv = {name: case[name] for name in ("query", "key", "value")}
    compressed = {name: case[name] for name in ("query", "key_compressed", "value_compressed")}
    scored = {name: case[name] for name in ("query", "key_compressed")}
    sizes = {"compress_size": COMPRESS, "num_keys": SHORT}
    _, lse, entropy = reference.compressed_attention(**compressed, **sizes)
    tau = reference.attention_tau(entropy, case["query"], SHORT, kv_heads, COMPRESS)
    threshold = case["base"].double() - case["slope"].double() * tau
    scored.update(lse=lse.float(), threshold=threshold.float())

    every = reference.select_blocks(**scored, **sizes, max_blocks=SHORT // COMPRESS + 1)
    between = ((every[2] < 0) & (every[0] >= 0)).sum().item()
    free = (torch.arange(SHORT - queries, SHORT) // COMPRESS - 2).clamp(min=0).sum().item() * kv_heads  # of first, previous and own block
    assert between >= PARTLY_OPEN * free > 0, f"gates between 0 and 1 must be {PARTLY_OPEN} of {free}, got {between}."
    indices, counts, bias, _, overflow = reference.select_blocks(**scored, **sizes, max_blocks=FEW_BLOCKS)
    assert overflow > 0 or queries == 1

    def select(library: Any, **x: Tensor) -> tuple[Tensor, ...]:
        listed, read, log_gate, soft_counts, *_ = library.select_blocks(**x, **sizes, max_blocks=FEW_BLOCKS)
        assert torch.equal(listed.cpu(), indices)
        assert torch.equal(read.cpu(), counts)
        return log_gate.exp(), soft_counts  # the gradient of the logarithm is unbounded as a gate approaches 0

    def whole(library: Any, **x: Tensor) -> tuple[Tensor, ...]:
        result = library.dyn_nsa(**x, window=WINDOW, max_blocks=FEW_BLOCKS, compress_size=COMPRESS)
        return result.out, result.soft_counts

    def block_sparse(library: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return library.block_sparse_attention(query, key, value, indices.to(query.device), counts.to(query.device), bias)[:1]

    calls: dict[str, tuple[Callable[..., tuple[Tensor, ...]], dict[str, Tensor]]] = {
        "dyn_nsa": (whole, case),
        "compressed": (lambda library, **x: library.compressed_attention(**x, **sizes)[:2], compressed),
        "select": (select, scored),
        "block sparse": (block_sparse, {**qkv, "bias": bias.float()}),
        "window": (lambda library, **x: (library.sliding_window_attention(**x, window=WINDOW),), qkv),
    }
    call, given = calls[name]
    ours = {name: x.to(device).requires_grad_() for name, x in given.items()}
    theirs = {name: x.double().requires_grad_() for name, x in given.items()}
    results, expected = call(ops, **ours), call(reference, **theirs)
    # The lse of rows without visible keys is -inf; it is excluded.
    cotangents = [torch.randn_like(x) * x.detach().isfinite() for x in expected]
    grads = torch.autograd.grad(results, list(ours.values()), [g.to(x) for g, x in zip(cotangents, results, strict=True)])
    exact = torch.autograd.grad(expected, list(theirs.values()), cotangents)
    for result, oracle in zip(results, expected, strict=True):
        assert_close_rms(result, oracle, tolerance, name)
    for leaf, grad, oracle in zip(given, grads, exact, strict=True):
        assert oracle.any(), leaf
        assert_close_rms(grad, oracle, 4 * tolerance, f"{name}'s gradient of {leaf}")


def forward_backward(call: Callable[..., Tensor], leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(call(*leaves), leaves, cotangent))


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SDPA of (B, T, H, D) tensors."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def einsum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense causal attention in plain PyTorch operations."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    scores = torch.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(later, -math.inf).softmax(-1), value)


def realised(tensors: dict[str, Tensor]) -> dict[str, Any]:
    result = dyn_nsa(tensors)
    return {"mean blocks a row": round(result.counts.float().mean().item(), 2), "overflowing rows": round(result.overflow.item(), 3)}


@pytest.mark.parametrize("choices", ["random", "clustered"])
@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
def test_forward_and_backward(compare, device, tokens, choices):
    check_short("dyn_nsa", device)
    tensors = inputs(tokens, choices, device)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    cotangent = torch.randn(leaves["query"].shape, device=device)
    names = ("query", "key", "value")

    def whole() -> tuple[Tensor, list[Tensor]]:
        out = dyn_nsa(leaves).out
        return out.detach(), list(torch.autograd.grad(out, list(leaves.values()), cotangent))

    candidates: dict[str, Callable[[], Any]] = {
        "dyn_nsa": whole,
        "SDPA": lambda: forward_backward(causal, [leaves[name] for name in names], cotangent),
    }
    if tokens <= 1024:
        candidates["einsum"] = lambda: forward_backward(einsum, [leaves[name] for name in names], cotangent)

    def check(outputs: dict[str, Any]) -> None:
        assert_close_rms(outputs["dyn_nsa"][0][:, -CHECKED:], expected_rows({k: x.detach() for k, x in leaves.items()}), 1e-5)
        for name in ("einsum",):
            if name in outputs:
                for a, b in zip(outputs[name], outputs["SDPA"], strict=True):
                    assert_close_rms(a, b.double(), 1e-5, name)

    compare(
        f"dyn_nsa forward + backward, {tokens} tokens, {HEADS}/{KV_HEADS} heads, {choices}, {device}",
        candidates,
        check,
        info={"goal": "SDPA >= 1.5x at 16384", **realised({k: x.detach() for k, x in leaves.items()})},
    )


@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
def test_forward(compare, device, tokens):
    check_short("dyn_nsa", device)
    tensors = inputs(tokens, "random", device)
    q, k, v = (tensors[name] for name in ("query", "key", "value"))
    candidates: dict[str, Callable[[], Any]] = {"dyn_nsa": lambda: dyn_nsa(tensors).out, "SDPA": lambda: causal(q, k, v)}
    if tokens <= 4096:
        candidates["einsum"] = lambda: einsum(q, k, v)
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=device)
        flex = torch.compile(flex_attention)
        turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        candidates["FlexAttention, causal"] = lambda: flex(*turned, block_mask=mask, enable_gqa=True).transpose(1, 2)

    def check(outputs: dict[str, Tensor]) -> None:
        assert_close_rms(outputs["dyn_nsa"][:, -CHECKED:], expected_rows(tensors), 1e-5)
        for name, out in outputs.items():
            if name != "dyn_nsa":
                assert_close_rms(out, outputs["SDPA"].double(), 1e-4, name)

    compare(f"dyn_nsa forward, {tokens} tokens, {device}", candidates, check, info=realised(tensors))


@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
def test_decoding(compare, device, tokens):
    check_short("dyn_nsa", device, queries=1)
    tensors = inputs(tokens, "random", device)
    step = {name: x[:, -1:] if name in ("query", "gates") else x for name, x in tensors.items()}
    q, k, v = (step[name].transpose(1, 2) for name in ("query", "key", "value"))

    def check(outputs: dict[str, Tensor]) -> None:
        expected = expected_rows(tensors)[:, -1:]
        for name in outputs:
            if name.startswith("dyn_nsa"):
                assert_close_rms(outputs[name], expected, 1e-5, name)

    candidates: dict[str, Callable[[], Tensor]] = {
        "dyn_nsa": lambda: dyn_nsa(step).out,
        "SDPA": lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2),
    }
    if device == "cuda":
        candidates |= {f"{name}, CUDA graph": replayed(call) for name, call in candidates.items()}
    compare(f"dyn_nsa, one token over a cache of {tokens}, {device}", candidates, check, info=realised(step))


def replayed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call as a CUDA graph, which takes no time on the host."""
    call()  # compiles, and finds the fastest configurations
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@pytest.mark.parametrize("part", ["compressed", "select", "block sparse", "window"])
def test_parts(compare, device, part):
    check_short(part, device)
    tokens = 4096
    tensors = inputs(tokens, "random", device)
    q, k, v, kc, vc = (tensors[name].requires_grad_() for name in ("query", "key", "value", "key_compressed", "value_compressed"))
    _, lse, _ = ops.compressed_attention(q.detach(), kc.detach(), vc.detach(), compress_size=COMPRESS)
    threshold = torch.full((1, tokens, KV_HEADS), -30.0, device=device, requires_grad=True)
    selection = ops.select_blocks(q.detach(), kc.detach(), lse, threshold.detach(), max_blocks=BLOCKS, compress_size=COMPRESS)
    cotangent = torch.randn(q.shape, device=device)
    grad_bias = torch.randn(selection.bias.shape, device=device)
    calls: dict[str, Callable[[], Tensor]] = {
        "compressed": lambda: ops.compressed_attention(q, kc, vc, compress_size=COMPRESS)[0],
        "select": lambda: ops.select_blocks(q, kc, lse, threshold, max_blocks=BLOCKS, compress_size=COMPRESS).bias,
        "block sparse": lambda: ops.block_sparse_attention(q, k, v, *selection[:3])[0],
        "window": lambda: ops.sliding_window_attention(q, k, v, WINDOW),
    }
    leaves = {"compressed": [q, kc, vc], "select": [q, kc, threshold], "block sparse": [q, k, v], "window": [q, k, v]}[part]
    given = grad_bias if part == "select" else cotangent
    candidates: dict[str, Callable[[], Any]] = {
        f"{part}, forward": calls[part],
        f"{part}, forward + backward": lambda: torch.autograd.grad(calls[part](), leaves, given),
    }
    if part == "window":
        distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
        band = (distance >= 0) & (distance < WINDOW)
        turned = [x.detach().transpose(1, 2) for x in (q, k, v)]
        candidates["SDPA with a band mask, forward"] = lambda: functional.scaled_dot_product_attention(
            *turned, attn_mask=band, enable_gqa=True
        ).transpose(1, 2)
    else:
        candidates["SDPA, causal, forward"] = lambda: causal(q.detach(), k.detach(), v.detach())

    def check(outputs: dict[str, Any]) -> None:
        if part == "window":
            assert_close_rms(outputs["window, forward"], outputs["SDPA with a band mask, forward"].double(), 1e-5)

    compare(
        f"DynNSA's {part}, {tokens} tokens, {device}", candidates, check, info={"mean blocks a row": selection.counts.float().mean().item()}
    )


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_whole_module(compare, device, tokens):
    """Times whole modules: projections, rotary embedding, compression and gates. Their weights differ, so outputs are not compared."""
    check_short("dyn_nsa", device)
    torch.manual_seed(0)
    hidden = HEADS * DIM
    options = DynNSAOptions(compress_size=COMPRESS, window=WINDOW, max_blocks=BLOCKS, base=-30.0, slope=0.0)
    module = DynNSAAttention(hidden, HEADS, KV_HEADS, DIM, options=options).to(device)
    x = torch.randn(1, tokens, hidden, device=device, requires_grad=True)
    cotangent = torch.randn_like(x)
    query, rest = torch.nn.Linear(hidden, hidden, bias=False).to(device), torch.nn.Linear(hidden, 2 * KV_HEADS * DIM, bias=False).to(device)
    output = torch.nn.Linear(hidden, hidden, bias=False).to(device)

    def dense(x: Tensor) -> Tensor:
        key, value = rest(x).chunk(2, -1)
        parts = [part.unflatten(-1, (-1, DIM)) for part in (query(x), key, value)]
        return output(causal(*parts).flatten(2))

    calls: dict[str, Callable[[Tensor], Tensor]] = {"DynNSAAttention": lambda x: module(x).out, "projections and SDPA": dense}
    if tokens <= 1024 and device == "cpu":
        from native_sparse_attention_pytorch import SparseAttention

        peer = SparseAttention(
            dim=hidden, dim_head=DIM, heads=HEADS, kv_heads=KV_HEADS, sliding_window_size=WINDOW, compress_block_size=COMPRESS,
            compress_block_sliding_stride=COMPRESS, selection_block_size=64, num_selected_blocks=BLOCKS - 3, causal=True,
        )  # fmt: skip
        calls["native-sparse-attention-pytorch"] = peer

    def check(outputs: dict[str, Tensor]) -> None:
        for name, grad in outputs.items():
            assert grad.isfinite().all(), name

    compare(
        f"attention module, forward + backward, {tokens} tokens, {device}",
        {name: lambda call=call: torch.autograd.grad(call(x), x, cotangent)[0] for name, call in calls.items()},
        check,
        rounds=5 if tokens <= 1024 else None,
        info={"mean blocks a row": round(module(x).counts.float().mean().item(), 2)},
    )
