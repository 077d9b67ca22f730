"""A tensor in the weights file of a converted model that makes transformers without tinyonn refuse the file.

config.json tells every process that reads it to import tinyonn. With a configuration of the caller, transformers does not read it, as in
`LlamaForCausalLM.from_pretrained(folder, config=LlamaConfig(...))`, and would initialise the converted MLPs at random. The weights file
therefore has one more weight, with the name of a weight that the conversion replaced and a shape that such a weight never has, for which
transformers raises an error. `save_pretrained` adds it, and loading skips it; it is not part of the model's state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def replace_module(model: nn.Module, name: str, part: nn.Module) -> None:
    """Replaces a submodule by `part`, which keeps the name of the first weight that it replaces."""
    replaced = next(key for key, _ in model.get_submodule(name).named_parameters())
    model.set_submodule(name, part)
    part._replaced_weight = replaced  # type: ignore[assignment]
    part.register_load_state_dict_pre_hook(_skip_guard)


def _skip_guard(part: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.pop(f"{prefix}{part._replaced_weight}", None)


def _replaced(model: nn.Module) -> dict[str, nn.Module]:
    """Names of the replaced weights -> the part in their place."""
    parts = [(name, part, getattr(part, "_replaced_weight", None)) for name, part in model.named_modules()]
    return {f"{name}.{weight}": part for name, part, weight in parts if weight is not None}


def guards(model: nn.Module) -> dict[str, Tensor]:
    """A tensor of one value under the name of the first replaced weight; empty if no weight was replaced."""
    first = list(_replaced(model).items())[:1]
    return {name: torch.zeros(1, dtype=next(part.parameters()).dtype) for name, part in first}


def without_guards(model: PreTrainedModel, unexpected: set[str]) -> set[str]:
    """Names of unexpected weights without those of guards. A file saved with another head has another prefix."""
    prefix = f"{model.base_model_prefix}."
    own = {name.removeprefix(prefix) for name in _replaced(model)}
    return {key for key in unexpected if key.removeprefix(prefix) not in own}


@contextlib.contextmanager
def guarded(model: PreTrainedModel, state_dict: dict[str, Any] | None) -> Iterator[dict[str, Any] | None]:
    """`state_dict` with the guard, for `save_pretrained`; None stays None. Within the context, `model.state_dict()` has the guard too."""
    if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter's weights are saved
        yield state_dict
        return

    def add(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state |= {f"{prefix}{name}": value for name, value in guards(module).items()}

    hook = model.register_state_dict_post_hook(add)
    try:
        yield None if state_dict is None else {**state_dict, **guards(model)}
    finally:
        hook.remove()
