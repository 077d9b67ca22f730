"""Gradients of the loss with respect to each head's weights.

    gradient_norm[l, h] = ‖ mean over samples of g_n ‖        g_n the gradient of sample n's loss in the head's q, k, v and o weights
    fisher[l, h]        = mean over samples of ‖ g_n ‖²       the diagonal of the empirical Fisher information, summed over these weights

One backward pass per batch. A linear layer's gradient for sample n is Δ_n^T X_n, where X (B, T, in) is its input and Δ (B, T, out) the
gradient of its output. It is computed for one layer and one sample at a time. If a model applies a projection to values that the samples
of a batch share (DeBERTa-v2 with `share_att_key` projects relative positions so), Δ is the sum over samples; if the token dimension comes
before the sample dimension (Longformer), rows of Δ are not samples. In both cases, samples are passed one at a time. The first sample is
checked: its loss must have a gradient only in its own row of Δ, and Δ^T X must equal autograd's gradient of each weight.

A key/value head that several query heads share counts fully for each of them. Biases are ignored. Gradients are summed over samples in
float32 (float64 sums would need twice the memory of the attention weights), their squares in float64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers.pytorch_utils import Conv1D

from ...errors import InputError
from ..capture.gates import Batch, class_logits, heads_shape, labelled, one_sample, sample_losses
from ..capture.layers import AttentionLayer, Projection, attention_layers, uncompiled

# Tolerances of Δ^T X against autograd's gradient: this share of its norm, and this share of ‖Δ‖‖X‖, whose terms may cancel out.
SAME_GRADIENT, SAME_TERMS = 0.1, 1e-3


class HeadGradients(NamedTuple):
    """Gradient statistics of each head's weights.

    Attributes:
        gradient_norm: (L, H) float64, nats per unit of weight: norm of the mean loss's gradient.
        fisher: (L, H) float64, in the square of this unit: mean over samples of the squared norm of each sample's gradient.
        samples: number of samples.
    """

    gradient_norm: Tensor
    fisher: Tensor
    samples: int


def head_gradients(model: nn.Module, batches: Iterable[Batch], *, on_samples: Callable[[int], object] | None = None) -> HeadGradients:
    """Gradient norm and empirical Fisher information of every head.

    Args:
        model: sequence classifier, in eval mode. The `grad` of its parameters does not change.
        batches: inputs of the model and "labels" (B,), on its device.
        on_samples: function called after each batch with the number of samples done.

    Raises:
        InputError: there are no samples, labels are not classes, a loss or gradient is not finite, the model's heads are not known, or it
            uses the weight of a projection without calling the projection.
    """
    layers = attention_layers(model)
    heads_shape(layers)
    sums = _Sums(layers)
    one_by_one, samples = False, 0
    for batch in labelled(batches, on_samples):
        size = len(batch["labels"])
        if not one_by_one:
            one_by_one = not sums.add(model, batch)
        if one_by_one:
            for row in range(size):
                sums.add(model, one_sample(batch, row))
        samples += size
    return HeadGradients(sums.mean_norm(samples), sums.fisher / samples, samples)


class _Call(NamedTuple):
    """A call of a projection: its input, and the node of its output in autograd's graph before any in-place change."""

    module: nn.Module
    inputs: Tensor
    output: GradientEdge


