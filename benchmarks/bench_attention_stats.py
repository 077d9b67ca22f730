"""Entropy of attention beside scaled_dot_product_attention, against eager attention and the entropy of its probabilities.

The shape is SmolLM2-135M's: 9 query and 3 key heads of 64 dimensions. Every candidate returns the attention output and the entropy of
every query and head. The mask of eager attention is built before timing, as a model builds it once for all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward

from tinyonn.heads.capture.attention import capture_attention_stats
from tinyonn.hf.memory import available_memory
from tinyonn.ops import attention_stats

HEADS, KV_HEADS, DIM = 9, 3, 64
GROUP = HEADS // KV_HEADS
SPAN = slice(8, 72)  # keys that count as the question, in the runs that compute its attention mass

Pair = tuple[Tensor, ...]


class Case:
    """Query, key and value of one sequence, (1, H, T, D); float32 on a CPU, bfloat16 on a GPU."""

    def __init__(self, tokens: int, device: str) -> None:
        generator = torch.Generator().manual_seed(tokens)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16

        def draw(heads: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(1, heads, tokens, DIM, generator=generator) * scale).to(device, dtype)

        self.tokens, self.query, self.key, self.value = tokens, draw(HEADS, 1.5), draw(KV_HEADS), draw(KV_HEADS)
        self.mask = torch.full((tokens, tokens), torch.finfo(dtype).min, device=device, dtype=dtype).triu_(1)[None, None]
        self.span = torch.zeros(1, tokens, dtype=torch.bool, device=device)
        self.span[:, SPAN] = True

    def sdpa(self) -> Pair:
        return (scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True, enable_gqa=True),)

    def ours(self) -> Pair:
        return *self.sdpa(), attention_stats(self.query.transpose(1, 2), self.key.transpose(1, 2)).entropy

    def ours_with_span(self) -> Pair:
        found = attention_stats(self.query.transpose(1, 2), self.key.transpose(1, 2), span_mask=self.span)
        assert found.span_mass is not None
        return *self.sdpa(), found.entropy, found.span_mass

    def eager(self) -> Pair:
        """Eager attention of transformers: output and probabilities."""
        module: Any = SimpleNamespace(num_key_value_groups=GROUP, training=False)
        out, probs = eager_attention_forward(module, self.query, self.key, self.value, self.mask, scaling=DIM**-0.5)
        return out.transpose(1, 2), probs

    def written_out(self) -> Pair:
        """The usual expression."""
        out, probs = self.eager()
        return out, -(probs * (probs + 1e-12).log()).sum(-1).transpose(1, 2)

    def entr_in_place(self) -> Pair:
        """Overwrites the probabilities, which are no longer needed, to save memory."""
        out, probs = self.eager()
        return out, torch.special.entr(probs, out=probs).sum(-1).transpose(1, 2)

    def entr_in_place_with_span(self) -> Pair:
        out, probs = self.eager()
        mass = probs @ self.span[0].to(probs.dtype)
        return out, torch.special.entr(probs, out=probs).sum(-1).transpose(1, 2), mass.transpose(1, 2)

    def head_at_a_time(self) -> Pair:
        """Holds the matrix of one head at a time."""
        out, entropy = torch.empty_like(self.query), torch.empty(1, self.tokens, HEADS, device=self.query.device)
        for head in range(HEADS):
            scores = torch.baddbmm(self.mask[0], self.query[:, head], self.key[:, head // GROUP].mT, alpha=DIM**-0.5)
            probs = scores.softmax(-1)
            out[:, head] = probs @ self.value[:, head // GROUP]
            entropy[..., head] = torch.special.entr(probs, out=probs).sum(-1)
        return out, entropy


def agree(outputs: dict[str, Pair]) -> None:
    wanted, *_ = outputs.values()
    for name, found in outputs.items():
        half = found[0].dtype == torch.bfloat16
        for one, other in zip(found, wanted, strict=name != "sdpa alone"):
            atol = 0.1 if half else 1e-4
            torch.testing.assert_close(one.float(), other.float(), rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def needs(tokens: int, device: str, matrices: int) -> None:
    """Skips the test if `matrices` T x T matrices of all heads do not fit in memory."""
    free, wanted = available_memory(torch.device(device)), matrices * HEADS * tokens**2 * 4
    if wanted > free:
        pytest.skip(f"needs {wanted / 1e9:.1f} GB for eager attention, {free / 1e9:.1f} are free")


@pytest.mark.parametrize("tokens", [512, 1024, 2048, 4096, 8192])
def test_entropy_beside_sdpa_against_eager(compare, device, peak_megabytes, tokens):
    needs(tokens, device, 5)
    case = Case(tokens, device)
    candidates: dict[str, Callable[[], Pair]] = {
        "sdpa and attention_stats": case.ours,
        "eager, entr in place": case.entr_in_place,
        "eager, a head at a time": case.head_at_a_time,
    }
    if tokens < 8192:
        candidates["eager, p log p written out"] = case.written_out
    candidates["sdpa alone"] = case.sdpa
    memory = {name: round(peak_megabytes(call), 1) for name, call in candidates.items()}
    compare(
        f"entropy of attention, {tokens} tokens, {device}",
        candidates,
        agree,
        rounds=3 if tokens == 8192 else None,
        info={"goal": "eager >= 3x at 4096", "peak MB": memory},
    )


@pytest.mark.parametrize("tokens", [4096])
def test_entropy_and_span_mass_against_eager(compare, device, tokens):
    needs(tokens, device, 5)
    case = Case(tokens, device)
    compare(
        f"entropy and span mass of attention, {tokens} tokens, {device}",
        {"sdpa and attention_stats": case.ours_with_span, "eager, entr in place": case.entr_in_place_with_span},
        agree,
        info={"goal": "eager >= 3x"},
    )


def test_memory_grows_as_the_sequence_does(compare, device, peak_megabytes):
    cases = {tokens: Case(tokens, device) for tokens in (1024, 2048, 4096, 8192)}
    memory = {tokens: peak_megabytes(case.ours) for tokens, case in cases.items()}
    eager = {tokens: round(peak_megabytes(cases[tokens].entr_in_place)) for tokens in (1024, 2048)}

    def linear(outputs: dict[str, Pair]) -> None:
        for tokens in (2048, 4096):
            assert memory[2 * tokens] <= 2.2 * memory[tokens], memory

    compare(
        f"entropy beside sdpa by length, {device}",
        {f"{tokens} tokens": case.ours for tokens, case in reversed(cases.items())},
        linear,
        rounds=3,
        info={"peak MB": {tokens: round(peak, 1) for tokens, peak in memory.items()}, "peak MB of eager": eager},
    )


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_a_model_captured_against_eager(compare, device, peak_megabytes, tokens):
    """Forward pass of a model with SmolLM2's sizes, two layers and a small vocabulary."""
    needs(tokens, device, 8)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=HEADS * DIM, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=8192, initializer_range=0.1, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device)
    peer = copy.deepcopy(model)
    peer.set_attn_implementation("eager")
    ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)

    def captured() -> list[Tensor]:
        with capture_attention_stats(model) as layers:
            model(ids)
        return [layer.entropy for layer in layers]

    def layer_by_layer() -> list[Tensor]:
        found: list[Tensor] = []

        def take(module: torch.nn.Module, args: Any, output: Any) -> None:
            probs = output[1]
            found.append(torch.special.entr(probs, out=probs).sum(-1).transpose(1, 2))

        handles = [layer.self_attn.register_forward_hook(take) for layer in peer.model.layers]
        try:
            peer(ids)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def output_attentions() -> list[Tensor]:
        return [torch.special.entr(probs).sum(-1).transpose(1, 2) for probs in peer(ids, output_attentions=True).attentions]

    def check(outputs: dict[str, Any]) -> None:
        for name in ("eager, entropy layer by layer", "eager, output_attentions"):
            torch.testing.assert_close(outputs["captured beside sdpa"], outputs[name], rtol=1e-3, atol=1e-3)

    candidates: dict[str, Callable[[], Any]] = {
        "captured beside sdpa": captured,
        "eager, entropy layer by layer": layer_by_layer,
        "eager, output_attentions": output_attentions,
        "sdpa, nothing captured": lambda: model(ids).logits,
    }
    memory = {name: round(peak_megabytes(call)) for name, call in candidates.items()}
    compare(
        f"entropy of all heads of two SmolLM2 layers, {tokens} tokens, {device}",
        candidates,
        check,
        rounds=3 if tokens == 4096 else None,
        info={"peak MB": memory},
    )
