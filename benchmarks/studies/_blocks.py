"""A model whose attention reads the key blocks that a rule selects, and measures of what blocks are worth.

    z[t, b]     log of a block's share of the attention, estimated from compressed keys, mean over a group's heads
    e²[t, b]    Σ_heads mean_t |∂L/∂o|² · |P_b (v̄_b - o)|², what leaving a block out costs; P is its true share
    line        E[e² | z] ≈ exp(a + b z), one line for each layer and key/value head

A rule is a function of (layer, query, key, value) that returns which blocks each query reads, (K, T, NB) bool, or that and a log gate. The
model runs the library's block-sparse attention on them.

L layers, H query heads, K key/value heads, G = H / K, T tokens, D head dim, NB key blocks
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from _study import half_precision
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tinyonn.hf.dyn_nsa.shares import chunks, true_shares
from tinyonn.nn.block_shares import Scores, block_shares, compressed_shares, kinds_of_blocks
from tinyonn.nn.dyn_nsa import DynNSACore
from tinyonn.ops import block_sparse_attention

FLOOR = -20.0  # of z

Rule = Callable[[int, Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
Score = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Layer(NamedTuple):
    """What the attention of a layer was given and gave in a dense run."""

    query: Tensor  # (T, H, D)
    key: Tensor  # (T, K, D)
    value: Tensor
    out: Tensor  # (T, H, D)


class _Run:
    """The rule and the records of the run that is under way."""

    rule: Rule | None = None
    layers: list[Layer] | None = None
    counts: list[float]


_RUN = _Run()


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    with torch.autocast(query.device.type, enabled=False):
        return _float_attention(module, query.float(), key.float(), value.float(), scaling)


def _float_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, None]:
    if _RUN.rule is None:
        groups = query.shape[1] // key.shape[1]
        wide = [x.repeat_interleave(groups, 1) for x in (key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(query, *wide, is_causal=True, scale=scaling)
        if out.requires_grad:
            out.retain_grad()
        if _RUN.layers is not None:
            _RUN.layers.append(Layer(*(x.detach()[0].transpose(0, 1) for x in (query, key, value)), out))
        return out.transpose(1, 2), None
    query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    found = _RUN.rule(module.layer_idx, query[0], key[0], value[0])
    chosen, gate = found if isinstance(found, tuple) else (found, None)
    _RUN.counts.append(chosen.sum(-1).double().mean().item())
    indices, counts, bias = block_lists(chosen, gate)
    return block_sparse_attention(query, key, value, indices, counts, bias, block_size=64, scale=scaling)[0], None


AttentionInterface.register("study", _attention)
AttentionMaskInterface.register("study", lambda *args, **kwargs: None)


def block_lists(chosen: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lists of blocks for the op: indices (1, T, K, n), counts (1, T, K) and log gates like indices, from (K, T, NB) each."""
    chosen, blocks = chosen.transpose(0, 1), chosen.shape[-1]
    counts = chosen.sum(-1).int()
    place = torch.where(chosen, torch.arange(blocks, device=chosen.device), blocks).sort(-1).values[..., : int(counts.max())]
    place = torch.where(place < blocks, place, 0)
    bias = None if gate is None else gate.transpose(0, 1).gather(-1, place)[None].contiguous()
    return place.int()[None].contiguous(), counts[None].contiguous(), bias


def losses(model: PreTrainedModel, ids: Tensor, rule: Rule | None = None, exact: bool = False) -> tuple[Tensor, float]:
    """Loss of each next token, (T - 1,), and mean blocks a query reads; NaN for dense attention. `exact`: linear layers in float32."""
    _RUN.rule, _RUN.counts = rule, []
    try:
        with torch.no_grad(), nullcontext() if exact else half_precision():
            return _loss(model(input_ids=ids, use_cache=False).logits, ids), sum(_RUN.counts) / max(1, len(_RUN.counts)) or float("nan")
    finally:
        _RUN.rule = None


def dense(model: PreTrainedModel, ids: Tensor, gradient: bool = False) -> tuple[list[Layer], Tensor, list[Tensor]]:
    """Layers of a dense run, losses (T - 1,), and mean_t |∂L/∂o|² of the heads of each layer, (H,), with gradient=True."""
    _RUN.layers = layers = []
    try:
        with torch.set_grad_enabled(gradient), half_precision():
            embedded = model.get_input_embeddings()(ids).requires_grad_(gradient)
            loss = _loss(model(inputs_embeds=embedded, use_cache=False).logits, ids)
            if gradient:
                loss.sum().backward()
    finally:
        _RUN.layers = None
    steep = [layer.out.grad[0].square().sum(-1).mean(-1) for layer in layers] if gradient else []
    return [layer._replace(out=layer.out.detach()[0].transpose(0, 1)) for layer in layers], loss.detach(), steep


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


