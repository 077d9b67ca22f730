"""Steps that importing `tinyonn.hf` adds to transformers' `PreTrainedModel`, for every model class alike.

transformers has no hook at these places. All but the last two act only on models whose configuration has a record of `hf._converted`:

    __init__                     chooses the attention implementation, unless the caller chose one
    post_init                    gives the model a configuration of its own and builds the recorded parts; weights are read later
    _initialize_weights          raises an error for parts whose weights a folder lacks
    save_pretrained              adds a guard to the weights file; see `hf.guard`
    config.transformers_weights  reads as None here, and as a sentence in processes without tinyonn
    _adjust_missing_and_unexpected_keys    forgets old names; raises an error for weights of parts that the model was built without
    post_init, set_experts_implementation  raise an error for experts that experts_implementation="tinyonn" cannot run

It also registers old names of weights of parts with transformers' own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from . import _converted
from ._converted import RECORD, WEIGHTS
from .experts import check_experts, experts_checked
from .guard import guarded, without_guards
from .old_folders import forget_renamings, register_renamings


class _WeightsFile:
    """`transformers_weights` of a configuration: the name of a weights file, or None for a converted model."""

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        if config is None:
            return self
        if WEIGHTS not in vars(config):
            raise AttributeError(f"'{type(config).__name__}' object has no attribute '{WEIGHTS}'")
        value = vars(config)[WEIGHTS]
        return None if RECORD in vars(config) else value

    def __set__(self, config: Any, value: Any) -> None:
        vars(config)[WEIGHTS] = value

    def __delete__(self, config: Any) -> None:
        if RECORD not in vars(config):  # `save_pretrained` deletes it, and must write the sentence
            vars(config).pop(WEIGHTS, None)


def install() -> None:
    """Adds the steps, once."""
    cls: Any = PreTrainedModel
    if hasattr(cls, "_tinyonn_installed"):
        return
    init, post_init, initialize, save = cls.__init__, cls.post_init, cls._initialize_weights, cls.save_pretrained
    adjust, set_experts = cls._adjust_missing_and_unexpected_keys, cls.set_experts_implementation

    @functools.wraps(init)
    def new_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        _converted.prepare(config)
        init(self, config, *args, **kwargs)

    @functools.wraps(post_init)
    def new_post_init(self: Any) -> None:
        post_init(self)
        _converted.build_parts(self)
        check_experts(self)

    @functools.wraps(initialize)
    def new_initialize(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if _converted.is_part(self, module):
            with torch.no_grad():
                _converted.finish_part(self, module)
        initialize(self, module, *args, **kwargs)

    @functools.wraps(adjust)
    def new_adjust(self: Any, loading_info: Any) -> None:
        _converted.refuse_lost_parts(self, loading_info)
        forget_renamings(self)
        loading_info.unexpected_keys = without_guards(self, loading_info.unexpected_keys)
        adjust(self, loading_info)

    @functools.wraps(save)
    def new_save(self: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any) -> Any:
        with guarded(self, state_dict) as state:
            return save(self, save_directory, is_main_process, state, *args, **kwargs)

    @functools.wraps(set_experts)
    def new_set_experts(self: Any, *args: Any, **kwargs: Any) -> Any:
        with experts_checked(self):
            return set_experts(self, *args, **kwargs)

    cls.__init__, cls.post_init, cls._initialize_weights, cls.save_pretrained = new_init, new_post_init, new_initialize, new_save
    cls._adjust_missing_and_unexpected_keys, cls.set_experts_implementation = new_adjust, new_set_experts
    register_renamings()
    cls._tinyonn_installed = True
    setattr(PretrainedConfig, WEIGHTS, _WeightsFile())
