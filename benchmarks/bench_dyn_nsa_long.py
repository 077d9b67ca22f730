"""DynNSA at training lengths on a GPU: 64/4 heads, D = 128, bfloat16, beside each backend of dense attention and beside fla.

Each implementation is timed forward, and forward plus backward; backward time is the difference of the two medians. Every SDPA backend
is a separate candidate, because plain SDPA runs whichever backend torch prefers. The output and the gradients of query and gates are
compared with the float64 oracle on the last rows, which attend to all keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_dyn_nsa import BLOCKS, COMPRESS, WINDOW, causal, inputs
from predicted import predicted
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyonn import ops, reference
from tinyonn.nn.dyn_nsa import forced_counts
from tinyonn.nn.dyn_nsa_options import DynNSAOptions
from tinyonn.testing import assert_close_rms
from tinyonn.testing.timing import Comparison, peak_megabytes

OURS = "dyn_nsa"
BOTH = "forward + backward"
CHECKED = 16  # number of last rows that are compared with the oracle
LIMITS = {torch.float32: (1e-5, 4e-5), torch.bfloat16: (1e-2, 2e-2)}  # limits for outputs and gradients
GOAL = "best SDPA >= 3x whole; FlashAttention-2 >= 6x forward and >= 7x backward, at 65536"
MEMORY_GOAL = 1.5
BACKENDS = {
    "SDPA flash (FlashAttention-2)": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

FAR = 1 << 30
LONGEST = {SDPBackend.EFFICIENT_ATTENTION: 16384}  # tokens; beyond, it takes seconds a call, and the others are always faster

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FULL = {"heads": 64, "kv_heads": 4, "dim": 128, "dtype": "bfloat16", "device": "cuda"}

Step = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]


def base_for(tensors: dict[str, Tensor], wanted: int) -> float:
    """Base at which rows read `wanted` blocks on average, if they may read twice as many."""
    q, kc, vc = (tensors[name] for name in ("query", "key_compressed", "value_compressed"))
    lse = ops.compressed_attention(q, kc, vc, compress_size=COMPRESS)[1]
    low, high = -20.0, 0.0  # base that opens all blocks, and base that opens only the forced ones
    for _ in range(12):
        middle = (low + high) / 2
        threshold = torch.full((1, q.shape[1], kc.shape[2]), middle, device=q.device)
        counts = ops.select_blocks(q, kc, lse, threshold, max_blocks=2 * wanted, compress_size=COMPRESS).counts
        low, high = (middle, high) if counts.float().mean() > wanted else (low, middle)
    return (low + high) / 2


class Setting:
    """Inputs of one length. `choices` is that of `bench_dyn_nsa.inputs`, or "threshold": random selections of which few pass."""

    def __init__(self, tokens: int, choices: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
        drawn = inputs(tokens, "random" if choices == "threshold" else choices, device, heads=heads, kv_heads=kv_heads, dim=dim)
        tensors = {name: x.to(dtype) for name, x in drawn.items()}
        self.options = {"window": WINDOW, "max_blocks": BLOCKS, "compress_size": COMPRESS}
        if choices == "threshold":
            self.options["max_blocks"] = 2 * BLOCKS
            tensors["base"] = torch.full_like(tensors["base"], base_for(tensors, BLOCKS))
        self.leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        self.qkv = [self.leaves[name] for name in ("query", "key", "value")]
        self.cotangent = torch.randn_like(self.qkv[0])

    def forward_and_backward(self, call: Callable[[], Tensor], over: list[Tensor]) -> Step:
        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            out = call()
            return out.detach(), torch.autograd.grad(out, over, self.cotangent)

        return run

    def forward(self, call: Callable[[], Tensor]) -> Step:
        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            with torch.no_grad():
                return call(), ()

        return run

    def both(self, name: str, call: Callable[[], Tensor], over: list[Tensor]) -> dict[str, Step]:
        return {f"{name}, {BOTH}": self.forward_and_backward(call, over), f"{name}, forward": self.forward(call)}

    def dyn_nsa(self) -> Tensor:
        return ops.dyn_nsa(*self.leaves.values(), **self.options).out

    def ours(self) -> dict[str, Step]:
        return self.both(OURS, self.dyn_nsa, list(self.leaves.values()))

    def dense(self) -> dict[str, Step]:
        """All implementations of dense causal attention that may run on this machine."""

        def by(backend: SDPBackend) -> Callable[[], Tensor]:
            def call() -> Tensor:
                with sdpa_kernel(backend):
                    return causal(*self.qkv)

            return call

        backends = {name: backend for name, backend in BACKENDS.items() if self.qkv[0].shape[1] <= LONGEST.get(backend, FAR)}
        calls = {name: by(backend) for name, backend in backends.items()}
        calls |= {name: lambda call=call: call(*self.qkv) for name, call in flash_attention_packages().items()}
        return {title: step for name, call in calls.items() for title, step in self.both(name, call, self.qkv).items()}

    def realised(self) -> dict[str, Any]:
        with torch.no_grad():
            found = ops.dyn_nsa(*self.leaves.values(), **self.options)
        counts = found.counts.float()
        far = counts - forced_counts(DynNSAOptions(), counts.shape[1], counts.shape[1], counts.device)
        return {
            "mean blocks a row": round(counts.mean().item(), 2),
            "far blocks a row": round(far.mean().item(), 2),
            "most blocks a row": int(counts.max().item()),
            "overflowing rows": round(found.overflow.item(), 3),
        }

    def check(self, out: Tensor, grads: tuple[Tensor, ...]) -> dict[str, float]:
        """Compares the last rows of the first and the last key head with the oracle; returns errors by name."""
        of_outputs, of_gradients = LIMITS[out.dtype]
        kv_heads = self.qkv[1].shape[2]
        group = out.shape[2] // kv_heads
        errors: dict[str, float] = {}
        for head in {0, kv_heads - 1}:
            queries = slice(head * group, (head + 1) * group)
            rows = (slice(None), slice(-CHECKED, None), queries)
            leaves = {name: x.detach()[rows if name in ("query", "gates") else (..., slice(head, head + 1), slice(None))] for name, x in
                      self.leaves.items() if x.dim() > 1}  # fmt: skip
            leaves |= {name: self.leaves[name].detach()[head : head + 1] for name in ("base", "slope")}
            exact = {name: leaves[name].double().requires_grad_(name in ("query", "gates")) for name in self.leaves}
            expected = reference.dyn_nsa(*exact.values(), **self.options).out
            wanted = torch.autograd.grad(expected, [exact["query"], exact["gates"]], self.cotangent[rows].double())
            given = dict(zip(self.leaves, grads, strict=True))
            pairs = {"output": (out, expected, of_outputs)}
            pairs |= {
                f"gradient of {name}": (given[name], grad, of_gradients) for name, grad in zip(("query", "gates"), wanted, strict=True)
            }
            for name, (got, oracle, limit) in pairs.items():
                errors[name] = max(errors.get(name, 0.0), assert_close_rms(got[rows], oracle, limit, f"{name}, key head {head}"))
        return errors


def flash_attention_packages() -> dict[str, Callable[..., Tensor]]:
    """FlashAttention's own packages, if installed."""
    found: dict[str, Callable[..., Tensor]] = {}
    try:
        from flash_attn import flash_attn_func

        found["flash_attn (FlashAttention-2)"] = lambda q, k, v: flash_attn_func(q, k, v, causal=True)
    except ImportError:
        pass
    try:
        from flash_attn_interface import flash_attn_func as third

        found["flash_attn_interface (FlashAttention-3)"] = lambda q, k, v: _first(third(q, k, v, causal=True))
    except ImportError:
        pass
    try:
        from flash_attn.cute import flash_attn_func as fourth

        found["flash-attn-4 (FlashAttention-4)"] = lambda q, k, v: _first(fourth(q, k, v, causal=True))
    except ImportError:
        pass
    return found


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def note_ratios(result: Comparison) -> None:
    """Adds our speedup over each peer that ran both passes: total, forward and backward; then over the best peer."""
    ours = [result.median(f"{OURS}, {part}") for part in (BOTH, "forward")]
    ratios = {}
    for name in result.samples:
        peer, _, part = name.rpartition(", ")
        if part == BOTH and peer != OURS and f"{peer}, forward" in result.samples:
            whole, forward = (result.median(f"{peer}, {part}") for part in (BOTH, "forward"))
            both = {"whole": whole / ours[0], "forward": forward / ours[1], "backward": (whole - forward) / (ours[0] - ours[1])}
            ratios[peer] = {part: round(ratio, 3) for part, ratio in both.items()}
    result.info["ours is faster by"] = ratios
    if ratios:
        result.info["whole, against the best of them"] = min(parts["whole"] for parts in ratios.values())


