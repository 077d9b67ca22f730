"""Calibration that fails leaves no trace; thresholds hold in the precision they are stored in, for the experts that are live."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf.dyn_moe import calibrate_experts, convert_mlp_to_dynmoe, expert_statistics
from tinyonn.hf.dyn_moe.calibration import mixtures
from tinyonn.nn import DynMoE
from tinyonn.testing import assert_close_rms, tiny_causal_lm, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")


def stock(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny_causal_lm("llama", dtype=dtype, intermediate_size=96)


class Interrupted(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


class Skipping(nn.Module):
    """An MLP's place whose mixture is there and not called."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.unused = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda layer: setattr(layer, "self_attn", Interrupted()), KeyboardInterrupt),
        (lambda layer: setattr(layer, "mlp", Skipping(layer.mlp)), InputError),
    ],
    ids=["interrupted", "a layer that is not reached"],
)
def test_a_calibration_that_fails_half_way_changes_nothing(change, error):
    model = convert_mlp_to_dynmoe(stock(), num_experts=8, sample=token_ids()).train()
    calibrate_experts(model, token_ids(), 3.0, max_experts=5)
    model(token_ids(40))
    routers = [module.router for module in mixtures(model).values()]
    thresholds, statistics = [router.thresholds.clone() for router in routers], expert_statistics(model)
    bounds = [(router.target_k, router.min_experts, router.max_experts) for router in routers]
    assert sum(target for target, _, _ in bounds) / 3 == pytest.approx(3.0, abs=0.01)
    change(model.model.layers[2])
    with pytest.raises(error, match="" if error is KeyboardInterrupt else "the sample did not reach model.layers.2.mlp.unused"):
        calibrate_experts(model, token_ids(), 2.0, min_experts=2)
    assert all(torch.equal(router.thresholds, old) for router, old in zip(routers, thresholds, strict=True))
    assert [(router.target_k, router.min_experts, router.max_experts) for router in routers] == bounds
    after = [module.statistics() for module in model.modules() if isinstance(module, DynMoE)]
    assert [found["mean_k"] for found in after] == [found["mean_k"] for found in statistics.values()]
    assert model.config.tinyonn["dyn_moe"]["options"]["target_k"] == 3.0
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in mixtures(model).values())


@pytest.mark.parametrize(
    ("tokens", "target", "message"),
    [
        (0, 2.0, "sample is too short: it has 0 tokens, and needs at least 2, better a few thousand."),
        (1, 2.0, "sample is too short: it has 1 token, and needs at least 2, better a few thousand."),
        (3, 2.0, "sample is too short for target_k=2.0 of 8 experts: it has 3 tokens, and needs at least 4, better a few thousand."),
        (3, 2.5, "sample is too short for target_k=2.5 of 8 experts: it has 3 tokens, and needs at least 4, better a few thousand."),
    ],
)
def test_a_sample_too_short_for_its_experts_says_how_many_tokens_it_needs(tokens, target, message):
    model = convert_mlp_to_dynmoe(stock(), num_experts=8)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        calibrate_experts(model, token_ids()[:1, :tokens], target)
    assert all((module.router.thresholds == -2).all() for module in mixtures(model).values())
    assert set(calibrate_experts(model, token_ids()[:1, :4], target)) == set(mixtures(model))


def test_experts_that_are_masked_out_are_not_calibrated():
    model = convert_mlp_to_dynmoe(stock(), num_experts=8, sample=token_ids())
    for module in mixtures(model).values():
        module.router.expert_mask[:3] = False
    with pytest.raises(ValueError, match=r"target_k must be at most 5, the live experts of model.layers.0.mlp, got 6"):
        calibrate_experts(model, token_ids(), 6)
    for shift in (False, True):
        reached = calibrate_experts(model, token_ids(), 2.0, shift=shift)
        model(token_ids())
        assert [found["mean_k"] for found in expert_statistics(model, reset=True).values()] == pytest.approx(
            list(reached.values()), abs=1e-5
        )
        assert sum(reached.values()) / 3 == pytest.approx(2.0, abs=0.05)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_mean_of_half_precision_is_that_of_what_was_stored():
    model, sample = convert_mlp_to_dynmoe(stock(dtype=torch.bfloat16), num_experts=8, sample=token_ids()), token_ids(100, 8)
    reached = calibrate_experts(model, sample, 3.0)
    model(sample)
    assert [found["mean_k"] for found in expert_statistics(model).values()] == pytest.approx(list(reached.values()), abs=1e-6)


