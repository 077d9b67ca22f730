"""Gradients of routers, over several processes: averaged as the model's wrapper averages the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

KEEP_OTHER_GRADIENTS = ("DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def check_wrapper(model: nn.Module, routers: dict[str, nn.Module]) -> None:
    """TypeError where gradients that are added to routers' parameters would reach no optimiser, or differ between processes."""
    for module in model.modules():
        if type(module).__name__ in KEEP_OTHER_GRADIENTS:
            raise TypeError(
                f"model must run alone, under DistributedDataParallel or fully_shard, got {type(module).__name__}, whose gradients are not "
                "those of its routers' parameters."
            )
    sharded = is_sharded(model)
    for name, router in routers.items():
        for inner, parameter in router.named_parameters():
            mesh = getattr(parameter, "device_mesh", None)
            if sharded != (mesh is not None) or (mesh is not None and mesh.ndim > 1):
                raise TypeError(
                    f"{name}.{inner} must be sharded where the model is, by fully_shard over a mesh of one dimension, got "
                    f"{'no mesh' if mesh is None else mesh}."
                )


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to any part of it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def data_parallel(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The wrapper of a model, compiled or not; None where there is none."""
    return next((module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)), None)


def average(model: nn.Module, grads: dict[nn.Parameter, Tensor], parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Gradients of this process as they are to be added to `.grad`.

    Args:
        grads: whole, of the parameters that took part here.
        parameters: all that may have taken part in another process, in one order in all of them.
    """
    wrapper = data_parallel(model)
    if is_sharded(model):
        group = next((parameter.device_mesh.get_group() for parameter in parameters), None)  # type: ignore[attr-defined]
    elif wrapper is not None and wrapper.require_backward_grad_sync:
        group = wrapper.process_group
    else:
        # Alone; or without synchronisation, and averaged together with the main loss' at the step's last batch.
        return grads
    if not parameters:
        return {}
    flat = torch.cat([_whole(parameter, grads).flatten() for parameter in parameters])
    distributed.all_reduce(flat, group=group)
    flat /= distributed.get_world_size(group)
    parts = flat.split([parameter.numel() for parameter in parameters])
    # A mixture that no process used has no gradient of the main loss either, and is left without.
    return {
        parameter: _like(parameter, part.view(parameter.shape).to(parameter.dtype))
        for parameter, part in zip(parameters, parts, strict=True)
        if parameter in grads or parameter.grad is not None
    }


def _whole(parameter: nn.Parameter, grads: dict[nn.Parameter, Tensor]) -> Tensor:
    return grads[parameter] if parameter in grads else torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def _like(parameter: Any, grad: Tensor) -> Tensor:
    """This process' part of it, where the parameter is sharded."""
    if not hasattr(parameter, "device_mesh"):
        return grad
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