def against_dense_attention(
    compare: Callable[..., Comparison], tokens: int, choices: str, heads: int, kv_heads: int, dim: int, dtype: str, device: str
) -> None:
    setting = Setting(tokens, choices, heads, kv_heads, dim, getattr(torch, dtype), device)
    ours, peers = setting.ours(), setting.dense()
    notes = {"goal": GOAL, **setting.realised()}
    if device == "cuda" and setting.options["max_blocks"] == BLOCKS:
        notes |= predicted("dyn_nsa", (tokens, heads, kv_heads, dim))
    result = compare(
        f"dyn_nsa, {tokens} tokens, {heads}/{kv_heads} heads, D {dim}, {choices}, {dtype}, {device}",
        {**ours, **peers},
        lambda outputs: setting.check(*outputs[f"{OURS}, {BOTH}"]),
        info=notes,
        optional=list(peers),
    )
    note_ratios(result)
    calls = {**ours, **peers}
    result.info["peak MB"] = {name: round(peak_megabytes(calls[name], device)) for name in result.samples}


def peak_memory(compare: Callable[..., Comparison], tokens: int, heads: int, kv_heads: int, dim: int, dtype: str, device: str) -> None:
    """Peak memory of a step, inputs included, divided by the size of query, key, value, output and their gradients, its lower bound."""
    setting = Setting(tokens, "random", heads, kv_heads, dim, getattr(torch, dtype), device)
    step = setting.ours()[f"{OURS}, {BOTH}"]
    step()  # the autotuner keeps copies while it tries configurations
    q, k, v = setting.qkv
    least = 2 * (2 * q.nbytes + k.nbytes + v.nbytes) / 1e6
    own = sum(x.nbytes for x in (q, k, v)) / 1e6
    share = (own + peak_megabytes(step, device)) / least
    result = compare(
        f"dyn_nsa's peak memory, {tokens} tokens, {heads}/{kv_heads} heads, D {dim}, {dtype}, {device}",
        {OURS: step},
        info={"goal": f"<= {MEMORY_GOAL}x", "least MB": round(least, 1), "peak over the least": round(share, 3)},
        rounds=1,
    )
    if device == "cuda":
        assert share <= MEMORY_GOAL, result.info


