"""Surprise of every mixture of a model by name, for fused and separate experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.surprise_capture import CapturedCall, captured_calls, is_capturable
from .surprise_hooks import Call, SurpriseHookManager, unfused_mixtures


class CapturedSurprise(Mapping[str, Tensor]):
    """Surprise by layer name, (tokens, experts), infinite for experts that did not see the token; complete after backward.

    Calls of one layer are concatenated. A layer that backward did not reach is missing.
    """

    def __init__(self, calls: Mapping[str, list[CapturedCall] | list[Call]]) -> None:
        self._calls = calls

    def _found(self) -> dict[str, Tensor]:
        parts = {name: [part for call in calls if (part := call.surprise()) is not None] for name, calls in self._calls.items()}
        return {name: torch.cat(found) for name, found in parts.items() if found}

    def mean(self) -> Tensor | None:
        """Mean over layers of the mean over (token, expert) pairs, 0-d float64; None if no layer is fused."""
        means = []
        for calls in self._calls.values():
            total = []
            for call in calls:
                if isinstance(call, CapturedCall) and (slots := call.by_slot()) is not None:
                    used = (call.top_k_index < call.num_experts) & slots.isfinite()
                    total.append(torch.stack([torch.where(used, slots, 0).double().sum(), used.sum().double()]))
            if total:
                found, number = torch.stack(total).sum(0)
                means.append(found / number)
        return torch.stack([one.to(means[0].device) for one in means]).nanmean() if means else None

    def first_choice_accuracy(self) -> Tensor | None:
        """Share of the tokens with several experts whose best-scored one had the least surprise, 0-d; None if no layer is fused."""
        shares = []
        for calls in self._calls.values():
            for call in calls:
                if isinstance(call, CapturedCall) and (slots := call.by_slot()) is not None:
                    used = call.top_k_index < call.num_experts
                    least = torch.where(used, slots, torch.inf).amin(-1)
                    several = used.sum(-1) > 1
                    shares.append(torch.stack([((slots[:, 0] <= least) & several).sum(), several.sum()]).double())
        if not shares:
            return None
        right, number = torch.stack([share.to(shares[0].device) for share in shares]).sum(0)
        return right / number

    def __getitem__(self, name: str) -> Tensor:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())


class _EveryCall(SurpriseHookManager):
    """A manager that makes a matrix for each call when backward reaches it."""

    calls: Mapping[str, list[Call]] = {}

    def _matched(self, layers: dict[str, nn.Module]) -> Mapping[str, Tensor]:
        self.calls = {name: [] for name in layers}
        return {}

    def _begin(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin(name, layer, args, kwargs)
        if layer in self._open:
            self.calls[name].append(self._open[layer])

    def _matrix(self, call: Call, inputs: Tensor) -> Tensor:
        wide = torch.promote_types(inputs.dtype, torch.float32)
        experts = len(call.layer.experts)  # type: ignore[arg-type]
        if call.num_tokens < 0:
            raise RuntimeError(
                f"{call.title} was not called, but its experts were, so their surprise cannot be captured; "
                "experts that are checkpointed one by one need use_reentrant=False."
            )
        return torch.full((call.num_tokens, experts), torch.inf, dtype=wide, device=inputs.device)


@contextmanager
def capture_surprise(model: nn.Module) -> Iterator[CapturedSurprise]:
    """Captures the surprise of every mixture of a model during backward.

        with capture_surprise(model) as surprise:
            model(**batch).loss.backward()
        surprise["model.layers.0.mlp.experts"]      # (tokens, experts)

    It captures `nn.DynMoE`, `nn.DynSMHA`, transformers' experts under `experts_implementation="tinyonn"`, and layers made of separate
    expert modules, as `SurpriseHookManager` does.

    Raises:
        TypeError: the model contains none of them.
        RuntimeError: one of them is captured already.
    """
    fused = {name: module for name, module in model.named_modules() if is_capturable(module)}
    unfused = unfused_mixtures(model)
    if not fused and not unfused:
        wanted = "DynMoE or DynSMHA, no list of expert modules, and no experts after model.set_experts_implementation('tinyonn')"
        raise TypeError(f"model contains no {wanted} (got {type(model).__name__}).")
    with ExitStack() as stack:
        calls = stack.enter_context(captured_calls(fused.values()))
        manager = _EveryCall({})
        stack.callback(manager.remove_hooks)
        if unfused:
            manager.register_hooks(model)
        yield CapturedSurprise({**{name: calls[module] for name, module in fused.items()}, **manager.calls})
