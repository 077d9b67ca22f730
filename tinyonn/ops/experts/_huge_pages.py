"""Large CPU buffers on pages of 2 MiB: each new page costs a page fault, and a step's gradients would need thousands of small pages."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

WORTH_BYTES = 32 << 20  # glibc maps blocks of this size anew each time; it reuses smaller blocks


def empty_on_huge_pages(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised contiguous tensor with the dtype and device of `like`.

    torch's own allocator is used for other devices, for small tensors, and on systems without huge pages. Otherwise the storage does not
    belong to torch and cannot grow: a larger `resize_` raises RuntimeError; resize a `clone()` instead.
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
