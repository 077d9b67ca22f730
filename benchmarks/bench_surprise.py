"""Surprise of every (token, expert) pair as a by-product of backward, against explicit per-token gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tinyonn import ops

TOKENS, FEATURES = 256, 512  # explicit gradients hold tokens x slots x features x neurons values


@pytest.mark.parametrize(("experts", "neurons", "slots"), [(128, 64, 4), (64, 128, 2), (1024, 16, 8)])
def test_surprise_against_gradients_per_token(compare, device, peak_megabytes, experts, neurons, slots):
    """Ours runs the whole step with the surprise. The peers compute only the surprise, from a given output gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, cotangent, weight = draw(TOKENS, FEATURES), draw(TOKENS, FEATURES), draw(TOKENS, slots).abs()
    up, down = draw(experts, 2 * neurons, FEATURES) * FEATURES**-0.5, draw(experts, FEATURES, neurons) * neurons**-0.5
    index = torch.rand(TOKENS, experts, generator=generator).topk(slots).indices.to(device)
    leaves = [tensor.requires_grad_() for tensor in (x, up, down, weight)]

    def step(kind: str | None, checkpointed: bool = False) -> Tensor:
        probe = None if kind is None else torch.zeros(index.shape, device=device, requires_grad=True)
        options = {"surprise": probe, "surprise_kind": kind or "down_proj"}
        if checkpointed:
            out = checkpoint(ops.expert_mlp, x, up, down, index, weight, use_reentrant=False, **options)
        else:
            out = ops.expert_mlp(x, up, down, index, weight, **options)
        return torch.autograd.grad(out, leaves if probe is None else [*leaves, probe], cotangent)[-1]

    @torch.no_grad()
    def einsum() -> Tensor:
        gate, right = torch.einsum("nf,nkif->nki", x, up[index]).chunk(2, -1)
        grads = torch.einsum("nk,nf,nki->nkfi", weight, cotangent, functional.silu(gate) * right)
        return grads.flatten(2).norm(dim=-1)

    def one_backward_a_token() -> Tensor:
        found = torch.zeros(index.shape, device=device)
        for token in range(8):  # of 256
            row = slice(token, token + 1)
            leaf = down.detach().requires_grad_()
            out = ops.expert_mlp(x[row].detach(), up.detach(), leaf, index[row], weight[row].detach())
            (grad,) = torch.autograd.grad(out, leaf, cotangent[row])
            found[token] = grad[index[token]].flatten(1).norm(dim=-1)
        return found

    def check(outputs: dict[str, Tensor]) -> None:
        wanted = outputs["einsum, surprise alone"]
        for name in ("whole step with surprise", "the same, checkpointed"):
            torch.testing.assert_close(outputs[name], wanted, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(outputs["one backward a token, 8 of 256"][:8], wanted[:8], rtol=1e-3, atol=1e-5)

    candidates = {
        "whole step with surprise": lambda: step("down_proj"),
        "the same, checkpointed": lambda: step("down_proj", checkpointed=True),
        "whole step, kind expert": lambda: step("expert"),
        "whole step without surprise": lambda: step(None),
        "without, checkpointed": lambda: step(None, checkpointed=True),
        "einsum, surprise alone": einsum,
        "one backward a token, 8 of 256": one_backward_a_token,
    }
    memory = {name: round(peak_megabytes(call)) for name, call in candidates.items()}
    compare(
        f"surprise, {TOKENS} tokens x {FEATURES}, {experts} experts of {neurons}, {slots} a token, {device}",
        candidates,
        check,
        info={"peak MB": memory},
    )