def test_routers_are_made_in_full_precision_under_autocast():
    """Each is compared with the router made of the same input outside of autocast."""
    model, sample = convert_mlp_to_dynmoe(stock(), num_experts=8), token_ids()
    inputs: list[Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calibrate_experts(model, sample, 3.0)
    handle.remove()
    module = model.model.layers[0].mlp
    x = inputs[-1].float()
    cosine = nn.functional.normalize(x.double(), dim=-1) @ nn.functional.normalize(module.router.prototypes.double(), dim=-1).T
    mean = (cosine > module.router.thresholds).sum(-1).clamp(min=1).float().mean().item()
    assert mean == pytest.approx(module.router.target_k, abs=1.5 / len(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = convert_mlp_to_dynmoe(stock(), num_experts=8, sample=sample)
    assert_close_rms(made(sample).logits, stock()(sample).logits, 1e-5)


def written_out(model: PreTrainedModel, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the loss's gradient with respect to each layer's MLP output, (L, N), and of the outputs of its experts, (L, N, 8)."""
    given: dict[int, Tensor] = {}
    outs: dict[int, Tensor] = {}

    def keep(number: int, args: tuple[Tensor, ...], out: Tensor) -> None:
        given[number], outs[number] = args[0][0].detach(), out

    layers = model.model.layers
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda _, *call, number=number: keep(number, *call))
    slopes, norms = [], []
    for row in sample:
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum")
            found = torch.autograd.grad(loss, list(outs.values()))
        slopes.append(torch.stack([grad[0].norm(dim=-1) for grad in found]))
        of_layers = []
        for number, layer in enumerate(layers):
            x, mlp = given[number], layer.mlp
            hidden = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
            parts = zip(hidden.split(12, -1), mlp.down_proj.weight.split(12, 1), strict=True)
            of_layers.append(torch.stack([(part @ weight.T).norm(dim=-1) for part, weight in parts], -1))
        norms.append(torch.stack(of_layers))
    return torch.cat(slopes, 1), torch.cat(norms, 1)


def test_layers_share_a_budget_by_one_price():
    """Against gradients and outputs of the dense model, whose neurons the experts take in order."""
    sample = token_ids(100, 4)
    slopes, norms = written_out(stock(), sample)
    worth = norms * slopes.square().mean(1).sqrt()[:, None, None]
    for price in worth.flatten().sort(descending=True).values[::20]:  # from high to low; a token has at least one expert
        expected = (worth > price).sum(-1).clamp(min=1).float().mean(1)
        if expected.mean() >= 3.0:
            break
    model = convert_mlp_to_dynmoe(stock(), num_experts=8)
    reached = calibrate_experts(model, sample, 3.0)
    assert list(reached.values()) == pytest.approx(expected.tolist(), abs=0.05)
    assert expected.max() > 1.3 * expected.min()
    thresholds = [module.router.thresholds.clone() for module in mixtures(model).values()]
    model(sample)
    for layer, found in enumerate(expert_statistics(model, reset=True).values()):
        assert torch.corrcoef(torch.stack([found["counts"].float(), (worth[layer] > price).sum(0).float()]))[0, 1] > 0.9
    again = calibrate_experts(model, sample, 3.0)  # measured with all experts, whatever the thresholds were
    assert again == reached
    assert all(torch.equal(module.router.thresholds, old) for module, old in zip(mixtures(model).values(), thresholds, strict=True))


def test_a_price_leaves_weights_and_gradients_as_they_were():
    model = convert_mlp_to_dynmoe(stock(), num_experts=8).train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("thresholds")}
    calibrate_experts(model, token_ids(), 3.0)
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_a_head_is_told_to_leave_the_price_out():
    model = convert_mlp_to_dynmoe(stock(), num_experts=8).model
    with pytest.raises(InputError, match=r"model must have a language head for price='gradient', got LlamaModel: give price='none'\."):
        calibrate_experts(model, token_ids(), 3.0)
    assert all((module.router.thresholds == -2).all() for module in mixtures(model).values())
    assert sum(calibrate_experts(model, token_ids(), 3.0, price="none").values()) / 3 == pytest.approx(3.0, abs=0.1)
    with pytest.raises(ValueError, match="price must be"):
        calibrate_experts(model, token_ids(), 3.0, price="dense")
