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
    change(model.model.layers[2])
    with pytest.raises(error, match="" if error is KeyboardInterrupt else "the sample did not reach model.layers.2.mlp.unused"):
        calibrate_experts(model, token_ids(), 2.0, min_experts=2)
    assert all(torch.equal(router.thresholds, old) for router, old in zip(routers, thresholds, strict=True))
    assert {(router.target_k, router.min_experts, router.max_experts) for router in routers} == {(3.0, 1, 5)}
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
        assert [found["mean_k"] for found in expert_statistics(model, reset=True).values()] == pytest.approx([2.0] * 3, abs=0.05)
        assert list(reached.values()) == pytest.approx([2.0] * 3, abs=0.05)
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
    x = inputs[0].float()
    cosine = nn.functional.normalize(x.double(), dim=-1) @ nn.functional.normalize(module.router.prototypes.double(), dim=-1).T
    assert (cosine > module.router.thresholds).sum(-1).clamp(min=1).float().mean().item() == pytest.approx(3.0, abs=1.5 / len(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = convert_mlp_to_dynmoe(stock(), num_experts=8, sample=sample)
    assert_close_rms(made(sample).logits, stock()(sample).logits, 1e-5)
