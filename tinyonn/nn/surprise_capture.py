"""Which mixtures hand out their surprise at the moment: a probe for each call, kept until the capture ends."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import scatter_surprise


class CapturedCall(NamedTuple):
    """One call of a mixture.

    Attributes:
        top_k_index: (N, K), where its tokens went.
        probe: (N, K), whose gradient after backward is the surprise.
        num_experts: E.
    """

    top_k_index: Tensor
    probe: Tensor
    num_experts: int

    def surprise(self) -> Tensor | None:
        """(N, E), infinite where a token did not go; None before backward, or where this call's graph took no part in it."""
        return None if self.probe.grad is None else scatter_surprise(self.probe.grad, self.top_k_index, self.num_experts)


_calls: weakref.WeakKeyDictionary[nn.Module, list[CapturedCall]] = weakref.WeakKeyDictionary()


@contextmanager
def captured_calls(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[CapturedCall]]]:
    """Within it, the modules that ask `probe_for` get a probe; RuntimeError where one is captured already."""
    found: dict[nn.Module, list[CapturedCall]] = {module: [] for module in modules}
    if any(module in _calls for module in found):
        raise RuntimeError("a mixture must be captured by one context at a time, got a second.")
    _calls.update(found)
    try:
        yield found
    finally:
        for module in found:
            _calls.pop(module, None)


def probe_for(module: nn.Module, top_k_index: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor | None:
    """A probe for this call of the module: (N, K) zeros; None where it is not captured, or gradients are off."""
    calls = _calls.get(module)
    if calls is None or not torch.is_grad_enabled():
        return None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    probe = torch.zeros(top_k_index.shape, dtype=wide, device=top_k_index.device, requires_grad=True)
    calls.append(CapturedCall(top_k_index.detach(), probe, num_experts))
    return probe
