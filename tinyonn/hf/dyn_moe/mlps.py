"""Dense MLPs of a model, found by the names of their layers, for any class. `conversion` checks their outputs.

F features, I neurons
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import InputError, listed
from ...ops.experts._activations import activate
from ...ops.experts._checks import LIMITS
from ...ops.experts._tuples import Layout
from ...ops.experts.expert_mlp import Activation

GATED = ("gate_proj", "up_proj", "down_proj")
PLAIN = ("c_fc", "c_proj")
WANTED = f"MLPs made of {', '.join(GATED)} or of {', '.join(PLAIN)}"
_MLP_NAMES = ("mlp", "ffn", "feed_forward", "feedforward", "ff")


class DenseMLP(NamedTuple):
    """Weights of one MLP in the layout of `nn.Linear`; they are the model's own, not copies.

    Attributes:
        inputs: weights of (I, F), gate and up, or the one before the activation.
        input_biases: one bias of (I,) per weight, or empty.
        output: (F, I), weight after the activation.
        output_bias: (F,) or None.
        activation: activation of `ops.expert_mlp`.
        dropout: dropout probability of the output.
    """

    inputs: tuple[Tensor, ...]
    input_biases: tuple[Tensor, ...]
    output: Tensor
    output_bias: Tensor | None
    activation: Activation
    dropout: float

    @property
    def gated(self) -> bool:
        return len(self.inputs) == 2

    def hidden(self, x: Tensor) -> Tensor:
        """(N, F) -> (N, I), input of the last product."""
        biases = self.input_biases or (None,) * len(self.inputs)
        pre = [nn.functional.linear(x, weight, bias) for weight, bias in zip(self.inputs, biases, strict=True)]
        return activate(torch.cat(pre, -1), Layout(self.activation, self.gated, False, False))


def dense_mlps(model: nn.Module) -> dict[str, DenseMLP]:
    """The dense MLPs of a model by name.

    Raises:
        InputError: the model has a mixture, no MLP of a supported kind, an MLP whose weights, biases or activation are not supported, or
            MLPs that share weights.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    mixture = next((name for name in modules if name.split(".")[-1] == "experts"), None)
    if mixture is not None:
        raise InputError(f"model cannot be converted: it has a mixture already, {mixture}.")
    found, others = {}, []
    owner: dict[int, str] = {}
    for name, module in modules.items():
        children = dict(module.named_children())
        layers = next((layers for layers in (GATED, PLAIN) if all(layer in children for layer in layers)), None)
        if layers is not None:
            found[name] = _read(name, module, layers)
            for parameter in (parameter for layer in layers for parameter in children[layer].parameters()):
                if (other := owner.setdefault(id(parameter), name)) != name:
                    raise InputError(f"{name} cannot be converted: it shares weights with {other}.")
        elif name.split(".")[-1] in _MLP_NAMES and children:
            others.append(f"{name} with {listed(children)}")
    if others:
        raise InputError(f"{type(model).__name__} cannot be converted: it must have only {WANTED}, got {others[0]}.")
    if not found:
        raise InputError(f"{type(model).__name__} cannot be converted: it has no {WANTED}.")
    return found


def _read(name: str, module: nn.Module, layers: tuple[str, ...]) -> DenseMLP:
    weights, biases = [], []
    for layer in layers:
        child = getattr(module, layer)
        # A subclass may do more than a product: quantised layers, adapters.
        if type(child) not in (nn.Linear, Conv1D):
            kind = type(child)
            raise InputError(
                f"{name}.{layer} must be a Linear of torch or a Conv1D of transformers, got {kind.__name__} of {kind.__module__}; convert "
                "MLPs before quantising the model or adding adapters. A converted model can be loaded quantised."
            )
        weights.append(child.weight.T if isinstance(child, Conv1D) else child.weight)
        biases.append(child.bias)
    with_bias = [bias is not None for bias in biases[:-1]]
    if any(with_bias) != all(with_bias):
        raise InputError(f"{name} cannot be converted: only one of gate_proj and up_proj has a bias.")
    dropout: Any = getattr(module, "dropout", None)
    return DenseMLP(
        inputs=tuple(weights[:-1]),
        input_biases=tuple(biases[:-1]) if all(with_bias) else (),
        output=weights[-1],
        output_bias=biases[-1],
        activation=_activation_of(name, module, weights[-1].device),
        dropout=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
    )


@torch.no_grad()
def _activation_of(name: str, module: nn.Module, device: torch.device) -> Activation:
    """The activation, identified by its values on a few numbers, not by its name."""
    own: Any = getattr(module, "act_fn", None) or getattr(module, "act", None)
    if not callable(own):
        raise InputError(f"{name} cannot be converted: it has no activation called act_fn or act.")
    x = torch.linspace(-11.3, 12.9, 96, device=device)
    given = own(x).double()
    known = [activation for activation in get_args(Activation) if activation not in LIMITS]  # dense MLPs do not clamp
    for activation in known:
        if torch.allclose(activate(x.double(), Layout(activation, False, False, False)), given, rtol=1e-4, atol=1e-5):
            return activation
    raise InputError(f"activation of {name} must be one of {', '.join(known)}, got {type(own).__name__}.")
