"""Gates on attention heads. Each multiplies its head's part of the input of the output projection.

    x[b, t, h·D + d]  <-  gate[l, h] · x[b, t, h·D + d],    x the input of layer l's output projection

L layers with attention, H heads, D head dim. A gate of 1 leaves the output bit-identical, a gate of 0 removes the head. (transformers 5
ignores `head_mask` and has no `prune_heads`. Hooks on the output projection work for all architectures that `attention_layers` knows.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._io.records import short
from ...errors import InputError, listed
from .layers import AttentionLayer, attention_layers, on_head_outputs, uncompiled

Batch = Mapping[str, Tensor]


def heads_shape(layers: Sequence[AttentionLayer]) -> tuple[int, int]:
    """(L, H) of a model with the same number of heads in each layer.

    Raises:
        InputError: the numbers differ; the message names the first such layer.
    """
    heads = layers[0].num_heads
    for layer in layers:
        if layer.num_heads != heads:
            raise InputError(f"model must have {heads} heads in each layer as in {layers[0].name}, got {layer.num_heads} in {layer.name}.")
    return len(layers), heads


@contextmanager
def head_gates(model: nn.Module, gates: Tensor | None = None) -> Iterator[Tensor]:
    """Applies gates to the heads in every forward pass of the model within the context. Differentiable in the gates.

    Compiled models run uncompiled within the context, because compiled code ignores the gates.

    Args:
        model: transformers model.
        gates: (L, H), or (B, L, H) for gates of each sample; None for ones. In-place changes take effect in the next pass.

    Yields:
        The gates.

    Raises:
        InputError: the model's heads are not known, or it is a wrapper of torch.compile.
        ValueError: the gates have another shape.
    """
    layers = attention_layers(model)
    shape = heads_shape(layers)
    if gates is None:
        gates = torch.ones(shape, device=next(model.parameters()).device)
    if gates.dim() not in (2, 3) or tuple(gates.shape[-2:]) != shape:
        raise ValueError(f"gates must have shape {shape} or (B, {shape[0]}, {shape[1]}), got {tuple(gates.shape)}.")

    def gated(layer: AttentionLayer, x: Tensor) -> Tensor:
        gate = gates.select(-2, layer.index).unsqueeze(-2).repeat_interleave(layer.head_dim, -1)  # (1, H·D) or (B, 1, H·D)
        return x * gate.to(x.dtype)

    with uncompiled(model), on_head_outputs(layers, gated):
        yield gates


def check_gates(model: nn.Module, batch: Batch) -> list[float]:
    """Checks for each layer that closed gates change the logits of the model.

    Args:
        model: sequence classifier, in eval mode.
        batch: inputs of the model; labels are not needed.

    Returns:
        Largest change of a logit for each layer when all of its heads are off: L positive numbers.

    Raises:
        InputError: the gates of a layer have no effect, so that measurements of its heads would be meaningless.
    """
    layers = attention_layers(model)
    changes = []
    with torch.no_grad(), head_gates(model) as gates:
        expected = class_logits(model, batch)
        for layer in layers:
            gates[layer.index] = 0
            change = float((class_logits(model, batch) - expected).abs().max())
            gates[layer.index] = 1
            if change == 0:
                raise InputError(f"the model's output does not change when all heads of layer {layer.index} ({layer.name}) are off.")
            changes.append(change)
    return changes


def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a sequence classifier.

    Args:
        model: sequence classifier in eval mode, without the noise of dropout.
        batch: inputs by name; "labels" and None values are ignored.

    Returns:
        (B, C) logits.

    Raises:
        ValueError: the model or a part of it is in training mode, or its logits do not have the shape of a sequence classifier's.
    """
    if model.training:
        raise ValueError("model must be in eval mode, got training mode.")
    if training := next((name for name, module in model.named_modules() if module.training), None):
        raise ValueError(f"model must be in eval mode, got {training} in training mode.")
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels" and tensor is not None}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    logits: Tensor = model(**inputs).logits
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"model must return logits of shape (B, classes), got {tuple(logits.shape)}.")
    return logits


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each sample in nats: (B,), float32 or wider.

    Args:
        logits: (B, C).
        labels: (B,) int64, class numbers.

    Raises:
        InputError: labels have another shape or type, or are not class numbers of the model (-100 is not either).
    """
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise InputError(f"labels must be {len(logits)} integers, one a sample, got {labels.dtype} of shape {tuple(labels.shape)}.")
    if (wrong := labels[(labels < 0) | (labels >= logits.shape[1])]).numel():
        raise InputError(f"labels must lie between 0 and {logits.shape[1] - 1}, got {wrong[0].item()}.")
    return functional.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels, reduction="none")


def labelled(batches: Iterable[Mapping[str, Tensor | None]], on_samples: Callable[[int], object] | None) -> Iterator[dict[str, Tensor]]:
    """Batches without their None values. Calls `on_samples` after each with the number of samples done.

    Raises:
        InputError: there are no batches, one is not a mapping (a batch was passed instead of a list), or has no labels or no samples.
    """
    samples = 0
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise InputError(f"batches must hold mappings of the model's inputs, got {short(batch)}; one batch alone is a list of one.")
        found = {name: tensor for name, tensor in batch.items() if tensor is not None}
        if "labels" not in found:
            raise InputError(f'each batch must hold "labels", got {listed(found, none="nothing")}.')
        if not found["labels"].numel():
            raise InputError("each batch must hold at least one sample, got none.")
        yield found
        samples += len(found["labels"])
        if on_samples is not None:
            on_samples(samples)
    if samples == 0:
        raise InputError("batches must hold at least one sample, got none.")


def one_sample(batch: Batch, row: int) -> dict[str, Tensor]:
    """One sample of a batch, as a batch. Values that all samples share, such as positions of one row, are kept."""
    size = len(batch["labels"])
    return {name: tensor[row : row + 1] if tensor.dim() and len(tensor) == size else tensor for name, tensor in batch.items()}
