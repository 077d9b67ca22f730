"""Entropy and span mass of every attention head, measured in the forward passes of an unchanged model.

For a model with transformers' attention interface, a registered function calls the model's own one (PyTorch's
scaled_dot_product_attention, or the eager function of its modelling file), and then computes the statistics from the same queries and
keys. The outputs stay bit-identical, and no additional matrix of probabilities is stored. A module outside the interface (DeBERTa-v2,
GPT-J, BLOOM) returns the probabilities that it computes in any case. Other modules raise an error with their names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...hf.interfaces import configurations, install_attention
from ...ops import AttentionStats
from .layer_stats import Wanted
from .layers import AttentionLayer, attention_layers, uncompiled

PREFIX = "tinyonn_stats_"
# Implementations that can be wrapped, and the keyword arguments that affect their scores.
BASES = {"sdpa": frozenset({"scaling", "is_causal"}), "eager": frozenset({"scaling", "softcap", "s_aux"})}
# Arguments without an effect on scores: the mask already contains windows and packed sequences.
WITHOUT_EFFECT = frozenset(
    {
        "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "is_causal", "max_length_k", "max_length_q",
        "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings",
        "position_ids", "return_dict", "seq_idx", "sliding_window", "use_cache",
    }
)  # fmt: skip
# Largest difference in nats that rounding explains between an eager function's entropy and ours.
SAME_ENTROPY, SAME_ENTROPY_HALF = 0.05, 0.5


@contextmanager
def capture_attention_stats(
    model: nn.Module, *, span_mask: Tensor | None = None, key_mask: Tensor | None = None, queries: Tensor | None = None
) -> Iterator[list[AttentionStats]]:
    """Captures attention statistics: within the block, the list holds those of the last forward pass of `model`, one entry per layer.

        with capture_attention_stats(model, span_mask=question) as layers:
            model(**batch)
        layers[3].entropy    # (B, T, H), of attention_layers(model)[3]

    Outputs and gradients of the model do not change. Blocks may be nested, and several models captured at once. Compiled models run
    uncompiled within the block. Within it, other threads must neither call nor capture the model, nor capture a model that shares its
    configuration.

    Args:
        model: transformers model; the block must call the model itself, not a part of it.
        span_mask: (B, Tk) bool, keys of the span; Tk counts those of a cache.
        key_mask: (B, Tk) bool or integer, 0 for keys to ignore in addition to those that the model masks, as in attention_mask.
        queries: (B,) int64, position 0 … T − 1 of the only query to measure in each row; T is then 1 in the statistics.

    Yields:
        One AttentionStats per layer, of entropy in nats and span mass (None without a span), (B, T, H) float32 (float64 for float64), 0 for
        queries that attend to nothing.

    Raises:
        InputError: the statistics of a layer cannot be captured (the message names the layer and its class), the model is a wrapper of
            torch.compile, or another thread captures it.
        TypeError, ValueError: a mask or `queries` does not fit the batch.
    """
    for name, mask, kind in (("span_mask", span_mask, "bool"), ("key_mask", key_mask, "bool or integer")):
        if mask is not None and (mask.dim() != 2 or mask.is_floating_point() or (kind == "bool" and mask.dtype != torch.bool)):
            raise TypeError(f"{name} must be a {kind} tensor of 2 dimensions, got {mask.dtype} of shape {tuple(mask.shape)}.")
    if queries is not None and (queries.dim() != 1 or queries.dtype != torch.int64):
        raise TypeError(f"queries must be an int64 tensor of 1 dimension, got {queries.dtype} of shape {tuple(queries.shape)}.")
    capture = _Capture(attention_layers(model), Wanted(span_mask, None if key_mask is None else key_mask != 0, queries))
    with uncompiled(model), _one_thread(model), ExitStack() as stack:
        with_interface = [layer for layer in capture.layers if "ALL_ATTENTION_FUNCTIONS" in _used_by(layer.module)]
        for layer in capture.layers:
            if layer in with_interface:
                _captures.setdefault(layer.module, []).append((capture, layer))
                stack.callback(_forget, layer.module, capture)
            else:
                _hook_probabilities(layer, capture, stack)
        if with_interface:
            _switch_implementation(model, _base_of(with_interface), stack)
        stack.callback(model.register_forward_pre_hook(capture.begin).remove)
        stack.callback(model.register_forward_hook(capture.end).remove)
        yield capture.found
        if capture.missed and not capture.finished:
            raise InputError(f"only parts of {type(model).__name__} were called; call the model itself for its statistics.")


class _Capture:
    """State of one block: the wanted statistics, and those that layers have reported."""

    def __init__(self, layers: list[AttentionLayer], wanted: Wanted) -> None:
        self.layers, self.wanted = layers, wanted
        self.found: list[AttentionStats] = []
        self.reported: dict[str, AttentionStats] = {}
        self.running = self.finished = self.missed = False
        self.thread = get_ident()

    def check_thread(self) -> None:
        if get_ident() != self.thread:
            raise InputError("model was called by another thread than the one that captures it.")

    def begin(self, model: nn.Module, args: Any) -> None:
        self.check_thread()
        self.running = True
        self.reported.clear()
        self.found.clear()

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        self.running, self.finished = False, True
        for layer in self.layers:
            if layer.name not in self.reported:
                raise InputError(f"model must use transformers' attention interface in every layer, got none of it in {_named(layer)}.")
        self.found[:] = [self.reported[layer.name] for layer in self.layers]

    def report(self, layer: AttentionLayer, statistics: Callable[[], AttentionStats]) -> None:
        if not self.running:  # the recomputation of a checkpointed layer in backward, or a call of a part of the model
            self.missed = True
            return
        self.check_thread()
        if layer.name in self.reported:
            raise InputError(f"model must run each attention layer once, got {_named(layer)} twice.")
        self.reported[layer.name] = statistics()


_threads: dict[int, list[int]] = {}  # id of a module or configuration -> threads of its blocks
_threads_lock = Lock()


@contextmanager
def _one_thread(model: nn.Module) -> Iterator[None]:
    """Reserves the model's modules and configurations for this thread; its blocks may be nested."""
    parts = [id(part) for part in (*model.modules(), *configurations(model))]
    with _threads_lock:
        if any(thread != get_ident() for part in parts for thread in _threads.get(part, ())):
            raise InputError("model is being captured by another thread; only one thread at a time can capture it.")
        for part in parts:
            _threads.setdefault(part, []).append(get_ident())
    try:
        yield
    finally:
        with _threads_lock:
            for part in parts:
                _threads[part].pop()
                if not _threads[part]:
                    del _threads[part]


