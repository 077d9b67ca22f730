"""The record of a conversion in a model's configuration, and the parts that are built from it.

A converted model's config.json has

    "tinyonn": {"version": 1, "dyn_nsa": {"options": {...}, "layers": {...}}, "dyn_moe": {"options": {...}, "layers": {...}}}

with one entry per conversion. `hf._install` builds the parts from it wherever transformers builds a model.

config.json also has `transformers_weights`, which transformers reads as the name of a weights file. For a converted model it is a sentence.
Without tinyonn, `from_pretrained` of every class raises an error with that sentence as its message, before it builds anything.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import InputError, did_you_mean, listed
from .old_folders import fill_added, moved, without_added

RECORD = "tinyonn"  # of config.json
VERSION = 1
WEIGHTS = "transformers_weights"
_REMEDY = "this model has parts from tinyonn: run `import tinyonn.hf` before from_pretrained"
# An adapter refers to its base model by the model's `name_or_path`. The folder of the unconverted model lacks the parts, and PEFT would
# load the adapter onto it without a warning.
_UNNAMED = "a model that tinyonn converted in memory: save_pretrained it, and load it before get_peft_model"


class Conversion(NamedTuple):
    """One kind of conversion.

    Attributes:
        prepare: called with a configuration that has a record of this kind, before its model is built.
        build: called with a model and its recorded options and layers; adds the missing parts.
        part: class of the parts.
        mark: suffix of the name of one weight that every such part has and no other module has.
    """

    prepare: Callable[[PretrainedConfig], None]
    build: Callable[[PreTrainedModel, dict[str, Any]], None]
    part: type[nn.Module]
    mark: str


_conversions: dict[str, Conversion] = {}


def register_conversion(name: str, conversion: Conversion) -> None:
    _conversions[name] = conversion


def recorded(config: Any) -> dict[str, dict[str, Any]]:
    """Options and layers of each conversion that a configuration records; empty if there is none.

    Raises:
        InputError: the record is damaged, or was written by a later version.
    """
    if not isinstance(config, PretrainedConfig) or RECORD not in vars(config):
        return {}
    found = vars(config)[RECORD]
    if not isinstance(found, Mapping) or found.get("version") != VERSION:
        got = f"version {found.get('version')!r}" if isinstance(found, Mapping) else type(found).__name__
        raise InputError(f"config.{RECORD} must be a dict of version {VERSION}, got {got}: update tinyonn, or convert the model again.")
    kinds = {name: conversion for name, conversion in found.items() if name != "version"}
    for name, conversion in kinds.items():
        if name not in _conversions:
            raise InputError(f"config.{RECORD} must record {' or '.join(_conversions)}, got {name!r}: update tinyonn.")
        if not isinstance(conversion, Mapping) or set(conversion) != {"options", "layers"}:
            got = ", ".join(map(str, conversion)) if isinstance(conversion, Mapping) else type(conversion).__name__
            raise InputError(f"config.{RECORD}.{name} must have options and layers, got {got}.")
        if not isinstance(conversion["layers"], Mapping):
            raise InputError(f"config.{RECORD}.{name}.layers must be a dict by layer name, got {type(conversion['layers']).__name__}.")
    return kinds


def converted_model(model: nn.Module, name: str) -> PreTrainedModel | None:
    """The model with a record of this kind: `model`, or one inside a wrapper such as PEFT's; None if there is none."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel) and name in recorded(m.config)), None)


def record(model: PreTrainedModel, name: str, options: dict[str, Any], layers: dict[str, Any]) -> None:
    """Records a conversion in the model's configuration, after giving the model its own copy of that configuration."""
    own_configuration(model)
    _note(model.config, name, {"options": options, "layers": layers})
    model.name_or_path = _UNNAMED


def _note(config: PretrainedConfig, name: str, conversion: dict[str, Any]) -> None:
    vars(config)[RECORD] = {"version": VERSION, **recorded(config), name: conversion}
    vars(config)[WEIGHTS] = _REMEDY


def forget(model: PreTrainedModel, name: str) -> None:
    """Removes a conversion from the model's record. A model without other conversions saves as an ordinary model."""
    kept = {other: conversion for other, conversion in recorded(model.config).items() if other != name}
    if kept:
        vars(model.config)[RECORD] = {"version": VERSION, **kept}
    else:
        vars(model.config).pop(RECORD, None)
        vars(model.config).pop(WEIGHTS, None)
        model.name_or_path = model.config.name_or_path


