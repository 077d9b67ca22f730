"""A sample of text in a converted model: the mixtures that it reaches, their inputs, and what each expert contributes.

N tokens, F features, E experts
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..._io.units import counted
from ...errors import InputError
from ...nn import DynMoE, ThresholdRouter
from ...ops._dispatch import autocast_off
from ...ops.experts._activations import activate
from ...ops.experts._tuples import Layout
from ..interfaces import gradients_kept, modes_kept
from ..peft_parts import active, active_modules

OPEN = -2.0  # threshold below every cosine


def mixtures(model: nn.Module) -> dict[str, DynMoE]:
    """The mixtures of a model by name; under PEFT, the active ones."""
    return {name: module for name, module in active_modules(model).items() if isinstance(module, DynMoE)}


def router_of(module: DynMoE) -> ThresholdRouter:
    """The active router, also if PEFT has wrapped it."""
    router: ThresholdRouter = active(module.router)
    return router


def check_sample(model: PreTrainedModel, sample: Tensor) -> None:
    if not hasattr(model, "get_input_embeddings"):
        raise InputError(f"model must be a transformers model, got {type(model).__name__}; pass the model inside it.")
    if not isinstance(sample, Tensor) or sample.dim() != 2 or sample.dtype not in (torch.int32, torch.int64):
        found = f"{sample.dtype} {tuple(sample.shape)}" if isinstance(sample, Tensor) else type(sample).__name__
        raise ValueError(f"sample must be token ids of shape (B, T), got {found}.")
    if sample.numel() < 2:
        raise ValueError(f"sample is too short: it has {counted(sample.numel(), 'token')}, and needs at least 2, better a few thousand.")
    known = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    outside = sample[(sample < 0) | (sample >= known)]
    if len(outside):  # on a GPU an index out of range ends the process' work there
        raise ValueError(f"sample must be token ids of shape (B, T), 0 … {known - 1}, got {outside[0].item()}.")


def run_sample(model: PreTrainedModel, sample: Tensor, layers: dict[str, nn.Module], act: Callable[[str, nn.Module, Tensor], None]) -> None:
    """Runs the model without its head, in eval mode. Before each layer runs, calls `act` with its name, the layer and its input, (N, F).

    The caller's autocast applies to the model, not to `act`.

    Raises:
        InputError: an input is not finite, or the sample did not reach a layer.
    """
    missed = set(layers)
    with ExitStack() as stack:
        for name, layer in layers.items():

            def before(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                check_finite(f"inputs of {name}", x)
                with torch.no_grad(), autocast_off(x):
                    act(name, module, x)
                missed.discard(name)

            stack.callback(layer.register_forward_pre_hook(before).remove)
        with modes_kept(model), gradients_kept(model):
            model.eval()
            model.base_model(sample.to(model.device), use_cache=False)
    if missed:
        first = next(name for name in layers if name in missed)
        raise InputError(f"the sample did not reach {first}, which must run in every forward.")


def check_finite(what: str, x: Tensor) -> None:
    if bad := int((~x.isfinite()).any(-1).sum()):
        raise InputError(f"{what} contain NaN or infinity in {bad} of {len(x)} tokens of the sample.")


def contributions(name: str, module: DynMoE, hidden_states: Tensor) -> Tensor:
    """(N, F) -> (N, E) float32, norm of the output of every expert for every token. InputError if one is not finite."""
    layout = Layout(module.activation, module.gated, False, False)
    x = hidden_states.to(module.down_proj.dtype)
    biases = [None] * len(module.down_proj) if module.gate_up_bias is None else module.gate_up_bias
    experts = zip(module.gate_up_proj, biases, module.down_proj, strict=True)
    given = torch.stack([(activate(functional.linear(x, up, bias), layout) @ down.T).float().norm(dim=-1) for up, bias, down in experts], 1)
    check_finite(f"outputs of the experts of {name}", given)
    return given
