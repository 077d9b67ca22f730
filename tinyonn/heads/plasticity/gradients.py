"""How strongly the loss pulls at each head's weights.

    gradient_norm[l, h] = ‖ mean over samples of g_n ‖        g_n the gradient of sample n's loss in the head's q, k, v and o weights
    fisher[l, h]        = mean over samples of ‖ g_n ‖²       the diagonal of the empirical Fisher information, summed over these weights

One backward pass a batch. A linear layer's gradient for sample n is Δ_n^T X_n, with X (B, T, in) what it took in and Δ (B, T, out) the
gradient of what it gave out; it is formed for one layer and one sample at a time. Where a model calls a projection on something that
the samples of a batch share (DeBERTa-v2 with `share_att_key` projects its relative positions so), Δ holds the samples' sum, and where its
tokens come before its samples (Longformer), rows of Δ are no samples: then samples are passed one at a time. The first sample is checked:
its loss must pull at no row of Δ but its own, and Δ^T X must be the gradient that autograd gives each weight.

A key/value head that several query heads share counts whole for each of them. Biases do not count. Gradients are added up over samples
in float32 (in float64 the sums would take twice the attention weights' memory), their squares in float64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers.pytorch_utils import Conv1D

from ...errors import InputError
from ..capture.gates import class_logits, heads_shape, labelled, one_sample, sample_losses
from ..capture.layers import AttentionLayer, Projection, attention_layers, uncompiled

Batch = Mapping[str, Tensor]

# Δ^T X and autograd's gradient are the same within this share of its norm, and this share of ‖Δ‖‖X‖, whose terms may cancel out.
SAME_GRADIENT, SAME_TERMS = 0.1, 1e-3


class HeadGradients(NamedTuple):
    """Gradients of each head's weights.

    Attributes:
        gradient_norm: (L, H) float64, nats per unit of weight: norm of the mean loss's gradient.
        fisher: (L, H) float64, its square: mean over samples of the squared norm of each sample's gradient.
        samples: counted.
    """

    gradient_norm: Tensor
    fisher: Tensor
    samples: int


def head_gradients(model: nn.Module, batches: Iterable[Batch], *, on_samples: Callable[[int], object] | None = None) -> HeadGradients:
    """Gradient norm and empirical Fisher information of every head.

    Args:
        model: a classifier of sequences, in eval mode. Its parameters' `grad` stay as they are.
        batches: inputs of the model and "labels" (B,), on its device.
        on_samples: called after each batch with the number of samples done.

    Raises:
        InputError: no samples, labels that are no classes, a loss or gradient that is not finite, a model whose heads are not known, or one
            that uses a projection's weight in another way than by calling it.
    """
    layers = attention_layers(model)
    heads_shape(layers)
    sums = _Sums(layers)
    one_by_one, samples = False, 0
    for batch in map(labelled, batches):
        size = len(batch["labels"])
        if not one_by_one:
            one_by_one = not sums.add(model, batch)
        if one_by_one:
            for row in range(size):
                sums.add(model, one_sample(batch, row))
        samples += size
        if on_samples is not None:
            on_samples(samples)
    if samples == 0:
        raise InputError("batches must hold at least one sample, got none.")
    return HeadGradients(sums.mean_norm(samples), sums.fisher / samples, samples)


class _Call(NamedTuple):
    """A call of a projection: what it took in, and the place of what it gave out in autograd's graph, before any change in place."""

    module: nn.Module
    inputs: Tensor
    output: GradientEdge


