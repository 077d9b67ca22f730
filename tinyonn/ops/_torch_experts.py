"""Mixture of small experts in plain torch: pairs sorted by expert once, then one grouped product a step.

P pairs (token, slot) that name an expert, F features, E experts, I neurons of an expert, K slots of a token
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ._dispatch import statistics_dtype, without_autocast

CLAMP, SWISH = 7.0, 1.702  # of gpt-oss
GROUPED_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Layout(NamedTuple):
    """How weights lie and what lies between the two products; see `ops.expert_mlp`."""

    activation: str
    gated: bool
    interleaved: bool
    transposed: bool


class Pairs(NamedTuple):
    """Pairs sorted by expert; within an expert by token.

    Attributes:
        slot: (P,) place in the (N * K) slots.
        token: (P,).
        expert: (P,).
        ends: (E,) int32, where each expert's pairs end.
        sizes: pairs of each expert.
        places: (N, K) place of each slot among the pairs; P where it is unused.
    """

    slot: Tensor
    token: Tensor
    expert: Tensor
    ends: Tensor
    sizes: list[int]
    places: Tensor


def pairs_of(top_k_index: Tensor, num_experts: int) -> Pairs:
    """An index outside 0 … E − 1 is an unused slot."""
    flat = top_k_index.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    expert, slot = flat.sort(stable=True)
    sizes = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    found = sizes.tolist()
    number = sum(found)
    slot, expert = slot[:number], expert[:number]
    places = torch.full_like(flat, number)
    places[slot] = torch.arange(number, device=flat.device)
    token = slot // max(1, top_k_index.shape[1])
    return Pairs(slot, token, expert, sizes.cumsum(0).to(torch.int32), found, places.view(top_k_index.shape))


def grouped(rows: Tensor, weights: Tensor, pairs: Pairs) -> Tensor:
    """(P, A), (E, A, B) -> (P, B): each expert's rows times its matrix."""
    if _fits(rows) and _fits(weights):
        return functional.grouped_mm(rows, weights, offs=pairs.ends)
    out = rows.new_empty(len(rows), weights.shape[-1])
    for expert, part in _parts(pairs):
        torch.mm(rows[part], weights[expert], out=out[part])
    return out


def grouped_outer(left: Tensor, right: Tensor, pairs: Pairs) -> Tensor:
    """(P, A), (P, B) -> (E, A, B): the sum of outer products of each expert's rows."""
    if _fits(left.T) and _fits(right):
        return functional.grouped_mm(left.T, right, offs=pairs.ends)
    out = left.new_zeros(len(pairs.sizes), left.shape[1], right.shape[1])
    for expert, part in _parts(pairs):
        torch.mm(left[part].T, right[part], out=out[expert])
    return out


def _parts(pairs: Pairs) -> list[tuple[int, slice]]:
    ends = pairs.ends.tolist()
    return [(expert, slice(end - size, end)) for expert, (size, end) in enumerate(zip(pairs.sizes, ends, strict=True)) if size]


def _fits(x: Tensor) -> bool:
    """Whether `grouped_mm` takes it: one of the last two strides 1, the others whole steps of 16 bytes."""
    if x.dtype not in GROUPED_FLOATS or x.numel() == 0 or x.data_ptr() % 16:
        return False
    whole = [stride * x.element_size() % 16 == 0 for stride in x.stride()]
    *outer, row, column = x.stride()
    return all(whole[: len(outer)]) and ((column == 1 and whole[-2]) or (row == 1 and whole[-1]))


def activate(pre: Tensor, layout: Layout) -> Tensor:
    """(P, 2I) -> (P, I), or (P, I) -> (P, I) without a gate."""
    if not layout.gated:
        return _activation(pre, layout.activation)
    gate, up = _halves(pre, layout)
    if layout.activation == "clamped_swiglu":
        up = up.clamp(-CLAMP, CLAMP) + 1
    return _activation(gate, layout.activation) * up


def activate_backward(pre: Tensor, grad: Tensor, layout: Layout) -> Tensor:
    """Gradient of `pre` from that of what `activate` gave."""
    if not layout.gated:
        return _activation_backward(grad, pre, layout.activation)
    gate, up = _halves(pre, layout)
    grad_pre = torch.empty_like(pre)
    grad_gate, grad_up = _halves(grad_pre, layout)
    grad_up.copy_(grad * _activation(gate, layout.activation))
    if layout.activation == "clamped_swiglu":
        grad_up.masked_fill_(up.abs() > CLAMP, 0)
        up = up.clamp(-CLAMP, CLAMP) + 1
    grad_gate.copy_(_activation_backward(grad * up, gate, layout.activation))
    return grad_pre


def _halves(pre: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    if layout.interleaved:
        return pre[..., 0::2], pre[..., 1::2]
    gate, up = pre.chunk(2, -1)
    return gate, up


def _activation(x: Tensor, name: str) -> Tensor:
    match name:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu2":
            return functional.relu(x).square()
    x = x.clamp(max=CLAMP)
    return x * (SWISH * x).sigmoid()


def _activation_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    match name:
        case "silu":
            return torch.ops.aten.silu_backward(grad, x)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, x)
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
        case "relu2":
            return grad * 2 * functional.relu(x)
    sigmoid = (SWISH * x).sigmoid()
    return torch.where(x > CLAMP, 0, grad * sigmoid * (1 + SWISH * x * (1 - sigmoid)))


