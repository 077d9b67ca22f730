"""Calls of the layers of a converted model, watched while a sample of text runs through it.

Where all blocks are read and only the selected branch counts, as after a conversion, a layer is plain causal attention, and SDPA runs it.

B batch, T queries, H query heads, K key/value heads, D head dim
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from ...nn.block_compression import block_starts
from ...nn.block_shares import Scores
from ...nn.dyn_nsa import GAIN_FROM, DynNSACore
from ...ops import DynNSAOutput
from .._converted import converted_model
from .._forward import tokens_of
from ..interfaces import gradients_kept
from .hooks import BUDGET, PRICE
from .options import open_price
from .parts import DYN_NSA, attention_of, cores
from .shares import Sequence, sequences_of


class Attended(NamedTuple):
    """Arguments and output of one call of a core."""

    core: DynNSACore
    query: Tensor  # (B, T, H, D)
    key: Tensor  # (B, T, K, D)
    value: Tensor  # (B, T, K, D)
    gates: Tensor  # (B, T, H, 3)
    tau: Tensor | None  # (B, T, K); None for the entropy of the compressed branch
    scores: Scores
    key_start: Tensor | None  # (B,), first position of each row's text; None for 0
    key_end: Tensor | None  # (B,), position after its last one; None for T
    cu_seqlens: Tensor | None  # (sequences + 1,), bounds of packed texts
    out: Tensor  # (B, T, H, D)

    def sequences(self) -> Iterator[Sequence]:
        batch, total = self.key.shape[:2]
        return sequences_of(batch, total, self.core.options.compress_size, self.key_start, self.key_end, self.cu_seqlens)

    def compressed_query(self) -> Tensor:
        """The queries of the compressed branch, (B, T, H, D) of at least single precision, without gradients."""
        query = self.query.detach()
        mapped = self.core.compressed_query(query)
        return (query if mapped is None else mapped).detach().float()

    def compressed_keys(self) -> Tensor:
        """(B, M, K, D), without gradients."""
        starts = block_starts(self.key.shape[1], self.core.options.compress_size, self.key_start, self.cu_seqlens)
        found: Tensor = self.core.compress_key(self.key.detach(), starts).detach()
        return found


Watch = Callable[[Attended], None]


def _attended(core: DynNSACore, args: tuple[Any, ...], kwargs: dict[str, Any], result: DynNSAOutput) -> Attended:
    """The arguments of a forward hook of a core."""
    query, key, value, gates = args
    given = kwargs.get
    scale = query.shape[-1] ** -0.5 if given("scale") is None else kwargs["scale"]
    scores = Scores(scale, given("softcap"), given("sinks"))
    return Attended(
        core, query, key, value, gates, given("tau"), scores, given("key_start"), given("key_end"), given("cu_seqlens"), result.out
    )


@contextmanager
def watched(found: list[DynNSACore], watch: Watch) -> Iterator[None]:
    """Within the block, all blocks are read, and each call of a core is watched. The price of all blocks stays after it."""
    set_price(found, price_of_all(found))
    with ExitStack() as stack:
        for core in found:
            stack.callback(core.register_forward_hook(lambda *call: watch(_attended(*call)), with_kwargs=True).remove)
            if _has_first_gates(core):
                core.watch = watch
                stack.callback(setattr, core, "watch", None)
        yield


def _has_first_gates(core: DynNSACore) -> bool:
    """Whether a layer has the gates of a new conversion, (0, 1, 0), for every query."""
    return not bool(core.gate_weight.any()) and bool((core.gate_bias == core.gate_bias.new_tensor((0.0, 1.0, 0.0))).all())


def plain_attention(
    core: DynNSACore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    *,
    tau: Tensor | None,
    price: Tensor | float | None,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | None:
    """Output of a watched call that reads all blocks, (B, T, H, D), 0 for padding; None where the core is to run, and be watched.

    Args: as of a core; price is that of the call.
    """
    watch, (batch, total), most = core.watch, key.shape[:2], core.options.max_blocks
    if watch is None or query.shape[1] != total or any(x is not None for x in (price, softcap, sinks)):
        return None
    if most is not None and most * core.options.block_size < total:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key_start is None and cu_seqlens is None:
        out = _causal(query, key, value, scale)
    else:
        out = torch.zeros_like(query)
        for row, begin, end, _ in sequences_of(batch, total, core.options.compress_size, key_start, key_end, cu_seqlens):
            text = (slice(row, row + 1), slice(begin, end))
            out[text] = _causal(query[text], key[text], value[text], scale)
    watch(Attended(core, query, key, value, gates, tau, Scores(scale), key_start, key_end, cu_seqlens, out))
    return out


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    groups = query.shape[2] // key.shape[2]
    key, value = (x if groups == 1 else x.repeat_interleave(groups, 2) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)


def checked_sample(model: PreTrainedModel, sample: Iterable[Tensor | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The batches of a sample, as keyword arguments of the model.

    Raises:
        InputError: the model is not converted, or runs another attention; there is no batch, or one cannot be measured.
        TypeError: the sample is not an iterable of batches.
    """
    if next(cores(model), None) is None:
        raise InputError(f"model must be converted by convert_attention, got an unconverted {type(model).__name__}.")
    if not hasattr(model, "get_input_embeddings"):
        raise InputError(f"model must be a transformers model, got {type(model).__name__}; pass the model inside it.")
    holder = converted_model(model, DYN_NSA)
    if holder is not None and (running := attention_of(holder.config)) != DYN_NSA:
        raise InputError(f"attn_implementation must be '{DYN_NSA}', got '{running}'; call model.set_attn_implementation('{DYN_NSA}').")
    if isinstance(sample, (Tensor, Mapping, str)) or not isinstance(sample, Iterable):
        raise TypeError(f"sample must be a list of batches, got {type(sample).__name__}.")
    known = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    batches = [_checked_batch(batch, known) for batch in sample]
    if not batches:
        raise InputError("sample contains no batch.")
    return batches


