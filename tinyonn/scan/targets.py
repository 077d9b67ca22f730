"""Which weights a scan records, and in which columns of its planes.

A target is an `nn.Linear`, a transformers `Conv1D` (GPT-2), or a 3-D expert parameter that transformers' experts interface
multiplies. Each is cut into feature blocks of 64 output features; an expert parameter is one weight per expert. Columns are
grouped by decoder layer, in the order the model names them, with the output head last.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, reason, shown
from ..hf.interfaces import uses_experts_interface
from ..mscan.layout import LayoutEntry, group_name

BLOCK_SIZE = 64
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """One parameter: `experts` weights of `out_features` each, whose blocks are columns base … base + experts * blocks.

    A module's weight has experts = 1. `weight` is the parameter's attribute name in `module`.
    """

    module_name: str
    module: nn.Module
    weight: str
    out_features: int
    experts: int
    base: int

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.weight}" if self.module_name else self.weight

    @property
    def blocks(self) -> int:
        """Blocks of one weight."""
        return -(-self.out_features // BLOCK_SIZE)

    @property
    def end(self) -> int:
        return self.base + self.experts * self.blocks

    @property
    def is_experts(self) -> bool:
        return not isinstance(self.module, (nn.Linear, Conv1D))


def find_targets(model: PreTrainedModel, targets: str = "all") -> list[Target]:
    """The targets of a model that a specification names, in column order.

    Args:
        model: a causal language model.
        targets: "all", or comma-separated patterns, each one of
            "attention" (every target inside a module named for attention), "mlp" (every other target inside a decoder
            layer, experts included), a glob matched against the module's dotted name or any ending of it ("q_proj",
            "layers.0.*", "self_attn.[qk]_proj"), or "re:…", a regular expression searched for in that name. The name of
            an expert parameter is its own ("model.layers.0.mlp.experts.gate_up_proj").

    Returns:
        At least one Target.

    Raises:
        InputError: a pattern matches nothing (the message lists what is there), or a chosen module keeps expert weights
            that transformers' experts interface does not multiply.
    """
    found = sorted(_all_targets(model), key=_layer_order(model))
    selected = [target for target in found if targets == "all"] or _select(found, targets)
    placed, base = [], 0
    for target in selected:
        _refuse_unreachable(target)
        placed.append(Target(target.module_name, target.module, target.weight, target.out_features, target.experts, base))
        base = placed[-1].end
    return placed


def layout_of(targets: Iterable[Target]) -> list[LayoutEntry]:
    """One entry per weight, an expert parameter's experts one by one."""
    layout = []
    for target in targets:
        for expert in range(target.experts):
            name = f"{target.name}.{expert}" if target.is_experts else target.name
            layout.append(LayoutEntry(name, target.out_features, target.blocks, target.base + expert * target.blocks))
    return layout


def _all_targets(model: PreTrainedModel) -> list[Target]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found.append(Target(name, module, "weight", module.out_features, 1, 0))
        elif isinstance(module, Conv1D):
            found.append(Target(name, module, "weight", module.nf, 1, 0))
        elif not type(module).__module__.startswith("torch.nn."):
            for weight, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and (min(parameter.shape) > 1 or uses_experts_interface(module)):
                    out_features = parameter.shape[2 if getattr(module, "is_transposed", False) else 1]
                    found.append(Target(name, module, weight, out_features, parameter.shape[0], 0))
    if not found:
        raise InputError(f"model must have linear layers to scan, got {type(model).__name__} without any.")
    return found


def _layer_order(model: PreTrainedModel) -> Callable[[Target], tuple[bool, int]]:
    """A sort key: by layer in order of first appearance, weights outside every layer in their place, the output head last."""
    head = model.get_output_embeddings()
    first: dict[str, int] = {}

    def key(target: Target) -> tuple[bool, int]:
        return target.module is head, first.setdefault(group_name(target.name), len(first))

    return key


def _select(found: list[Target], targets: str) -> list[Target]:
    patterns = [pattern.strip() for pattern in targets.split(",") if pattern.strip()]
    if not patterns:
        raise InputError(f"targets must be 'all' or comma-separated patterns, got {targets!r}.")
    chosen: set[int] = set()
    for pattern in patterns:
        hits = [index for index, target in enumerate(found) if _matches(pattern, target)]
        if not hits:
            there = ", ".join(dict.fromkeys(_label(target).rsplit(".", 1)[-1] for target in found))
            raise InputError(f"targets must match a module, got {pattern!r}; there are {there}, and the words attention and mlp.")
        chosen.update(hits)
    return [found[index] for index in sorted(chosen)]


def _matches(pattern: str, target: Target) -> bool:
    name = _label(target)
    if pattern in ("attention", "mlp"):
        inside = name.rsplit(".", 1)[0] if "." in name else ""
        is_attention = ATTENTION.search(inside) is not None
        return is_attention if pattern == "attention" else any(part.isdigit() for part in name.split(".")) and not is_attention
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise InputError(
                f"targets must be a valid regular expression after 're:', got {shown(pattern[3:])}: {reason(error, 80)}."
            ) from error
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _label(target: Target) -> str:
    return target.name if target.is_experts else target.module_name


def _refuse_unreachable(target: Target) -> None:
    if target.is_experts and not (uses_experts_interface(target.module) and target.weight in ("gate_up_proj", "up_proj", "down_proj")):
        raise InputError(
            f"targets must leave out {target.name}: {type(target.module).__name__} multiplies this 3-D parameter itself, "
            "not through transformers' experts interface, so its products cannot be recorded."
        )