def _combine(rows: Tensor, pairs: Pairs, weights: Tensor | None) -> Tensor:
    """(P, F) -> (N, F), summed over a token's slots in their order, in float32 or float64."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    total = rows.new_zeros(len(pairs.places), rows.shape[1], dtype=statistics_dtype(rows.dtype))
    for slot in range(pairs.places.shape[1]):
        part = padded[pairs.places[:, slot]].to(total.dtype)
        total.add_(part if weights is None else part.mul_(weights[:, slot : slot + 1]))
    return total


@without_autocast
def experts_forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """out (N, F); and (N * K, 2I), what the activation takes, sorted by expert, 0 behind the last pair."""
    pairs = pairs_of(top_k_index, len(gate_up_proj))
    up, down = (weight if layout.transposed else weight.mT for weight in (gate_up_proj, down_proj))
    whole = hidden_states.new_zeros(top_k_index.numel(), up.shape[-1])
    pre = grouped(hidden_states[pairs.token], up, pairs)
    if gate_up_bias is not None:
        pre += gate_up_bias[pairs.expert]
    whole[: len(pre)] = pre
    rows = grouped(activate(pre, layout), down, pairs)
    if down_bias is not None:
        rows += down_bias[pairs.expert]
    out = _combine(rows, pairs, top_k_weights.to(statistics_dtype(rows.dtype)))
    return out.to(hidden_states.dtype), whole


@without_autocast
def experts_backward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    grad_out: Tensor,
    layout: Layout,
    surprise_kind: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden_states, gate_up_proj, down_proj, top_k_weights and both biases; and the surprise (N, K) or None."""
    pairs = pairs_of(top_k_index, len(gate_up_proj))
    wide = statistics_dtype(hidden_states.dtype)
    up, down = (weight.mT if layout.transposed else weight for weight in (gate_up_proj, down_proj))  # (E, 2I, F), (E, F, I)
    weight = top_k_weights.reshape(-1)[pairs.slot].to(wide).unsqueeze(-1)
    grad_out = grad_out.contiguous().to(hidden_states.dtype)
    pre = pre[: len(pairs.slot)]
    x, h, grad = hidden_states[pairs.token], activate(pre, layout), grad_out[pairs.token]

    grad_h = grouped(grad, down, pairs)
    grad_weight = (grad_h.to(wide) * h).sum(-1)
    if down_bias is not None:
        grad_weight += (grad.to(wide) * down_bias[pairs.expert]).sum(-1)
    grad_pre = activate_backward(pre, grad_h, layout)  # but for the pair's weight, as grad_h is

    surprise = None
    if surprise_kind is not None:
        surprise = _surprise(top_k_index, top_k_weights.to(wide), pairs, surprise_kind, x, h, grad_out, grad_pre, gate_up_bias, down_bias)

    grad_pre = (grad_pre * weight).to(pre.dtype)
    grad = (grad * weight).to(grad.dtype)
    grad_hidden = _combine(grouped(grad_pre, up, pairs), pairs, None).to(hidden_states.dtype)
    grad_up, grad_down = grouped_outer(grad_pre, x, pairs), grouped_outer(grad, h, pairs)
    if layout.transposed:
        grad_up, grad_down = grad_up.mT, grad_down.mT
    slots = torch.zeros(top_k_weights.numel(), dtype=wide, device=grad_weight.device)
    slots[pairs.slot] = grad_weight
    biases = [
        None if bias is None else _sum_by_expert(rows, pairs).to(bias.dtype)
        for bias, rows in ((gate_up_bias, grad_pre), (down_bias, grad))
    ]  # fmt: skip
    return (grad_hidden, grad_up, grad_down, slots.view(top_k_weights.shape).to(top_k_weights.dtype), biases[0], biases[1], surprise)


def _sum_by_expert(rows: Tensor, pairs: Pairs) -> Tensor:
    """(P, A) -> (E, A)."""
    total = torch.zeros(len(pairs.sizes), rows.shape[1], dtype=statistics_dtype(rows.dtype), device=rows.device)
    for expert, part in _parts(pairs):
        total[expert] = rows[part].sum(0, dtype=total.dtype)
    return total


def _surprise(
    top_k_index: Tensor,
    top_k_weights: Tensor,
    pairs: Pairs,
    kind: str,
    x: Tensor,
    h: Tensor,
    grad_out: Tensor,
    grad_pre: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """(N, K) norms, 0 in unused slots; `grad_pre` is that of a pair of weight 1."""
    wide = top_k_weights.dtype

    def squares(rows: Tensor) -> Tensor:
        return rows.to(wide).square().sum(-1)

    # An expert named twice counts with its summed weight.
    same = top_k_index.unsqueeze(1) == top_k_index.unsqueeze(2)
    size = (same * top_k_weights.unsqueeze(1)).sum(-1).abs().reshape(-1)[pairs.slot]
    grad_squares = squares(grad_out)[pairs.token]
    match kind:
        case "output":
            found = size * grad_squares.sqrt()
        case "down_proj":
            found = size * (grad_squares.sqrt() * squares(h).sqrt())
        case _:
            of_up = squares(grad_pre) * (squares(x) + (gate_up_bias is not None))
            found = size * (of_up + grad_squares * (squares(h) + (down_bias is not None))).sqrt()
    slots = torch.zeros(top_k_index.numel(), dtype=wide, device=x.device)
    slots[pairs.slot] = found
    return slots.view(top_k_index.shape)