class Blocks:
    """Estimates and true measures of key blocks, for the cores of a converted model."""

    def __init__(self, cores: Iterable[DynNSACore]) -> None:
        self.cores = list(cores)
        self.options = self.cores[0].options

    def far(self, length: int) -> tuple[Tensor, Tensor]:
        """Which blocks queries may leave out, and which they read anyway, (T, NB) bool each."""
        place = torch.arange(length)
        far, _ = kinds_of_blocks(place, length, self.options)
        past = torch.arange(far.shape[1]) <= place[:, None] // self.options.block_size
        return far, past & ~far

    @torch.no_grad()
    def shares(self, layer: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mean estimated shares (K, T, NB), places (T,) and compressed (queries, keys)."""
        core, place = self.cores[layer], torch.arange(len(query))
        keys, mapped = core.compress_key(key[None])[0], core.compressed_query(query[None])
        query = query if mapped is None else mapped[0]
        scores = Scores(query.shape[-1] ** -0.5)
        return block_shares(query, keys, place, len(query), self.options, scores).mean(1), place, [query, keys]

    def z(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        return self.shares(layer, query, key)[0].log().clamp(min=FLOOR)

    def uncertain_z(self, layer: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """z, and the query's tau, (K, T, 1): entropy of its attention to compressed keys, over that of a uniform one; mean over heads."""
        shares, place, (query, keys) = self.shares(layer, query, key)
        own = compressed_shares(query, keys, place, self.options, Scores(query.shape[-1] ** -0.5))
        visible = (place + 1) // self.options.compress_size
        tau = torch.where(visible > 1, torch.special.entr(own).sum(-1).mean(1) / visible.clamp(min=2).log(), 0)
        return shares.log().clamp(min=FLOOR), tau[..., None]

    def relative(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        """Importance of earlier versions, with slope 1: log(share / uniform share) + tau, (K, T, NB)."""
        z, tau = self.uncertain_z(layer, query, key)
        visible = (torch.arange(len(query)) + 1) // self.options.compress_size
        uniform = visible * (self.options.compress_size / self.options.block_size)
        return (z + uniform.log()[:, None]).clamp(min=FLOOR) + tau

    @torch.no_grad()
    def effects(self, layer: Layer, weight: Tensor) -> tuple[Tensor, Tensor]:
        """e² and true share of each block, (K, T, NB): sum over a group's heads by their weights (H,), and mean over them."""
        (length, heads, dim), size, groups = layer.query.shape, self.options.block_size, layer.key.shape[1]
        blocks = -(-length // size)
        value = layer.value.unflatten(0, (blocks, size)).permute(2, 0, 1, 3)  # (K, NB, size, D)
        effect, mass = (layer.query.new_zeros(groups, length, blocks) for _ in range(2))
        scores = Scores(dim**-0.5)
        for place, seen in chunks(torch.arange(length), heads):
            shares = true_shares(layer.query[place], layer.key, place, seen, size, scores).movedim(3, 1)  # (K, NB, G, t, size)
            part = torch.einsum("kbgts,kbsd->kbgtd", shares, value[:, : shares.shape[1]])
            own = shares.sum(-1)
            lost = (part - own[..., None] * part.sum(1, keepdim=True)).square().sum(-1)
            lost = (lost * weight.view(groups, 1, -1, 1)).sum(2)
            effect[:, place, : shares.shape[1]], mass[:, place, : shares.shape[1]] = lost.transpose(1, 2), own.mean(2).transpose(1, 2)
        return effect, mass


def ranked(z: Tensor, far: Tensor) -> Tensor:
    """Rank of each block among those that a query may leave out, from 0, by z; (K, T, NB)."""
    return z.masked_fill(~far, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)


def level(scores: Iterable[Tensor], number: float) -> float:
    """The score that `number` of all these reach."""
    every = torch.cat([score.flatten() for score in scores])
    return every.topk(max(1, min(len(every), round(number)))).values[-1].item()


def above(score: Score, lowest: float, far: Tensor, forced: Tensor) -> Rule:
    return lambda *layer: ((score(*layer) >= lowest) & far) | forced
