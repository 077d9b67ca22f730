"""Mixture of small experts in plain torch: pairs are sorted by expert once; grouped products follow for one chunk of experts at a time.

P pairs (token, slot) that name an expert, F features, E experts, I neurons of an expert, K slots of a token
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .._dispatch import statistics_dtype, without_autocast
from .._torch_norms import row_norms
from ._activations import activate, activate_backward
from ._huge_pages import empty_on_huge_pages
from ._tuples import Gradients, Inputs, Layout, Saved, Wanted

GRADIENT_ELEMENTS = 1 << 21  # elements of the gradient of a chunk's first projection, a temporary that is then copied
SMALL_ELEMENTS = 1 << 13  # elements of an expert's matrix below which one grouped product and a copy beat one call per expert
CHUNK_ELEMENTS = 1 << 19  # gathered elements of a chunk, which then stay in the cache from one step to the next
GROUPED_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Pairs(NamedTuple):
    """Pairs sorted by expert, and by token within an expert.

    Attributes:
        slot: (P,), index of the pair's slot among the N * K slots.
        token: (P,).
        expert: (P,).
        ends: (E,) int32, end of each expert's pairs.
        sizes: number of pairs of each expert.
        places: (N, K), index of each slot's pair; P for unused slots.
    """

    slot: Tensor
    token: Tensor
    expert: Tensor
    ends: Tensor
    sizes: list[int]
    places: Tensor


class Chunk(NamedTuple):
    """Neighbouring experts whose pairs are computed together.

    Attributes:
        experts, rows: slices of the experts and of their pairs.
        sizes: number of pairs of each expert.
        ends: int32, end of each expert's pairs within the chunk.
    """

    experts: slice
    rows: slice
    sizes: list[int]
    ends: Tensor


def pairs_of(top_k_index: Tensor, num_experts: int) -> Pairs:
    """Pairs of (N, K) indices; an index outside 0 … E − 1 is an unused slot."""
    flat = top_k_index.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    expert, slot = flat.sort(stable=True)
    sizes = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    return _pairs(top_k_index, flat, slot, expert, sizes)


def pairs_by_order(top_k_index: Tensor, num_experts: int, slots: Tensor, offsets: Tensor) -> Pairs:
    """`pairs_of` for slots that are sorted already; see `SlotOrder`."""
    flat = top_k_index.reshape(-1).long()
    return _pairs(top_k_index, flat, slots, flat[slots], offsets.diff())


def _pairs(top_k_index: Tensor, flat: Tensor, slot: Tensor, expert: Tensor, sizes: Tensor) -> Pairs:
    found = sizes.tolist()
    number = sum(found)
    slot, expert = slot[:number], expert[:number]
    places = torch.full_like(flat, number)
    places[slot] = torch.arange(number, device=flat.device)
    token = slot // max(1, top_k_index.shape[1])
    return Pairs(slot, token, expert, sizes.cumsum(0).to(torch.int32), found, places.view(top_k_index.shape))


def chunks_of(pairs: Pairs, features: int, width: int) -> Iterator[Chunk]:
    """On a CPU, chunks whose gathered rows fit the cache and whose temporary gradients stay small; on other devices, one chunk."""
    whole = pairs.ends.device.type != "cpu"
    most_rows = len(pairs.slot) if whole else CHUNK_ELEMENTS // max(1, features)
    most_experts = len(pairs.sizes) if whole else max(1, GRADIENT_ELEMENTS // max(1, features * width))
    first = begin = end = 0
    for expert, size in enumerate([*pairs.sizes, most_rows + 1]):
        if expert > first and (end + size - begin > most_rows or expert - first >= most_experts):
            experts = slice(first, expert)
            yield Chunk(experts, slice(begin, end), pairs.sizes[experts], pairs.ends[experts] - begin)
            first, begin = expert, end
        end += size


def grouped(rows: Tensor, weights: Tensor, chunk: Chunk) -> Tensor:
    """Product of each expert's rows with its matrix: (P, A), (E, A, B) -> (P, B)."""
    if _fits(rows) and _fits(weights):
        return functional.grouped_mm(rows, weights, offs=chunk.ends)
    out = rows.new_empty(len(rows), weights.shape[-1])
    for expert, part in _parts(chunk):
        torch.mm(rows[part], weights[expert], out=out[part])
    return out