class _Sums:
    """Sums over samples: of the gradients, and per head of their squares."""

    def __init__(self, layers: list[AttentionLayer]) -> None:
        self.layers = layers
        self.fisher = torch.zeros(heads_shape(layers), dtype=torch.float64)
        self.gradients: dict[nn.Module, Tensor] = {}
        self.checked = 0  # 1 after a sample alone, 2 after a batch of several
        self.parts: dict[nn.Module, list[tuple[int, Projection]]] = defaultdict(list)  # a fused weight has three
        for layer in layers:
            for projection in (layer.query, layer.key, layer.value, layer.output):
                self.parts[projection.module].append((layer.index, projection))

    def add(self, model: nn.Module, batch: Batch) -> bool:
        """Counts a batch; False, and nothing counted, where its samples cannot be told apart."""
        calls: list[_Call] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            calls.append(_Call(module, args[0].detach(), get_gradient_edge(output.requires_grad_())))
            return output.clone()  # which the model may change in place: Longformer does so with its queries

        labels = batch["labels"]
        with torch.enable_grad(), uncompiled(model), ExitStack() as stack:
            for module in self.parts:
                stack.callback(module.register_forward_hook(keep).remove)
            losses = sample_losses(class_logits(model, batch), labels)
            total, first = losses.sum(), losses[0]
        if len(labels) > 1 and any(call.inputs.dim() != 3 or len(call.inputs) != len(labels) for call in calls):
            return False
        if not losses.isfinite().all():
            raise InputError(f"loss of the evaluation samples must be finite, got {total.item()}.")
        kind = min(len(labels), 2)
        if kind > self.checked:
            if not self._first_sample_is_right(calls, first, len(labels)):
                return False
            self.checked = kind
        grads = torch.autograd.grad(total, [call.output for call in calls], allow_unused=True)
        for module, (inputs, grad) in _by_module(calls, grads, len(labels)).items():
            for x, delta in zip(inputs, grad, strict=True):
                self._count(module, delta.T @ x)
        return True

    def _first_sample_is_right(self, calls: list[_Call], loss: Tensor, samples: int) -> bool:
        """Whether the first sample's loss pulls at the first row alone.

        Raises:
            InputError: a projection was not called, or autograd's gradient of its weight is another.
        """
        edges, modules = [call.output for call in calls], list(self.parts)
        called = {call.module for call in calls}
        for module in modules:
            if module not in called:
                name = self.parts[module][0][1].name.removesuffix(".weight")
                raise InputError(f"model must call {name} for the gradient of its weight, got no call.")
        weights = {module: dict(module.named_parameters()).get("weight") for module in modules}
        trained = {module: weight for module, weight in weights.items() if weight is not None and weight.requires_grad}
        places: list[Any] = [*edges, *trained.values()]
        grads = torch.autograd.grad(loss, places, allow_unused=True, retain_graph=True)
        if any(grad is not None and samples > 1 and grad[1:].any() for grad in grads[: len(edges)]):
            return False
        ours = _by_module(calls, grads[: len(edges)], samples)
        for module, theirs in zip(trained, grads[len(edges) :], strict=True):
            if theirs is None:  # nothing of the loss comes through it
                continue
            expected = (theirs.T if isinstance(module, Conv1D) else theirs).to(loss.dtype)
            found, terms = torch.zeros_like(expected), torch.zeros(())
            if module in ours:
                x, delta = (tensor[0] for tensor in ours[module])
                found, terms = delta.T @ x, delta.norm() * x.norm()
            least = torch.finfo(theirs.dtype).smallest_normal * theirs.numel() ** 0.5
            if (found - expected).norm() > SAME_GRADIENT * expected.norm() + SAME_TERMS * terms + least:
                name = self.parts[module][0][1].name
                raise InputError(f"gradient of {name} must come from what its module takes in and gives out, got another by autograd.")
        return True

    def _count(self, module: nn.Module, gradient: Tensor) -> None:
        """One sample's gradient of a weight, (out_features, in_features)."""
        total = self.gradients.get(module)
        self.gradients[module] = gradient if total is None else total.add_(gradient)
        for index, squares in self._squares(module, gradient):
            self.fisher[index] += squares

    def _squares(self, module: nn.Module, gradient: Tensor) -> Iterable[tuple[int, Tensor]]:
        """For each part of a weight its layer and (H,) sums of squares per head."""
        square = gradient.square()
        for index, part in self.parts[module]:
            per_feature = square.sum(0 if part.columns else 1, dtype=torch.float64)
            starts = part.first + part.step * torch.arange(part.heads)
            per_head = per_feature.cpu()[starts[:, None] + torch.arange(part.head_dim)].sum(1)
            yield index, per_head.repeat_interleave(self.layers[index].num_heads // part.heads)

    def mean_norm(self, samples: int) -> Tensor:
        squares = torch.zeros_like(self.fisher)
        for module, total in self.gradients.items():
            for index, its in self._squares(module, total / samples):
                squares[index] += its
        wrong = (~squares.isfinite()).nonzero().tolist()
        if wrong:
            layer, head = wrong[0]
            raise InputError(f"gradients must be finite, got {squares[layer, head].item()} in head {head} of layer {layer}.")
        return squares.sqrt()


def _by_sample(tensor: Tensor, samples: int) -> Tensor:
    """(B, T, F) in float32 or wider; all tokens of a single sample, whatever their shape."""
    tensor = tensor.float() if tensor.dtype.itemsize < 4 else tensor
    return tensor.reshape(samples, -1, tensor.shape[-1])


def _by_module(calls: list[_Call], grads: Iterable[Tensor | None], samples: int) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """What each projection took in, and the gradient of what it gave out, (B, T, F) each; its calls one after another."""
    taken: dict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for call, grad in zip(calls, grads, strict=True):
        if grad is not None:
            taken[call.module].append((_by_sample(call.inputs, samples), _by_sample(grad, samples)))
    found = {}
    for module, pairs in taken.items():
        inputs, outputs = zip(*pairs, strict=True)
        found[module] = torch.cat(inputs, 1), torch.cat(outputs, 1)
    return found
