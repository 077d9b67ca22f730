"""DynNSA in models of transformers: `attn_implementation="dyn_nsa"`, and conversion of a trained model.

Importing this module registers three things with transformers: an attention function and the masks it takes, both named "dyn_nsa", and
the loader of converted models. The loader uses the hook by which transformers changes a model between building it and reading its
weights, the one of quantisation: a converted model's config.json carries `quantization_config = {"quant_method": "dyn_nsa", ...}`, so
`from_pretrained` adds the same parts again, and without tinyonn imported it warns of the unknown method. Nothing is quantised.

The attention function sees queries after their rotation; its branch gates are made of those.

Selection is computed where the attention function is called, which under gradient checkpointing is inside the checkpointed layer. It is
deterministic, so recomputation selects the same blocks; tau_source="output" hands its tau in from outside the layer.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import InputError
from ..nn.block_compression import block_starts, blocks_of
from ..nn.dyn_nsa import MIN_MAX_BLOCKS, OPEN, CompressedCache, DynNSACore, DynNSAOptions, TauSource, common_dtype, normalised_entropy
from ..ops import dyn_nsa
from .interfaces import attention_implementation, register_attention

DYN_NSA = "dyn_nsa"
_PROBE = "dyn_nsa_probe"
_PART = "dyn_nsa"  # name of a core within its attention module
MAX_HEAD_DIM = 256
OBSERVED_TOKENS = 256  # of a row, about, evenly spread, whose output entropy is taken in training: logits are large

# What a model may hand to its attention function that has no bearing on the result here.
_WITHOUT_EFFECT = {
    "cache_position", "cu_seq_lens_k", "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states", "position_embeddings",
    "position_ids", "return_dict", "use_cache",
}  # fmt: skip


def dyn_nsa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    tau: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' AttentionInterface.

    A layer that `convert_attention` has changed uses its own parts. Another one runs DynNSA without learnable parts: means of blocks,
    gates (0, 1, 0) and all blocks, or what the fields of `DynNSAOptions` in the dict `config.dyn_nsa` say. A layer with a sliding
    window, which is local already, runs SDPA.

    Args:
        module: the attention module.
        query: (B, H, T, D). key, value: (B, K, Tk, D).
        attention_mask: of `dyn_nsa_mask`.
        tau: (), (B,), (B, T) or (B, T, K) in [0, 1], handed through by `model(..., tau=...)`; None for that of the layer's options.
        cu_seq_lens_q: (sequences + 1,) int32, sequences packed in one row.

    Returns:
        out (B, T, H, D), and None for the weights.

    Raises:
        InputError: dropout, a mask other than padding, or an argument of unknown meaning.
    """
    if sliding_window is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    name = type(module).__name__
    unknown = sorted(key for key, given in kwargs.items() if given is not None and given is not False and key not in _WITHOUT_EFFECT)
    if unknown:
        raise InputError(f"attn_implementation='dyn_nsa' must not be given {', '.join(unknown)}, which it lacks; {name} passes it.")
    if dropout:
        raise InputError(f"attention dropout must be 0 for attn_implementation='dyn_nsa', got {dropout} in {name}.")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise InputError(f"attention must be causal for attn_implementation='dyn_nsa', got {name}.")
    core = getattr(module, _PART, None)
    bounds: dict[str, Tensor | None] = {}
    rows = None
    if cu_seq_lens_q is not None:
        bounds["cu_seqlens"] = cu_seq_lens_q.int()
    elif attention_mask is not None:
        if attention_mask.dtype == torch.bool or attention_mask.is_floating_point():
            raise InputError(
                "attention_mask must be None or (batch, tokens) of padding for attn_implementation='dyn_nsa'; packed sequences are told by "
                f"cu_seq_lens_q, got a mask of shape {tuple(attention_mask.shape)}."
            )
        rows = attention_mask[:, 0, 0]
    compressed: tuple[Tensor | None, Tensor | None] = (None, None)
    if core is not None and core.collecting and not torch.compiler.is_compiling() and (kept := _kept.get(core)) is not None:
        compressed = kept.extend(core, key, value, query.shape[2], rows)
    if rows is not None:
        key, value, bounds["key_start"], bounds["key_end"] = _within_bounds(key, value, rows)
    query, key, value = (x.transpose(1, 2) for x in common_dtype(query, key, value))
    if core is None:
        return _without_parts(module, query, key, value, tau, scaling, bounds), None
    gates = core.gates(query)
    # The previous token's uncertainty comes in as `tau`, so it is recomputed with the same one: see `_before`.
    tau = core.tau_of(tau, query, decoding=False)
    result = core(query, key, value, gates, key_compressed=compressed[0], value_compressed=compressed[1], tau=tau, scale=scaling, **bounds)
    loss = core.budget_loss(result)  # recomputation must save the same tensors, so it does this too
    if core.collecting:
        core.record(result, gates)
        core.collected = loss if core.training else None
    return result.out, None


