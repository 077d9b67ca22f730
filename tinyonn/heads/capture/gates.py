"""Gates on attention heads: each multiplies its head's part of what the output projection takes in.

    x[b, t, h·D + d]  <-  gate[l, h] · x[b, t, h·D + d],    x the input of layer l's output projection

L layers with attention, H heads, D head dim. A gate of 1 changes no bit, a gate of 0 takes the head out. (transformers 5 ignores
`head_mask` and has no `prune_heads`; hooks on the output projection reach every architecture that `attention_layers` knows.)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._io.records import short
from ...errors import InputError, listed
from .layers import AttentionLayer, attention_layers, uncompiled


def heads_shape(layers: Sequence[AttentionLayer]) -> tuple[int, int]:
    """(L, H) of a model whose layers have as many heads each.

    Raises:
        InputError: they differ; the line names the first layer that does.
    """
    heads = layers[0].num_heads
    for layer in layers:
        if layer.num_heads != heads:
            raise InputError(f"model must have {heads} heads in each layer as in {layers[0].name}, got {layer.num_heads} in {layer.name}.")
    return len(layers), heads


@contextmanager
def head_gates(model: nn.Module, gates: Tensor | None = None) -> Iterator[Tensor]:
    """Within the context every forward pass of the model has gates on its heads. Differentiable in the gates.

    Compiled models run uncompiled within the context, since compiled code does not see the gates.

    Args:
        model: a transformers model.
        gates: (L, H), or (B, L, H) for gates of each sample; None for ones. They are read at every pass, so they may be changed
            between passes in place.

    Yields:
        The gates.

    Raises:
        InputError: the model's heads are not known, or it is given as torch.compile wraps it.
        ValueError: gates of another shape.
    """
    layers = attention_layers(model)
    shape = heads_shape(layers)
    if gates is None:
        gates = torch.ones(shape, device=next(model.parameters()).device)
    if gates.dim() not in (2, 3) or tuple(gates.shape[-2:]) != shape:
        raise ValueError(f"gates must have shape {shape} or (B, {shape[0]}, {shape[1]}), got {tuple(gates.shape)}.")
    with uncompiled(model), ExitStack() as stack:
        for layer in layers:
            handle = layer.output.module.register_forward_pre_hook(_gate_hook(layer, gates))
            stack.callback(handle.remove)
        yield gates


def _gate_hook(layer: AttentionLayer, gates: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        x, *rest = args
        gate = gates.select(-2, layer.index).unsqueeze(-2).repeat_interleave(layer.head_dim, -1)  # (1, H·D) or (B, 1, H·D)
        return (x * gate.to(x.dtype), *rest)

    return hook


def check_gates(model: nn.Module, batch: Mapping[str, Tensor]) -> list[float]:
    """Proves, layer by layer, that closed gates change what the model answers.

    Args:
        model: a classifier of sequences, in eval mode.
        batch: its inputs; labels are not needed.

    Returns:
        Largest change of a logit per layer, with all of its heads off: L positive numbers.

    Raises:
        InputError: the gates of a layer change nothing, so that measuring its heads would mean nothing.
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
                raise InputError(
                    f"a closed gate must change the model's output, got the same with all heads of layer {layer.index} ({layer.name}) off."
                )
            changes.append(change)
    return changes


def class_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a classifier of sequences answers.

    Args:
        model: in eval mode, so that dropout does not decide what a head is worth.
        batch: inputs by name; "labels" and what is None are left out.

    Returns:
        (B, C) logits.

    Raises:
        ValueError: the model or a part of it is in training mode, or its logits are of another shape: no classifier of sequences.
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
        raise ValueError(f"model must give logits of shape (B, classes), got {tuple(logits.shape)}.")
    return logits


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) cross entropy of each sample in nats, float32 or wider.

    Args:
        logits: (B, C).
        labels: (B,) int64, classes.

    Raises:
        InputError: labels of another shape or type, or that are no class of the model's: -100 too.
    """
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise InputError(f"labels must be {len(logits)} integers, one a sample, got {labels.dtype} of shape {tuple(labels.shape)}.")
    if (wrong := labels[(labels < 0) | (labels >= logits.shape[1])]).numel():
        raise InputError(f"labels must lie between 0 and {logits.shape[1] - 1}, got {wrong[0].item()}.")
    return functional.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels, reduction="none")


def labelled(batch: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """A batch without what is None.

    Raises:
        InputError: it is no mapping (one batch given in place of a list of them), has no labels, or no sample.
    """
    if not isinstance(batch, Mapping):
        raise InputError(f"batches must hold mappings of the model's inputs, got {short(batch)}; one batch alone is a list of one.")
    found = {name: tensor for name, tensor in batch.items() if tensor is not None}
    if "labels" not in found:
        raise InputError(f'each batch must hold "labels", got {listed(found, none="nothing")}.')
    if not found["labels"].numel():
        raise InputError("each batch must hold at least one sample, got none.")
    return found


def one_sample(batch: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of a batch, as a batch; what all samples share, as positions of one row, stays."""
    size = len(batch["labels"])
    return {name: tensor[row : row + 1] if tensor.dim() and len(tensor) == size else tensor for name, tensor in batch.items()}
