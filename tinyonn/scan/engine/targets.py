"""The weights that a scan records, and their columns in its planes.

A target is an `nn.Linear`, a transformers `Conv1D` (GPT-2), or a 3-D expert parameter that transformers' experts interface
multiplies. Each is cut into feature blocks of 64 output features; an expert parameter is one weight per expert. Columns are
grouped by decoder layer, in the order the model names them, with the output head last.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import InputError, reason, shown
from ...hf.interfaces import uses_experts_interface
from ...mscan.layout import LayoutEntry, group_name

BLOCK_SIZE = 64
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# Patterns that choose by kind. A weight that such a word matches and a scan cannot measure is left out; a name that matches it is an error.
WORDS = ("all", "attention", "mlp")


@dataclass(frozen=True)
class Target:
    """One parameter: `experts` weights of `out_features` each, whose blocks are columns base … base + experts * blocks.

    A module's weight has experts = 1. `weight` is the parameter's attribute name in `module`. `named` is True if a pattern
    other than a word chose it.
    """

    module_name: str
    module: nn.Module
    weight: str
    out_features: int
    experts: int
    base: int
    named: bool = False

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


@dataclass(frozen=True)
class Selection:
    """The targets of a scan, and the requested weights that it cannot record.

    Attributes:
        targets: at least one, in column order.
        left_out: name of a weight -> reason why it is not measured.
    """

    targets: list[Target]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def without(self, faults: Mapping[str, str]) -> Selection:
        """The selection without the targets in `faults` (name -> reason), with consecutive columns.

        Raises:
            InputError: a pattern names one of them, or no target is left.
        """
        kept: list[Target] = []
        base = 0
        for target in self.targets:
            if target.name not in faults:
                kept.append(replace(target, base=base))
                base = kept[-1].end
            elif target.named:
                raise InputError(f"targets must leave out {target.name}: {faults[target.name]}.")
        if not kept:
            name, why = next(iter(faults.items()))
            raise InputError(f"none of the {len(faults)} weights in targets can be measured: {name}: {why}.")
        return Selection(kept, {**self.left_out, **faults})


def find_targets(model: PreTrainedModel, targets: str = "all") -> Selection:
    """The targets of a model that a specification chooses, in column order.

    Args:
        model: causal language model.
        targets: comma-separated patterns. A target is chosen if some pattern matches it and no pattern with `!` does. With `!`
            patterns alone, all other targets are chosen. A pattern is one of
            "all", "attention" (every target inside a module named for attention), "mlp" (every other target inside a decoder
            layer, experts included), a glob matched against the module's dotted name or any ending of it ("q_proj",
            "layers.0.*", "self_attn.[qk]_proj", with or without ".weight"), or "re:…", a regular expression searched for in that
            name. Commas inside brackets of any kind, or behind a backslash, belong to the pattern. The name of an expert parameter
            is its own ("model.layers.0.mlp.experts.gate_up_proj").

    Returns:
        The selection. Expert weights that transformers' experts interface does not multiply are left out if a word chose them.
        With "all", `left_out` also has the matrices that are not targets, except embeddings.

    Raises:
        InputError: a pattern matches nothing (the message lists the names), nothing is left, or a pattern other than a word
            chooses expert weights that transformers' experts interface does not multiply.
    """
    found = sorted(_all_targets(model), key=_layer_order(model))
    selected = _select(found, targets)
    patterns = split_patterns(targets)
    others = _other_matrices(model, found) if "all" in patterns or all(pattern.startswith("!") for pattern in patterns) else {}
    return Selection(selected, others).without({target.name: why for target in selected if (why := _unreachable(target))})


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


def _other_matrices(model: PreTrainedModel, found: list[Target]) -> dict[str, str]:
    """Matrices without a target, with the reason: routers that are bare parameters, and convolutions. Embeddings are look-ups."""
    covered = {id(parameter) for target in found for parameter in target.module.parameters(recurse=False)}
    others = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            matrix = parameter.dim() >= 2 and sum(size > 1 for size in parameter.shape) >= 2 and "bias" not in own
            if matrix and id(parameter) not in covered and not isinstance(module, nn.Embedding):
                others[f"{name}.{own}" if name else own] = f"{type(module).__name__} uses this parameter itself, not through a linear layer"
    return others


def _layer_order(model: PreTrainedModel) -> Callable[[Target], tuple[bool, int]]:
    """Sort key: layers in order of first appearance, weights outside layers in their place, the output head last."""
    head = model.get_output_embeddings()
    first: dict[str, int] = {}

    def key(target: Target) -> tuple[bool, int]:
        return target.module is head, first.setdefault(group_name(target.name), len(first))

    return key


def _select(found: list[Target], targets: str) -> list[Target]:
    patterns = split_patterns(targets)
    if not patterns:
        raise InputError(f"targets must be 'all' or comma-separated patterns, got {targets!r}.")
    excluded: set[int] = set()
    chosen: dict[int, bool] = {}  # index -> whether a name chose it
    for pattern in patterns:
        wanted = pattern.removeprefix("!").strip()
        hits = [index for index, target in enumerate(found) if _matches(wanted, target)]
        if not hits and wanted != "all":
            there = ", ".join(dict.fromkeys(_label(target).rsplit(".", 1)[-1] for target in found))
            raise InputError(f"targets must match a module, got {shown(pattern)}; there are {there}, and the words {', '.join(WORDS)}.")
        if pattern.startswith("!"):
            excluded.update(hits)
        else:
            chosen.update({index: chosen.get(index, False) or wanted not in WORDS for index in hits})
    if all(pattern.startswith("!") for pattern in patterns):
        chosen = dict.fromkeys(range(len(found)), False)
    kept = [replace(found[index], named=named) for index, named in sorted(chosen.items()) if index not in excluded]
    if not kept:
        raise InputError(f"targets must include at least one weight, got {targets!r}, which excludes all.")
    return kept


def split_patterns(targets: str) -> list[str]:
    """Patterns of a comma-separated list. Commas inside brackets or after a backslash do not separate."""
    patterns, depth, in_class, start, index = [], 0, False, 0, 0
    while index < len(targets):
        character = targets[index]
        if character == "\\":
            index += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
            index += targets[index + 1 : index + 2] in ("^", "!")  # what negates a set
            index += targets[index + 1 : index + 2] == "]"  # stands for itself where it is a set's first character
        elif character in "({":
            depth += 1
        elif character in ")}":
            depth = max(0, depth - 1)
        elif character == "," and not depth:
            patterns.append(targets[start:index])
            start = index + 1
        index += 1
    patterns.append(targets[start:])
    return [pattern.strip() for pattern in patterns if pattern.strip()]


def _matches(pattern: str, target: Target) -> bool:
    name = _label(target)
    if pattern == "all":
        return True
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
    # A weight's own name, as layouts and messages have it, names its module.
    spellings = {pattern, pattern.removesuffix(".weight")}
    return any(fnmatch.fnmatchcase(name, form) or fnmatch.fnmatchcase(name, f"*.{form}") for form in spellings)


def _label(target: Target) -> str:
    return target.name if target.is_experts else target.module_name


def _unreachable(target: Target) -> str:
    """Reason why no hook reaches a target's products; empty if one does."""
    if not target.is_experts or (uses_experts_interface(target.module) and target.weight in ("gate_up_proj", "up_proj", "down_proj")):
        return ""
    return f"{type(target.module).__name__} multiplies this 3-D parameter itself, outside the experts interface"
