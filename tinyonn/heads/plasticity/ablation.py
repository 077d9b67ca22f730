"""Importance of the heads of a classifier: the increase of its loss without a head.

    loss_increase[l, h] = mean over samples of (cross entropy without head h of layer l) − (with all heads)
    taylor[l, h]        = −mean over samples of dL/dgate[l, h]: its first-order estimate, from one backward pass

Exact ablation runs the model L · H times, but removing a head of layer l does not affect the layers before it. One full pass over a batch
therefore records the outputs of all layers. For a head in layer l, the layers before l return their recorded outputs, the attention of
layer l uses the recorded outputs of its other heads, and only the rest is computed: about half of the work. The model is not rewritten;
the modules' `forward` is replaced for the duration of a replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..capture.gates import Batch, class_logits, head_gates, heads_shape, labelled, one_sample, sample_losses
from ..capture.layers import AttentionLayer, attention_layers, on_head_outputs, uncompiled

# Tolerance of a replay against a full pass: this many roundings of the largest logit, or this share of the head's effect. A replay does
# the same operations in the same order, mostly bit-identical. A wrong one is off by 80 roundings in bfloat16, and more in wider types.
ROUNDING = 8
EFFECT = 1e-3


class HeadAblation(NamedTuple):
    """Importance of each head by ablation.

    Attributes:
        loss_increase: (L, H) float64, nats.
        accuracy_drop: (L, H) float64, share of samples; negative if the accuracy is higher without the head.
        base_loss, base_accuracy: loss and accuracy with all heads.
        samples: number of samples.
        replayed: whether replays were used; False if they were disabled or did not agree with full passes.
        replay_error: largest difference of a logit between replay and full pass on the first sample; None without replays (disabled, or
            the model replaces its attention modules while it runs, as BigBird does).
    """

    loss_increase: Tensor
    accuracy_drop: Tensor
    base_loss: float
    base_accuracy: float
    samples: int
    replayed: bool
    replay_error: float | None


class TaylorImportance(NamedTuple):
    """First-order importance of each head.

    Attributes:
        taylor: (L, H) float64, nats: −mean of dL/dgate, an estimate of the loss increase.
        taylor_abs: (L, H) float64, nats: mean over samples of |dL/dgate|, the importance of Michel et al. without their layer norm.

    Source: Michel, Levy, Neubig, "Are sixteen heads really better than one?", arXiv:1905.10650.
    """

    taylor: Tensor
    taylor_abs: Tensor


def ablate_heads(
    model: nn.Module, batches: Iterable[Batch], *, replay: bool = True, on_samples: Callable[[int], object] | None = None
) -> HeadAblation:
    """Exact loss increase and accuracy drop of every head.

    On the first sample, one head of each layer is both replayed and run in full. If the results differ by more than rounding, all passes
    are full. (In such a model, attention continues after its output projection, or layers pass each other more than their outputs.)

    Args:
        model: sequence classifier, in eval mode.
        batches: inputs of the model and "labels" (B,), on its device.
        replay: False to run all passes in full.
        on_samples: function called after each batch with the number of samples done.

    Raises:
        InputError: there are no samples, labels are not classes, a loss is not finite, or the model's heads are not known.

    Source: ablation of single heads by a gate: Michel, Levy, Neubig, "Are sixteen heads really better than one?", arXiv:1905.10650.
    """
    layers = attention_layers(model)
    shape = heads_shape(layers)
    losses, right = torch.zeros(2, *shape, dtype=torch.float64)
    base_loss, base_right, samples, error = 0.0, 0, 0, None
    with torch.no_grad(), uncompiled(model):
        for batch in labelled(batches, on_samples):
            labels = batch["labels"]
            if samples == 0 and replay:
                error, replay = _replay_error(model, layers, one_sample(batch, 0))
            with _recording(model, layers) if replay else nullcontext() as record:
                base = class_logits(model, batch)
            if record is not None and not record.holds(layers):
                record, replay = None, False
            loss = sample_losses(base, labels).double()
            _check_finite(loss.sum(), "with all heads on")
            base_loss += float(loss.sum())
            base_right += int((base.argmax(-1) == labels).sum())
            for layer in layers:
                for head in range(layer.num_heads):
                    if record is None:
                        logits = _full_pass(model, batch, shape, layer, head)
                    else:
                        logits = _replay(model, batch, record, layers, layer, head)
                    rise = (sample_losses(logits, labels).double() - loss).sum()
                    _check_finite(rise, f"with head {head} of layer {layer.index} off")
                    losses[layer.index, head] += rise.cpu()
                    right[layer.index, head] += (logits.argmax(-1) == labels).sum().cpu()
            samples += len(labels)
    return HeadAblation(losses / samples, (base_right - right) / samples, base_loss / samples, base_right / samples, samples, replay, error)


def taylor_importance(model: nn.Module, batches: Iterable[Batch], *, on_samples: Callable[[int], object] | None = None) -> TaylorImportance:
    """First-order importance of every head, from one backward pass per batch.

    Args:
        model, batches, on_samples: as for `ablate_heads`.

    Raises:
        InputError: there are no samples, labels are not classes, a loss is not finite, or the model's heads are not known.
    """
    shape = heads_shape(attention_layers(model))
    total, total_abs = torch.zeros(2, *shape, dtype=torch.float64)
    samples = 0
    for batch in labelled(batches, on_samples):
        labels = batch["labels"]
        gates = torch.ones(len(labels), *shape, device=labels.device, requires_grad=True)
        with torch.enable_grad(), head_gates(model, gates):
            loss = sample_losses(class_logits(model, batch), labels).sum()
            _check_finite(loss, "with all heads on")
            (grad,) = torch.autograd.grad(loss, gates)
        total += grad.double().sum(0).cpu()
        total_abs += grad.double().abs().sum(0).cpu()
        samples += len(labels)
    return TaylorImportance(-total / samples, total_abs / samples)


def _check_finite(loss: Tensor, when: str) -> None:
    value = loss.item()
    if not math.isfinite(value):
        raise InputError(f"the loss of the evaluation samples is {value} {when}, which is not finite.")


@dataclass(eq=False)
class _Record:
    """Record of one full pass.

    Attributes:
        outputs: output of each block.
        contexts: outputs of the heads of each attention module, (B, T, H · D), which are the input of its output projection.
        rests: values that the attention module returned after its first tensor; None if it returned a single tensor.
    """

    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    contexts: dict[nn.Module, Tensor] = field(default_factory=dict)
    rests: dict[nn.Module, tuple[Any, ...] | None] = field(default_factory=dict)

    def holds(self, layers: list[AttentionLayer]) -> bool:
        """Whether all attention modules ran; BigBird replaces its own at its first short batch."""
        return all(layer.module in self.rests for layer in layers)


def _blocks(model: nn.Module, layers: list[AttentionLayer]) -> list[nn.Module]:
    """All elements of the model's list of layers, including those without attention."""
    return list(model.get_submodule(layers[0].block_name.rpartition(".")[0]).children())


