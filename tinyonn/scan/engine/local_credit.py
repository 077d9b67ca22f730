"""Attention whose keys and values get gradients only on the diagonal.

    s_tj = softcap(q_t·k_j·scale) + mask_tj     p = softmax over j (a sink adds to the denominator)     o_t = Σ_j p_tj v_j

Forward is ordinary attention. Backward treats k_j and v_j of every other token as constants, as a decoding loop with a detached
cache does, so a token's loss reaches nothing but that token's own positions:

    ds_tj = p_tj (do_t·v_j − do_t·o_t)     dq_t = Σ_j ds_tj k_j·scale     dk_t = ds_tt q_t·scale     dv_t = p_tt do_t

with ds times 1 − (s/softcap)² under a softcap, and dk, dv summed over the query heads of a group.

B sequences, H query heads, K key heads, G = H / K, T tokens, D head dim. Tensors are (B, H, T, D), as transformers passes them.
The probabilities are recomputed in backward, a few query rows at a time: nothing of size T × T outlives one step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...errors import InputError
from ...hf.interfaces import install_attention

LOCAL_CREDIT = "tinyonn_local_credit"
STEP_ELEMENTS = 1 << 22  # scores in memory at once, over all sequences and heads

# Arguments that do not affect the result here: the mask includes the window, and there is no cache.
WITHOUT_EFFECT = frozenset(
    {"sliding_window", "position_ids", "use_cache", "cache_position", "output_hidden_states", "return_dict", "position_embeddings"}
)


def local_credit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' AttentionInterface.

    Args:
        module: attention module, named in errors.
        query: (B, H, T, D). key: (B, K, T, D). value: (B, K, T, Dv).
        attention_mask: bool, broadcastable to (B, H, T, T), True for keys to attend to; None for causal.
        scaling: factor of the scores; None for 1/sqrt(D).
        softcap: limit of the scores, softcap·tanh(score / softcap).
        s_aux: (H,) logit of each head's sink.

    Returns:
        out (B, T, H, Dv), and None for the weights.

    Raises:
        InputError: there is dropout, a cache, attention that is not causal, or an unknown argument.
    """
    name = type(module).__name__
    unknown = sorted(key for key, given in kwargs.items() if given is not None and given is not False and key not in WITHOUT_EFFECT)
    if unknown:
        raise InputError(
            f"credit must be 'full' for this model: {name} passes {', '.join(unknown)} to its attention, which local credit lacks."
        )
    if dropout:
        raise InputError(f"dropout must be 0 for credit='local', got {dropout} in {name}.")
    if query.shape[2] != key.shape[2]:
        raise InputError(
            f"credit='local' must see whole sequences without a cache, got {query.shape[2]} queries and {key.shape[2]} keys in {name}."
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise InputError(f"credit must be 'full' for this model: {name} adds a {attention_mask.dtype} mask to its scores.")
    if attention_mask is None and not causal:
        raise InputError(f"credit must be 'full' for this model: {name} attends to later tokens.")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out: Tensor = _LocalCreditAttention.apply(query, key, value, attention_mask, s_aux, scaling, softcap)
    return out.transpose(1, 2).contiguous(), None


class _LocalCreditAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask, sinks)
        ctx.scale, ctx.softcap = scale, softcap
        if softcap is None and sinks is None:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
        out = query.new_empty(*query.shape[:3], value.shape[3])
        for rows in _row_steps(query):
            probs, _ = _probabilities(query, key, mask, sinks, scale, softcap, rows)
            seen = value[:, :, None, : probs.shape[-1]].to(probs.dtype)
            _split_heads(out, key.shape[1])[..., rows, :] = (probs @ seen).to(out.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, sinks = ctx.saved_tensors
        heads = key.shape[1]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
        for rows in _row_steps(query):
            probs, slope = _probabilities(query, key, mask, sinks, ctx.scale, ctx.softcap, rows)
            grad = _split_heads(grad_out, heads)[..., rows, :].to(probs.dtype)
            seen = slice(probs.shape[-1])
            grad_scores = grad @ value[:, :, None, seen].mT.to(probs.dtype)
            grad_scores -= (grad_scores * probs).sum(-1, keepdim=True)
            grad_scores *= probs
            if slope is not None:
                grad_scores *= slope
            grad_scores *= ctx.scale
            _split_heads(grad_query, heads)[..., rows, :] = (grad_scores @ key[:, :, None, seen].to(probs.dtype)).to(query.dtype)
            own = _split_heads(query, heads)[..., rows, :].to(probs.dtype)
            grad_key[:, :, rows] = (_diagonal(grad_scores, rows) * own).sum(2).to(key.dtype)
            grad_value[:, :, rows] = (_diagonal(probs, rows) * grad).sum(2).to(value.dtype)
        return grad_query, grad_key, grad_value, None, None, None, None


def _row_steps(query: Tensor) -> list[slice]:
    sequences, heads, tokens, _ = query.shape
    step = max(1, STEP_ELEMENTS // (sequences * heads * tokens))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float | None, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, K, G, rows, seen) of some query rows, in float32 or wider, and the softcap's slope there.

    Under a mask, all T keys count as seen; without one, those up to the last of the rows.
    """
    heads = key.shape[1]
    if mask is None:
        key = key[:, :, : rows.stop]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = _split_heads(query, heads)[..., rows, :].to(dtype) @ key[:, :, None].mT.to(dtype)
    scores *= scale
    slope = None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = capped * softcap, 1 - capped * capped
    if mask is None:
        position = torch.arange(rows.stop, device=query.device)
        visible = position <= position[rows, None]
    else:
        visible = mask[..., rows, :].expand(len(query), -1, -1, -1)
        visible = visible[:, :, None] if visible.shape[1] == 1 else _split_heads(visible, heads)
    scores.masked_fill_(~visible, -torch.inf)
    if sinks is None:
        probs = torch.softmax(scores, -1)
    else:
        sink = sinks.to(dtype).view(1, heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        probs = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    return probs, slope


def _split_heads(x: Tensor, key_heads: int) -> Tensor:
    """(B, H, ...) as (B, K, G, ...), a view."""
    return x.unflatten(1, (key_heads, -1))


def _diagonal(x: Tensor, rows: slice) -> Tensor:
    """(B, K, G, rows, seen) -> (B, K, G, rows, 1): what each row holds of its own token."""
    return x[..., rows].diagonal(dim1=-2, dim2=-1)[..., None]


install_attention(LOCAL_CREDIT, local_credit_attention, mask="sdpa")
