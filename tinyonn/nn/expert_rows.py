"""Rows of parameters, of buffers and of optimisers' state, written in place; under `fully_shard` by the process that has them."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def set_row(tensor: Tensor, row: int, value: Tensor | float) -> None:
    """Writes one row of a tensor (R, ...), in place.

    Args:
        tensor: an ordinary tensor, or one that is sharded over a mesh of one dimension; then each process writes its part.
        row: 0 … R − 1, of the whole tensor.
        value: the whole row, of the tensor's shape after its first dimension, or one number.
    """
    if not hasattr(tensor, "device_mesh"):
        tensor[row] = value
        return
    from torch.distributed.tensor import Shard

    mesh, (placement,) = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    local = own_part(tensor)
    if isinstance(placement, Shard):
        size, dim = tensor.shape[placement.dim], placement.dim % tensor.dim()
        start = min(-(-size // mesh.size()) * mesh.get_local_rank(), size)
        if dim == 0:
            row -= start
            if not 0 <= row < len(local):
                return
        elif isinstance(value, Tensor) and value.dim():
            value = value.narrow(dim - 1, start, local.shape[dim])
    local[row] = value


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of the tensor if it is sharded; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
