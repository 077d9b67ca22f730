"""Positions of a model's attention heads: their rows in the query, key and value weights, and their columns in the output weight.

H query heads, K key/value heads, D head dim. Query head h uses key/value head h // (H / K). A module is attention if it has
projections with known names and an output projection of H · D inputs, inside (Llama, GPT-2) or beside it (BERT's `output.dense`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import InputError, listed

SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
# One weight for all three, by class, because only the code defines the order: all query rows, then all key rows, then all value rows …
STACKED = {
    "GPT2Attention": "c_attn",
    "DecisionTransformerGPT2Attention": "c_attn",
    "ImageGPTAttention": "c_attn",
    "Phi3Attention": "qkv_proj",
    "Phi4MultimodalAttention": "qkv_proj",
    "ModernBertAttention": "Wqkv",
    "DbrxAttention": "Wqkv",
    "MptAttention": "Wqkv",
}
# … or the rows of each head together: its query, its key, its value.
INTERLEAVED = {"GPTNeoXAttention": "query_key_value", "BloomAttention": "query_key_value"}
FUSED = STACKED | INTERLEAVED
OUTPUTS = ("o_proj", "out_proj", "c_proj", "out_lin", "Wo", "dense", "o")
HEAD_DIMS = ("head_dim", "attention_head_size", "head_size")


class Projection(NamedTuple):
    """One part (query, key, value or output) of an attention layer's weights, as heads.

    Attributes:
        name: name of the weight in the model, such as `layers.0.self_attn.q_proj.weight`.
        module: Linear, or GPT-2's Conv1D, whose weight is transposed.
        heads: H for query and output, K for key and value.
        head_dim: D.
        first: output feature (of the output projection: input feature) at which head 0 begins.
        step: features from one head to the next.
        columns: whether a head is columns of the weight (the output projection) rather than rows.
    """

    name: str
    module: nn.Module
    heads: int
    head_dim: int
    first: int
    step: int
    columns: bool

    def head(self, weight: Tensor, index: int) -> Tensor:
        """One head's part of a weight with this layout: a view, (D, in_features), or (out_features, D) for an output projection."""
        dim = int(self.columns != isinstance(self.module, Conv1D))
        part = weight.narrow(dim, self.first + index * self.step, self.head_dim)
        return part.T if isinstance(self.module, Conv1D) else part


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention.

    Attributes:
        index: 0 … layers − 1, counting the layers that have attention.
        name: name of `module` in the model.
        module: module with the query, key and value projections.
        block_name, block: the transformer layer around it, an element of the model's list of layers.
        num_heads: number of query heads, H.
        num_kv_heads: number of key/value heads, K.
        head_dim: features of a head, D.
        query, key, value, output: weights of the projection. The input of `output.module` is (B, T, H · D), head h in columns
            h · D … (h + 1) · D.
    """

    index: int
    name: str
    module: nn.Module
    block_name: str
    block: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query: Projection
    key: Projection
    value: Projection
    output: Projection


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Attention layers of a decoder-only or encoder-only transformer, in order.

    Args:
        model: transformers model, with or without the head of a task. Layers without attention (convolutions, recurrences) are skipped.

    Raises:
        InputError: the model has none, a projection does not consist of heads, or layers cannot be distinguished (encoder and decoder in
            one, shared layers, several towers); the message has the expected and the found names.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"model must be an encoder or a decoder, got {kind}, which is both.")
    if getattr(config, "num_hidden_groups", None) is not None:
        raise InputError(f"model must have separate weights in each layer, got {kind}, which shares them between layers.")
    names = dict(model.named_modules())
    found = [_layer(index, name, names[name], parts, names, config) for index, (name, parts) in enumerate(_with_projections(names))]
    if not found:
        linears = Counter(name.rpartition(".")[2] for name, module in names.items() if isinstance(module, nn.Linear | Conv1D))
        held = listed((name for name, _ in linears.most_common()), 5, none="no linear layer")
        raise InputError(
            f"model must have attention modules with projections like {', '.join(SEPARATE[0])}, or a fused one of known order (as in "
            f"GPT-2, Phi-3, BLOOM); {kind} has {held}."
        )
    towers = {re.sub(r"\.\d+$", "", layer.block_name) for layer in found}
    if len(towers) > 1:
        raise InputError(f"model must have one list of layers, got {listed(sorted(towers), 3)} in {kind}; load the text model alone.")
    twice = [name for name, count in Counter(layer.block_name for layer in found).items() if count > 1]
    if twice:
        raise InputError(f"model must have one attention in each layer, got two in {twice[0]} of {kind}.")
    return found


@contextmanager
def on_head_outputs(layers: Sequence[AttentionLayer], function: Callable[[AttentionLayer, Tensor], Tensor | None]) -> Iterator[None]:
    """Calls `function` within the block with each input (B, T, H · D) of a layer's output projection; a result replaces the input."""

    def before(layer: AttentionLayer, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        found = function(layer, args[0])
        return None if found is None else (found, *args[1:])

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.output.module.register_forward_pre_hook(partial(before, layer)).remove)
        yield