def _checked_batch(batch: Tensor | Mapping[str, Any], known: float) -> dict[str, Any]:
    """The arguments of one batch. Ids lie below `known`. Tensors made in inference mode are copied, as the measures need gradients."""
    if not isinstance(batch, (Tensor, Mapping)):
        raise TypeError(f"batches of the sample must be token ids or dicts of the model's arguments, got {type(batch).__name__}.")
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    for name in ("past_key_values", PRICE, BUDGET):
        if given.get(name) is not None:
            raise InputError(f"batches of the sample must not have {name}.")
    tokens = tokens_of(given)
    if tokens is None:
        raise InputError("batches of the sample must have input_ids or inputs_embeds, got neither.")
    name, shape = ("input_ids", "(B, T)") if given.get("input_ids") is not None else ("inputs_embeds", "(B, T, features)")
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} of the sample must be a tensor {shape}, got {type(tokens).__name__}.")
    if tokens.dim() != shape.count(",") + 1 or tokens.numel() == 0:
        raise InputError(f"{name} of the sample must be {shape} of at least one token, got {tuple(tokens.shape)}.")
    if name == "input_ids" and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
        raise TypeError(f"input_ids of the sample must be integers, got {tokens.dtype}.")
    if name == "input_ids" and len(outside := tokens[(tokens < 0) | (tokens >= known)]):  # on a GPU one ends the process' work there
        raise InputError(f"input_ids of the sample must be in 0 … {known - 1}, got {outside[0].item()}.")
    for other in ("attention_mask", "labels"):
        found = given.get(other)
        if isinstance(found, Tensor) and found.dim() == 2 and found.shape != tokens.shape[:2]:
            raise InputError(f"{other} of the sample must be {tuple(tokens.shape[:2])} like {name}, got {tuple(found.shape)}.")
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.any():
        raise InputError("batches of the sample must have a token that is not padding, got one with none.")
    with torch.inference_mode(False):
        return {key: value.clone() if isinstance(value, Tensor) and value.is_inference() else value for key, value in given.items()}


@torch.no_grad()
def run(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    with gradients_kept(model):
        model(**{**batch, "use_cache": False})


def set_price(found: list[DynNSACore], price: float) -> None:
    for core in found:
        core.price.fill_(price)


def price_of_all(found: list[DynNSACore]) -> float:
    """Price at which every block of every layer passes, also where an earlier calibration or training has moved the thresholds."""
    prices = []
    for core in found:
        open_here = open_price(replace(core.options, base=core.base.max().item(), slope=core.slope.min().item()))
        prices.append(open_here + min(0.0, GAIN_FROM * (1 - core.gain.min().item())))
    return min(prices)
