"""`nn.DynSMHA` against dense attention with as many heads as a token uses, and against all heads with a mask, forward and backward.

    .venv/bin/python -m pytest benchmarks/bench_dyn_smha.py --benchmark-only

The layer routes by its own router, calibrated on the tokens to k heads each; the table has the number it used. Dense attention projects
every token by k heads and calls SDPA. "All heads, masked" computes every head of every token, and masks those that a token does not use;
its output and gradients are checked to equal ours. It runs only where its scores fit. Tensors are float32 on a CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bench_expert_mlp import DTYPE, TOLERANCE, check_close
from torch import Tensor, nn
from torch.nn import functional

from tinyonn.nn import DynSMHA
from tinyonn.nn.rotary import rotate, rotation

FEATURES, HEAD_DIM = 512, 64
SIZES = {  # heads, heads a token, tokens
    "64 heads, 8 a token, 2k tokens": (64, 8, 2048),
    "16 heads, 2 a token, 512 tokens": (16, 2, 512),
    "16 heads, 4 a token, 2k tokens": (16, 4, 2048),
    "256 heads, 8 a token, 2k tokens": (256, 8, 2048),
    "64 heads, 8 a token, 8k tokens": (64, 8, 8192),
    "256 heads, 4 a token, 8k tokens": (256, 4, 8192),
}
GOAL = "dense, as many heads <= 1.3x its time, <= 1.5x its memory at 64 heads, 8 a token, 2k tokens"
MOST_SCORES = 1 << 28


class Dense(nn.Module):
    """Multi-head attention with rotary embedding over SDPA."""

    def __init__(self, heads: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv = nn.Linear(FEATURES, 3 * heads * HEAD_DIM, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(heads * HEAD_DIM, FEATURES, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        turn = rotation(torch.arange(x.shape[1], device=x.device), HEAD_DIM, 10000.0, x.dtype)
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(rotate(query, turn), rotate(key, turn), value, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Case:
    def __init__(self, heads: int, active: int, tokens: int, device: str) -> None:
        torch.manual_seed(0)
        dtype = DTYPE[device]
        self.x = torch.randn(1, tokens, FEATURES).to(device, dtype).requires_grad_()
        self.cotangent = torch.randn(1, tokens, FEATURES).to(device, dtype)
        options: dict[str, Any] = {"max_experts": 2 * active, "device": device, "dtype": dtype}
        self.module = DynSMHA(FEATURES, HEAD_DIM, heads, target_k=active, **options).eval()
        self.module.router.calibrate(self.x.detach())
        self.surprised = DynSMHA(FEATURES, HEAD_DIM, heads, target_k=active, surprise_kind="head", **options).eval()
        self.surprised.load_state_dict(self.module.state_dict())
        self.dense = Dense(active, device, dtype)
        self.leaves = [self.x, self.module.qkv_proj, self.module.o_proj]

    def ours(self) -> tuple[Tensor, ...]:
        return self._step(self.module, self.leaves)

    def with_surprise(self) -> tuple[Tensor, ...]:
        with self.surprised.capturing():
            return self._step(self.surprised, [self.x, self.surprised.qkv_proj, self.surprised.o_proj])

    def dense_step(self) -> tuple[Tensor, ...]:
        return self._step(self.dense, [self.x, *self.dense.parameters()])

    def all_heads(self) -> tuple[Tensor, ...]:
        return self._step(self._masked, self.leaves)

    def _step(self, form: Callable[[Tensor], Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        out = form(self.x)
        return (out.detach(), *torch.autograd.grad(out, leaves, self.cotangent))

    def _masked(self, x: Tensor) -> Tensor:
        """Every head for every token."""
        routing = self.module.route(x[0])
        heads = len(self.module.o_proj)
        weights = x.new_zeros(x.shape[1], heads + 1).scatter(1, routing.top_k_index, routing.top_k_weights.to(x.dtype))[:, :heads]
        active = x.new_zeros(x.shape[1], heads + 1, dtype=torch.bool).scatter(1, routing.top_k_index, True)[:, :heads].T
        turn = rotation(torch.arange(x.shape[1], device=x.device), HEAD_DIM, 10000.0, x.dtype)
        query, key, value = torch.einsum("tf,edf->etd", x[0], self.module.qkv_proj).split(HEAD_DIM, -1)
        seen = active[:, None, :] & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        seen |= torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        mixed = functional.scaled_dot_product_attention(
            rotate(query, turn)[None], rotate(key, turn)[None], value[None], attn_mask=seen[None]
        )
        return torch.einsum("etd,efd,te->tf", mixed[0], self.module.o_proj, weights)[None]


@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(compare, device, peak_megabytes, size):
    heads, active, tokens = SIZES[size]
    c = Case(heads, active, tokens, device)
    candidates = {"DynSMHA": c.ours, "DynSMHA, surprise": c.with_surprise, "dense, as many heads": c.dense_step}
    if heads * tokens * tokens <= MOST_SCORES:
        candidates["all heads, masked"] = c.all_heads

    def check(outputs: dict[str, tuple[Tensor, ...]]) -> dict[str, float]:
        """Checks ours against all heads with a mask. Dense attention is another function, whose answers are only its own."""
        reference = outputs.get("all heads, masked", outputs["DynSMHA, surprise"])
        pairs = zip(outputs["DynSMHA"], reference, strict=True)
        return {"DynSMHA": max(check_close(a, b, TOLERANCE[DTYPE[device]], f"part {part}") for part, (a, b) in enumerate(pairs))}

    used = (c.module.route(c.x[0]).top_k_index < heads).sum(-1).float().mean().item()
    memory = {name: round(peak_megabytes(call), 1) for name, call in candidates.items()}
    info = {"goal": GOAL, "heads a token": round(used, 2), "peak MB": memory}
    compare(f"dynamic heads, {size}, {device}", {name: partial(call) for name, call in candidates.items()}, check, info=info)
