"""Trials of kernel configurations ahead of training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..ops._checks import check_flag, check_size
from ..ops._tuning import noted_choices
from .dyn_nsa.parts import cores
from .interfaces import modes_kept
from .loading import usable_positions

MAX_TOKENS = 2**31 - 1


class TuningResult(NamedTuple):
    """The configuration of a kernel that is fastest for a kind and size of input.

    Attributes:
        tokens: tokens of the row, or rows, where it was found.
        kernel: name of the kernel.
        configuration: tile sizes, warps and stages, as Triton prints them.
        tried: configurations that were tried, with those that did not compile; 0 if an earlier process had kept the result.
    """

    tokens: int
    kernel: str
    configuration: str
    tried: int


def tune_kernels(
    model: PreTrainedModel,
    tokens: Iterable[int] = (4096,),
    *,
    batch: int = 1,
    backward: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[TuningResult]:
    """Runs a model once for each number of tokens, on random ids, so that its kernels find their fastest configurations on this GPU.

    The results stay in Triton's cache folder, with the compiled kernels: later processes neither compile nor try again. Inputs of another
    size class, a factor of four, need trials of their own, and so do block lists of another length, a factor of two. Call it after
    `calibrate`: a model that was only converted reads all blocks. The model stays as it is, with its gradients and statistics.

    Args:
        model: causal language model on a GPU, with attention or experts of tinyonn.
        tokens: tokens of a row.
        batch: rows.
        backward: whether to tune backward too, in training mode.
        progress: called with each number of tokens before it runs.

    Returns:
        What was found, in the order of the launches. Kernels that have a single configuration, or that this process has tuned before, are
        not in it.

    Raises:
        InputError: the model is not on a GPU, has no attention or experts of tinyonn that run on its kernels, or has no weight to tune
            backward with; torch.use_deterministic_algorithms is on, under which no configuration is tried.
        TypeError, ValueError: tokens or batch is no positive int, or too large; model is not a transformers model.
    """
    if not hasattr(model, "get_output_embeddings"):  # which a PEFT model passes on
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}.")
    check_gpu(model.device)
    if not isinstance(tokens, Iterable):
        raise TypeError(f"tokens must be an iterable of ints, got {type(tokens).__name__}.")
    lengths, limit = list(tokens), usable_positions(model)
    for length in lengths:
        check_size("tokens", length)
        if limit is not None and length > limit:
            raise InputError(f"tokens must be at most the {limit:,} positions of the model, got {length:,}.")
    check_size("batch", batch)
    if batch * max(lengths, default=0) > MAX_TOKENS:
        raise ValueError(f"batch times tokens must be at most {MAX_TOKENS:,}, got {batch * max(lengths):,}.")
    check_flag("backward", backward)
    if model.get_output_embeddings() is None:
        raise InputError(f"model must have a language head, got {type(model).__name__}.")
    if torch.are_deterministic_algorithms_enabled():
        raise InputError("torch.use_deterministic_algorithms must be off to tune: under it, kernels take their first configuration.")
    return _tuned(model, lengths, batch, backward, progress)


def check_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise InputError(f"kernels are tuned on a GPU that torch can use, got {device}.")


def _tuned(
    model: PreTrainedModel, lengths: list[int], batch: int, backward: bool, progress: Callable[[int], None] | None = None
) -> list[TuningResult]:
    found: list[TuningResult] = []
    vocabulary = model.config.get_text_config().vocab_size
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if backward and not learned:
        raise InputError("model must have a weight that requires a gradient to tune backward, got none.")
    # Logits of all tokens are large, and none of the kernels computes them.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with modes_kept(model), state_kept(model), torch.inference_mode(False), torch.set_grad_enabled(backward):
        model.train(backward)
        for length in lengths:
            if progress is not None:
                progress(length)
            ids = torch.randint(vocabulary, (batch, length), device=model.device)
            with noted_choices() as chosen:
                logits = model(input_ids=ids, use_cache=False, **last).logits
                if backward:
                    torch.autograd.grad(logits[:, -1].float().sum(), learned, allow_unused=True)
            if not chosen.launches:
                raise InputError("model must have attention or experts of tinyonn that run on its kernels, got none; convert it first.")
            found += [TuningResult(length, *choice) for choice in chosen]
    return found


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Restores buffers after the block, such as running statistics, what layers of DynNSA note in training, and random states."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    noted = [(core, dict(vars(core)), None if core.counted is None else core.counted.clone()) for core in cores(model)]
    try:
        yield
    finally:
        torch.set_rng_state(random[0])
        if random[1]:
            torch.cuda.set_rng_state_all(random[1])
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for core, values, counted in noted:
            core.collected, core.previous_tau, core.counted = values["collected"], values["previous_tau"], counted
            core.loss_taken = values.get("loss_taken", False)
