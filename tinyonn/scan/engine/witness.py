"""Proof on a probe batch that what a scan records of each weight is the weight's own gradient.

The hooks of a scan report each target's input x and output y, and in backward the gradient δ of y. For each target the probe shows
that its module runs once, that y is its weight's product with x plus the bias, that the rows are the batch's tokens in order, and that

    Σ_t δ_t ⊗ x_t  (plus the look-up's part, for a tied head)  =  the weight's own gradient by autograd

Both sides are compared as products with a few random vectors of ±1, row by row, so that memory holds the gradient of one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .capture import RUNS_TWICE, Recorder, row_fault
from .forward import logits_from_embeddings, loss_into_gradient_
from .lookup import TiedLookup
from .proof import OUTPUT_TOLERANCE
from .targets import Target

# Largest difference of a gradient, relative to the sizes of its terms, that rounding explains.
GRADIENT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DIRECTIONS = 4
ROWS_AT_ONCE = 1 << 14

OTHER_USES = "its weight has other uses than its module's product, so what would be recorded is not the weight's gradient"
NOT_CALLED = "its weight is used without calling its module"
DID_NOT_RUN = "its module does not run in a forward pass of this model"
NO_GRADIENT = "no gradient of the loss reaches its output"


@dataclass(frozen=True)
class Verdict:
    """Result of the probe.

    Attributes:
        faults: name of a target -> reason why a scan cannot record it.
        unproven: name of a target -> reason why its weight has no gradient to compare with. All other checks passed.
    """

    faults: dict[str, str]
    unproven: dict[str, str]


@dataclass
class _Seen:
    """One call of one target: inputs (rows, in), tokens and experts of pairs, and the output's gradient after backward."""

    inputs: Tensor
    tokens: Tensor | None = None
    experts: Tensor | None = None
    grad: Tensor | None = None


class Witness(Recorder):
    """Stores what the hooks report, and faults that show at once."""

    def __init__(self, batch_shape: tuple[int, int]) -> None:
        self.batch_shape = batch_shape
        self.faults: dict[str, str] = {}
        self.seen: dict[str, _Seen] = {}

    def record(self, target: Target, inputs: Tensor, output: Tensor) -> None:
        if target.name in self.seen:
            self.faults[target.name] = RUNS_TWICE
        elif fault := row_fault(output, self.batch_shape) or _product_fault(target, inputs.detach(), output.detach()):
            self.faults[target.name] = fault
            self.seen[target.name] = _Seen(inputs.detach())
        else:
            self._keep(target, _Seen(inputs.detach().reshape(-1, inputs.shape[-1])), output)

    def record_pairs(self, target: Target, tokens: Tensor, experts: Tensor, inputs: Tensor, output: Tensor) -> None:
        if target.name in self.seen:
            self.faults[target.name] = RUNS_TWICE
        else:
            self._keep(target, _Seen(inputs.detach(), tokens, experts), output)

    def _keep(self, target: Target, seen: _Seen, output: Tensor) -> None:
        self.seen[target.name] = seen

        def on_gradient(grad: Tensor) -> None:
            seen.grad = grad.detach().reshape(-1, grad.shape[-1]).clone()

        if output.requires_grad:
            output.register_hook(on_gradient)


