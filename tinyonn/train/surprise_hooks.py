"""Surprise of mixtures whose experts are separate modules, by hooks.

For a token t of expert e, the gradient of e's last weight due to t alone is the outer product of the output's gradient and the input of
e's last layer. Its norm is ‖grad of the output‖ · ‖input‖, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..ops._torch_norms import row_norms
from ..ops.experts._torch_experts import stored_surprise

LAST_LAYERS = ("w2", "down_proj")
ROUTERS = ("router", "gate")


def unfused_mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name whose `experts` is a list of modules with a last linear layer `w2` or `down_proj`."""
    found = {}
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.ModuleList) and len(experts) and all(_last_layer(expert) is not None for expert in experts):
            found[name] = module
    return found


def _last_layer(expert: nn.Module) -> nn.Module | None:
    for name in LAST_LAYERS:
        layer = getattr(expert, name, None)
        if isinstance(layer, nn.Module) and hasattr(layer, "weight"):
            return layer
    return None


@dataclass(eq=False)
class Call:
    """One call of a mixture with gradients on.

    Attributes:
        name, layer: the mixture.
        num_tokens: number of tokens; -1 if the mixture was not called, but its experts were.
        era: number of the layer's calls that backward had reached when this call began.
        backward: id of the backward that recomputed this call; -1 for none.
        router: input of the router, (tokens, F), and its indices, (tokens, k).
        experts: experts whose last layers were called.
        inputs: input of each expert until the call ends; input of its last layer if the expert was not called as a whole.
        rows: token of each row of each expert, once the call has ended.
        matrix: (tokens, experts), the surprise; set when backward reaches the first expert.
    """

    name: str
    layer: nn.Module
    num_tokens: int = -1
    era: int = 0
    backward: int = -1
    router: tuple[Tensor, Tensor] | None = None
    experts: set[int] = field(default_factory=set)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    matrix: Tensor | None = None

    @property
    def title(self) -> str:
        return self.name or type(self.layer).__name__

    def surprise(self) -> Tensor | None:
        return self.matrix


@dataclass(eq=False)
class _Kept:
    """Input of an expert's last layer, kept until backward reaches it or the hooks are removed."""

    call: Call
    expert: int
    inputs: Tensor | None


