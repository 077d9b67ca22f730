"""A scan proves itself on the model at hand, and names the module at fault where it cannot be exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from ..hf.interfaces import attention_implementation, experts_implementation
from .capture import token_rows
from .forward import logits_from_embeddings, vocabulary_size
from .local_credit import LOCAL_CREDIT
from .targets import Target

PROBE_TOKENS = 16
# Largest difference of logits, as a share of the largest logit, that another order of summation explains.
LOGIT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def prove_same_logits(model: PreTrainedModel, changed: Callable[[], Any], what: str) -> None:
    """Raises InputError unless a frozen model's logits are the same inside the context that `changed()` opens.

    The model's experts are those of its own class here: the grouped ones that transformers may choose lack float64.
    """
    probe = _probe(model)
    with torch.no_grad(), experts_implementation(model, "eager"):
        stock = logits_from_embeddings(model, probe)[0]
        with changed():
            ours = logits_from_embeddings(model, probe)[0]
    scale, difference = stock.abs().max().item(), (ours - stock).abs().max().item()
    if not difference <= LOGIT_TOLERANCE.get(ours.dtype, 1e-1) * scale:
        raise InputError(f"{what} must leave the logits as they are, got a difference of {difference:.3g} at a scale of {scale:.3g}.")


def prove_causal(model: PreTrainedModel) -> None:
    """Raises InputError where a frozen model's logits depend on later tokens: on labels, and on a batch's padding."""
    logits, embeddings = logits_from_embeddings(model, _probe(model))
    token = PROBE_TOKENS // 2
    (grad,) = torch.autograd.grad(logits[0, token].logsumexp(-1), embeddings)
    seen = grad[0].abs().sum(-1)
    if seen[token + 1 :].max() > LOGIT_TOLERANCE.get(logits.dtype, 1e-1) * seen[: token + 1].max():
        raise InputError(f"model must be a causal language model, got {type(model).__name__}, whose tokens see later ones.")


def prove_products(model: PreTrainedModel, targets: Iterable[Target]) -> None:
    """Raises InputError, naming the module, where a frozen model's target gives out anything but its weight's product, token by token.

    A hook or a subclass that changes the output makes its gradient another than that of the product. Quantised weights, which have
    another shape or type than the product's, are taken at their word.
    """

    def hook_for(target: Target) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            token_rows(target, output, (2, PROBE_TOKENS))
            weight = cast(Tensor, module.weight)
            matrix = weight.T if isinstance(module, Conv1D) else weight
            if not weight.is_floating_point() or matrix.shape != (output.shape[-1], inputs.shape[-1]):
                return
            expected = functional.linear(inputs, matrix, cast(Tensor | None, module.bias))
            limit = LOGIT_TOLERANCE.get(expected.dtype, 1e-1) * expected.abs().max()
            if ((output - expected).abs() > limit).any():  # NaN is another matter, and not refused
                raise InputError(f"targets must leave out {target.name}: its output is not the product of its weight and its input.")

        return hook

    with ExitStack() as stack, torch.no_grad():
        for target in targets:
            if not target.is_experts:
                handle = target.module.register_forward_hook(hook_for(target), with_kwargs=True)
                stack.callback(handle.remove)
        logits_from_embeddings(model, _probe(model).repeat(2, 1))


def prove_local_credit(model: PreTrainedModel) -> None:
    """Raises InputError, naming the module, unless local credit is exact on a frozen model.

    One token's loss must leave exactly zero gradient on every other token's embedding.
    """
    _refuse_own_attention(model)
    with attention_implementation(model, LOCAL_CREDIT), _watched(model) as mixers:
        logits, embeddings = logits_from_embeddings(model, _probe(model))
        token = logits.shape[1] - 2
        (grad,) = torch.autograd.grad(logits[0, token].logsumexp(-1), embeddings)
    leak = grad[0].abs().sum(-1)
    leak[token] = 0
    if leak.any():
        named = mixers[0] if mixers else type(model).__name__
        raise InputError(f"credit must be 'full' for this model: {named} mixes tokens outside transformers' attention interface.")


def _refuse_own_attention(model: PreTrainedModel) -> None:
    """Refuses models whose classes choose their attention by a table of their own when they are built."""
    if not model._can_set_attn_implementation():
        name, module = next(
            ((name, module) for name, module in model.named_modules() if "attention" in type(module).__name__.lower()), ("the model", model)
        )
        raise InputError(
            f"credit must be 'full' for this model: {name} ({type(module).__name__}) does not use transformers' attention interface."
        )


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[list[str]]:
    """Yields a list that backward fills with the innermost modules where one token's gradient spread to others.

    A module spreads it where its output's gradient is on one token and its input's is on more. Backward meets the last layer
    first, so the first name is the mixer closest to the logits.
    """
    spread: dict[str, list[bool]] = {}
    mixers: list[str] = []
    handles = []

    def touches_others(grad: Tensor) -> bool:
        rows = grad.reshape(PROBE_TOKENS, -1).abs().sum(-1)
        rows[PROBE_TOKENS - 2] = 0
        return bool(rows.any())

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first_in = _first_token_tensor((*args, *kwargs.values()))
            first_out = _first_token_tensor(output if isinstance(output, tuple | list) else (output,))
            if first_in is None or first_out is None or first_in is first_out:
                return
            seen = spread.setdefault(name, [])
            first_out.register_hook(lambda grad: seen.append(touches_others(grad)))

            def on_input(grad: Tensor) -> None:
                nested = any(mixer.startswith(f"{name}.") for mixer in mixers)
                if seen == [False] and touches_others(grad) and not nested:
                    mixers.append(f"{name} ({type(module).__name__})")

            first_in.register_hook(on_input)

        return hook

    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_hook(hook_for(name), with_kwargs=True))
        yield mixers
    finally:
        for handle in handles:
            handle.remove()


def _first_token_tensor(values: Any) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad and value.dim() >= 2 and value.numel() and PROBE_TOKENS in value.shape[:2]:
            return value
    return None


def _probe(model: PreTrainedModel) -> Tensor:
    tokens = (torch.arange(1, PROBE_TOKENS + 1) * 7919) % vocabulary_size(model)
    return tokens[None].to(next(model.parameters()).device)