def dyn_nsa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """A mask function for transformers' AttentionMaskInterface: where each row begins and ends, instead of a T × Tk mask.

    Args:
        q_offset: position of the first query; a 0-d tensor where the cache is a buffer.

    Returns:
        None for rows without padding whose last key is the last query's. (B, 1, 1, 2) int32, first key and one past the last; with a
        third number, one past the last query's position, where the keys are a buffer that is longer. A bool mask, as for SDPA, for
        layers with a sliding window, and for what cannot be said with such bounds.

    Raises:
        InputError: padding between tokens.
    """
    compiling = torch.compiler.is_compiling()
    plain = mask_function is causal_mask_function
    if not plain and local_size is None and not use_vmap and kv_offset == 0 and compiling:
        # While compiling, transformers never says whether sequences are packed, but masks as if they were; checked when it runs.
        row, place = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)[None]
        seen = mask_function(row, torch.zeros_like(row), place, place - 1)
        torch._assert_async(torch.as_tensor(seen).all(), "sequences must not be packed under torch.compile with dyn_nsa")
        plain = True
    if not plain or local_size is not None or kv_offset != 0:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, use_vmap=use_vmap,
            device=device, **kwargs,
        )  # fmt: skip
    is_buffer = isinstance(q_offset, Tensor) or kv_length != q_offset + q_length
    query_end = q_offset + q_length
    if attention_mask is None:
        if not is_buffer:
            return None
        start = torch.zeros(batch_size, dtype=torch.int32, device=device)
        end = start + query_end
    else:
        padding = attention_mask[:, :kv_length].bool()
        if not is_buffer and not compiling and padding.shape[1] == kv_length and bool(padding.all()):
            return None
        place = torch.arange(1, padding.shape[1] + 1, device=device)
        end = (padding * place).amax(-1)
        start = torch.where(end > 0, padding.int().argmax(-1), 0)
        whole = (padding.sum(-1) == end - start).all()
        message = "attention_mask must hold padding only before or after a row's tokens, got padding between them."
        if compiling:
            torch._assert_async(whole, message)
        elif not whole:
            raise InputError(message)
    bounds = [start, end]
    if is_buffer:
        bounds.append(torch.zeros_like(start) + query_end)
    return torch.stack([bound.int() for bound in bounds], -1)[:, None, None]