class SurpriseHookManager:
    """Fills a matrix with surprise during backward, for mixtures made of separate expert modules.

        surprise = torch.full((num_tokens, num_experts), math.inf)
        with SurpriseHookManager(surprise).register_hooks(layer):
            loss(layer(x)).backward()

    An expert's rows are mapped to tokens by `layer.last_expert_token_indices`, a list or dict of (rows,) indices per expert, if the layer
    has it at the end of its call. Otherwise the output of its `router` or `gate` maps them, by its integer tensor (tokens, k) of expert
    indices. An expert's rows are then ordered by token, or by slot and then token as in Mixtral; if these orders differ, the expert's
    inputs are compared with the router's. Entries of pairs that were not routed do not change.

    A matrix holds one call of its layer in each backward; the first backward through a call counts. Calls under `no_grad` have no effect.
    The surprise scales with the loss, including AMP's scale; values that overflow the matrix' dtype become its largest finite value.
    Inputs of last layers are kept from forward to backward, under checkpointing too. `with` removes the hooks after any error; without it,
    an error in the hooks of this class removes them.

    Args:
        per_token_surprise: floats of shape (tokens, experts) for one layer, with at least as many rows as tokens; or a matrix for each
            layer, by layer name.
    """

    def __init__(self, per_token_surprise: Tensor | Mapping[str, Tensor]) -> None:
        self.per_token_surprise = per_token_surprise
        self._buffers: Mapping[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._owner: dict[nn.Module, tuple[str, nn.Module, int]] = {}
        self._open: dict[nn.Module, Call] = {}
        self._kept: WeakSet[_Kept] = WeakSet()
        self._era: dict[nn.Module, int] = {}
        self._backward: dict[nn.Module, int] = {}

    def register_hooks(self, module: nn.Module) -> SurpriseHookManager:
        """Registers hooks on `module`, if it is a mixture, and on every mixture in it.

        Raises:
            TypeError: there is no mixture; a matrix is not of floats.
            ValueError: the matrices do not fit the layers: each layer needs its own, with one column per expert and without gradients.
            RuntimeError: this manager has registered hooks already.
        """
        if self._handles:
            raise RuntimeError("this manager has registered hooks already; remove them first.")
        layers = unfused_mixtures(module)
        if not layers:
            raise TypeError(f"module contains no experts with a {' or '.join(LAST_LAYERS)} (got {type(module).__name__}).")
        self._buffers = self._matched(layers)
        _active.add(self)
        try:
            for name, layer in layers.items():
                self._register(name, layer)
        except BaseException:
            self.remove_hooks()
            raise
        return self

    def _matched(self, layers: dict[str, nn.Module]) -> Mapping[str, Tensor]:
        given = self.per_token_surprise
        if isinstance(given, Tensor):
            if len(layers) > 1:
                raise ValueError(f"per_token_surprise must be one matrix a layer, got one for {len(layers)}: {', '.join(layers)}.")
            given = dict.fromkeys(layers, given)
        if not isinstance(given, Mapping):
            raise TypeError(f"per_token_surprise must be a tensor, or tensors by layer name, got {type(given).__name__}.")
        if set(given) != set(layers):
            raise ValueError(f"per_token_surprise must be given for {', '.join(layers)}, got {', '.join(map(str, given)) or 'none'}.")
        places: dict[int, str] = {}
        for name, buffer in given.items():
            experts = len(layers[name].experts)  # type: ignore[arg-type]
            if not isinstance(buffer, Tensor) or not buffer.is_floating_point():
                found = buffer.dtype if isinstance(buffer, Tensor) else type(buffer).__name__
                raise TypeError(f"per_token_surprise of {name!r} must be of floats, got {found}.")
            if buffer.dim() != 2 or buffer.shape[1] != experts:
                raise ValueError(f"per_token_surprise of {name!r} must have shape (tokens, {experts}), got {tuple(buffer.shape)}.")
            if buffer.requires_grad:
                raise ValueError(f"per_token_surprise of {name!r} must have no gradient, got one that requires it.")
            if buffer.numel() and any(buffer.data_ptr() == busy.data_ptr() for one in _active for busy in one._buffers.values()):
                raise ValueError(f"per_token_surprise of {name!r} must be filled by one manager, got a matrix that another fills.")
            other = places.setdefault(buffer.data_ptr(), name) if buffer.numel() else name
            if other != name:
                raise ValueError(f"per_token_surprise must be a matrix of its own for each layer, got one for {other!r} and {name!r}.")
        return given

    def _register(self, name: str, layer: nn.Module) -> None:
        experts: Any = layer.experts
        self._handles.append(layer.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True))
        for number, expert in enumerate(experts):
            last = _last_layer(expert)
            assert last is not None
            if last in self._owner:
                raise ValueError(f"an expert's last layer must belong to one expert, got {name}.experts.{number} with another's.")
            self._owner[last] = (name, layer, number)
            self._handles.append(expert.register_forward_pre_hook(partial(self._note_inputs, layer, number), with_kwargs=True))
            self._handles.append(last.register_forward_hook(self.save_inputs_hook))
        for attribute in ROUTERS:
            router = getattr(layer, attribute, None)
            if isinstance(router, nn.Module):
                self._handles.append(router.register_forward_hook(partial(self._note_routing, layer), with_kwargs=True))
                break
        self._handles.append(layer.register_forward_hook(self._end, always_call=True))

    def _begin(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        tokens = _first(args, kwargs).shape[:-1].numel()
        buffer = self._buffers.get(name)
        if buffer is not None and len(buffer) < tokens:
            raise ValueError(f"per_token_surprise of {name!r} must have a row for each of {tokens} tokens, got {len(buffer)}.")
        # Checkpoints with use_reentrant=True run a layer again within the backward of the whole model.
        self._open[layer] = Call(name, layer, tokens, self._era.get(layer, 0), torch._C._current_graph_task_id())

    def _note_routing(self, layer: nn.Module, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self._open.get(layer)
        if call is None:
            return
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) and value.dim() >= 2:
                call.router = _first(args, kwargs).detach().flatten(0, -2), value.detach().flatten(0, -2)

    def _note_inputs(self, layer: nn.Module, expert: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._open.get(layer)
        if call is not None:
            call.inputs[expert] = _first(args, kwargs).detach().flatten(0, -2)

    def _end(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends a call. Runs after errors too, because a recomputed forward ends with one as soon as it has what it needs."""
        call = self._open.pop(layer, None)
        if call is None:
            return
        if output is not None:
            call.rows = {expert: _tokens(call, expert, inputs) for expert, inputs in call.inputs.items()}
        call.router = None
        call.inputs.clear()

    def save_inputs_hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of an expert's last layer: keeps its input and registers a hook on its output."""
        if not torch.is_grad_enabled():
            return None
        name, layer, expert = self._owner[module]
        call = self._open.get(layer) or Call(name, layer)
        if expert in call.experts:
            raise RuntimeError(f"{call.title} called expert {expert} twice in one call; surprise is defined for one.")
        call.experts.add(expert)
        given = inputs[0].detach().flatten(0, -2)
        call.inputs.setdefault(expert, given)
        kept = _Kept(call, expert, given)
        self._kept.add(kept)
        frozen = not output.requires_grad  # no parameter before it learns, but it has a surprise
        if frozen:
            output = output.detach().requires_grad_().clone()
        output.register_hook(lambda grad: self.compute_surprise_hook(kept, grad))
        return output if frozen else None

    def compute_surprise_hook(self, kept: _Kept, grad_output: Tensor) -> None:
        """Gradient hook on the output of an expert's last layer: fills the expert's column."""
        inputs, kept.inputs = kept.inputs, None
        if inputs is None:
            return
        call, expert = kept.call, kept.expert
        try:
            if call.num_tokens < 0:
                call.rows[expert] = _tokens(call, expert, inputs)
            if call.matrix is None:
                call.matrix = self._matrix(call, inputs)
            norms = row_norms(grad_output.detach().flatten(0, -2)).double() * row_norms(inputs)
            rows = call.rows[expert].to(call.matrix.device)
            call.matrix[rows, expert] = stored_surprise(norms.to(call.matrix.device), call.matrix.dtype)
        except BaseException:
            self.remove_hooks()
            raise

    def _matrix(self, call: Call, inputs: Tensor) -> Tensor:
        """Matrix for a call that backward reaches for the first time."""
        era, backward = self._era.get(call.layer, 0), self._backward.get(call.layer, -1)
        if call.num_tokens >= 0 and (call.era != era or (call.backward == backward and backward >= 0)):
            raise RuntimeError(
                f"{call.title} was called twice before one backward, but its matrix holds one call; capture_surprise captures every call."
            )
        self._era[call.layer], self._backward[call.layer] = era + 1, call.backward
        return self._buffers[call.name]

    def remove_hooks(self) -> None:
        """Removes all hooks and frees what they kept; a second call does nothing.

        Calls that backward has not reached yet will not be filled.
        """
        for handle in self._handles:
            handle.remove()
        for kept in self._kept:
            kept.inputs = None
        _active.discard(self)
        self._handles.clear()
        self._owner.clear()
        self._open.clear()
        self._era.clear()
        self._backward.clear()

    def __enter__(self) -> SurpriseHookManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove_hooks()


_active: WeakSet[SurpriseHookManager] = WeakSet()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Hidden states of a call: its first tensor."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("a mixture, its router and its experts need a tensor as input.")


def _tokens(call: Call, expert: int, inputs: Tensor) -> Tensor:
    """Token of each row of an expert."""
    indices: Any = getattr(call.layer, "last_expert_token_indices", None)
    if indices is not None:
        source = f"{call.name}.last_expert_token_indices[{expert}]".lstrip(".")
        try:
            orders = [torch.as_tensor(indices[expert], device=inputs.device).flatten()]
        except LookupError:
            raise ValueError(f"{source} must have an index for each of the {len(inputs)} rows of expert {expert}; it is missing.") from None
    elif call.router is not None:
        routed = call.router[1] == expert
        orders = [routed.any(-1).nonzero().squeeze(-1), routed.T.nonzero()[:, 1]]
        source = f"the output of the router of {call.title}"
    else:
        raise ValueError(
            f"{call.title} needs last_expert_token_indices, or a router or gate that returns expert indices, to map rows of its experts "
            "to tokens."
        )
    if len(orders[0]) != len(inputs):
        raise ValueError(f"{source} must have an index for each of the {len(inputs)} rows of expert {expert}, got {len(orders[0])}.")
    if len(orders) == 1 or torch.equal(*orders):
        return orders[0]
    assert call.router is not None
    for tokens in orders:
        if torch.equal(call.router[0][tokens].to(inputs), inputs):
            return tokens
    raise ValueError(
        f"{call.title} needs last_expert_token_indices: the inputs of expert {expert} differ from the router's, so the order of its rows "
        "is unknown."
    )
