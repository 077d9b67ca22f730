"""Gradients of routers over several processes, averaged as the model's wrapper averages the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from .mixtures import Mixtures


def average(mixtures: Mixtures, grads: dict[nn.Parameter, Tensor], parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Gradients to add to `.grad`, averaged over processes if the model's wrapper averages the others.

    Args:
        mixtures: the mixtures of the model.
        grads: unsharded gradients of the parameters that this process used.
        parameters: all parameters that any process may have used, in the same order everywhere.
    """
    wrapper = mixtures.wrapper
    if mixtures.sharded:
        group = next((parameter.device_mesh.get_group() for parameter in parameters), None)  # type: ignore[attr-defined]
    elif wrapper is not None and wrapper.require_backward_grad_sync:
        group = wrapper.process_group
    else:
        # One process; or no synchronisation now: DistributedDataParallel averages these gradients in the last batch of the step.
        return grads
    if not parameters:
        return {}
    flat = torch.cat([_whole(parameter, grads).flatten() for parameter in parameters])
    distributed.all_reduce(flat, group=group)
    flat /= distributed.get_world_size(group)
    parts = flat.split([parameter.numel() for parameter in parameters])
    # A mixture that no process used has no gradient of the main loss either, and gets none here.
    return {
        parameter: _like(parameter, part.view(parameter.shape).to(parameter.dtype))
        for parameter, part in zip(parameters, parts, strict=True)
        if parameter in grads or parameter.grad is not None
    }


def _whole(parameter: nn.Parameter, grads: dict[nn.Parameter, Tensor]) -> Tensor:
    return grads[parameter] if parameter in grads else torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def _like(parameter: Any, grad: Tensor) -> Tensor:
    """The part of this process, if the parameter is sharded."""
    if not hasattr(parameter, "device_mesh"):
        return grad
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
