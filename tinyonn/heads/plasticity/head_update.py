"""Change of each head's weights in training.

    Up[l, h]   = ‖ W1 − W0 ‖  over the head's slice,  p in q, k, v (rows) and o (columns)
    U[l, h]    = sqrt(Uq² + Uk² + Uv² + Uo²)
    Urel[l, h] = U / (‖Wq0‖ + ‖Wk0‖ + ‖Wv0‖ + ‖Wo0‖)

W0 before, W1 after training; Frobenius norms in float64. A key/value head that several query heads share counts fully for each of
them. Biases are ignored. Checkpoints are read tensor by tensor; no model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import InputError, listed, reason
from ...hf.loading import load_config, weight_files
from ..capture.gates import heads_shape
from ..capture.layers import AttentionLayer, Projection, attention_layers


class HeadUpdate(NamedTuple):
    """Change of each head's weights: (L, H) float64 each, in units of the weights (`relative` without unit)."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    total: Tensor
    relative: Tensor


def head_update(layers: Sequence[AttentionLayer], before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> HeadUpdate:
    """Change of every head between two sets of weights.

    Args:
        layers: result of `attention_layers`; only names and sizes are read.
        before, after: name -> weight, as state dicts or `Checkpoint`s.

    Raises:
        InputError: a weight is missing, has another shape or values that are not finite, or all weights of a head were zero.
    """
    moved, norms = torch.zeros(2, 4, *heads_shape(layers), dtype=torch.float64)
    for layer in layers:
        weights: dict[str, tuple[Tensor, Tensor]] = {}  # so that a fused weight is read once
        for number, part in enumerate((layer.query, layer.key, layer.value, layer.output)):
            if part.name not in weights:
                weights[part.name] = _pair(part, before, after)
            old, new = weights[part.name]
            shared = layer.num_heads // part.heads
            norms[number, layer.index] = _head_norms(part, old).repeat_interleave(shared)
            moved[number, layer.index] = _head_norms(part, new - old).repeat_interleave(shared)
    scale = norms.sum(0)
    if zero := (scale == 0).nonzero().tolist():
        index, head = zero[0]
        raise InputError(
            f"all weights of head {head} in {layers[index].name} were 0 before training, so that its relative change is undefined."
        )
    total = moved.square().sum(0).sqrt()
    return HeadUpdate(moved[0], moved[1], moved[2], moved[3], total, total / scale)


def checkpoint_update(before: str | os.PathLike[str], after: str | os.PathLike[str]) -> HeadUpdate:
    """Change of every head between two checkpoints of a sequence classifier.

    Args:
        before, after: folders with config.json and safetensors.

    Raises:
        InputError: they are not two checkpoints of one model; the message names the first difference.
    """
    old, new = Checkpoint(before), Checkpoint(after)
    layers = _layers(old.folder)
    for layer, other in zip(layers, _layers(new.folder), strict=False):
        found, wanted = (((one.query.name, one.num_heads, one.num_kv_heads, one.head_dim)) for one in (other, layer))
        if found != wanted:
            shown = [f"{name} of {heads} heads ({key_heads} for keys) of {dim} features" for name, heads, key_heads, dim in (wanted, found)]
            raise InputError(f"{new.folder} must hold the model of {old.folder.name}, whose {shown[0]}, got {shown[1]}.")
    for name in sorted({*old, *new}):
        if name not in new or name not in old:
            raise InputError(f"{new.folder} must hold the tensors of {old.folder.name}, got {name} in only one of them.")
        if old.shape(name) != new.shape(name):
            raise InputError(f"{name} must have shape {old.shape(name)} as in {old.folder.name}, got {new.shape(name)} in {new.folder}.")
    return head_update(layers, old, new)


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of the safetensors files in a folder, by name; each is read on access.

    Raises:
        InputError: the folder has no safetensors, or a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        files = weight_files(self.folder)
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise InputError(f"{self.folder} must hold weights in safetensors files, got {listed(file.name for file in files)}.")
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  # not a mapping, although it has keys
                        self._files[name] = file
                        self._shapes[name] = tuple(tensors.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} must be a whole safetensors file, got: {reason(error)}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:  # Mapping's own method would read the tensor
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _layers(folder: Path) -> list[AttentionLayer]:
    """Attention layers of a checkpoint, from its configuration alone."""
    from transformers import AutoModelForSequenceClassification

    config = load_config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise InputError(f"{folder} must hold a sequence classifier, got {config.model_type}.") from error
    return attention_layers(model)


def _pair(part: Projection, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A weight before and after training, in float64."""
    pair = []
    for weights, when in ((before, "before"), (after, "after")):
        if part.name not in weights:
            raise InputError(f"the weights {when} training lack {part.name}.")
        weight = weights[part.name]
        wanted = tuple(part.module.get_parameter("weight").shape)
        if tuple(weight.shape) != wanted:
            raise InputError(f"{part.name} must have shape {wanted} as in the model, got {tuple(weight.shape)} {when} training.")
        if not weight.is_floating_point() or not weight.isfinite().all():
            raise InputError(f"{part.name} has values {when} training that are not finite floating-point numbers.")
        pair.append(weight.detach().cpu().double())
    return pair[0], pair[1]


def _head_norms(part: Projection, weight: Tensor) -> Tensor:
    return torch.stack([part.head(weight, head).norm() for head in range(part.heads)])
