"""The next token's loss of a model over a sample, and a leaf below its first layer that a backward pass can end at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError


@contextmanager
def _with_leaf(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the block, what the embedding gives is a leaf that requires a gradient; the leaves of its calls are in the list.

    Weights require no gradient in the block, so none is kept for them.
    """
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(cut)
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield leaves
    finally:
        handle.remove()
        for parameter in held:
            parameter.requires_grad_(True)


def _loss_of(model: PreTrainedModel, output: Any, batch: dict[str, Any]) -> Tensor:
    """Sum of the next token's loss over a batch, without padding and the first tokens of texts.

    Raises:
        InputError: the output has no logits of tokens, the batch no token ids, or the loss is not finite.
    """
    labels, logits = batch.get("labels", batch.get("input_ids")), getattr(output, "logits", None)
    if labels is None:
        raise InputError("sample must have input_ids or labels for price='gradient', got neither.")
    if logits is None or logits.dim() != 3 or model.get_output_embeddings() is None:
        raise InputError(f"model must have a language head for price='gradient', got {type(model).__name__}: give price='none'.")
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    labels = labels.to(logits.device, torch.int64)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        labels = labels.masked_fill(mask.to(labels.device)[:, -labels.shape[1] :] == 0, -100)
    if isinstance(positions, Tensor) and positions.dim() == 2:
        labels = labels.masked_fill(positions.to(labels.device) == 0, -100)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    if not torch.isfinite(loss):
        raise InputError(f"loss over the sample must be finite, got {loss.item()}.")
    return loss


def backward_to_embeddings(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    """One backward pass as far as the embeddings; no weight gets a gradient."""
    with torch.inference_mode(False), torch.enable_grad(), _with_leaf(model) as leaves:
        given = {name: value for name, value in batch.items() if name not in ("labels", "return_dict")}
        if given.get("inputs_embeds") is not None:
            given["inputs_embeds"] = given["inputs_embeds"].detach().requires_grad_()
            leaves.append(given["inputs_embeds"])
        output = model(**{**given, "use_cache": False, "return_dict": True})
        loss = _loss_of(model, output, batch)
        torch.autograd.backward([loss], inputs=leaves)
