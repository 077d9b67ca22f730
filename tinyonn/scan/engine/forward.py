"""The forward pass of a scan: frozen model, no cache, and a gradient path from the embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import InputError
from ...hf.interfaces import modes_kept

# A chunk of logits that a core's cache holds; a whole (tokens, vocabulary) copy costs more than the model.
CHUNK_BYTES = 4 << 20


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode, without parameters that require a gradient, within the block, and restores both afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with modes_kept(model):
            model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def check_differentiable(model: nn.Module) -> None:
    """Raises InputError if 4-bit weights have bitsandbytes' packing for inference on a CPU, which does not support gradients."""
    for name, parameter in model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError(
                f"model must not have run without gradients before a scan, got {name}, which bitsandbytes then repacked for inference: "
                "load the model again, and generate answers with another copy of it."
            )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embeddings."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def position_switches(model: nn.Module) -> tuple[set[int], int | None]:
    """Sequence lengths at which a model's rotary embeddings change for the whole batch, by its longest sequence.

    Returns:
        The lengths beyond which all sequences use other frequencies ("longrope"), and the length beyond which the frequencies depend
        on earlier calls ("dynamic"), or None.
    """
    switches: set[int] = set()
    limits: list[int] = []
    for module in model.modules():
        rotary: Any = module
        kinds = getattr(rotary, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer, kind in by_layer.items():
            if kind == "longrope":
                parameters = rotary.config.rope_parameters
                switches.add(int((parameters if layer is None else parameters[layer])["original_max_position_embeddings"]))
            elif isinstance(kind, str) and "dynamic" in kind:
                limits.append(int(rotary.original_max_seq_len))
    return switches, min(limits, default=None)


def logits_from_embeddings(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Runs a frozen model on whole sequences.

    Args:
        model: model within `frozen`.
        input_ids: (B, T) with padding last, so that causal attention needs no padding mask and default positions are right.

    Returns:
        logits (B, T, V), and the leaf at which the graph starts, whose gradient is that of the token embeddings (B, T, F).

    Raises:
        InputError: the model did not call its input embeddings, or its outputs have other shapes.
    """
    leaves: list[Tensor] = []

    def start_graph(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # A zero that is added, not the embeddings themselves: models may change those in place, which a leaf forbids.
        leaf = output.new_zeros(()).expand_as(output).requires_grad_()
        leaves.append(leaf)
        return output + leaf

    with model.get_input_embeddings().register_forward_hook(start_graph):
        output = model(input_ids=input_ids, use_cache=False, output_hidden_states=False, output_attentions=False, return_dict=True)
    logits = output.logits
    if len(leaves) != 1 or logits.shape[:2] != input_ids.shape:
        raise InputError(
            f"model must be a causal language model with one embedding call and logits for every token, got {type(model).__name__} with "
            f"{len(leaves)} calls and logits of shape {tuple(logits.shape)}."
        )
    return logits, leaves[0]


@torch.no_grad()
def loss_into_gradient_(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row, and, written over the logits, its gradient: softmax − one-hot.

    Works a few rows at a time, so nothing else of the logits' size is ever allocated. Arithmetic in float32 or wider.

    Args:
        logits: (rows, V), contiguous; overwritten.
        labels: (rows,) int64; negative where a row has no label: its loss is NaN, its gradient 0.

    Returns:
        (rows,) float32 loss in nats.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    step = max(1, CHUNK_BYTES // (logits.shape[1] * dtype.itemsize))
    for start in range(0, len(logits), step):
        chunk, label = logits[start : start + step], labels[start : start + step, None]
        labelled = label >= 0
        log_probs = torch.log_softmax(chunk, -1, dtype=dtype)
        index = label.clamp(min=0)
        loss[start : start + step] = torch.where(labelled, -log_probs.gather(1, index), torch.nan)[:, 0]
        grad = log_probs.exp_()
        grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=dtype))
        chunk.copy_(grad.masked_fill_(~labelled, 0))
    return loss