@contextmanager
def _recording(model: nn.Module, layers: list[AttentionLayer]) -> Iterator[_Record]:
    record = _Record()

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        record.outputs[module] = output

    def keep_rest(module: nn.Module, args: Any, output: Any) -> None:
        record.rests[module] = tuple(output[1:]) if isinstance(output, tuple) else None

    def keep_context(layer: AttentionLayer, context: Tensor) -> None:
        record.contexts[layer.module] = context

    with on_head_outputs(layers, keep_context), ExitStack() as stack:
        for block in _blocks(model, layers):
            stack.callback(block.register_forward_hook(keep_output).remove)
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(keep_rest).remove)
        yield record


def _replay(model: nn.Module, batch: Batch, record: _Record, layers: list[AttentionLayer], layer: AttentionLayer, head: int) -> Tensor:
    """(B, C) logits without a head; only the operations after the layer's attention are computed."""
    blocks = _blocks(model, layers)
    before = blocks[: blocks.index(layer.block)]
    answers = {block: record.outputs[block] for block in before}
    context = record.contexts[layer.module].clone()
    context[..., head * layer.head_dim : (head + 1) * layer.head_dim] = 0
    inside = any(part is layer.output.module for part in layer.module.modules())
    first = layer.output.module(context) if inside else context
    rest = record.rests[layer.module]
    with _answering({**answers, layer.module: first if rest is None else (first, *rest)}):
        return class_logits(model, batch)


def _full_pass(model: nn.Module, batch: Batch, shape: tuple[int, int], layer: AttentionLayer, head: int) -> Tensor:
    gates = torch.ones(shape, device=batch["labels"].device)
    gates[layer.index, head] = 0
    with head_gates(model, gates):
        return class_logits(model, batch)


@contextmanager
def _answering(answers: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Makes each of these modules return the given answer within the context, instead of computing it."""
    own = {module: vars(module).get("forward") for module in answers}
    try:
        for module, answer in answers.items():
            vars(module)["forward"] = lambda *args, _answer=answer, **kwargs: _answer
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


def _replay_error(model: nn.Module, layers: list[AttentionLayer], batch: Batch) -> tuple[float | None, bool]:
    """Largest difference of a logit between replays and full passes, for one head per layer, and whether it is within rounding.

    None and False if an attention module did not run, so that there is nothing to replay.
    """
    shape = heads_shape(layers)
    worst, agree = 0.0, True
    with _recording(model, layers) as record:
        base = class_logits(model, batch)
    if not record.holds(layers):
        return None, False
    for layer in layers:
        head = layer.index % layer.num_heads
        full = _full_pass(model, batch, shape, layer, head)
        error = float((_replay(model, batch, record, layers, layer, head) - full).abs().max())
        rounding = ROUNDING * torch.finfo(full.dtype).eps * float(full.abs().max())
        agree &= error <= max(rounding, EFFECT * float((full - base).abs().max()))
        worst = max(worst, error)
    return worst, agree
