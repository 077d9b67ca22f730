"""Every stored norm is the norm of that token's own weight gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tinyonn.scan.engine.engine import ScanEngine
from tinyonn.testing import tiny_causal_lm

ARCHITECTURES = ["qwen3", "llama", "mistral", "gemma2", "gpt2", "qwen3_moe", "gpt_oss"]
# Their RMSNorm and router compute in float32 even in a float64 model; GPT-2's LayerNorm does not.
RELATIVE = {"gpt2": 4e-7}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (14,), generator=torch.Generator().manual_seed(3))


def double_model(arch, **overrides):
    return tiny_causal_lm(arch, dtype=torch.float64, experts_implementation="eager", tie_word_embeddings=False, **overrides)


def assert_norms_agree(stored: np.ndarray, expected: np.ndarray, arch: str, name: str) -> None:
    """Agreement to a few float32 roundings; a value cancelled to nothing is judged against its column's size."""
    relative = RELATIVE.get(arch, 3e-6)
    np.testing.assert_allclose(stored, expected, rtol=relative, atol=relative * np.nanmax(expected, initial=0), err_msg=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_full_credit_matches_one_weight_per_token(arch, tokens, full_credit_oracle):
    model = double_model(arch)
    expected = full_credit_oracle(model, tokens)
    with ScanEngine(model) as engine:
        (result,) = engine.scan(tokens[None])
    np.testing.assert_allclose(result.loss[:-1], expected["loss"], rtol=1e-6)
    named = set()
    for entry in engine.layout:
        columns = slice(entry.base, entry.base + entry.blocks)
        named.add(entry.name)
        if entry.name not in expected["grad_norm"]:  # an expert that no token was routed to
            assert np.isnan(result.grad_norm[:, columns]).all()
            continue
        assert_norms_agree(result.activation[:-1, columns], expected["activation"][entry.name][:-1], arch, entry.name)
        assert_norms_agree(result.grad_norm[:-1, columns], expected["grad_norm"][entry.name][:-1], arch, entry.name)
    assert named >= set(expected["grad_norm"])


def test_an_input_changed_in_place_between_two_layers_counts_as_another(tokens, full_credit_oracle):
    """The first has a computed weight, whose frozen parts keep no input for backward, so that autograd allows the change."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.utils.parametrizations.orthogonal(nn.Linear(48, 48)), nn.Linear(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.first(x)
            x.mul_(2)
            return first + self.second(x)

    model = double_model("llama")
    torch.manual_seed(0)
    model.model.layers[1].mlp = Doubling().double()
    expected = full_credit_oracle(model, tokens)["grad_norm"]
    with ScanEngine(model) as engine:
        (result,) = engine.scan(tokens[None])
    for name in ("first", "second"):
        (entry,) = [entry for entry in engine.layout if entry.name == f"model.layers.1.mlp.{name}.weight"]
        stored = result.grad_norm[:-1, entry.base : entry.base + entry.blocks]
        assert_norms_agree(stored, expected[entry.name][:-1], "llama", entry.name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_local_credit_matches_the_detached_cache_loop(arch, tokens, local_credit_oracle):
    model = double_model(arch)
    with ScanEngine(model, credit="local") as engine:
        (result,) = engine.scan(tokens[None])
    expected = local_credit_oracle(model, tokens)
    np.testing.assert_allclose(result.loss[:-1], expected["loss"], rtol=1e-6)
    assert {entry.name for entry in engine.layout} == set(expected["grad_norm"])
    for entry in engine.layout:
        stored = result.grad_norm[:-1, entry.base : entry.base + entry.blocks]
        wanted = expected["grad_norm"][entry.name]
        assert (wanted[np.isnan(stored)] == 0).all(), f"{entry.name}: a token routed to this expert was not recorded"
        assert_norms_agree(np.nan_to_num(stored), wanted, arch, entry.name)


def test_local_and_full_credit_differ_and_agree_at_the_last_label(tokens):
    model = double_model("qwen3")
    results = []
    for credit in ("full", "local"):
        with ScanEngine(model, credit=credit) as engine:
            results.append(engine.scan(tokens[None])[0])
    full, local = results
    np.testing.assert_allclose(local.activation, full.activation, rtol=1e-5)
    # The last labelled token serves no later loss: both measures see the same.
    np.testing.assert_allclose(local.grad_norm[-2], full.grad_norm[-2], rtol=1e-4, atol=1e-6)
    assert np.abs(local.grad_norm[:-2] / np.maximum(full.grad_norm[:-2], 1e-3) - 1).mean() > 0.1


@pytest.mark.parametrize("credit", ["full", "local"])
def test_unrouted_experts_are_missing_and_routed_ones_are_not(credit, tokens):
    model = double_model("qwen3_moe")
    with ScanEngine(model, credit=credit, targets="re:experts") as engine:
        (result,) = engine.scan(tokens[None])
    routed = ~np.isnan(result.grad_norm[:-1])
    np.testing.assert_array_equal(routed, ~np.isnan(result.activation[:-1]))
    blocks = {entry.name.rsplit(".", 1)[0]: entry.blocks for entry in engine.layout}
    assert (routed.sum(1) == 2 * sum(blocks.values())).all()  # two experts a token, in each layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("credit", ["full", "local"])
def test_half_precision_models_stay_near_float32(dtype, credit, tokens):
    model = tiny_causal_lm("llama", initializer_range=0.1)
    with ScanEngine(model, credit=credit) as engine:
        (exact,) = engine.scan(tokens[None])
    with ScanEngine(model.to(dtype), credit=credit) as engine:
        (half,) = engine.scan(tokens[None])
    error = np.sqrt(np.nanmean((half.grad_norm - exact.grad_norm) ** 2) / np.nanmean(exact.grad_norm**2))
    assert error < (0.03 if dtype == torch.bfloat16 else 0.005)
    np.testing.assert_allclose(half.loss[:-1], exact.loss[:-1], rtol=0.05, atol=0.02)