class _Sums:
    """Sums over samples of the gradients and, per head, of their squares."""

    def __init__(self, layers: list[AttentionLayer]) -> None:
        self.layers = layers
        self.fisher = torch.zeros(heads_shape(layers), dtype=torch.float64)
        self.gradients: dict[nn.Module, Tensor] = {}
        self.checked = 0  # 1 after a single sample, 2 after a batch of several
        self.parts: dict[nn.Module, list[tuple[int, Projection]]] = defaultdict(list)  # a fused weight has three parts
        for layer in layers:
            for projection in (layer.query, layer.key, layer.value, layer.output):
                self.parts[projection.module].append((layer.index, projection))

    def add(self, model: nn.Module, batch: Batch) -> bool:
        """Adds a batch. Returns False, and adds nothing, if its samples cannot be separated."""
        calls: list[_Call] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            calls.append(_Call(module, args[0].detach(), get_gradient_edge(output.requires_grad_())))
            return output.clone()  # the model may change it in place, as Longformer does with its queries

        labels = batch["labels"]
        with torch.enable_grad(), uncompiled(model), ExitStack() as stack:
            for module in self.parts:
                stack.callback(module.register_forward_hook(keep).remove)
            losses = sample_losses(class_logits(model, batch), labels)
            total, first = losses.sum(), losses[0]
        if len(labels) > 1 and any(call.inputs.dim() != 3 or len(call.inputs) != len(labels) for call in calls):
            return False
        if not losses.isfinite().all():
            raise InputError(f"the loss of the evaluation samples is {total.item()}, which is not finite.")
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
        """Whether the first sample's loss has a gradient only in the first row; checks autograd's gradient of each weight."""
        edges, called = [call.output for call in calls], {call.module for call in calls}
        for module in self.parts:
            if module not in called:
                name = self.parts[module][0][1].name.removesuffix(".weight")
                raise InputError(f"model did not call {name}, whose gradient is needed.")
        weights = {module: dict(module.named_parameters()).get("weight") for module in self.parts}
        trained = {module: weight for module, weight in weights.items() if weight is not None and weight.requires_grad}
        places: list[Any] = [*edges, *trained.values()]
        grads = torch.autograd.grad(loss, places, allow_unused=True, retain_graph=True)
        if any(grad is not None and samples > 1 and grad[1:].any() for grad in grads[: len(edges)]):
            return False
        ours = _by_module(calls, grads[: len(edges)], samples)
        for module, theirs in zip(trained, grads[len(edges) :], strict=True):
            if theirs is None:  # the loss does not depend on it
                continue
            expected = (theirs.T if isinstance(module, Conv1D) else theirs).to(loss.dtype)
            found, terms = torch.zeros_like(expected), torch.zeros(())
            if module in ours:
                x, delta = (tensor[0] for tensor in ours[module])
                found, terms = delta.T @ x, delta.norm() * x.norm()
            least = torch.finfo(theirs.dtype).smallest_normal * theirs.numel() ** 0.5
            if (found - expected).norm() > SAME_GRADIENT * expected.norm() + SAME_TERMS * terms + least:
                name = self.parts[module][0][1].name
                raise InputError(f"gradient of {name} by autograd differs from the one computed from its module's input and output.")
        return True

    def _count(self, module: nn.Module, gradient: Tensor) -> None:
        """Gradient of a weight for one sample, (out_features, in_features)."""
        total = self.gradients.get(module)
        self.gradients[module] = gradient if total is None else total.add_(gradient)
        self._add_squares(self.fisher, module, gradient)

    def _add_squares(self, sums: Tensor, module: nn.Module, gradient: Tensor) -> None:
        """Adds a weight's sums of squares per head to `sums` (L, H)."""
        square = gradient.square()
        for index, part in self.parts[module]:
            per_feature = square.sum(0 if part.columns else 1, dtype=torch.float64)
            starts = part.first + part.step * torch.arange(part.heads)
            per_head = per_feature.cpu()[starts[:, None] + torch.arange(part.head_dim)].sum(1)
            sums[index] += per_head.repeat_interleave(self.layers[index].num_heads // part.heads)

    def mean_norm(self, samples: int) -> Tensor:
        squares = torch.zeros_like(self.fisher)
        for module, total in self.gradients.items():
            self._add_squares(squares, module, total / samples)
        wrong = (~squares.isfinite()).nonzero().tolist()
        if wrong:
            layer, head = wrong[0]
            raise InputError(f"the gradient of head {head} in layer {layer} is not finite (squared norm {squares[layer, head].item()}).")
        return squares.sqrt()


def _by_sample(tensor: Tensor, samples: int) -> Tensor:
    """(B, T, F) in float32 or wider; for a single sample, all tokens, whatever their shape."""
    tensor = tensor.float() if tensor.dtype.itemsize < 4 else tensor
    return tensor.reshape(samples, -1, tensor.shape[-1])


def _by_module(calls: list[_Call], grads: Iterable[Tensor | None], samples: int) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Input of each projection and gradient of its output, (B, T, F) each; several calls are concatenated."""
    taken: dict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for call, grad in zip(calls, grads, strict=True):
        if grad is not None:
            taken[call.module].append((_by_sample(call.inputs, samples), _by_sample(grad, samples)))
    return {module: (torch.cat([x for x, _ in pairs], 1), torch.cat([delta for _, delta in pairs], 1)) for module, pairs in taken.items()}
