"""The attention function of `attn_implementation="dyn_nsa"`.

The branch gates are computed from the queries after their rotation.

Under gradient checkpointing, blocks are selected inside the checkpointed layer. Selection is deterministic, so recomputation selects the
same blocks. With tau_source="output", tau is computed outside the layer and passed in.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import InputError
from ...nn.block_compression import block_starts, blocks_of
from ...nn.block_shares import Scores
from ...nn.dyn_nsa import attend, checked_price, common_dtype
from ..interfaces import install_attention
from .decoding import compressed_so_far
from .masks import dyn_nsa_mask, gathered, layout_of, within_bounds
from .observing import plain_attention
from .options import checked_options, checked_tau, open_price
from .parts import ARRIVALS, DYN_NSA, core_of
from .plain import ScoreShape, checked_shape, mask_of_bounds, plain_layer

# Arguments that a model may pass to its attention function, and that do not change the result here.
_WITHOUT_EFFECT = {
    "cache_position", "cu_seq_lens_k", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "position_embeddings", "position_ids", "return_dict", "seq_idx", "shift_labels", "use_cache",
}  # fmt: skip

# Values of `layer_types` for layers that see only a part of the past, whether or not they pass a sliding_window.
_LOCAL_TYPES = {"sliding_attention", "chunked_attention", "window_attention", "hybrid_sliding", "reference_sliding_attention"}


def is_local(module: nn.Module, sliding_window: int | None) -> bool:
    """Whether an attention layer sees only a part of the past, so that it stays as it is."""
    types, index = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    if sliding_window is not None:
        return True
    return core_of(module) is None and types is not None and index is not None and index < len(types) and types[index] in _LOCAL_TYPES


def unknown_arguments(given: dict[str, Any]) -> list[str]:
    """Names of arguments that a model passes to its attention function and DynNSA does not support."""
    return sorted(name for name, value in given.items() if value is not None and value is not False and name not in _WITHOUT_EFFECT)


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
    tau: Tensor | float | None = None,
    block_price: Tensor | float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' AttentionInterface.

    A layer that `convert_attention` has converted uses its own parts. Other layers attend to all that they see, as in an unconverted
    model. Where a model sets the dict `config.dyn_nsa`, fields of `DynNSAOptions`, its layers without a sliding window or chunks run DynNSA
    without learned parts: with means of blocks, gates (0, 1, 0), and all blocks unless the dict sets something sparser.

    Args:
        module: attention module of a layer.
        query: (B, H, T, D). key, value: (B, K, Tk, D).
        attention_mask: mask from `dyn_nsa_mask`: padding, also between tokens, and sequences packed in rows by `position_ids`.
        tau: (), (B,), (B, T) or (B, T, K) in [0, 1], passed as `model(..., tau=...)`; None for the tau of the layer's options.
        block_price: number or 0-d, in nats, passed as `model(..., block_price=...)` or `generate(..., block_price=...)`; None for the price
            of the model. A lower one reads more blocks.
        cu_seq_lens_q: (sequences + 1,) int32, bounds of the sequences packed in one row; None to take them from the mask.
        softcap: bound of the scores, softcap · tanh(score / softcap); of every branch.
        s_aux: (H,), sinks: the score of each head's additional key, whose value is 0; in the softmax of every branch.

    Returns:
        out (B, T, H, D), 0 for queries that are padding, and None for the weights.

    Raises:
        InputError: dropout; attention that is not causal; a mask other than padding; padding together with cu_seq_lens_q; a tau of another
            shape; an argument that is not supported. TypeError, ValueError: see `checked_price` and `checked_tau`.
    """
    name, local = type(module).__name__, is_local(module, sliding_window)
    arrivals: list[nn.Module] | None = kwargs.pop(ARRIVALS, None)
    if unknown := unknown_arguments(kwargs):
        raise InputError(f"{name} passes {', '.join(unknown)} to its attention, and attn_implementation='dyn_nsa' does not support it.")
    shape = checked_shape(name, query.shape[1], softcap, s_aux)
    how: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal}
    if local:
        return plain_layer(module, query, key, value, attention_mask, shape, **how), None
    core = core_of(module)
    if core is not None and core.base.is_meta and not query.is_meta:
        raise InputError(f"weights of the converted {name} are offloaded; use a device_map that keeps its layer on a device.")
    if arrivals is not None and core is not None:
        arrivals.append(core)
    whole = core is None and not _own_options(module)  # a full layer that nothing was chosen for
    if whole and arrivals is None and (tau is not None or block_price is not None):
        raise InputError(f"tau and block_price need a model that convert_attention has converted, or config.dyn_nsa; {name} has neither.")
    if dropout and not whole:
        raise InputError(f"attention dropout must be 0 for attn_implementation='dyn_nsa', got {dropout} in {name}.")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise InputError(f"attention must be causal for attn_implementation='dyn_nsa', and that of {name} is not.")
    own = core is not None and core.options.tau_source == "output"
    tau = None if tau is None else checked_tau(tau, (query.shape[0], query.shape[2], key.shape[1]), query, own=own)
    price = None if block_price is None else checked_price("block_price", block_price)
    original = key
    rows, sequences, compaction = layout_of(attention_mask, query.shape[0], cu_seq_lens_q)
    bounds: dict[str, Tensor | None] = {"cu_seqlens": sequences}
    compressed: tuple[Tensor | None, Tensor | None] = (None, None)
    query_order = None
    if compaction is not None:
        rows, query_order = compaction.rows, compaction.queries(query.shape[2])
        tau = None if tau is None else gathered(tau, query_order, 1)
        query, key, value = gathered(query, query_order, 2), gathered(key, compaction.order, 2), gathered(value, compaction.order, 2)
    if core is not None and sequences is None and core.watch is None:
        compressed = compressed_so_far(core, original, key, value, query.shape[2], rows)
    between: list[Tensor] | None = None
    if rows is not None:
        key, value, *between = within_bounds(key, value, rows)
        bounds["key_start"], bounds["key_end"] = between
    if whole:
        mask = mask_of_bounds(query, key, between, sequences)
        query, key, value = common_dtype(query, key, value)
        out = plain_layer(module, query, key, value, mask, shape, **how)
        return _in_place(out, query_order), None
    query, key, value = (x.transpose(1, 2) for x in common_dtype(query, key, value))
    batch, tokens = query.shape[:2]
    if sequences is not None and cu_seq_lens_q is None:  # bounds of all rows laid end to end
        query, key, value = (x.flatten(0, 1)[None] for x in (query, key, value))
        tau = None if tau is None else tau.flatten(0, 1)[None]
    if core is None:
        out = _without_parts(module, query, key, value, tau, price, scaling, shape, bounds)
        return _in_place(out.reshape(batch, tokens, *out.shape[2:]), query_order), None
    gates = core.gates(query)
    # The previous token's uncertainty is passed in as `tau`, so recomputation uses the same value; see `hooks`.
    tau = core.tau_of(tau, query, decoding=False)
    if core.watch is not None:
        plain = plain_attention(
            core, query, key, value, gates, tau=tau, price=price, scale=scaling, key_start=bounds.get("key_start"),
            key_end=bounds.get("key_end"), cu_seqlens=sequences, **shape._asdict(),
        )  # fmt: skip
        if plain is not None:
            return _in_place(plain.reshape(batch, tokens, *plain.shape[2:]), query_order), None
    result = core(
        query, key, value, gates, key_compressed=compressed[0], value_compressed=compressed[1], tau=tau, price=price, scale=scaling,
        **shape._asdict(), **bounds,
    )  # fmt: skip
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, shape.softcap, shape.sinks)
    sums = core.loss_sums(result, query, key, scores, **bounds)  # also in recomputation, which must save the same tensors
    if core.collecting:
        core.record(result, gates, key.shape[1], key_start=bounds.get("key_start"), cu_seqlens=bounds.get("cu_seqlens"))
        if core.training:
            core.collected = [*core.collected, sums]  # some families call a layer several times in a forward
    return _in_place(result.out.reshape(batch, tokens, *result.out.shape[2:]), query_order), None


