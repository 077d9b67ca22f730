"""Calls of mixtures while they are captured, and the surprise of each call.

A mixture calls `probe_for` once in each forward. If it is captured, the call gets a probe, zeros whose gradient is the surprise, and each
listener gets the call. `register_capturable` registers how to recognise a kind of mixture.

A captured mixture has an attribute. torch.compile guards on it, so a compiled mixture is compiled once more for capturing. It then takes
its probe from an operator that compilers do not trace. The operator's backward stores the surprise in the call.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops import Routing, scatter_surprise
from ..ops._dispatch import statistics_dtype
from .surprise_budget import Budget

_ATTRIBUTE = "_tinyonn_capture"

# What a listener receives: the surprise, or the router's inputs as well, for which a compiled mixture breaks its graph.
Kind = Literal["surprise", "router_inputs"]


@dataclass(eq=False)
class CapturedCall:
    """Surprise of one call of a mixture.

    Attributes:
        top_k_index: (N, K), experts of each token.
        num_experts: E.
        probe: (N, K), whose gradient after backward is the surprise; None if the call was compiled.
        slots: (N, K), surprise of a compiled call after backward.
        token_mask: (N,) bool, which tokens count in statistics; None for all.
    """

    top_k_index: Tensor
    num_experts: int
    probe: Tensor | None = None
    slots: Tensor | None = None
    token_mask: Tensor | None = None

    def by_slot(self) -> Tensor | None:
        """(N, K), surprise of each slot; None before backward, or if backward did not reach this call."""
        return self.slots if self.probe is None else self.probe.grad

    def surprise(self) -> Tensor | None:
        """(N, E), infinite for experts that did not see the token; None before backward, or if backward did not reach this call."""
        slots = self.by_slot()
        return None if slots is None else scatter_surprise(slots, self.top_k_index, self.num_experts)


@dataclass(eq=False)
class Visit:
    """One call of a layer with routed experts, with what the router's loss needs.

    Attributes:
        hidden_states: (N, F), detached.
        routing: routing of the call.
        probe: (N, K), whose gradient after backward is the surprise.
        surprise_budget: budget of the call, a number, 0-d or (N,); None for routing by threshold.
        shape: leading shape of the call's tokens.
    """

    hidden_states: Tensor
    routing: Routing
    probe: Tensor
    surprise_budget: Budget | None
    shape: torch.Size


class _Capture:
    """Listeners of one mixture. A mixture keeps the same object for its lifetime, so that it is compiled for capturing once.

    Attributes:
        place: number under which the operator finds this object.
        anchor: 0-d; requires a gradient, always 0, so that backward reaches the operator.
        listeners: at most one of each kind.
    """

    def __init__(self, place: int) -> None:
        self.place, self.anchor = place, torch.zeros((), requires_grad=True)
        self.listeners: dict[str, Callable[[Any], None]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Capture:
        return self


_capturable: list[Callable[[nn.Module], bool]] = []


def register_capturable(predicate: Callable[[nn.Module], bool]) -> None:
    """Registers how to recognise a kind of mixture whose forward calls `probe_for`."""
    _capturable.append(predicate)


def is_capturable(module: nn.Module) -> bool:
    """Whether the module's forward calls `probe_for`, by the registered predicates."""
    return any(predicate(module) for predicate in _capturable)


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
def call_listener(modules: Iterable[nn.Module], kind: Kind, listener: Callable[[Any, Any], None]) -> Iterator[None]:
    """Calls `listener(module, call)` in every forward of the modules in which gradients are on.

    Args:
        modules: mixtures, whose forward calls `probe_for`.
        kind: "surprise" for a `CapturedCall` of any mixture; "router_inputs" for a `Visit` of a `DynMoE` or `DynSMHA`.
        listener: must not keep the probe of a visit in a hook of that probe.

    Raises:
        RuntimeError: a module has a listener of this kind.
    """
    captures = {module: _capture_of(module) for module in modules}
    if any(kind in capture.listeners for capture in captures.values()):
        raise RuntimeError("a mixture is already captured; only one context can capture it at a time.")
    for module, capture in captures.items():
        capture.listeners[kind] = partial(listener, module)
        module.__dict__[_ATTRIBUTE] = capture
    try:
        yield
    finally:
        for module, capture in captures.items():
            del capture.listeners[kind]
            if not capture.listeners:
                module.__dict__.pop(_ATTRIBUTE, None)