def _within_bounds(key: Tensor, value: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values whose last one is the last query's, and where rows begin and end among them."""
    start, end, *query_end = bounds.unbind(-1)
    if query_end:
        # A buffer holds room behind the last token: turned round, so that it lies in front of the first.
        size, last = key.shape[2], query_end[0][0]
        place = (torch.arange(size, device=key.device) + last) % size
        key, value = key.index_select(2, place), value.index_select(2, place)
        start, end = start + (size - last), end + (size - last)
    return key, value, start, end


def _without_parts(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tau: Tensor | None,
    scale: float | None,
    bounds: dict[str, Tensor | None],
) -> Tensor:
    start: dict[str, Any] = {"max_blocks": None, "start_gates": (0.0, 1.0, 0.0), "base": OPEN, "slope": 0.0, "learnable_compression": False}
    options = DynNSAOptions(**{**start, **getattr(module.config, "dyn_nsa", {})})
    if options.learnable_compression or options.tau_source == "output" or options.budget_weight:
        raise InputError("config.dyn_nsa must ask for nothing learnt or collected; convert_attention adds the parts for that.")
    batch, tokens, heads, _ = query.shape
    num_keys, num_kv = key.shape[1:3]
    starts = block_starts(num_keys, options.compress_size, bounds.get("key_start"), bounds.get("cu_seqlens"))
    compressed = [blocks_of(x, options.compress_size, starts).mean(2) for x in (key, value)]
    if tau is None and options.tau_source == "constant":
        tau = torch.tensor(options.tau, device=query.device)
    if tau is not None:
        while tau.dim() < 3:
            tau = tau.unsqueeze(-1)
        tau = tau.float().expand(batch, tokens, num_kv).contiguous()
    gates = query.new_tensor(options.start_gates).expand(batch, tokens, heads, 3)
    base, slope = (query.new_full((num_kv,), number) for number in (options.base, options.slope))
    with torch.autocast(query.device.type, enabled=False):
        return dyn_nsa(
            query, key, value, compressed[0], compressed[1], gates, base, slope, tau=tau, window=options.window,
            temperature=options.temperature, block_size=options.block_size, compress_size=options.compress_size,
            max_blocks=options.max_blocks or max(MIN_MAX_BLOCKS, -(-num_keys // options.block_size)), detach_scores=options.detach_scores,
            scale=scale, impl=options.impl, cu_seqlens=bounds.get("cu_seqlens"), key_start=bounds.get("key_start"),
            key_end=bounds.get("key_end"),
        ).out  # fmt: skip


# ---- decoding ----


class _Kept:
    """What one layer compressed for the cache of the last forward, and how to tell that cache from a changed one.

    Whatever reorders, crops or resets a layer of a cache either replaces its tensor of keys or writes to it, which counts up its version.
    """

    def __init__(self, starts: Tensor | None) -> None:
        self.starts = starts  # of rows, as the mask tells them
        self.keys: weakref.ref[Tensor] | None = None
        self.version = -1
        self.compressed = CompressedCache()

    def belongs_to(self, keys: Tensor | None, starts: Tensor | None) -> bool:
        if self.keys is None or keys is None or keys is not self.keys() or keys._version != self.version:
            return False
        return starts is self.starts is None or (starts is not None and self.starts is not None and torch.equal(starts, self.starts))

    def extend(
        self, core: DynNSACore, key: Tensor, value: Tensor, num_queries: int, rows: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compressed keys and values of all positions; (B, K, Tk, D) as the cache gives them."""
        if key.is_inference():
            return None, None  # carries no version
        begin: int | Tensor = 0
        count = key.shape[2]
        if self.keys is not None:
            begin = count - num_queries if rows is None or rows.shape[1] < 3 else rows[0, 2] - num_queries
            count = num_queries
        self.keys, self.version = weakref.ref(key), key._version
        key, value = (x.transpose(1, 2) for x in common_dtype(key, value))
        return self.compressed.extend(core, key, value, begin, count, None if rows is None else rows[:, 0])


_kept: weakref.WeakKeyDictionary[DynNSACore, _Kept] = weakref.WeakKeyDictionary()  # only while a forward with a cache may use it


def _recall(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Readies each core to go on from what it compressed for this cache, if that is unchanged, or to begin."""
    layers = getattr(kwargs.get("past_key_values"), "layers", None)
    if model.training or torch.is_grad_enabled():
        layers = None
    starts = _starts(kwargs.get("attention_mask"))
    for module in model.modules():
        core = module._modules.get(_PART)
        if not isinstance(core, DynNSACore):
            continue
        index = getattr(module, "layer_idx", None)
        if layers is None or index is None:
            _kept.pop(core, None)
            continue
        keys = layers[index].keys if index < len(layers) else None
        kept = _kept.get(core)
        if kept is None or not kept.belongs_to(keys, starts):
            _kept[core] = _Kept(starts)


def _starts(mask: Any) -> Tensor | None:
    """(B,) first token of each row, of a mask that a model is given: of padding, of `dyn_nsa_mask`, or several of those by kind."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    return mask.int().argmax(-1) if mask.dim() == 2 else mask[:, 0, 0, 0].long()


# ---- conversion ----


def convert_attention(
    model: PreTrainedModel,
    *,
    compress_size: int = 64,
    block_size: int = 64,
    window: int = 512,
    temperature: float = 1.0,
    base: float = 0.0,
    slope: float = 1.0,
    detach_scores: bool = False,
    learnable_compression: bool = True,
    tau_source: TauSource = "attention",
    tau: float = 0.5,
    impl: str = "auto",
) -> PreTrainedModel:
    """Adds the learnable parts of DynNSA to each attention layer of a model, in place; its outputs stay the same.

    It starts with branch gates (0, 1, 0), a linear function of the query with a gradient there, and with all blocks selected: `opening`
    is -30. `BudgetSchedule` lowers the budget. Compression starts as the mean. Attention layers are found by running the model on two
    tokens; layers with a sliding window are left as they are.

    The model saves with `save_pretrained`, and loads with `from_pretrained` once this module is imported. Its gradient checkpointing
    must be the non-reentrant kind, which is transformers' own choice. The budget loss is added to the loss that the model returns for
    `labels`; for a loss of your own, add `collected_budget_loss(model)`.

    Args:
        model: a causal decoder that asks AttentionInterface.
        compress_size … impl: see `DynNSAOptions`.

    Returns:
        The model.

    Raises:
        InputError: already converted, or quantised; no layer to convert; attention that DynNSA lacks (softcap, sinks, dropout, values of
            another size than keys).
    """
    if next(cores(model), None) is not None:
        raise InputError("model must not have been converted before.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError("model must not be quantised: its configuration has one quantization_config, which conversion needs.")
    options = DynNSAOptions(
        compress_size=compress_size, block_size=block_size, window=window, temperature=temperature, max_blocks=None,
        detach_scores=detach_scores, learnable_compression=learnable_compression, start_gates=(0.0, 1.0, 0.0), base=base, slope=slope,
        tau_source=tau_source, tau=tau, impl=impl,
    )  # fmt: skip
    layers = _attention_layers(model)
    conversion = DynNSAConversion(dataclasses.asdict(options), layers)
    _add_parts(model, conversion)
    model.config.quantization_config = conversion
    model.set_attn_implementation(DYN_NSA)
    return model


def cores(model: nn.Module) -> Iterator[DynNSACore]:
    """The parts that conversion has added, in the order of the layers."""
    return (module for module in model.modules() if isinstance(module, DynNSACore))


def statistics(model: nn.Module, *, reset: bool = False) -> dict[str, dict[str, float]]:
    """Running statistics of each converted layer, by name; see `DynNSACore.statistics`.

    Args:
        reset: begin anew.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, DynNSACore):
            found[name] = module.statistics()
            if reset:
                module.reset_statistics()
    return found


def collected_budget_loss(model: nn.Module) -> Tensor:
    """Mean over layers of the budget loss of the last forward in training mode, if the model had no labels to add it to a loss of its own.

    Returns:
        0-d.

    Raises:
        RuntimeError: there was no such forward, or its loss has been taken.
    """
    loss = _take_budget_loss(model)
    if loss is None:
        raise RuntimeError("collected_budget_loss must follow a forward of a converted model without labels, got none.")
    return loss


def _attention_layers(model: PreTrainedModel) -> dict[str, list[int]]:
    """Name of each full attention layer and its query heads, key heads and head size."""
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad(), attention_implementation(model, _PROBE):
        _probed.clear()
        try:
            model(torch.zeros((1, 2), dtype=torch.long, device=model.device), use_cache=False)
            found = list(_probed)
        finally:
            _probed.clear()
    layers = {}
    for module, query, key, value, given in found:
        if given.pop("sliding_window", None) is not None:
            continue
        name = type(module).__name__
        unknown = sorted(key for key, x in given.items() if x is not None and x is not False and key not in _WITHOUT_EFFECT)
        if unknown:
            raise InputError(f"model must not pass {', '.join(unknown)} to its attention, which DynNSA lacks; {name} does.")
        if getattr(module, "attention_dropout", 0):
            raise InputError(f"attention dropout must be 0 to convert, got {module.attention_dropout} in {name}.")
        if not getattr(module, "is_causal", True):
            raise InputError(f"attention must be causal to convert, got {name}.")
        if value != key or query[3] > MAX_HEAD_DIM:
            raise InputError(f"{name} must have keys and values of one size, at most {MAX_HEAD_DIM}, got {key[3]} and {value[3]}.")
        layers[names[module]] = [query[1], key[1], query[3]]
    if not layers:
        raise InputError(
            f"{type(model).__name__} must have attention layers that ask AttentionInterface and have no sliding window, got "
            f"{len(found)} with one."
        )
    return layers


_probed: list[tuple[nn.Module, torch.Size, torch.Size, torch.Size, dict[str, Any]]] = []


def _probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    _probed.append((module, query.shape, key.shape, value.shape, kwargs))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal)


def _add_parts(model: nn.Module, conversion: DynNSAConversion) -> None:
    options = DynNSAOptions(**conversion.options)
    for name, (heads, kv_heads, dim) in conversion.layers.items():
        module = model.get_submodule(name)
        weight = next(module.parameters())
        core = DynNSACore(heads, kv_heads, dim, options, opening=OPEN, device=weight.device, dtype=weight.dtype)
        module.add_module(_PART, core.train(module.training))
    model.register_forward_pre_hook(_before, with_kwargs=True)
    model.register_forward_hook(_after, with_kwargs=True)


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Readies the cores to collect; tells the tau of outputs from outside, so that recomputation in backward sees the same."""
    if not torch.compiler.is_compiling():
        _recall(model, kwargs)
    first = None
    for core in cores(model):
        first = first or core
        core.collecting, core.collected = True, None
    if first is None or first.options.tau_source != "output" or kwargs.get("tau") is not None:
        return None
    tau, tokens = first.output_tau.clone(), _tokens(args, kwargs)
    past = kwargs.get("past_key_values")
    previous = first.previous_tau
    if not model.training and previous is not None and tokens.shape[:2] == (len(previous), 1) and past is not None:
        tau = torch.where(torch.as_tensor(past.get_seq_length(), device=tau.device) > 0, previous, tau)
    return args, {**kwargs, "tau": tau}


def _after(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Adds the budget loss to the model's; takes note of the output's entropy."""
    first = None
    for core in cores(model):
        first = first or core
        core.collecting = False
    if first is None:
        return output
    if first.options.tau_source == "output" and hasattr(output, "logits"):
        logits = output.logits if model.training else output.logits[:, -1:]
        mask = kwargs.get("attention_mask")
        mask = mask[:, -logits.shape[1] :] if isinstance(mask, Tensor) and mask.dim() == 2 else None
        step = max(1, logits.shape[1] // OBSERVED_TOKENS)
        entropy = normalised_entropy(logits[:, ::step])
        mask = None if mask is None else mask[:, ::step]
        for core in cores(model):
            core.observe_output(entropy, mask)
    labels = kwargs.get("labels")
    if not first.options.budget_weight or labels is None or not model.training:
        return output
    loss = _take_budget_loss(model)
    assert loss is not None
    if torch.is_grad_enabled() and not loss.requires_grad and first.base.requires_grad:
        raise RuntimeError("gradient checkpointing must have use_reentrant=False for a budget loss, got one without a gradient.")
    if (items := kwargs.get("num_items_in_batch")) is not None:
        # The model's own loss is a share of what the optimiser step gathers; so is this one.
        loss = loss * ((labels != -100).sum() / items)
    if isinstance(output, tuple):
        return (output[0] + loss, *output[1:])
    output["loss"] = output["loss"] + loss
    return output


def _take_budget_loss(model: nn.Module) -> Tensor | None:
    found = []
    for core in cores(model):
        if core.collected is not None:
            found.append(core.collected)
        core.collected = None
    return torch.stack([loss.to(found[0].device) for loss in found]).mean() if found else None


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if given is not None:
            return given
    raise InputError("model must be given input_ids or inputs_embeds.")


# ---- loading ----


@register_quantization_config(DYN_NSA)
class DynNSAConversion(QuantizationConfigMixin):
    """What a converted model's configuration says of its conversion; a `quantization_config` in name only.

    Args:
        options: fields of `DynNSAOptions`.
        layers: name of each converted attention layer -> query heads, key heads, head size.
    """

    def __init__(self, options: dict[str, Any], layers: dict[str, list[int]], **kwargs: Any) -> None:
        self.quant_method = DYN_NSA  # type: ignore[assignment]
        self.options = options
        self.layers = layers


@register_quantizer(DYN_NSA)
class DynNSALoader(HfQuantizer):
    """Adds the parts between building a model and reading its weights; leaves no mark of a quantised model behind."""

    quantization_config: DynNSAConversion
    requires_calibration = True  # loads converted models only; convert_attention converts

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        if config._attn_implementation is None:
            config._attn_implementation = DYN_NSA
        return config

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        _add_parts(model, self.quantization_config)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del model.hf_quantizer
        model.config.quantization_config = self.quantization_config
        for core in cores(model):
            core.reset_statistics()  # not saved, and no memory of theirs was ever set

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


# ---- schedule ----


class BudgetSchedule(TrainerCallback):
    """Takes a converted model from all blocks to a budget; a Trainer's callback, or called by hand before each step.

    Over `steps` optimiser steps, with s the share of them done: opening goes as -30 · (1 - s)³ to 0, where the learnt thresholds alone
    decide; the budget loss's target goes from `start` to `target` geometrically.

    Args:
        target: key blocks per query, forced ones included, at the end.
        steps: optimiser steps until then.
        start: the loss's target at the beginning.
        weight: of the budget loss, from the first step on.
        max_blocks: most blocks of a query from the end on; None for no limit.
    """

    def __init__(self, target: float, steps: int, *, start: float = 64.0, weight: float = 0.1, max_blocks: int | None = None) -> None:
        if target <= 0 or start <= 0:
            raise ValueError(f"target and start must be positive, got {target} and {start}.")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        if weight < 0:
            raise ValueError(f"weight must be at least 0, got {weight}.")
        if max_blocks is not None and max_blocks < MIN_MAX_BLOCKS:
            raise ValueError(f"max_blocks must be at least {MIN_MAX_BLOCKS}, the forced ones, got {max_blocks}.")
        self.target, self.steps, self.start, self.weight, self.max_blocks = target, steps, start, weight, max_blocks

    def opening(self, step: int) -> float:
        """Added to base at a step."""
        return OPEN * (1 - self._share(step)) ** 3

    def target_at(self, step: int) -> float:
        """Blocks per query that the loss pulls towards at a step."""
        share = self._share(step)
        return float(self.start ** (1 - share) * self.target**share)

    def apply(self, model: nn.Module, step: int) -> None:
        """Sets a model to the step that is about to be taken, counted from 0."""
        options: dict[str, Any] = {"budget_weight": self.weight}
        if self.max_blocks is not None and step >= self.steps:
            options["max_blocks"] = self.max_blocks
        for core in cores(model):
            core.opening.fill_(self.opening(step))
            core.budget_target.fill_(self.target_at(step))
            for name, value in options.items():
                if getattr(core.options, name) != value:
                    setattr(core.options, name, value)
        for module in model.modules():
            conversion = getattr(getattr(module, "config", None), "quantization_config", None)
            if isinstance(conversion, DynNSAConversion):
                conversion.options.update(options)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        self.apply(model, state.global_step)

    def _share(self, step: int) -> float:
        return min(max(step / self.steps, 0.0), 1.0)


register_attention(DYN_NSA, dyn_nsa_attention, mask=dyn_nsa_mask)
register_attention(_PROBE, _probe, mask="sdpa")