_captures: dict[nn.Module, list[tuple[_Capture, AttentionLayer]]] = {}  # attention module -> blocks that capture it


def _forget(module: nn.Module, capture: _Capture) -> None:
    _captures[module] = [watching for watching in _captures[module] if watching[0] is not capture]
    if not _captures[module]:
        del _captures[module]


def _named(layer: AttentionLayer) -> str:
    return f"{layer.name} ({type(layer.module).__name__})"


def _used_by(module: nn.Module) -> dict[str, Any]:
    """Global names of its file that a module's forward uses."""
    forward: Any = inspect.unwrap(type(module).forward)
    return {name: forward.__globals__[name] for name in forward.__code__.co_names if name in forward.__globals__}


def _base_of(layers: list[AttentionLayer]) -> str:
    """Attention implementation of these layers."""
    bases: dict[str, AttentionLayer] = {}
    for layer in layers:
        config: Any = getattr(layer.module, "config", None)
        bases.setdefault(str(getattr(config, "_attn_implementation", None)).removeprefix(PREFIX), layer)
    if len(bases) > 1:
        raise InputError(f"model must use one attention implementation, got {', '.join(bases)}.")
    ((base, layer),) = bases.items()
    if base not in BASES:
        raise InputError(f"attention implementation must be {' or '.join(BASES)} for its statistics, got {base} in {_named(layer)}.")
    if base == "eager" and getattr(layer.module, "reorder_and_upcast_attn", False):
        raise InputError(
            f"attention implementation must be sdpa for its statistics, got eager with reorder_and_upcast_attn in {_named(layer)}."
        )
    return base


def _switch_implementation(model: nn.Module, base: str, stack: ExitStack) -> None:
    """Switches configurations with the base implementation, or that of an outer block, to the reporting one until the stack closes."""
    for config in configurations(model):
        before = config._attn_implementation_internal
        if before in (base, PREFIX + base):
            stack.callback(setattr, config, "_attn_implementation_internal", before)
            config._attn_implementation_internal = PREFIX + base


