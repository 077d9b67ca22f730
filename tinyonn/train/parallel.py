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
    synchronised, group = _group(mixtures, parameters)
    if not synchronised:
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


@torch.no_grad()
def average_thresholds(mixtures: Mixtures) -> None:
    """Averages the running thresholds of all routers, and what they recorded, over processes whose gradients are averaged."""
    routers: list[Any] = [layer.router for layer in mixtures.layers.values() if layer.router.price is not None]
    synchronised, group = _group(mixtures, list(mixtures.router_parameters().values()))
    if not routers or not synchronised:
        return
    buffers = [buffer for router in routers for buffer in (router.thresholds, router.price, router.spread, router.pending)]
    buffers += [buffer for router in routers if router.head is not None for buffer in router.head.buffers()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    distributed.all_reduce(flat, group=group)
    flat /= distributed.get_world_size(group)
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view(buffer.shape))


def _group(mixtures: Mixtures, parameters: list[nn.Parameter]) -> tuple[bool, Any]:
    """Whether gradients are averaged over processes in this backward, and their group."""
    if mixtures.sharded:
        return True, next((parameter.device_mesh.get_group() for parameter in parameters), None)  # type: ignore[attr-defined]
    wrapper = mixtures.wrapper
    # Without synchronisation now, DistributedDataParallel averages these gradients in the last batch of the step.
    return (False, None) if wrapper is None or not wrapper.require_backward_grad_sync else (True, wrapper.process_group)


def _whole(parameter: nn.Parameter, grads: dict[nn.Parameter, Tensor]) -> Tensor:
    return grads[parameter] if parameter in grads else torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def _like(parameter: Any, grad: Tensor) -> Tensor:
    """The part of this process, if the parameter is sharded."""
    if not hasattr(parameter, "device_mesh"):
        return grad
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
