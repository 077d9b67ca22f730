"""Which mixtures hand out their surprise at the moment: a probe for each call, kept until the capture ends.

A mixture that is captured carries an attribute. torch.compile guards on it: a compiled mixture is compiled once more for capturing. It then
takes its probe from an operator that no compiler looks into, whose backward hands the surprise to the call that it belongs to.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import scatter_surprise

_ATTRIBUTE = "_tinyonn_capture"


class CapturedCall:
    """One call of a mixture.

    Attributes:
        top_k_index: (N, K), where its tokens went.
        num_experts: E.
        probe: (N, K), whose gradient after backward is the surprise; None where the call was compiled.
        slots: (N, K), the surprise of a compiled call after backward.
    """

    def __init__(self, top_k_index: Tensor, num_experts: int, probe: Tensor | None = None) -> None:
        self.top_k_index, self.num_experts, self.probe = top_k_index, num_experts, probe
        self.slots: Tensor | None = None

    def surprise(self) -> Tensor | None:
        """(N, E), infinite where a token did not go; None before backward, or where this call's graph took no part in it."""
        slots = self.slots if self.probe is None else self.probe.grad
        return None if slots is None else scatter_surprise(slots, self.top_k_index, self.num_experts)


class _Capture:
    """Of one mixture, the same object in every capture: compiled code is made for it once.

    Attributes:
        place: number under which the operator finds it.
        anchor: 0-d; its gradient, always 0, is what makes backward come by.
        calls: of the capture that is open.
    """

    def __init__(self, place: int) -> None:
        self.place, self.anchor = place, torch.zeros((), requires_grad=True)
        self.calls: list[CapturedCall] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Capture:
        return self


_captures: weakref.WeakKeyDictionary[nn.Module, _Capture] = weakref.WeakKeyDictionary()
_by_place: weakref.WeakValueDictionary[int, _Capture] = weakref.WeakValueDictionary()
_by_ticket: weakref.WeakValueDictionary[int, CapturedCall] = weakref.WeakValueDictionary()
_places, _tickets, _sites = itertools.count(), itertools.count(), itertools.count()


def _capture_of(module: nn.Module) -> _Capture:
    if module not in _captures:
        _captures[module] = capture = _Capture(next(_places))
        _by_place[capture.place] = capture
    return _captures[module]


@contextmanager
def captured_calls(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[CapturedCall]]]:
    """Within it, the modules that ask `probe_for` get a probe; RuntimeError where one is captured already."""
    found: dict[nn.Module, list[CapturedCall]] = {module: [] for module in modules}
    if any(_ATTRIBUTE in module.__dict__ for module in found):
        raise RuntimeError("a mixture must be captured by one context at a time, got a second.")
    for module, calls in found.items():
        capture = _capture_of(module)
        capture.calls = calls
        module.__dict__[_ATTRIBUTE] = capture
    try:
        yield found
    finally:
        for module in found:
            module.__dict__.pop(_ATTRIBUTE, None)
            _capture_of(module).calls = []


def probe_for(module: nn.Module, top_k_index: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor | None:
    """A probe for this call of the module: (N, K) zeros; None where it is not captured, or gradients are off."""
    capture: _Capture | None = getattr(module, _ATTRIBUTE, None)
    if capture is None or not torch.is_grad_enabled():
        return None
    if torch.compiler.is_compiling():
        probe, _ = _captured_probe(capture.anchor, top_k_index, num_experts, dtype == torch.float64, capture.place, _site())
        return probe
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    probe = torch.zeros(top_k_index.shape, dtype=wide, device=top_k_index.device, requires_grad=True)
    capture.calls.append(CapturedCall(top_k_index.detach(), num_experts, probe))
    return probe


@torch.compiler.assume_constant_result
def _site() -> int:
    """Another number for each call in a graph: two calls alike would be made one."""
    return next(_sites)


@torch.library.custom_op("tinyonn::captured_probe", mutates_args=())
def _captured_probe(anchor: Tensor, top_k_index: Tensor, num_experts: int, double: bool, place: int, site: int) -> tuple[Tensor, Tensor]:
    """A probe, and the number of the call that is remembered: an int64 on the CPU."""
    probe = torch.zeros(top_k_index.shape, dtype=torch.float64 if double else torch.float32, device=top_k_index.device)
    ticket = next(_tickets)
    capture = _by_place.get(place)
    if capture is not None:
        _by_ticket[ticket] = call = CapturedCall(top_k_index.clone(), num_experts)
        capture.calls.append(call)
    return probe, torch.tensor(ticket, device="cpu")


@_captured_probe.register_fake
def _(anchor: Tensor, top_k_index: Tensor, num_experts: int, double: bool, place: int, site: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if double else torch.float32
    return top_k_index.new_empty(top_k_index.shape, dtype=dtype), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("tinyonn::deliver_surprise", mutates_args=())
def _deliver_surprise(anchor: Tensor, surprise: Tensor, ticket: Tensor) -> Tensor:
    """Hands the surprise to its call; 0, the anchor's gradient."""
    call = _by_ticket.get(int(ticket))
    if call is not None:
        call.slots = surprise.clone() if call.slots is None else call.slots + surprise  # as gradients add up
    return torch.zeros_like(anchor)


@_deliver_surprise.register_fake
def _(anchor: Tensor, surprise: Tensor, ticket: Tensor) -> Tensor:
    return torch.empty_like(anchor)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_probe: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    anchor, ticket = ctx.saved_tensors
    return _deliver_surprise(anchor, grad_probe, ticket), *([None] * 5)


_captured_probe.register_autograd(_autograd, setup_context=_setup_context)
