"""Proofs that a scan is exact on a given model, which name the module at fault if it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import InputError
from ...hf.interfaces import attention_implementation, experts_implementation
from .forward import logits_from_embeddings, vocabulary_size
from .local_credit import LOCAL_CREDIT

PROBE_TOKENS = 16
# Largest difference of an output, relative to the largest value, that another order of summation explains.
OUTPUT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def logit_change(model: PreTrainedModel, changed: Callable[[], Any]) -> str:
    """Description of how a frozen model's logits differ inside the context `changed()`; empty if they differ by rounding only.

    The model's experts are those of its own class here: the grouped ones that transformers may choose lack float64. Gradients are on, as in
    a scan: in a forward without them, a quantised layer may repack its weights for good.
    """
    probe = probe_tokens(model)
    with experts_implementation(model, "eager"):
        stock = logits_from_embeddings(model, probe)[0].detach()
        with changed():
            ours = logits_from_embeddings(model, probe)[0].detach()
    finite = stock.isfinite()  # logits that are NaN by themselves are another matter
    if not finite.any():
        return ""
    scale, difference = stock[finite].abs().max().item(), (ours - stock)[finite].abs().max().item()
    if difference <= OUTPUT_TOLERANCE.get(ours.dtype, 1e-1) * scale:
        return ""
    return f"a difference of {difference:.3g} at a scale of {scale:.3g}"


def prove_causal(model: PreTrainedModel) -> None:
    """Raises InputError if a frozen model's logits depend on later tokens, and therefore on labels and padding."""
    logits, embeddings = logits_from_embeddings(model, probe_tokens(model))
    token = PROBE_TOKENS // 2
    (grad,) = torch.autograd.grad(logits[0, token].logsumexp(-1), embeddings)
    seen = grad[0].abs().sum(-1)
    if seen[token + 1 :].max() > OUTPUT_TOLERANCE.get(logits.dtype, 1e-1) * seen[: token + 1].max():
        raise InputError(f"model must be a causal language model, got {type(model).__name__}, whose tokens see later ones.")


def prove_local_credit(model: PreTrainedModel) -> None:
    """Raises InputError, with the name of the module, unless local credit is exact on a frozen model.

    One token's loss must leave exactly zero gradient on every other token's embedding.
    """
    _refuse_own_attention(model)
    with attention_implementation(model, LOCAL_CREDIT), _watched(model) as mixers:
        logits, embeddings = logits_from_embeddings(model, probe_tokens(model))
        token = logits.shape[1] - 2
        (grad,) = torch.autograd.grad(logits[0, token].logsumexp(-1), embeddings)
    leak = grad[0].abs().sum(-1)
    leak[token] = 0
    if leak.any():
        named = mixers[0] if mixers else type(model).__name__
        raise InputError(f"credit must be 'full' for this model: {named} mixes tokens outside transformers' attention interface.")


def _refuse_own_attention(model: PreTrainedModel) -> None:
    """Raises InputError for models whose classes choose their attention by their own table when they are built."""
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

    def touches_others(grad: Tensor) -> bool:
        rows = grad.reshape(PROBE_TOKENS, -1).abs().sum(-1)
        rows[PROBE_TOKENS - 2] = 0
        return bool(rows.any())

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
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

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(partial(watch, name), with_kwargs=True).remove)
        yield mixers


def _first_token_tensor(values: Any) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad and value.dim() >= 2 and value.numel() and PROBE_TOKENS in value.shape[:2]:
            return value
    return None


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """(1, PROBE_TOKENS) ids with embeddings and logits, on the model's device."""
    head = getattr(model.get_output_embeddings(), "out_features", None)
    size = vocabulary_size(model) if head is None else min(vocabulary_size(model), head)
    tokens = (torch.arange(1, PROBE_TOKENS + 1, device="cpu") * 7919) % size
    return tokens[None].to(next(model.parameters()).device)
