"""Parameters whose first dimension is experts."""

from __future__ import annotations

from torch import nn

from .routed import Routed


def expert_pools(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that have one row for each expert and require a gradient, for `LazyAdamW`.

    These are, of `nn.DynMoE` and `nn.DynSMHA` layers, the experts' weights and biases, the router's prototypes and learned thresholds, and
    of other modules that have `num_experts` and a parameter (num_experts, ., .), as the experts of transformers' models, each parameter
    with that many rows.
    """
    found: dict[nn.Parameter, None] = {}
    for module in model.modules():
        parameters = parameters_of_experts(module).values() if isinstance(module, Routed) else _stacked(module)
        found |= {parameter: None for parameter in parameters if parameter.requires_grad}
    return list(found)


def parameters_of_experts(layer: Routed) -> dict[str, nn.Parameter]:
    """Parameters of a layer with a row for each expert, by name."""
    router = {f"router.{name}": parameter for name, parameter in layer.router.named_parameters(recurse=False)}
    return layer.expert_parameters() | router


def _stacked(module: nn.Module) -> list[nn.Parameter]:
    """Parameters with a row for each expert, of a module whose experts are stacked in parameters of three dimensions."""
    experts = getattr(module, "num_experts", None)
    found = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1 and len(parameter) == experts]
    return found if any(parameter.dim() == 3 for parameter in found) else []
