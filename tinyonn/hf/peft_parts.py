"""Parts of a converted model under PEFT.

PEFT freezes a model. It copies the parts named in `modules_to_save`, trains the copies and saves them with the adapter; the originals stay
in the wrapper and do not run. Other parts stay frozen, and an adapter's folder lacks them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def _is_wrapper(module: nn.Module) -> bool:
    return "original_module" in module._modules and "modules_to_save" in module._modules


def active(module: Any) -> Any:
    """The module that runs: in a wrapper of PEFT, the copy of the active adapter or the original; otherwise the module itself."""
    if not _is_wrapper(module):
        return module
    copies, adapters = module._modules["modules_to_save"], module.active_adapters
    if module.disable_adapters or not adapters or adapters[0] not in copies:
        return module._modules["original_module"]
    return copies[adapters[0]]


def active_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`named_modules` of a model without PEFT's wrappers and inactive copies. Names are those of the model without PEFT's wrappers."""
    modules = list(model.named_modules())
    wrappers = [(name, module) for name, module in modules if _is_wrapper(module)]
    if not wrappers:
        return dict(modules)
    idle, renamed = set(), {}
    for name, wrapper in wrappers:
        runs = active(wrapper)
        copies: Any = wrapper._modules["modules_to_save"]
        for part in (wrapper._modules["original_module"], *copies.values()):
            if part is not runs:
                idle.update(part.modules())
        idle.update((wrapper, copies))
        renamed.update({module: f"{name}.{inner}".rstrip(".") for inner, module in runs.named_modules()})
    return {renamed.get(module, name): module for name, module in modules if module not in idle}


def running_statistics(model: nn.Module, kind: type[Any], reset: bool) -> dict[str, dict[str, Any]]:
    """`statistics()` of each active part of this kind by name; `reset` resets them afterwards."""
    found = {}
    for name, module in active_modules(model).items():
        if isinstance(module, kind):
            found[name] = module.statistics()
            if reset:
                module.reset_statistics()
    return found


def adapter_of(model: nn.Module) -> tuple[str, Any] | None:
    """Name and configuration of PEFT's active adapter; None if there is none."""
    if "peft" not in sys.modules:
        return None
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and configs:
            given: Any = getattr(module, "active_adapter", None)
            if given is None:  # transformers' own adapters
                given = getattr(module, "active_adapters", None)
            given = given() if callable(given) else given
            name = str(given[0] if isinstance(given, list) and given else given)
            return (name, configs[name]) if name in configs else None
    return None


def keep_in_adapter(model: nn.Module, name: str) -> None:
    """Makes the active adapter save modules of this name too, as frozen copies; later changes to the copies leave the originals unchanged.

    Does nothing if there is no adapter, or if it saves them already.
    """
    found = adapter_of(model)
    if found is None:
        return
    from peft.utils import ModulesToSaveWrapper

    adapter, config = found
    places = [
        (parent, module)
        for path, parent in active_modules(model).items()
        if (module := parent._modules.get(name)) is not None and not _is_wrapper(module) and not _is_saved(model, path)
    ]
    for parent, module in places:
        wrapper = ModulesToSaveWrapper(module, adapter)
        wrapper.set_adapter(adapter, inference_mode=True)
        setattr(parent, name, wrapper)
    if places:
        config.modules_to_save = [*(config.modules_to_save or []), name]


def _is_saved(model: nn.Module, path: str) -> bool:
    """Whether an adapter saves the module, or a module that contains it."""
    whole = {name for name, module in model.named_modules() if _is_wrapper(module)}
    return any(path == name or path.startswith(f"{name}.") for name in whole)


def frozen(parameters: Iterable[torch.Tensor]) -> bool:
    return not any(parameter.requires_grad for parameter in parameters)


def remedy(model: nn.Module, name: str) -> str:
    """How to make parts of this name trainable, for a message."""
    if adapter_of(model) is None:
        return "call requires_grad_(True) on them"
    return f"give PEFT's configuration modules_to_save=['{name}']"
