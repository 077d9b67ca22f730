"""Conversion of a trained model's dense MLPs to mixtures of their own neurons."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ...errors import InputError
from ...nn import DynMoE
from ...nn.dyn_moe import GatingLoss, RoutingKind
from ...ops._dispatch import autocast_off
from ...ops.experts.expert_mlp import SurpriseKind
from .._converted import checked_model, record
from ..guard import replace_module
from ..interfaces import modes_kept
from .budget import take_surprise_budget
from .calibration import fit_prototypes
from .mlps import DenseMLP, dense_mlps
from .options import DynMoEOptions, LayerSizes, build
from .partition import coactive_neurons, neurons_in_order
from .sampling import OPEN, check_finite, check_sample, contributions, mixtures, run_sample
from .saving import DYN_MOE

# Largest relative error of a layer on random input that can be due to rounding.
_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def convert_mlp_to_dynmoe(
    model: PreTrainedModel,
    *,
    num_experts: int,
    sample: Tensor | None = None,
    scale: float = 1.0,
    gating_loss: GatingLoss = "both",
    surprise_kind: SurpriseKind = "down_proj",
    checkpoint: bool = False,
    routing: RoutingKind = "threshold",
    surprise_budget: float | None = None,
) -> PreTrainedModel:
    """Splits the neurons of each dense MLP into equal experts, in place; its outputs stay the same.

    Each MLP becomes a `nn.DynMoE`. All experts are active at first: every threshold is -2, below any cosine, and combine="unit" adds a
    token's experts up to the MLP. `calibrate_experts` makes the model sparse. Experts require gradients where the MLP's weights and biases
    did (gate and up together if either did); routers always do.

    With a sample, neurons that are active together form one expert. The prototype of an expert is the direction that best predicts the
    norm of its output. Without a sample, experts take the neurons in order, and a prototype is the mean direction of their input weights
    (gate or c_fc). Such prototypes are a start for training; calibrate only after training them.

    With routing="budget" a token uses the experts that hold `surprise_budget` of its softmax over scores. The model then also takes the
    budget as a keyword, as in `model(input_ids, surprise_budget=0.6)` and `model.generate(input_ids, surprise_budget=0.6)`. It is above 0
    and at most 1: a number, (B, T), or (B, 1) for one budget per row. `nn.surprise_budget_of` sets it for a block of calls.

    The model saves with `save_pretrained`, and loads with `from_pretrained` once `tinyonn.hf` is imported. The model gets its own copy of
    its configuration, which records the conversion. Its attention can be converted too, by `convert_attention`. During the conversion,
    memory holds the converted weights twice.

    Args:
        model: model whose MLPs have gate_proj, up_proj, down_proj, as in Llama and Qwen3, or c_fc, c_proj, as in GPT-2.
        num_experts: E, number of experts per layer; must divide the intermediate size.
        sample: (B, T) token ids without padding, run in one batch; a few thousand tokens are enough. None for no sample.
        scale: scale of the routers' sigmoids, at most 10.
        gating_loss, surprise_kind, checkpoint: see `nn.DynMoE`.
        routing: "threshold", for which `calibrate_experts` sets the thresholds, or "budget".
        surprise_budget: default budget of a call with routing="budget"; None for 1, which keeps the outputs the same.

    Returns:
        The model.

    Raises:
        InputError: the model is converted, quantised or a mixture already; weights are on the meta device; the MLPs have other layers or
            another activation, or num_experts does not divide their intermediate size. The model is unchanged.
        TypeError, ValueError: `model` is not a transformers model; an option is invalid.
    """
    checked_model(model)
    options = DynMoEOptions(
        num_experts, num_experts, 1, num_experts, scale, gating_loss, surprise_kind, checkpoint, routing, surprise_budget
    )
    if sample is not None:
        check_sample(model, sample)
    layers = _checked_layers(model, num_experts)
    converted: dict[str, DynMoE] = {}

    def convert(name: str, module: nn.Module, x: Tensor) -> None:
        mlp = layers[name]
        hidden = mlp.hidden(x.to(mlp.output.dtype))
        check_finite(f"neurons of {name}", hidden)
        converted[name] = _mixture(mlp, options, coactive_neurons(hidden, num_experts))
        fit_prototypes(converted[name].router, x, contributions(name, converted[name], x))

    if sample is None:
        for name, mlp in layers.items():
            converted[name] = _mixture(mlp, options, neurons_in_order(len(mlp.inputs[0]), num_experts))
    else:
        run_sample(model, sample, {name: model.get_submodule(name) for name in layers}, convert)
    for name, mixture in converted.items():
        with autocast_off(mixture.down_proj):
            _prove(name, model.get_submodule(name), mixture)
    for name, mixture in converted.items():
        replace_module(model, name, mixture.train(model.get_submodule(name).training))
    sizes = {name: asdict(_sizes(mlp, num_experts)) for name, mlp in layers.items()}
    take_surprise_budget(model)
    record(model, DYN_MOE, asdict(options), sizes)
    return model


def _checked_layers(model: PreTrainedModel, num_experts: int) -> dict[str, DenseMLP]:
    if mixtures(model):
        raise InputError(f"model was converted before: {next(iter(mixtures(model)))} is a DynMoE.")
    layers = dense_mlps(model)
    for name, mlp in layers.items():
        if len(mlp.inputs[0]) % num_experts:
            raise InputError(f"num_experts must divide the intermediate size {len(mlp.inputs[0])} of {name}, got {num_experts}.")
    return layers


def _sizes(mlp: DenseMLP, num_experts: int) -> LayerSizes:
    neurons, features = mlp.inputs[0].shape
    bias, output_bias = bool(mlp.input_biases), mlp.output_bias is not None
    return LayerSizes(features, neurons // num_experts, mlp.activation, mlp.gated, bias, output_bias, mlp.dropout)


def _mixture(mlp: DenseMLP, options: DynMoEOptions, groups: Tensor) -> DynMoE:
    """The MLP as a mixture with an expert for each row of `groups`, (E, C) neuron indices; all experts are active."""
    weight = mlp.output
    module = build(options, _sizes(mlp, options.num_experts), device=weight.device, dtype=weight.dtype)
    groups = groups.to(weight.device)
    module.gate_up_proj.copy_(torch.cat([part[groups] for part in mlp.inputs], 1))
    module.down_proj.copy_(mlp.output[:, groups].transpose(0, 1))
    if module.gate_up_bias is not None and module.down_bias is not None:
        module.gate_up_bias.copy_(torch.cat([part[groups] for part in mlp.input_biases], 1))
        module.down_bias.zero_()  # `output_bias` adds the MLP's bias once per token
    if module.output_bias is not None and mlp.output_bias is not None:
        module.output_bias.copy_(mlp.output_bias)
    module.router.thresholds.fill_(OPEN)
    module.router.prototypes.copy_(functional.normalize(mlp.inputs[0][groups].float().sum(1), dim=-1))
    _copy_requires_grad(module, mlp)
    return module


def _copy_requires_grad(module: DynMoE, mlp: DenseMLP) -> None:
    """Parameters of the mixture require gradients if their sources in the MLP do; gate and up, one parameter here, if either does."""
    output_bias = () if mlp.output_bias is None else (mlp.output_bias,)
    parts = (
        (module.gate_up_proj, mlp.inputs), (module.down_proj, (mlp.output,)), (module.gate_up_bias, mlp.input_biases),
        (module.down_bias, output_bias or mlp.input_biases), (module.output_bias, output_bias),
    )  # fmt: skip
    for parameter, sources in parts:
        if parameter is not None:
            parameter.requires_grad_(any(source.requires_grad for source in sources))


def _prove(name: str, module: nn.Module, mixture: DynMoE) -> None:
    """InputError if the mixture's output differs: a module can have the layers of an MLP and compute something else with them."""
    weight = mixture.down_proj
    x = torch.randn(1, 8, weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
    with modes_kept(module):
        expected = module.eval()(x)
    everything = {"surprise_budget": 1.0} if mixture.routing_kind == "budget" else {}
    error = (mixture.eval()(x, **everything) - expected).double().norm() / expected.double().norm().clamp(min=1e-30)
    mixture.reset_statistics()
    limit = _LIMITS[weight.dtype]
    if not error <= limit:
        layers = "gate_proj, up_proj, down_proj" if mixture.gated else "c_fc, c_proj"
        raise InputError(
            f"{name} cannot be converted: the output of {type(module).__name__} differs from that of {layers} by a relative {error:.2g}."
        )
