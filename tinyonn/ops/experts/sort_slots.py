"""`sort_slots`: the order of the slots by expert, computed once for several calls of `expert_linear`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_size
from .._dispatch import check_impl, choose_impl, on_its_device, register
from ._checks import check_index_type


class SlotOrder(NamedTuple):
    """Slots sorted by expert, and by token and slot within an expert; unused slots come last.

    Attributes:
        slots: (N * K,) int64, the slot token * K + k in each place; a permutation.
        offsets: (E + 1,) int32, first place of each expert, and that of the unused slots.
        tile_expert, tile_row: (tiles,) int32, what Triton's kernels need; (0,) with impl="torch".
    """

    slots: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor


def sort_slots(top_k_index: Tensor, num_experts: int, dtype: torch.dtype, *, impl: str = "auto") -> SlotOrder:
    """Sorts the slots of a routing by expert, for the `order` of several `expert_linear` calls with this index.

    Args:
        top_k_index: (N, K) int32 or int64; an index outside 0 … E - 1 is an unused slot.
        num_experts: E.
        dtype: dtype of the rows that will be projected: float16, bfloat16, float32 or float64.
        impl: "auto", "triton" or "torch", as in the calls that use it; "reference" needs no order.

    Raises:
        TypeError, ValueError: the index or a size has the wrong type or shape.
        RuntimeError: impl="triton" cannot run here.
    """
    check_impl(impl)
    check_choice("impl", impl, ("auto", "triton", "torch"))
    check_index_type(top_k_index)
    check_size("num_experts", num_experts)
    if top_k_index.dim() != 2:
        raise ValueError(f"top_k_index must have shape (N, K), got {tuple(top_k_index.shape)}.")
    return SlotOrder(*_sort_op(top_k_index, num_experts, dtype, impl))


def _by_torch(top_k_index: Tensor, num_experts: int) -> SlotOrder:
    flat = top_k_index.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    slots = flat.sort(stable=True).indices
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = counts[:num_experts].cumsum(0)
    none = flat.new_empty(0, dtype=torch.int32)
    return SlotOrder(slots, torch.cat([ends.new_zeros(1), ends]).int(), none, none.clone())


@on_its_device
def _by_triton(top_k_index: Tensor, num_experts: int, dtype: torch.dtype) -> SlotOrder:
    from tinyonn_kernels.experts.expert_activation import rows_of
    from tinyonn_kernels.experts.expert_sort import sort_pairs

    index = top_k_index.reshape(-1).contiguous()
    pairs = sort_pairs(index, num_experts, rows_of(index.numel(), num_experts, dtype))
    # The kernels leave the places of unused slots undefined. The last entry takes those of used slots.
    unused = (index < 0) | (index >= num_experts)
    place = torch.where(unused, pairs.offsets[-1] + unused.cumsum(0) - 1, index.numel())
    slots = torch.cat([pairs.slots.long(), pairs.slots.new_zeros(1, dtype=torch.int64)])
    slots.scatter_(0, place, torch.arange(index.numel(), device=index.device))
    return SlotOrder(slots[:-1].clone(), pairs.offsets, pairs.tile_expert, pairs.tile_row)


def _is_triton(top_k_index: Tensor, dtype: torch.dtype, impl: str) -> bool:
    return choose_impl(impl, top_k_index.new_empty(0, dtype=dtype)) == "triton" and top_k_index.numel() > 0


def _sort(top_k_index: Tensor, num_experts: int, dtype: torch.dtype, impl: str) -> tuple[Tensor, ...]:
    if _is_triton(top_k_index, dtype, impl):
        return tuple(_by_triton(top_k_index, num_experts, dtype))
    return tuple(_by_torch(top_k_index, num_experts))


@on_its_device
def _number_of_tiles(top_k_index: Tensor, num_experts: int, dtype: torch.dtype) -> Any:
    from tinyonn_kernels.experts.expert_activation import rows_of

    number = top_k_index.numel()
    return number // rows_of(number, num_experts, dtype) + min(num_experts, number)


def _fake(top_k_index: Tensor, num_experts: int, dtype: torch.dtype, impl: str) -> tuple[Any, ...]:
    def integers(*shape: Any) -> Tensor:
        return top_k_index.new_empty(shape, dtype=torch.int32)

    number = top_k_index.numel()
    tiles = _number_of_tiles(top_k_index, num_experts, dtype) if _is_triton(top_k_index, dtype, impl) else 0
    return top_k_index.new_empty(number, dtype=torch.int64), integers(num_experts + 1), integers(tiles), integers(tiles)


_sort_op = register(
    "sort_slots", _sort, _fake, "(Tensor top_k_index, SymInt num_experts, ScalarType dtype, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)