def outer_into(out: Tensor, left: Tensor, right: Tensor, chunk: Chunk) -> None:
    """Writes the sum of the outer products of each expert's rows of `left` (P, A) and `right` (P, B) to `out` (E, A, B)."""
    if out[0].numel() < SMALL_ELEMENTS and _fits(left.T) and _fits(right):
        out.copy_(functional.grouped_mm(left.T, right, offs=chunk.ends))
        return
    end = 0
    for expert, size in enumerate(chunk.sizes):
        if size:
            torch.mm(left[end : end + size].T, right[end : end + size], out=out[expert])
        else:
            out[expert] = 0
        end += size


def _parts(chunk: Chunk) -> Iterator[tuple[int, slice]]:
    end = 0
    for expert, size in enumerate(chunk.sizes):
        end += size
        if size:
            yield expert, slice(end - size, end)


def _fits(x: Tensor) -> bool:
    """Whether `grouped_mm` supports x: one of the last two strides is 1, the others are multiples of 16 bytes, rows do not overlap."""
    if x.dtype not in GROUPED_FLOATS or x.numel() == 0 or x.data_ptr() % 16:
        return False
    whole = [stride * x.element_size() % 16 == 0 for stride in x.stride()]
    *outer, row, column = x.stride()
    rows, columns = x.shape[-2:]
    by_row, by_column = column == 1 and whole[-2] and row >= columns, row == 1 and whole[-1] and column >= rows
    return all(whole[: len(outer)]) and (by_row or by_column)


def combine(rows: Tensor, pairs: Pairs, weights: Tensor | None) -> Tensor:
    """Sum over a token's slots in slot order, in float32 or float64: (P + 1, F) -> (N, F). The last row stands for unused slots."""
    wide = statistics_dtype(rows.dtype)
    rows[-1] = 0
    if weights is not None:
        weights = torch.where(pairs.places < len(pairs.slot), weights.to(wide), 0)
    if rows.dtype == wide and pairs.places.numel():
        return functional.embedding_bag(pairs.places, rows, mode="sum", per_sample_weights=weights)
    total = rows.new_zeros(len(pairs.places), rows.shape[1], dtype=wide)
    for slot in range(pairs.places.shape[1]):
        part = rows.index_select(0, pairs.places[:, slot]).to(wide)
        total.add_(part if weights is None else part.mul_(weights[:, slot : slot + 1]))
    return total


@without_autocast
def experts_forward(inputs: Inputs, layout: Layout) -> tuple[Tensor, Tensor]:
    """out (N, F), and `Saved.pre`, 0 after the last pair."""
    hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias = inputs
    pairs = pairs_of(top_k_index, len(gate_up_proj))
    up, down = (weight if layout.transposed else weight.mT for weight in (gate_up_proj, down_proj))
    features = hidden_states.shape[1]
    whole = hidden_states.new_empty(top_k_index.numel(), up.shape[-1])
    whole[len(pairs.slot) :] = 0
    rows = hidden_states.new_empty(len(pairs.slot) + 1, features)
    for chunk in chunks_of(pairs, features, up.shape[-1]):
        x = hidden_states.index_select(0, pairs.token[chunk.rows])
        pre = grouped(x, up[chunk.experts], chunk)
        if gate_up_bias is not None:
            pre += gate_up_bias.index_select(0, pairs.expert[chunk.rows])
        whole[chunk.rows] = pre
        rows[chunk.rows] = grouped(activate(pre, layout), down[chunk.experts], chunk)
        if down_bias is not None:
            rows[chunk.rows] += down_bias.index_select(0, pairs.expert[chunk.rows])
    return combine(rows, pairs, top_k_weights).to(hidden_states.dtype), whole


