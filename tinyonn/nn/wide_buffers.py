"""Buffers that a model of half precision keeps in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class WideBuffers(nn.Module):
    """A module whose floating-point buffers stay in float32: the steps of a running mean are below the resolution of half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None and buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = moved.float() if moved.is_meta or buffer.is_meta else buffer.to(moved.device)
        return self
