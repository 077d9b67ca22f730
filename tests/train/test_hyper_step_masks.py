"""HyperStep on converted models, token by token: against the two steps written out, with padding anywhere, accumulated, and under PEFT.

B sequences, T tokens, F features, E experts
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tinyonn.hf.dyn_moe import calibrate_experts, convert_mlp_to_dynmoe
from tinyonn.nn import DynMoE
from tinyonn.testing import tiny_causal_lm, token_ids
from tinyonn.train import HyperStep

B, T = 3, 8
WEIGHT = 0.7
LORA = {"target_modules": ["q_proj"], "modules_to_save": ["router"]}


def padding(kind: str) -> torch.Tensor | None:
    """(B, T), 1 = a token."""
    mask, place = torch.ones(B, T, dtype=torch.long), torch.arange(T)
    length = torch.tensor([[T], [5], [2]])
    if kind == "right":
        return (place < length).long()
    if kind == "left":
        return (place >= T - length).long()
    if kind == "both sides":
        return ((place >= 1) & (place < 1 + length.clamp(max=6))).long()
    if kind == "one sequence":
        return mask * torch.tensor([[1], [0], [1]])
    if kind == "holes":
        return (place % 3 != 1).long().expand(B, T)
    return None


def sparse(arch: str, lora: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    overrides = {"n_positions": 256} if arch == "gpt2" else {"intermediate_size": 96}
    model: Any = convert_mlp_to_dynmoe(
        tiny_causal_lm(arch, **overrides), num_experts=8, sample=token_ids(), gating_loss="surprise", **options
    )
    if "routing" not in options:
        calibrate_experts(model, token_ids(), 3.0)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **lora))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


class NoStep(torch.optim.SGD):
    """Leaves gradients to be looked at."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