def _reporting(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Attention function that calls the base implementation and reports statistics to the blocks that capture the module."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        used = _used_by(module)  # the file's own interface, which may have additional functions, and its eager function
        eager = next((function for name, function in used.items() if name.endswith("eager_attention_forward")), None)
        out, weights = used["ALL_ATTENTION_FUNCTIONS"].get_interface(base, eager)(
            module, query, key, value, attention_mask, dropout=dropout, **kwargs
        )
        for capture, layer in _captures.get(module, ()):
            probs = None if dropout else weights
            capture.report(layer, partial(_of_layer, layer, base, capture.wanted, query, key, attention_mask, kwargs, probs))
        return out, weights

    return forward


for _base in BASES:
    install_attention(PREFIX + _base, _reporting(_base), mask=_base)


def _of_layer(
    layer: AttentionLayer,
    base: str,
    wanted: Wanted,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    probs: Tensor | None,
) -> AttentionStats:
    """Statistics from the arguments of an attention function, checked against the probabilities that it returned, if any."""
    given = {name for name, value in options.items() if value is not None and value is not False}
    unknown = sorted(given - BASES[base] - WITHOUT_EFFECT)
    if unknown:
        raise InputError(f"{_named(layer)} passes unknown arguments to its attention ({', '.join(unknown)}), which may change its scores.")
    scores: dict[str, Any] = {"scale": options.get("scaling"), "softcap": options.get("softcap"), "sinks": options.get("s_aux")}
    if (is_causal := options.get("is_causal")) is None:
        is_causal = getattr(layer.module, "is_causal", True)
    causal = base == "sdpa" and mask is None and query.shape[2] > 1 and bool(is_causal)
    if causal:
        key = key[:, :, : query.shape[2]]  # the other positions of a static cache are empty
    if probs is not None:
        last_mask = None if mask is None else mask[:, :, -1:]
        last = Wanted(None, None, None).from_scores(query[:, :, -1:], key, last_mask, causal=False, **scores)
        theirs = torch.special.entr(probs[:, :, -1].detach().to(last.entropy.dtype)).sum(-1)
        ours = last.entropy[:, 0]
        half = query.dtype.itemsize == 2 or torch.is_autocast_enabled(query.device.type)
        limit = SAME_ENTROPY_HALF if half else SAME_ENTROPY
        if ((ours - theirs).abs() > limit)[ours > 0].any():  # a query that attends to nothing has uniform probabilities there
            raise InputError(f"{_named(layer)} has attention probabilities that differ from the softmax of its queries and keys.")
    return wanted.from_scores(query, key, mask, causal=causal, sliding=options.get("sliding_window") is not None, **scores)


def _hook_probabilities(layer: AttentionLayer, capture: _Capture, stack: ExitStack) -> None:
    """Makes the module return its probabilities until the stack closes; callers that did not request them do not get them."""
    module = layer.module
    signature = inspect.signature(module.forward)
    forward: Any = inspect.unwrap(type(module).forward)
    if "output_attentions" not in signature.parameters or "_attn_implementation" in forward.__code__.co_names:  # else it has another path
        raise InputError(f"model must use transformers' attention interface or return its probabilities, got neither in {_named(layer)}.")
    asked: list[bool] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if module.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.children()):
            raise InputError(f"model must be in eval mode for its statistics, got {_named(layer)}, which applies dropout.")
        bound = signature.bind(*args, **kwargs)
        asked.append(bool(bound.arguments.get("output_attentions")))
        bound.arguments["output_attentions"] = True
        return bound.args, bound.kwargs

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        place = [i for i, part in enumerate(output) if isinstance(part, Tensor) and part.dim() == 4 and part.shape[1] == layer.num_heads]
        if not isinstance(output, tuple) or len(place) != 1:
            raise InputError(f"{_named(layer)} does not return its probabilities (B, {layer.num_heads}, T, T).")
        mask = signature.bind(*args, **kwargs).arguments.get("attention_mask")
        probs = output[place[0]]
        capture.report(layer, lambda: capture.wanted.from_probabilities(probs, mask))
        return output if asked.pop() else (*output[: place[0]], None, *output[place[0] + 1 :])

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    # Prepended, so that the hook of the inner block runs first.
    stack.callback(module.register_forward_hook(after, with_kwargs=True, prepend=True).remove)