_stances: list[Any] = []  # one entry per block of `uncompiled`, all the same
_stances_lock = Lock()


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Makes all compiled functions of the process run uncompiled within the block, because compiled code ignores later hooks.

    Raises:
        InputError: the model, or a part of it, is a wrapper of torch.compile.
    """
    from torch._dynamo import OptimizedModule  # half a second, which the first forward pass of a transformers model needs in any case

    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule):
            of = f" in {name}" if name else ""
            raise InputError(f"model must not be a wrapper of torch.compile; pass the wrapped module _orig_mod{of}.")
    with _stances_lock:  # the first block of all threads sets it, the last one puts back what was there
        _stances.append(_stances[0] if _stances else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _stances_lock:
            stance = _stances.pop()
            if not _stances:
                stance.__exit__(None, None, None)


def _with_projections(names: dict[str, nn.Module]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of the modules with query, key and value projections, and of these projections."""
    for name, module in names.items():
        held = {child for child, part in module.named_children() if isinstance(part, nn.Linear | Conv1D)}
        parts = next((parts for parts in SEPARATE if held.issuperset(parts)), (FUSED.get(type(module).__name__, ""),))
        if held.issuperset(parts):
            yield name, parts


def _layer(index: int, name: str, module: nn.Module, parts: tuple[str, ...], names: dict[str, nn.Module], config: Any) -> AttentionLayer:
    place = re.match(r"(.*?\.\d+)(\.|$)", name)
    if place is None:
        raise InputError(f"model must keep its layers in a list, got the attention {name or type(module).__name__} outside of one.")
    output_name = _output_of(name, names)
    output = names[output_name]
    width = _features(output, output_name)[1]
    head_dim = _head_dim(module, config)
    if head_dim < 1 or width % head_dim:
        raise InputError(f"{output_name} must have the heads' {head_dim} features as input, got {width} input features.")
    heads = width // head_dim

    def part(child: str, count: int, first: int, step: int) -> Projection:
        return Projection(f"{name}.{child}.weight", names[f"{name}.{child}"], count, head_dim, first, step, False)

    if len(parts) == 3:
        sizes = [_features(names[f"{name}.{child}"], f"{name}.{child}")[0] for child in parts]
        key_heads = sizes[1] // head_dim
        wrong = [child for child, size in zip(parts, sizes, strict=True) if size != (heads if child == parts[0] else key_heads) * head_dim]
        if wrong or not key_heads or heads % key_heads:
            shown = ", ".join(f"{child} {size}" for child, size in zip(parts, sizes, strict=True))
            raise InputError(f"{name} must project to {heads} query heads of {head_dim} features and as many keys as values, got {shown}.")
        query, key, value = (part(child, count, 0, head_dim) for child, count in zip(parts, (heads, key_heads, key_heads), strict=True))
    else:
        (fused,) = parts
        size = _features(names[f"{name}.{fused}"], f"{name}.{fused}")[0]
        key_heads = (size - width) // (2 * head_dim)
        together = type(module).__name__ in INTERLEAVED
        if key_heads < 1 or size != (heads + 2 * key_heads) * head_dim or heads % key_heads or (together and key_heads != heads):
            raise InputError(f"{name}.{fused} must project to {heads} query heads of {head_dim} features, keys and values, got {size}.")
        if together:
            query, key, value = (part(fused, heads, place * head_dim, 3 * head_dim) for place in range(3))
        else:
            query = part(fused, heads, 0, head_dim)
            key = part(fused, key_heads, width, head_dim)
            value = part(fused, key_heads, width + key_heads * head_dim, head_dim)
    out = Projection(f"{output_name}.weight", output, heads, head_dim, 0, head_dim, True)
    block = place[1]
    return AttentionLayer(index, name, module, block, names[block], heads, key_heads, head_dim, query, key, value, out)


def _output_of(name: str, names: dict[str, nn.Module]) -> str:
    """Name of the output projection: inside the module, or beside it as `output.dense`."""
    above = name.rpartition(".")[0]
    wanted = [*(f"{name}.{output}" for output in OUTPUTS), f"{above}.output.dense"]
    for candidate in wanted:
        if isinstance(names.get(candidate), nn.Linear | Conv1D):
            return candidate
    raise InputError(f"{name} must have an output projection ({', '.join(OUTPUTS)}, or output.dense beside it), got none.")


def _head_dim(module: nn.Module, config: Any) -> int:
    for source in (module, config):
        for attribute in HEAD_DIMS:
            value = getattr(source, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else 0


def _features(module: nn.Module, name: str) -> tuple[int, int]:
    """Output and input features of a weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        held = f"{getattr(weight, 'dtype', None)} of shape {tuple(getattr(weight, 'shape', ()))}"
        raise InputError(f"{name}.weight must be a matrix of floating-point values, got {held}; load the model without quantisation.")
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