def prove_weights(
    model: PreTrainedModel,
    targets: list[Target],
    probe: Tensor,
    recording: Callable[[Recorder], AbstractContextManager[None]],
    lookup: TiedLookup | None,
) -> Verdict:
    """Runs a frozen model once over the probe, forward and backward, with its targets' weights requiring gradients.

    Afterwards the weights are frozen again, and every `.grad` is restored.

    Args:
        probe: (2, tokens) ids; more than two tokens, so that another order of rows shows.
        recording: function that returns the context of a scan whose hooks report to the given recorder.
        lookup: target whose weight is also the input embeddings.
    """
    witness = Witness((probe.shape[0], probe.shape[1]))
    parameters = {target.name: parameter for target in targets if (parameter := _own_parameter(target)) is not None}
    unique = {id(parameter): parameter for parameter in parameters.values()}
    # The two sequences have labels up to different tokens: no later row may see a gradient.
    stops = torch.tensor([probe.shape[1] // 2, probe.shape[1] - 3], device=probe.device)
    labels = torch.where(torch.arange(probe.shape[1], device=probe.device) < stops[:, None], probe.roll(-1, 1), -1)
    with _weight_gradients(unique) as products:
        with recording(witness):
            logits, embeddings = logits_from_embeddings(model, probe)
            cotangent = logits.detach().clone().contiguous()
            loss_into_gradient_(cotangent.view(-1, cotangent.shape[-1]), labels.clamp(max=cotangent.shape[-1] - 1).reshape(-1))
            torch.autograd.backward([logits], [cotangent], inputs=[embeddings, *unique.values()])
        embedding_grad = embeddings.grad if embeddings.grad is not None else torch.zeros_like(embeddings)
    faults = dict(witness.faults)
    unproven = {}
    later = (torch.arange(probe.shape[1], device=probe.device) >= stops[:, None]).reshape(-1)
    for target in targets:
        if target.name in faults:
            continue
        parameter, seen = parameters.get(target.name), witness.seen.get(target.name)
        product = products.get(id(parameter)) if parameter is not None else None
        if seen is None:
            faults[target.name] = NOT_CALLED if product is not None and bool(product.any()) else DID_NOT_RUN
        elif seen.grad is None:
            faults[target.name] = NO_GRADIENT
        elif _reaches(seen, later):
            faults[target.name] = "the rows of its output are not the batch's tokens in order"
        elif parameter is None:
            unproven[target.name] = f"{type(getattr(target.module, target.weight)).__name__}: no gradient of its own"
        else:
            part = None
            if lookup is not None and lookup.target.name == target.name:
                part = lookup.gradient(embedding_grad.reshape(-1, embedding_grad.shape[-1]), probe.reshape(-1))
            if not _agrees(target, parameter, seen, product, part, probe.reshape(-1)):
                faults[target.name] = OTHER_USES
    return Verdict(faults, unproven)


def _product_fault(target: Target, inputs: Tensor, output: Tensor) -> str:
    """Reason why an output is not the product of its module's weight; empty if it is, or if the weight is not a plain matrix."""
    weight: Any = target.module.weight
    matrix = weight.T if isinstance(target.module, Conv1D) else weight
    if not weight.is_floating_point() or matrix.shape != (output.shape[-1], inputs.shape[-1]):
        return ""
    with torch.no_grad():
        bias = getattr(target.module, "bias", None)
        expected = functional.linear(inputs.to(matrix.dtype), matrix, bias)
        limit = OUTPUT_TOLERANCE.get(expected.dtype, 1e-1) * expected.abs().max()
        if expected.shape == output.shape and not ((output - expected).abs() > limit).any():  # NaN is another matter, and no fault
            return ""
    return "its output is not the product of its weight and its input"


def _own_parameter(target: Target) -> nn.Parameter | None:
    """The weight, if it is a plain floating-point parameter of the layer's shape, which gets a gradient from autograd."""
    parameter = target.module._parameters.get(target.weight)
    if parameter is None or type(parameter.data) is not Tensor or not parameter.is_floating_point():
        return None
    if not target.is_experts:
        sizes = (target.module.nx, target.module.nf) if isinstance(target.module, Conv1D) else None
        wanted = sizes or (target.module.out_features, target.module.in_features)
        if tuple(parameter.shape) != wanted:
            return None
    return parameter


@contextmanager
def _weight_gradients(parameters: Mapping[int, nn.Parameter]) -> Iterator[dict[int, Tensor]]:
    """Makes the parameters require gradients within the block. Yields the products of their gradients, by id of the parameter.

    A product is (rows, DIRECTIONS), of the gradient as (rows, inputs); the gradient itself is dropped at once.
    """
    products: dict[int, Tensor] = {}

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        products[id(parameter)] = _times_directions(parameter.grad.detach())
        parameter.grad = None

    with ExitStack() as stack:
        for parameter in parameters.values():
            stack.callback(setattr, parameter, "grad", parameter.grad)
            stack.callback(parameter.requires_grad_, False)
            parameter.grad = None
            parameter.requires_grad_(True)
            stack.callback(parameter.register_post_accumulate_grad_hook(take).remove)
        yield products


def _directions(size: int, like: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(size)
    signs = torch.randint(0, 2, (size, DIRECTIONS), generator=generator, device="cpu") * 2 - 1
    return signs.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _times_directions(matrix: Tensor) -> Tensor:
    """(..., size) -> (..., DIRECTIONS), in float32 or wider, some rows at a time."""
    signs = _directions(matrix.shape[-1], matrix)
    rows = matrix.reshape(-1, matrix.shape[-1])
    return torch.cat([part.to(signs.dtype) @ signs for part in rows.split(ROWS_AT_ONCE)]).view(*matrix.shape[:-1], DIRECTIONS)


def _reaches(seen: _Seen, later: Tensor) -> bool:
    """Whether a gradient reached rows of tokens behind the last label."""
    assert seen.grad is not None
    rows = later if seen.tokens is None else later[seen.tokens]
    size = seen.grad.abs().amax(-1)
    return len(size) > 0 and bool((size * rows).max() > OUTPUT_TOLERANCE.get(seen.grad.dtype, 1e-1) * size.max())


def _agrees(target: Target, parameter: nn.Parameter, seen: _Seen, product: Tensor | None, part: Tensor | None, ids: Tensor) -> bool:
    """Whether the recorded outer products, and the look-up's part, sum to the weight's own gradient."""
    assert seen.grad is not None
    wide = torch.promote_types(parameter.dtype, torch.float32)
    grad, inputs = seen.grad.to(wide), seen.inputs.to(wide)
    by_input = isinstance(target.module, Conv1D) or bool(getattr(target.module, "is_transposed", False))
    # A weight stored as (in, out) is multiplied with directions of its outputs.
    left, right = (inputs, grad) if by_input else (grad, inputs)
    if len(left) != len(right):
        return False
    signs = _directions(right.shape[-1], parameter)
    terms, sizes = right @ signs, torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    if seen.experts is None:
        expected, scale = left.T @ terms, left.abs().T @ sizes
    else:
        expected = terms.new_zeros(target.experts, left.shape[-1], DIRECTIONS)
        scale = terms.new_zeros(target.experts, left.shape[-1], 1)
        for expert in seen.experts.unique().tolist():
            mine = seen.experts == expert
            expected[expert], scale[expert] = left[mine].T @ terms[mine], left[mine].abs().T @ sizes[mine]
    if part is not None:
        part = part.to(wide)
        expected.index_add_(0, ids, part @ signs)
        scale.index_add_(0, ids, torch.linalg.vector_norm(part, dim=-1, keepdim=True))
    own = torch.zeros_like(expected) if product is None else product.to(wide)
    if own.shape != expected.shape:
        return False
    info = torch.finfo(parameter.dtype)
    limit = GRADIENT_TOLERANCE.get(parameter.dtype, 2e-2) * scale + 8 * info.smallest_normal * info.eps * right.shape[-1]
    return not bool(((own - expected).abs() > limit).any())  # NaN is another matter, and no fault