def loss_of_token(module: DynMoE, router: Any, x: torch.Tensor, grad: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> Any:
    """The router's loss for one token, (F,), whose output has this gradient; None where no loss depends on the token."""
    prototypes, thresholds = parameters
    cosine = (prototypes / prototypes.norm(dim=-1, keepdim=True)) @ (x / x.norm())
    scores = cosine.sigmoid() - thresholds.sigmoid()
    order = sorted(range(len(scores)), key=lambda e: (-scores[e].item(), e))[: router.max_experts]
    if module.routing_kind == "threshold":
        chosen = [e for slot, e in enumerate(order) if slot < router.min_experts or scores[e] > 0]
    else:
        share, chosen = scores.softmax(-1), []
        while len(chosen) < len(order) and (not chosen or share[chosen].sum() < module.surprise_budget):
            chosen.append(order[len(chosen)])
    surprise = []
    for expert in chosen:  # each of weight 1: experts are pieces of one MLP
        inner = module.gate_up_proj[expert].detach().double() @ x
        if module.gate_up_bias is not None:
            inner = inner + module.gate_up_bias[expert].detach().double()
        if module.gated:
            gate, up = inner.chunk(2)
            inner = nn.functional.silu(gate) * up
        else:
            inner = nn.functional.gelu(inner, approximate="tanh")
        surprise.append(grad.norm() * inner.norm())
    relative = torch.stack(surprise)
    if not relative.any():
        return None
    relative = relative / relative.mean()
    target, found = (-relative).softmax(-1), scores.log_softmax(-1)[chosen]
    return -found[relative.argmin()] + (target * (target.log() - found)).sum()


def two_steps(model: nn.Module, batches: list[tuple[Any, torch.Tensor | None]]) -> list[float]:
    """An ordinary backward of each batch, then each router's loss from what was seen; adds to `.grad` and gives the routers' losses."""
    mixtures = [m for name, m in model.named_modules() if isinstance(m, DynMoE) and "original_module" not in name]
    losses = []
    for compute_loss, mask in batches:
        seen: dict[DynMoE, list[torch.Tensor]] = {module: [] for module in mixtures}

        def note(module: Any, args: Any, output: torch.Tensor, seen: Any = seen) -> None:
            seen[module].append(args[0].detach().double().flatten(0, -2))
            output.register_hook(lambda slope: seen[module].append(slope.double().flatten(0, -2)))

        handles = [module.register_forward_hook(note) for module in mixtures]
        (compute_loss() / len(batches)).backward()
        for handle in handles:
            handle.remove()
        kept = range(B * T) if mask is None else mask.flatten().nonzero().flatten().tolist()
        total = 0.0
        for module, (x, grad) in seen.items():
            router: Any = getattr(module.router, "modules_to_save", {"default": module.router})["default"]
            stored = (router.prototypes, router.thresholds)
            parameters = tuple(p.detach().double().requires_grad_() for p in stored)
            tokens = [loss_of_token(module, router, x[t], grad[t], parameters) for t in kept]
            terms = [term for term in tokens if term is not None]
            if not terms:
                continue
            loss = torch.stack(terms).mean()
            total += loss.item() / len(mixtures)
            for parameter, found in zip(stored, torch.autograd.grad(loss, parameters), strict=True):
                share = (found * WEIGHT / len(batches) / len(mixtures)).float()
                parameter.grad = share if parameter.grad is None else parameter.grad + share
        losses.append(total)
    return losses


def assert_same_gradients(model: nn.Module, wanted: nn.Module) -> None:
    other = dict(wanted.named_parameters())
    for name, parameter in model.named_parameters():
        expected = other[name].grad
        assert (parameter.grad is None) == (expected is None or not parameter.requires_grad), name
        if expected is not None:
            found = parameter.grad if parameter.grad is not None else torch.zeros_like(expected)
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("batches", [1, 2], ids=["one", "accumulated"])
@pytest.mark.parametrize("kind", ["none", "right", "left", "both sides", "one sequence", "holes"])
@pytest.mark.parametrize(
    ("arch", "lora", "options"),
    [("llama", None, {}), ("gpt2", None, {}), ("qwen3", None, {"routing": "budget", "surprise_budget": 0.4}), ("llama", LORA, {})],
    ids=["llama", "gpt2", "qwen3-budget", "llama-lora"],
)
def test_gradients_equal_two_plain_steps(arch, lora, options, kind, batches):
    model, plain = (sparse(arch, lora, **options) for _ in range(2))
    ids, mask = torch.randint(97, (3, B, T), generator=torch.Generator().manual_seed(3)), padding(kind)
    step = HyperStep(model, NoStep(model), gating_weight=WEIGHT, accumulation_steps=batches)
    masks = [None if mask is None else mask.roll(i, 0) for i in range(batches)]

    def loss_of(one: Any, i: int) -> torch.Tensor:
        labels = ids[i] if masks[i] is None else ids[i].masked_fill(masks[i] == 0, -100)
        return one(ids[i], attention_mask=masks[i], labels=labels).loss

    found = [step(lambda i=i: loss_of(model, i), token_mask=masks[i]).gating_loss.item() for i in range(batches)]
    wanted = two_steps(plain, [(lambda i=i: loss_of(plain, i), masks[i]) for i in range(batches)])
    assert found == pytest.approx(wanted, rel=1e-4)
    assert_same_gradients(model, plain)


def routers_of(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if ".router." in name}


def test_a_batch_of_padding_alone_teaches_no_router():
    model, ids = sparse("llama"), token_ids(T)
    step = HyperStep(model, NoStep(model))
    result = step(lambda: model(ids).logits.square().mean(), token_mask=torch.zeros(ids.shape, dtype=torch.long))
    plain = sparse("llama")
    plain(ids).logits.square().mean().backward()
    assert result.gating_loss == 0
    torch.testing.assert_close(routers_of(model), routers_of(plain))


@pytest.mark.parametrize("kind", ["surprise", "both"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_masked_token_of_any_value_teaches_no_router(kind, value):
    """As when padding overflows: its states are not finite, the others' are."""
    grads = []
    for filler in (0.5, value):
        torch.manual_seed(0)
        module = DynMoE(16, 8, 6, target_k=2.5, max_experts=4, gating_loss=kind)
        for parameter in (module.gate_up_proj, module.down_proj):
            parameter.requires_grad_(False)
        x, mask = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
        x[1, 3:], mask[1, 3:] = filler, False
        step = HyperStep(module, NoStep(module))
        # The router's own part of the main loss is cut off: what is left is what the step teaches.
        route = module.router.forward
        module.router.forward = lambda *a, route=route: (r := route(*a))._replace(top_k_weights=r.top_k_weights.detach())
        result = step(lambda module=module, x=x, mask=mask: module(x.requires_grad_())[mask].square().mean(), token_mask=mask)
        grads.append((result.gating_loss, {name: p.grad for name, p in module.router.named_parameters()}))
    assert all(grad.isfinite().all() and grad.any() for grad in grads[0][1].values())
    torch.testing.assert_close(grads[1], grads[0])


def test_a_token_that_no_loss_depends_on_teaches_no_router():
    """The last token, and tokens of the label -100 in the last layer: their surprise is 0 for every expert, so none is the least."""
    ids = token_ids(T)[:1]
    labels = ids.clone()
    labels[:, :5] = -100
    found = []
    for mask in (None, (torch.arange(T) >= 4).expand_as(ids) & (torch.arange(T) < T - 1)):
        model = sparse("llama")
        result = HyperStep(model, NoStep(model))(lambda model=model: model(ids, labels=labels).loss, token_mask=mask)
        found.append({name: grad for name, grad in routers_of(model).items() if "layers.2." in name})
        assert result.gating_loss > 0
    torch.testing.assert_close(found[0], found[1])
