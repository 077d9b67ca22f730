"""Log-probabilities of candidate answers, and AugScore, their sum over the eight symmetric views of a task.

    log p(answer | prompt) = Σ_t log p(answer_t | prompt, answer_<t)
    AugScore(answer)       = Σ_v log p(v(answer) | v(prompt)),   v over the symmetries

The prompt passes the model once; all candidates continue from its cached keys and values, as the rows of a padded batch.
K candidates, P tokens of a prompt, A tokens of an answer, V vocabulary
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError, shown
from ..hf.tiny_onn.cache import SparseCacheLayer
from .augmentations import views
from .tasks import Grid, Task
from .tokens import Vocabulary

# Layers of a cache whose rows can be repeated and continued by several tokens at once. States of linear attention cannot.
REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer, SparseCacheLayer)


def answer_log_probs(model: nn.Module, prompt: Tensor, answers: Sequence[Tensor], *, batch_size: int = 16) -> Tensor:
    """Log-probability of each of several answers to one prompt.

    Where the model's cache has another kind of layer than keys and values, as with linear attention, each row passes the prompt too.

    Args:
        model: a causal language model of transformers.
        prompt: (P,) token ids.
        answers: K tensors, each (A,) token ids.
        batch_size: answers in one forward pass.

    Returns:
        (K,) on the CPU, nats; float64 for a model in float64, otherwise float32.

    Raises:
        InputError: the prompt or an answer is empty, or batch_size is not positive.
    """
    if not len(prompt) or not all(map(len, answers)):
        raise InputError("prompt and answers must have at least one token, got none.")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {shown(batch_size)}.")
    device = next(model.parameters()).device
    prompt = prompt.long().to(device)
    # Answers of similar lengths share a batch.
    order = sorted(range(len(answers)), key=lambda number: len(answers[number]))
    chunks = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    found: dict[int, Tensor] = {}
    with torch.no_grad(), evaluating(model):
        cache = _prompt_cache(model, prompt[:-1]) if answers else None
        for chunk in chunks:
            rows = [answers[number].long().to(device) for number in chunk]
            if cache is None:
                scores = _plain(model, prompt, rows)
            else:
                # A forward pass extends the cache, so every batch but the last has its own copy.
                held = cache if chunk is chunks[-1] else copy.deepcopy(cache)
                scores = _continued(model, prompt, rows, held)
            found.update(zip(chunk, scores.cpu(), strict=True))
    return torch.stack([found[number] for number in range(len(answers))]) if answers else torch.zeros(0)


def aug_scores(
    model: nn.Module, vocabulary: Vocabulary, task: Task, number: int, candidates: Sequence[Grid], *, batch_size: int = 16
) -> list[float]:
    """AugScore of candidate outputs for a test pair: log-probabilities of their views, summed over the eight symmetries of the task.

    Args:
        model: a causal language model of transformers.
        vocabulary: the tokens it was trained with.
        task: the task.
        number: number of the test pair, from 0.
        candidates: K grids, each (rows, columns).
        batch_size: candidates in one forward pass.

    Returns:
        K numbers in nats, at most 0.

    Raises:
        InputError: the task has no such test pair, or batch_size is not positive.
    """
    if not candidates:
        return []
    total = torch.zeros(len(candidates), dtype=torch.float64)
    for augmentation, view in views(task):
        prompt = torch.from_numpy(vocabulary.encode(view, number).prompt)
        answers = [torch.from_numpy(vocabulary.encode_answer(augmentation.grid(grid))) for grid in candidates]
        total += answer_log_probs(model, prompt, answers, batch_size=batch_size).double()
    return total.tolist()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is in evaluation mode; after it, every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _prompt_cache(model: nn.Module, prompt: Tensor) -> Cache | None:
    """Keys and values of a prompt; None where it is empty or the model's cache cannot be repeated."""
    if not len(prompt):
        return None
    cache = getattr(model(input_ids=prompt[None], use_cache=True, **_last_logits(model, 1)), "past_key_values", None)
    can_repeat = isinstance(cache, Cache) and all(type(layer) in REPEATABLE for layer in cache.layers)
    return cache if can_repeat else None


def _continued(model: nn.Module, prompt: Tensor, answers: Sequence[Tensor], cache: Any) -> Tensor:
    """(K,), with all tokens of the prompt but the last in the cache."""
    cache.batch_repeat_interleave(len(answers))
    inputs = _padded([torch.cat([prompt[-1:], answer[:-1]]) for answer in answers], 0)
    mask = _padded([torch.ones(len(prompt) - 1 + len(answer), dtype=torch.long, device=prompt.device) for answer in answers], 0)
    logits = model(input_ids=inputs, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    return _summed(logits, answers)


def _plain(model: nn.Module, prompt: Tensor, answers: Sequence[Tensor]) -> Tensor:
    """(K,), without a cache."""
    inputs = [torch.cat([prompt, answer[:-1]]) for answer in answers]
    mask = _padded([torch.ones_like(row) for row in inputs], 0)
    longest = max(map(len, answers))
    logits = model(input_ids=_padded(inputs, 0), attention_mask=mask, use_cache=False, **_last_logits(model, longest)).logits
    return _summed(logits[:, -longest:], answers)


def _last_logits(model: nn.Module, count: int) -> dict[str, int]:
    """The argument with which a forward pass computes the logits of the last tokens alone; empty where the model has none."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _summed(logits: Tensor, answers: Sequence[Tensor]) -> Tensor:
    """(K,) sums of log-probabilities; logits are (K, longest A, V)."""
    targets = _padded(answers, -1)
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(targets < 0, 0).sum(-1)


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """(rows, longest)."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value)