def own_layers(model: PreTrainedModel, layers: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Recorded layers by their names in this model: a model with a head and its base model name them differently.

    Args:
        what: kind of the layers, for error messages.

    Raises:
        InputError: a layer does not exist.
    """
    names = [name for name, _ in model.named_modules()]
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, sizes in layers.items():
        own = next((own for own in (name, prefix + name, name.removeprefix(prefix)) if own in names), None)
        if own is None:  # in some families the base model's name differs from its prefix
            longer = [other for other in names if other.endswith(f".{name}")]
            shorter = [other for other in names if other and name.endswith(f".{other}")]
            own = longer[0] if len(longer) == 1 else max(shorter, key=len, default=None)
        if own is None:
            raise InputError(f"config.{RECORD} must name {what} of {type(model).__name__}, got {name!r}.")
        found[own] = sizes
    return found


# Per model built with a record: pairs of an original configuration and its copy, which a model with a head takes over from its base model.
_copies: weakref.WeakKeyDictionary[nn.Module, list[tuple[PretrainedConfig, PretrainedConfig]]] = weakref.WeakKeyDictionary()


def own_configuration(model: PreTrainedModel, *, building: bool = False) -> None:
    """Replaces every configuration that the model's modules refer to by a copy, so that no other model shares it.

    Args:
        building: whether the model is new; configurations that its parts copied while they were built are kept.
    """
    pairs = [pair for module in model.modules() for pair in _copies.pop(module, [])]
    memo: dict[int, Any] = {}
    for original, twin in pairs if building else []:
        memo |= {id(original): twin, id(twin): twin}
    places = [(module, name, value) for module in model.modules() for name, value in vars(module).items() if _is_config(value)]
    new = [value for _, _, value in places if id(value) not in memo]
    for module, name, value in places:
        vars(module)[name] = copy.deepcopy(value, memo)
    if building:
        _copies[model] = [*pairs, *((value, memo[id(value)]) for value in _with_nested(new))]


def _is_config(value: Any) -> bool:
    return isinstance(value, PretrainedConfig)


def _with_nested(configs: list[PretrainedConfig]) -> list[PretrainedConfig]:
    nested = [value for config in configs for value in vars(config).values() if _is_config(value)]
    return [*configs, *(_with_nested(nested) if nested else [])]


def prepare(config: Any) -> None:
    if isinstance(config, PretrainedConfig):
        if (old := moved(config)) is not None:
            _note(config, *old)
        for name in recorded(config):
            _conversions[name].prepare(config)


def build_parts(model: PreTrainedModel) -> None:
    if not recorded(model.config):
        return
    own_configuration(model, building=True)
    for name, conversion in recorded(model.config).items():
        _conversions[name].build(model, conversion)
    for part in _parts(model).values():
        if not any(tensor.is_meta for tensor in part.parameters()):
            for module in part.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # keeps the values that they were built with


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    classes = tuple(conversion.part for conversion in _conversions.values())
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}


def finish_part(model: PreTrainedModel, part: Any) -> None:
    """Completes a part that was built on the meta device, after weights were read. InputError if some were not."""
    if getattr(part, "_is_hf_initialized", False):
        return
    for other in _parts(model).values():
        if not getattr(other, "_is_hf_initialized", False):
            fill_added(other)
    missing = [
        f"{name}.{key}"
        for name, other in _parts(model).items()
        for key, tensor in other.state_dict(keep_vars=True).items()
        if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False) and not getattr(other, "_is_hf_initialized", False)
    ]
    if missing:
        source, lost = model.config.name_or_path or "the weights", listed(missing, 1, width=80)
        raise InputError(f"{source} lacks weights of parts that config.{RECORD} records, or has another shape for them: {lost}.")
    part.reset_statistics()  # they are not saved, so their memory is uninitialised
    for module in part.modules():
        module._is_hf_initialized = True


def refuse_lost_parts(model: PreTrainedModel, loading_info: Any) -> None:
    """Raises InputError if the weights include parts that the model was built without. What `finish_part` has filled is not missing."""
    if recorded(model.config):
        loading_info.missing_keys = without_added(loading_info.missing_keys, _parts(model))
    marks = tuple(conversion.mark for conversion in _conversions.values())
    if lost := sorted(key for key in loading_info.unexpected_keys if key.endswith(marks)):
        loading_info.mismatched_keys.clear()  # otherwise transformers raises an error about the guard's shape instead
        source = model.config.name_or_path or "the folder"
        raise InputError(
            f"{source} is a converted model, but the given config has no record of {lost[0]}; leave config out, or start from "
            "AutoConfig.from_pretrained."
        )


def is_part(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether the module is a part of a model that was converted."""
    return bool(recorded(model.config)) and isinstance(module, tuple(conversion.part for conversion in _conversions.values()))


def checked_model(model: Any) -> None:
    """Raises TypeError unless `model` is a transformers model, and InputError if some of its weights are on the meta device."""
    if not isinstance(model, PreTrainedModel):
        wrapped = "; convert the model inside it" if isinstance(model, nn.Module) else ""
        raise TypeError(f"model must be a PreTrainedModel of transformers, got {type(model).__name__}{wrapped}.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("model has weights on the meta device; load them before the conversion.")


def check_fields(kind: type, given: Any, source: str) -> None:
    """Raises InputError unless `given` is a dict of fields of a dataclass.

    Args:
        source: name of `given` in error messages.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{source} must be a dict of fields of {kind.__name__}, got {type(given).__name__}.")
    names = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in names:
            raise InputError(f"{source} must have fields of {kind.__name__}, got {name!r}{did_you_mean(name, names)}")
