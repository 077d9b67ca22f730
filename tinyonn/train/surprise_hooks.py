"""The surprise of mixtures whose experts are modules of their own, by hooks; and of any mixture, by name.

For a token t that expert e took, the gradient of e's last weight due to t alone is the outer product of what its last layer gave back and
took in, so its norm is ‖grad of the output‖ · ‖input‖, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..nn.dyn_moe import DynMoE
from ..nn.surprise_capture import CapturedCall, captured_calls

LAST_LAYERS = ("w2", "down_proj")
ROUTERS = ("router", "gate")


def unfused_mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose `experts` is a list of modules with a last linear layer `w2` or `down_proj`, by name."""
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


class SurpriseHookManager:
    """Fills a matrix of surprise while backward runs, for mixtures made of separate expert modules.

        surprise = torch.full((num_tokens, num_experts), math.inf)
        with SurpriseHookManager(surprise).register_hooks(layer):
            loss(layer(x)).backward()

    Rows of an expert's call are mapped to tokens by `layer.last_expert_token_indices`, a list or dict of (rows,) indices an expert, where
    the layer has one; else by the output of its `router` or `gate`, from which the integer tensor (tokens, k) of expert indices is taken,
    an expert's rows in the order of tokens. Pairs that were not routed stay as they are.

    Args:
        per_token_surprise: (tokens, experts), of one layer; or such matrices by layer name, one for each layer.
    """

    def __init__(self, per_token_surprise: Tensor | Mapping[str, Tensor]) -> None:
        self.per_token_surprise = per_token_surprise
        self._handles: list[RemovableHandle] = []
        self._inputs: dict[nn.Module, Tensor] = {}
        self._owner: dict[nn.Module, tuple[str, nn.Module, int, Tensor]] = {}
        self._routed: dict[nn.Module, Tensor] = {}

    def register_hooks(self, module: nn.Module) -> SurpriseHookManager:
        """Hooks the mixture `module` is, or those it holds.

        Raises:
            TypeError: there is none.
            ValueError: buffers and layers do not go together: one for each, of one column an expert, none shared.
        """
        if self._handles:
            raise RuntimeError("hooks must be removed before others are registered.")
        layers = unfused_mixtures(module)
        if not layers:
            raise TypeError(f"module must hold experts with a {' or '.join(LAST_LAYERS)}, got {type(module).__name__} without any.")
        buffers = self._buffers(layers)
        try:
            for name, layer in layers.items():
                self._register(name, layer, buffers[name])
        except BaseException:
            self.remove_hooks()
            raise
        return self

    def _buffers(self, layers: dict[str, nn.Module]) -> Mapping[str, Tensor]:
        given = self.per_token_surprise
        if isinstance(given, Tensor):
            if len(layers) > 1:
                raise ValueError(f"per_token_surprise must be one matrix a layer, got one for {len(layers)}: {', '.join(layers)}.")
            given = dict.fromkeys(layers, given)
        if set(given) != set(layers):
            raise ValueError(f"per_token_surprise must be given for {', '.join(layers)}, got {', '.join(given) or 'none'}.")
        places: dict[int, str] = {}
        for name, buffer in given.items():
            experts = len(layers[name].experts)  # type: ignore[arg-type]
            if buffer.dim() != 2 or buffer.shape[1] != experts:
                raise ValueError(f"per_token_surprise of {name!r} must have shape (tokens, {experts}), got {tuple(buffer.shape)}.")
            other = places.setdefault(buffer.data_ptr(), name)
            if other != name:
                raise ValueError(f"per_token_surprise must be a matrix of its own for each layer, got one for {other!r} and {name!r}.")
        return given

    def _register(self, name: str, layer: nn.Module, buffer: Tensor) -> None:
        experts: Any = layer.experts
        for number, expert in enumerate(experts):
            last = _last_layer(expert)
            assert last is not None
            if last in self._owner:
                raise ValueError(f"an expert's last layer must belong to one expert, got {name}.experts.{number} with another's.")
            self._owner[last] = (name, layer, number, buffer)
            self._handles.append(last.register_forward_hook(self.save_inputs_hook))
            self._handles.append(last.register_full_backward_hook(self.compute_surprise_hook))
        for attribute in ROUTERS:
            router = getattr(layer, attribute, None)
            if isinstance(router, nn.Module):
                self._handles.append(router.register_forward_hook(lambda _, __, output, layer=layer: self._note_routing(layer, output)))
                break

    def _note_routing(self, layer: nn.Module, output: Any) -> None:
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor) and not value.is_floating_point() and value.dim() >= 2:
                self._routed[layer] = value.detach().flatten(0, -2)

    def save_inputs_hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of an expert's last layer: keeps what it took in."""
        if torch.is_grad_enabled():
            self._inputs[module] = inputs[0].detach()

    def compute_surprise_hook(self, module: nn.Module, grad_input: Any, grad_output: tuple[Tensor | None, ...]) -> None:
        """Full backward hook of an expert's last layer: fills its column."""
        inputs, grad = self._inputs.pop(module, None), grad_output[0]
        if inputs is None or grad is None:
            return
        name, layer, expert, buffer = self._owner[module]
        try:
            tokens = self._tokens(name, layer, expert, inputs.shape[:-1].numel())
            wide = torch.promote_types(grad.dtype, torch.float32)
            norms = grad.detach().to(wide).flatten(0, -2).norm(dim=-1) * inputs.to(wide).flatten(0, -2).norm(dim=-1)
            buffer[tokens.to(buffer.device), expert] = norms.to(buffer)
        except BaseException:
            self.remove_hooks()
            raise

    def _tokens(self, name: str, layer: nn.Module, expert: int, rows: int) -> Tensor:
        indices: Any = getattr(layer, "last_expert_token_indices", None)
        if indices is not None:
            tokens = torch.as_tensor(indices[expert]).flatten()
            source = f"{name}.last_expert_token_indices[{expert}]".lstrip(".")
        elif layer in self._routed:
            tokens = (self._routed[layer] == expert).any(-1).nonzero().squeeze(-1)
            source = f"the output of the router of {name or type(layer).__name__}"
        else:
            raise ValueError(
                f"{name or type(layer).__name__} must have last_expert_token_indices, or a router or gate that gives expert indices; "
                "rows of its experts cannot be told."
            )
        if len(tokens) != rows:
            raise ValueError(f"{source} must name the {rows} rows that expert {expert} took, got {len(tokens)}.")
        return tokens

    def remove_hooks(self) -> None:
        """Takes all hooks away and lets go of what they kept; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()
        self._owner.clear()
        self._routed.clear()

    def __enter__(self) -> SurpriseHookManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove_hooks()


class CapturedSurprise(Mapping[str, Tensor]):
    """Surprise by layer name, (tokens, experts), infinite where a token did not go; complete once backward ran.

    Several calls of a layer follow one another. A layer whose calls had no gradient is missing.
    """

    def __init__(self) -> None:
        self._calls: dict[str, list[CapturedCall]] = {}
        self._found: dict[str, Tensor] = {}

    def _settle(self) -> dict[str, Tensor]:
        for name, calls in self._calls.items():
            parts = [part for call in calls if (part := call.surprise()) is not None]
            if parts:
                self._found[name] = torch.cat(parts)
        return self._found

    def __getitem__(self, name: str) -> Tensor:
        return self._settle()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settle())

    def __len__(self) -> int:
        return len(self._settle())


@contextmanager
def capture_surprise(model: nn.Module) -> Iterator[CapturedSurprise]:
    """The surprise of every mixture of a model while backward runs.

        with capture_surprise(model) as surprise:
            model(**batch).loss.backward()
        surprise["model.layers.0.mlp.experts"]      # (tokens, experts)

    Sees `nn.DynMoE`, transformers' experts under `experts_implementation="tinyonn"`, and layers made of separate expert modules, as
    `SurpriseHookManager` does.

    Raises:
        TypeError: the model has none of them.
        RuntimeError: one of them is captured already.
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, DynMoE) or _runs_here(module)}
    unfused = unfused_mixtures(model)
    if not fused and not unfused:
        wanted = "a DynMoE, experts with experts_implementation='tinyonn', or a list of expert modules"
        raise TypeError(f"model must hold {wanted}, got {type(model).__name__}.")
    found = CapturedSurprise()
    with ExitStack() as stack:
        calls = stack.enter_context(captured_calls(fused.values()))
        found._calls = {name: calls[module] for name, module in fused.items()}
        for name, layer in unfused.items():
            stack.enter_context(_hooked(found._found, name, layer))
        yield found
        found._settle()


def _runs_here(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return hasattr(module, "has_post_expert_norm") and getattr(config, "_experts_implementation", None) == "tinyonn"


@contextmanager
def _hooked(found: dict[str, Tensor], name: str, layer: nn.Module) -> Iterator[None]:
    """The matrix is made when the layer is called, for then its tokens are known."""
    with ExitStack() as stack:

        def begin(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not torch.is_grad_enabled() or name in found:
                return
            tokens, experts = inputs[0].shape[:-1].numel(), len(layer.experts)  # type: ignore[arg-type]
            wide = torch.promote_types(inputs[0].dtype, torch.float32)
            found[name] = torch.full((tokens, experts), torch.inf, dtype=wide, device=inputs[0].device)
            manager = stack.enter_context(SurpriseHookManager({"": found[name]}))
            manager.register_hooks(layer)

        handle = layer.register_forward_pre_hook(begin)
        stack.callback(handle.remove)
        yield
