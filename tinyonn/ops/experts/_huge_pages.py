"""Large CPU buffers on pages of 2 MiB: a fresh page costs a fault, and a step's gradients take thousands of small ones."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

WORTH_BYTES = 32 << 20  # glibc maps blocks of that size afresh each time; smaller ones it soon keeps


def empty_on_huge_pages(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised and contiguous, with the dtype and device of `like`; from torch's allocator on other devices, where it is small, and
    where the system knows no such pages.

    The storage is not torch's own and cannot grow: `resize_` beyond it raises RuntimeError, and what needs that takes a `clone()`.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < WORTH_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    try:
        buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return like.new_empty(shape)
    return torch.frombuffer(buffer, dtype=like.dtype).view(shape)