def _own_options(module: nn.Module) -> Any:
    """The fields of options that a model sets without a conversion; see `dyn_nsa_attention`."""
    return getattr(getattr(module, "config", None), "dyn_nsa", None)


def _in_place(out: Tensor, order: Tensor | None) -> Tensor:
    """(B, T, H, D), results in the original order of the queries."""
    return out if order is None else gathered(out, order.argsort(-1), 1)


def _without_parts(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tau: Tensor | None,
    price: Tensor | float | None,
    scale: float | None,
    shape: ScoreShape,
    bounds: dict[str, Tensor | None],
) -> Tensor:
    start: dict[str, Any] = {"max_blocks": None, "start_gates": (0.0, 1.0, 0.0), "base": 0.0, "slope": 0.0, "learnable_compression": False}
    start["compress_query"] = False
    given: Any = _own_options(module)
    options = checked_options(given, "config.dyn_nsa", start)
    if "base" not in given:
        options.base = open_price(options)
    if options.learnable_compression or options.compress_query or options.tau_source == "output" or options.budget_weight:
        raise InputError(
            "config.dyn_nsa cannot set learnable_compression, compress_query, tau_source='output' or budget_weight; use convert_attention."
        )
    batch, tokens, heads, _ = query.shape
    num_keys, num_kv = key.shape[1:3]
    starts = block_starts(num_keys, options.compress_size, bounds.get("key_start"), bounds.get("cu_seqlens"))
    compressed = [blocks_of(x, options.compress_size, starts).mean(2) for x in (key, value)]
    if tau is None and options.tau_source == "constant":
        tau = checked_tau(options.tau, (batch, tokens, num_kv), query)
    gates = query.new_tensor(options.start_gates).expand(batch, tokens, heads, 3)
    base, slope = (query.new_full((num_kv,), number) for number in (options.base, options.slope))
    if price is not None:
        base = base + price
    return attend(options, query, key, value, *compressed, gates, base, slope, tau=tau, scale=scale, **shape._asdict(), **bounds).out


install_attention(DYN_NSA, dyn_nsa_attention, mask=dyn_nsa_mask)
