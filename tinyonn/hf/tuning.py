"""Trials of kernel configurations ahead of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..ops._checks import check_flag, check_size
from .interfaces import modes_kept


class TunedKernel(NamedTuple):
    """The configuration of a kernel that is fastest for a kind and size of input.

    Attributes:
        tokens: tokens of the row, or rows, where it was found.
        kernel: name of the kernel.
        configuration: tile sizes, warps and stages, as Triton prints them.
        tried: configurations that were timed; 0 if an earlier process had kept the result.
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
) -> list[TunedKernel]:
    """Runs a model once for each number of tokens, on random ids, so that its kernels find their fastest configurations on this GPU.

    The results stay in Triton's cache folder, with the compiled kernels: later processes neither compile nor try again. A kernel tries
    anew where the size of its input is in another class; classes differ by a factor of four. The model stays as it is, with its gradients.

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
        InputError: the model is not on a GPU, or has no weight to tune backward with; torch.use_deterministic_algorithms is on, under
            which no configuration is tried.
        TypeError, ValueError: tokens or batch is no positive int.
    """
    lengths = list(tokens)
    for length in lengths:
        check_size("tokens", length)
    check_size("batch", batch)
    check_flag("backward", backward)
    check_gpu(model.device)
    if torch.are_deterministic_algorithms_enabled():
        raise InputError("torch.use_deterministic_algorithms must be off to tune: under it, kernels take their first configuration.")
    return _tuned(model, lengths, batch, backward, progress)


def check_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise InputError(f"kernels are tuned on a GPU that torch can use, got {device}.")


def _tuned(
    model: PreTrainedModel, lengths: list[int], batch: int, backward: bool, progress: Callable[[int], None] | None = None
) -> list[TunedKernel]:
    from tinyonn_kernels._tune import choices

    found: list[TunedKernel] = []
    vocabulary = model.config.get_text_config().vocab_size
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if backward and not learned:
        raise InputError("model must have a weight that requires a gradient to tune backward, got none.")
    with modes_kept(model), buffers_kept(model), torch.inference_mode(False), torch.set_grad_enabled(backward):
        model.train(backward)
        for length in lengths:
            if progress is not None:
                progress(length)
            ids = torch.randint(vocabulary, (batch, length), device=model.device)
            with choices() as chosen:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                if backward:
                    torch.autograd.grad(loss, learned, allow_unused=True)
            found += [TunedKernel(length, *choice) for choice in chosen]
    return found


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restores buffers after the block, such as running statistics."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
