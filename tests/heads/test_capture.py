"""Captured statistics, against the probabilities that the same weights give out under eager attention; the outputs stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinyonn.heads.capture.attention import capture_attention_stats
from tinyonn.heads.capture.layers import attention_layers
from tinyonn.testing import tiny_causal_lm, tiny_encoder, token_ids

DECODERS = ("llama", "qwen3", "mistral", "gpt2", "gpt_neox", "qwen3_moe", "gemma2", "gpt_oss", "lfm2", "gptj", "bloom")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "deberta-v2")
LENGTH = 23
PADDINGS = {"whole": (0, 0), "left": (7, 0), "right": (0, 5)}


def tiny(arch: str, **overrides: Any) -> PreTrainedModel:
    return tiny_encoder(arch, **overrides) if arch in ENCODERS else tiny_causal_lm(arch, **overrides)


def batch_of(padding: str = "whole") -> dict[str, Tensor]:
    """Two rows of tokens, the first with padding."""
    left, right = PADDINGS[padding]
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, LENGTH - right :] = 0
    return {"input_ids": token_ids(LENGTH) % 90, "attention_mask": mask}


def span_of(keys: int = LENGTH) -> Tensor:
    return torch.rand(2, keys, generator=torch.Generator().manual_seed(5)) < 0.3


def output(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    found = model(**batch)
    return found.logits if "logits" in found else found.last_hidden_state


def eager_probabilities(model: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """(B, H, T, Tk) in float64 of each layer that has attention."""
    before = model.config._attn_implementation
    if before != "eager":
        model.set_attn_implementation("eager")
    attentions = model(**batch, output_attentions=True, **options).attentions
    if before != "eager":
        model.set_attn_implementation(before)
    return [probs.detach().double() for probs in attentions if probs is not None]


def statistics_of(probs: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, H) each, written out."""
    entropy = -torch.where(probs > 0, probs * probs.clamp(min=1e-300).log(), 0).sum(-1)
    return entropy.transpose(1, 2), (probs * span[:, None, None]).sum(-1).transpose(1, 2)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("arch", [*DECODERS, *ENCODERS])
@torch.no_grad()
def test_statistics_are_those_of_eager_probabilities_and_outputs_stay_bit_identical(arch, padding):
    model, batch, span = tiny(arch), batch_of(padding), span_of()
    stock = output(model, batch)
    with capture_attention_stats(model, span_mask=span) as layers:
        assert torch.equal(output(model, batch), stock)
    probabilities = eager_probabilities(model, batch)
    assert len(layers) == len(probabilities) == len(attention_layers(model)) > 0
    real = batch["attention_mask"].bool()
    for stats, probs in zip(layers, probabilities, strict=True):
        entropy, mass = statistics_of(probs, span)
        assert stats.entropy.dtype == stats.span_mass.dtype == torch.float32
        torch.testing.assert_close(stats.entropy[real].double(), entropy[real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats.span_mass[real].double(), mass[real], rtol=1e-5, atol=1e-5)
        if padding == "left":  # a query of padding sees nothing in a causal model, and in DeBERTa
            blind = stats.entropy[~real] if arch in DECODERS or arch == "deberta-v2" else stats.entropy[:0]
            assert (blind == 0).all()
    assert torch.equal(output(model, batch), stock)
    assert all(layer.entropy.unique().numel() > LENGTH for layer in layers)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2", "bert", "deberta-v2", "bloom"])
@torch.no_grad()
def test_chosen_queries_are_rows_of_the_full_result(arch, padding):
    model, batch, span = tiny(arch), batch_of(padding), span_of()
    queries = torch.tensor([13, LENGTH - 1])
    with capture_attention_stats(model, span_mask=span) as full, capture_attention_stats(model, span_mask=span, queries=queries) as chosen:
        model(**batch)
    for whole, row in zip(full, chosen, strict=True):
        assert row.entropy.shape == (2, 1, whole.entropy.shape[2])
        torch.testing.assert_close(row.entropy[:, 0], whole.entropy[torch.arange(2), queries], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(row.span_mass[:, 0], whole.span_mass[torch.arange(2), queries], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2"])
@torch.no_grad()
def test_queries_after_a_cache_see_the_keys_in_it(arch, attention):
    model, batch = tiny(arch, attn_implementation=attention), batch_of("left")
    span, first = span_of(), 16
    for new in (LENGTH - first, 1):
        end = first + new
        past = model(batch["input_ids"][:, :first], attention_mask=batch["attention_mask"][:, :first], use_cache=True).past_key_values
        with capture_attention_stats(model, span_mask=span[:, :end]) as layers:
            model(batch["input_ids"][:, first:end], attention_mask=batch["attention_mask"][:, :end], past_key_values=past)
        whole = {name: value[:, :end] for name, value in batch.items()}
        for stats, probs in zip(layers, eager_probabilities(model, whole), strict=True):
            entropy, mass = statistics_of(probs, span[:, :end])
            torch.testing.assert_close(stats.entropy.double(), entropy[:, first:], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stats.span_mass.double(), mass[:, first:], rtol=1e-5, atol=1e-5)