@without_autocast
def experts_backward(inputs: Inputs, saved: Saved, layout: Layout, wanted: Wanted) -> Gradients:
    """Gradients, None for those that are not wanted."""
    hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias = inputs
    pre, surprise_kind = saved.pre, wanted.surprise_kind
    pairs = pairs_of(top_k_index, len(gate_up_proj))
    number, features = len(pairs.slot), hidden_states.shape[1]
    wide = statistics_dtype(hidden_states.dtype)
    up, down = (weight.mT if layout.transposed else weight for weight in (gate_up_proj, down_proj))  # (E, 2I, F), (E, F, I)
    weights = top_k_weights.to(wide).reshape(-1)[pairs.slot].unsqueeze(-1)
    grad_out = saved.grad_out.contiguous().to(hidden_states.dtype)

    rows = hidden_states.new_empty(number + 1 if wanted.grad_hidden else 0, features)
    grad_up = empty_on_huge_pages(gate_up_proj.shape, gate_up_proj) if wanted.grad_gate_up else None
    grad_down = empty_on_huge_pages(down_proj.shape, down_proj) if wanted.grad_down else None
    grad_weights, h_norms, pre_norms = (torch.empty(number, dtype=wide, device=rows.device) for _ in range(3))
    grad_up_bias = torch.empty_like(gate_up_bias) if gate_up_bias is not None and wanted.grad_gate_up else None
    grad_down_bias = torch.empty_like(down_bias) if down_bias is not None and wanted.grad_down else None
    for chunk in chunks_of(pairs, features, up.shape[1]):
        token, part = pairs.token[chunk.rows], chunk.rows
        grad, weight = grad_out.index_select(0, token), weights[part]
        h = activate(pre[part], layout)
        grad_h = grouped(grad, down[chunk.experts], chunk)
        torch.sum(grad_h.to(wide) * h, -1, out=grad_weights[part])
        if down_bias is not None:
            grad_weights[part] += (grad.to(wide) * down_bias.index_select(0, pairs.expert[part])).sum(-1)
        grad_pre = activate_backward(pre[part], grad_h, layout)  # without the pair's weight, like grad_h
        if surprise_kind in ("down_proj", "expert"):
            h_norms[part] = row_norms(h)
        if surprise_kind == "expert":
            pre_norms[part] = row_norms(grad_pre)

        grad_pre = (grad_pre * weight).to(pre.dtype)
        if wanted.grad_hidden:
            rows[part] = grouped(grad_pre, up[chunk.experts], chunk)
        if grad_up is not None:
            x = hidden_states.index_select(0, token)
            left, right = (x, grad_pre) if layout.transposed else (grad_pre, x)
            outer_into(grad_up[chunk.experts], left, right, chunk)
        if grad_down is not None:
            h = (h * weight).to(h.dtype)
            left, right = (h, grad) if layout.transposed else (grad, h)
            outer_into(grad_down[chunk.experts], left, right, chunk)
        if grad_up_bias is not None:
            grad_up_bias[chunk.experts] = sum_by_expert(grad_pre, chunk, wide)
        if grad_down_bias is not None:
            grad_down_bias[chunk.experts] = sum_by_expert(grad * weight, chunk, wide)

    grad_hidden = combine(rows, pairs, None).to(hidden_states.dtype) if wanted.grad_hidden else None
    surprise = None
    if surprise_kind == "saving":
        surprise = in_slots(stored_surprise(-grad_weights, wide), pairs)
    elif surprise_kind is not None:
        # An expert named twice counts with its summed weight.
        same = top_k_index.unsqueeze(1) == top_k_index.unsqueeze(2)
        size = torch.where(same, top_k_weights.to(wide).unsqueeze(1), 0).sum(-1).abs().reshape(-1)[pairs.slot]
        # Norms and their products in float64: squares and intermediate products can leave the range of float32.
        found = row_norms(grad_out).double()[pairs.token]
        h_norms = h_norms.double()
        match surprise_kind:
            case "down_proj":
                found = found * h_norms
            case "expert":
                x_squares = row_norms(hidden_states).double().square()[pairs.token]
                of_up = pre_norms.double().square() * (x_squares + (gate_up_bias is not None))
                found = (of_up + found.square() * (h_norms.square() + (down_bias is not None))).sqrt()
        surprise = in_slots(stored_surprise(size * found, wide), pairs)
    grad_weights = in_slots(grad_weights, pairs).to(top_k_weights.dtype)
    return Gradients(grad_hidden, grad_up, grad_down, grad_weights, grad_up_bias, grad_down_bias, surprise)


def stored_surprise(found: Tensor, dtype: torch.dtype) -> Tensor:
    """Surprise in the dtype of the result, within its finite values: infinity is reserved for tokens that an expert did not see. NaN
    stays NaN.
    """
    largest = torch.finfo(dtype).max
    return found.clamp(-largest, largest).to(dtype)


def sum_by_expert(rows: Tensor, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """Sum of each expert's rows: (P, A) -> (E, A)."""
    total = torch.zeros(len(chunk.sizes), rows.shape[1], dtype=dtype, device=rows.device)
    for expert, part in _parts(chunk):
        total[expert] = rows[part].sum(0, dtype=dtype)
    return total


def in_slots(values: Tensor, pairs: Pairs) -> Tensor:
    """Values of the pairs in their slots: (P,) -> (N, K), 0 in unused slots."""
    slots = torch.zeros(pairs.places.numel(), dtype=values.dtype, device=values.device)
    slots[pairs.slot] = values
    return slots.view(pairs.places.shape)
