"""Parameters whose first dimension is experts."""

from __future__ import annotations

from torch import nn

from .routed import Routed


def expert_pools(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with one row for each expert: the weights of experts and heads, and the router's prototypes and thresholds.

    Found are those of `nn.DynMoE` and `nn.DynSMHA`, and parameters of three dimensions in a module that has an attribute `num_experts` of
    the size of their first one, as in transformers' mixtures.
    """
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, Routed):
            own = [*module.expert_parameters().values(), *module.router.parameters(recurse=False)]
            found |= {id(one): one for one in own}
        number = getattr(module, "num_experts", None)
        if isinstance(number, int):
            own = [one for one in module.parameters(recurse=False) if one.dim() == 3 and len(one) == number]
            found |= {id(one): one for one in own}
    return list(found.values())
