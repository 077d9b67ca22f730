"""A tied output head is recorded with both uses of its weight: the product and the look-up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from tinyonn.scan.engine.engine import ScanEngine
from tinyonn.testing import tiny_causal_lm

VOCABULARY = 150  # two whole blocks of 64 and a ragged one


def tied_model(arch: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    if arch == "gemma3_text":  # its embedding module scales what it looks up
        sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = AutoConfig.for_model(arch, **sizes, head_dim=16, vocab_size=VOCABULARY, pad_token_id=0, initializer_range=0.2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        model.get_input_embeddings().weight.data[0] = 0.3  # the padding row, which the tokens meet
    else:
        model = tiny_causal_lm(arch, dtype=dtype, vocab_size=VOCABULARY, tie_word_embeddings=True, experts_implementation="eager")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model


def gradient_at(model: torch.nn.Module, tokens: torch.Tensor, place: int, losses: slice | int) -> np.ndarray:
    """Norms of blocks of the shared weight's gradient due to position `place` alone: both of its uses there have a weight of their own.

    Written with the weight as a leaf in each use: every other position multiplies and looks up a copy that is no leaf.
    """
    shared = model.get_input_embeddings().weight
    own = shared.detach().clone().requires_grad_()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    here = torch.arange(len(tokens)) == place
    scale = getattr(embedding, "scalar_embed_scale", 1.0)
    padding = embedding.padding_idx

    def look_up(module, args, output):
        found = functional.embedding(args[0], own, padding_idx=padding) * torch.tensor(scale, dtype=own.dtype)
        torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-6)
        return torch.where(here[None, :, None], found, output.detach())

    def product(module, args, output):
        return torch.where(here[None, :, None], args[0] @ own.T, output)

    handles = [embedding.register_forward_hook(look_up), head.register_forward_hook(product)]
    try:
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    loss = functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    (grad,) = torch.autograd.grad(loss[losses].sum(), own)
    return torch.stack([part.double().norm() for part in grad.split(64)]).numpy()


@pytest.fixture
def tokens() -> torch.Tensor:
    found = torch.randint(0, VOCABULARY, (10,), generator=torch.Generator().manual_seed(3))
    found[2], found[5], found[6] = found[4], 0, VOCABULARY - 1  # a token twice, the padding row, the last row
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gemma3_text", "qwen3_moe"])
def test_full_credit_is_the_norm_of_both_uses(arch, tokens):
    model = tied_model(arch).requires_grad_(False)
    with ScanEngine(model) as engine:
        (result,) = engine.scan(tokens[None])
    assert "lm_head.weight" not in engine.not_measured
    head = engine.layout[-1]
    assert (head.name, head.blocks) == ("lm_head.weight", 3)
    stored = result.grad_norm[:-1, head.base :]
    expected = np.stack([gradient_at(model, tokens, place, slice(None)) for place in range(len(tokens) - 1)])
    np.testing.assert_allclose(stored, expected, rtol=2e-5, atol=1e-6)
    # It is the look-up that makes the difference: without it, the input token's block is another.
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.detach().clone(), requires_grad=False)
    with ScanEngine(model, targets="lm_head") as engine:
        (apart,) = engine.scan(tokens[None])
    own = np.arange(len(stored)), tokens[:-1].numpy() // 64
    changed = np.abs(apart.grad_norm[:-1] / stored - 1)
    assert (changed[own][tokens[:-1].numpy() != 0] > 1e-3).all()
    changed[own] = 0
    assert changed.max() < 1e-5


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_local_credit_is_the_norm_of_both_uses(arch, tokens, local_credit_oracle):
    """A decoding loop whose weight's ordinary gradient has both uses at the position that is decoded."""
    model = tied_model(arch)
    with ScanEngine(model, credit="local") as engine:
        (result,) = engine.scan(tokens[None])
    expected = local_credit_oracle(model, tokens)["grad_norm"]["lm_head.weight"]
    np.testing.assert_allclose(result.grad_norm[:-1, engine.layout[-1].base :], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_heads_stay_near_float32(dtype, tokens):
    exact, half = (tied_model("llama", which) for which in (torch.float32, torch.float32))
    with ScanEngine(exact, targets="lm_head") as engine:
        (wanted,) = engine.scan(tokens[None])
    with ScanEngine(half.to(dtype), targets="lm_head") as engine:
        (result,) = engine.scan(tokens[None])
    error = np.sqrt(np.nanmean((result.grad_norm - wanted.grad_norm) ** 2) / np.nanmean(wanted.grad_norm**2))
    assert error < 0.1


def test_a_batch_records_what_each_sequence_does_alone(tokens):
    model = tied_model("llama", torch.float32)
    with ScanEngine(model, targets="lm_head") as engine:
        together = engine.scan(torch.stack([tokens, tokens.flip(0)]), torch.tensor([[1] * 10, [0] * 3 + [1] * 7]))
        alone = [engine.scan(tokens[None])[0], engine.scan(tokens.flip(0)[None, 3:])[0]]
    for result, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(result.grad_norm), torch.tensor(wanted.grad_norm), equal_nan=True, rtol=1e-4, atol=1e-6)


def test_embeddings_that_do_more_than_a_look_up_are_told():
    model = tied_model("llama", torch.float32)
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.tanh())
    with ScanEngine(model) as engine:
        pass
    assert list(engine.not_measured) == ["lm_head.weight"]
    assert "other uses" in engine.not_measured["lm_head.weight"]