@contextmanager
def captured_calls(modules: Iterable[nn.Module], kind: Kind = "surprise") -> Iterator[dict[Any, list[Any]]]:
    """The calls of each module, in order; see `call_listener`. RuntimeError if a module is captured already."""
    found: dict[nn.Module, list[Any]] = {module: [] for module in modules}
    with call_listener(found, kind, lambda module, call: found[module].append(call)):
        yield found


def probe_for(
    module: nn.Module, top_k_index: Tensor, num_experts: int, dtype: torch.dtype,
    visit: tuple[Tensor, Routing, Budget | None, torch.Size] | None = None, token_mask: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Probe of this call, (N, K) zeros; None if nothing captures the module, gradients are off, or the module is being exported.

    Args:
        module: the mixture.
        top_k_index: (N, K), experts of each token.
        num_experts: E.
        dtype: of the tokens; the probe is float64 for float64, else float32.
        visit: (N, F) tokens, routing, budget and leading shape, for listeners to the router's inputs.
        token_mask: (N,) bool, which tokens count in statistics; None for all.
    """
    capture: _Capture | None = getattr(module, _ATTRIBUTE, None)
    if capture is None or not capture.listeners or not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return None
    if torch.compiler.is_compiling() and "router_inputs" not in capture.listeners:
        dtype = statistics_dtype(dtype)
        probe, _ = _captured_probe(capture.anchor, top_k_index, token_mask, num_experts, dtype, capture.place, _site())
        return probe
    return _notified(capture, top_k_index, num_experts, dtype, visit, token_mask)


@torch.compiler.disable
def _notified(
    capture: _Capture, top_k_index: Tensor, num_experts: int, dtype: torch.dtype, visit: Any, token_mask: Tensor | None
) -> Tensor:
    """A probe for this call. Each listener receives the call."""
    probe = torch.zeros(top_k_index.shape, dtype=statistics_dtype(dtype), device=top_k_index.device, requires_grad=True)
    if "surprise" in capture.listeners:
        capture.listeners["surprise"](CapturedCall(top_k_index.detach(), num_experts, probe, token_mask=token_mask))
    if "router_inputs" in capture.listeners:
        tokens, routing, budget, shape = visit
        capture.listeners["router_inputs"](Visit(tokens.detach(), routing, probe, budget, shape))
    return probe


@torch.compiler.assume_constant_result
def _site() -> int:
    """A new number for each call in a graph; the compiler would merge two equal calls."""
    return next(_sites)


@torch.library.custom_op("tinyonn::captured_probe", mutates_args=())
def _captured_probe(
    anchor: Tensor, top_k_index: Tensor, token_mask: Tensor | None, num_experts: int, dtype: torch.dtype, place: int, site: int
) -> tuple[Tensor, Tensor]:
    """A probe, and the number of the captured call, an int64 on the CPU."""
    probe = torch.zeros(top_k_index.shape, dtype=dtype, device=top_k_index.device)
    ticket = next(_tickets)
    capture = _by_place.get(place)
    if capture is not None and "surprise" in capture.listeners:
        kept = None if token_mask is None else token_mask.clone()
        _by_ticket[ticket] = call = CapturedCall(top_k_index.clone(), num_experts, token_mask=kept)
        capture.listeners["surprise"](call)
    return probe, torch.tensor(ticket, device="cpu")


@_captured_probe.register_fake
def _(
    anchor: Tensor, top_k_index: Tensor, token_mask: Tensor | None, num_experts: int, dtype: torch.dtype, place: int, site: int
) -> tuple[Tensor, Tensor]:
    return top_k_index.new_empty(top_k_index.shape, dtype=dtype), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("tinyonn::deliver_surprise", mutates_args=())
def _deliver_surprise(anchor: Tensor, surprise: Tensor, ticket: Tensor) -> Tensor:
    """Stores the surprise in its call. Returns 0, the anchor's gradient."""
    call = _by_ticket.get(int(ticket))
    if call is not None:
        call.slots = surprise.clone() if call.slots is None else call.slots + surprise  # as gradients accumulate
    return torch.zeros_like(anchor)


@_deliver_surprise.register_fake
def _(anchor: Tensor, surprise: Tensor, ticket: Tensor) -> Tensor:
    return torch.empty_like(anchor)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_probe: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    anchor, ticket = ctx.saved_tensors
    return _deliver_surprise(anchor, grad_probe, ticket), *([None] * 6)


_captured_probe.register_autograd(_autograd, setup_context=_setup_context)