def selected_branch_against_fla(
    compare: Callable[..., Comparison], tokens: int, heads: int, kv_heads: int, dim: int, dtype: str, device: str
) -> None:
    """Compares the selected branch alone, because fla computes attention to given blocks; both use the same blocks."""
    try:
        from fla.ops.nsa import parallel_nsa
    except ImportError as error:
        pytest.skip(f"fla-core cannot be imported: {error}")
    setting = Setting(tokens, "random", heads, kv_heads, dim, getattr(torch, dtype), device)
    q, k, v = setting.qkv
    with torch.no_grad():
        compressed = (setting.leaves["key_compressed"], setting.leaves["value_compressed"])
        lse = ops.compressed_attention(q, *compressed, compress_size=COMPRESS)[1]
        threshold = torch.full((1, tokens, kv_heads), -30.0, device=device)
        selection = ops.select_blocks(q, compressed[0], lse, threshold, max_blocks=BLOCKS, compress_size=COMPRESS)
    ones = torch.ones(1, tokens, heads, device=device, dtype=q.dtype)
    blocks, counts = selection.indices.long().clamp(min=0), selection.counts.long()
    theirs = {"g_slc": ones, "block_indices": blocks, "block_counts": counts, "block_size": 64}
    ours = setting.both("selected branch", lambda: ops.block_sparse_attention(q, k, v, *selection[:2])[0], setting.qkv)
    peer = setting.both("fla", lambda: parallel_nsa(q, k, v, **theirs), setting.qkv)

    def check(outputs: dict[str, Any]) -> dict[str, float]:
        if f"fla, {BOTH}" not in outputs:
            return {}
        ours, others = outputs[f"selected branch, {BOTH}"], outputs[f"fla, {BOTH}"]
        errors = {"fla's output": assert_close_rms(others[0], ours[0].double(), 1e-2, "fla")}
        for name, got, wanted in zip(("query", "key", "value"), others[1], ours[1], strict=True):
            errors[f"fla's gradient of {name}"] = assert_close_rms(got, wanted.double(), 2e-2, f"gradient of {name} of fla")
        return errors

    info = {"goal": "fla > 1x", "mean blocks a row": round(counts.float().mean().item(), 2)}
    group = f"selected branch, {tokens} tokens, {heads}/{kv_heads} heads, D {dim}, {dtype}, {device}"
    result = compare(group, {**ours, **peer}, check, info=info, optional=list(peer))
    calls = {**ours, **peer}
    result.info["peak MB"] = {name: round(peak_megabytes(calls[name], device)) for name in result.samples}


@pytest.mark.parametrize("tokens", [8192, 32768, 65536])
@pytest.mark.parametrize("choices", ["random", "clustered", "threshold"])
def test_against_dense_attention(compare, tokens, choices):
    against_dense_attention(compare, tokens, choices, **FULL)


def test_peak_memory(compare):
    peak_memory(compare, 65536, **FULL)


@pytest.mark.parametrize("tokens", [8192, 65536])
def test_selected_branch_against_fla(compare, tokens):
    selected_branch_against_fla(compare, tokens, **FULL)
