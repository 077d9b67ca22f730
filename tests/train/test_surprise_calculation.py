"""Surprise of any mixture: finite entries are exactly the routed pairs, and their values are right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyonn.nn import DynMoE
from tinyonn.testing import tiny_causal_lm
from tinyonn.train import SurpriseHookManager, capture_surprise

TOKENS, FEATURES, EXPERTS = 12, 8, 5


class Expert(nn.Module):
    def __init__(self, last: str) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 6)
        self.last = last
        setattr(self, last, nn.Linear(6, FEATURES, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.last)(torch.nn.functional.silu(self.up(x)))


class Router(nn.Module):
    """Scores, and the two best experts of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.linear(x).softmax(-1)
        return scores, scores.topk(2).indices


class Mixture(nn.Module):
    """The usual loop over experts; `remembers` leaves last_expert_token_indices behind."""

    def __init__(self, last: str = "w2", remembers: bool = True) -> None:
        super().__init__()
        self.router = Router()
        self.experts = nn.ModuleList(Expert(last) for _ in range(EXPERTS))
        self.remembers = remembers

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, FEATURES)
        scores, index = self.router(flat)
        out, indices = torch.zeros_like(flat), []
        for number, expert in enumerate(self.experts):
            tokens = (index == number).any(-1).nonzero().squeeze(-1)
            indices.append(tokens)
            if len(tokens):
                out = out.index_add(0, tokens, expert(flat[tokens]) * scores[tokens, number, None])
        if self.remembers:
            self.last_expert_token_indices = indices
        return out.view(x.shape)


def mixture(**options) -> Mixture:
    torch.manual_seed(0)
    return Mixture(**options)


def batch() -> Tensor:
    return torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(1))


def empty() -> Tensor:
    return torch.full((TOKENS, EXPERTS), math.inf)


def by_token(layer: Mixture, x: Tensor, last: str) -> Tensor:
    """One backward a token."""
    found = empty()
    _, index = layer.router(x)
    for token in range(len(x)):
        layer.zero_grad()
        layer(x)[token].square().sum().backward()
        for expert in index[token].tolist():
            found[token, expert] = getattr(layer.experts[expert], last).weight.grad.norm()
    layer.zero_grad()
    return found


@pytest.mark.parametrize("remembers", [True, False], ids=["indices", "router"])
@pytest.mark.parametrize("last", ["w2", "down_proj"])
def test_finite_entries_are_the_routed_pairs_and_right(last, remembers):
    layer, x, surprise = mixture(last=last, remembers=remembers), batch(), empty()
    with SurpriseHookManager(surprise).register_hooks(layer):
        layer(x).square().sum().backward()
    _, index = layer.router(x)
    routed = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, index, True)
    assert torch.equal(surprise.isfinite(), routed)
    torch.testing.assert_close(surprise, by_token(layer, x, last), rtol=1e-4, atol=1e-7)


def test_checkpointing_changes_nothing():
    layer, x, found = mixture(), batch().requires_grad_(), []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        surprise = empty()
        with SurpriseHookManager(surprise).register_hooks(layer):
            call(x).square().sum().backward()
        found.append(surprise)
    assert torch.equal(*found)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_survives():
    layer, x = mixture(), batch()
    manager = SurpriseHookManager(empty()).register_hooks(layer)
    assert hooks_of(layer) > 0
    with pytest.raises(RuntimeError, match="has registered hooks already; remove them first"):
        manager.register_hooks(layer)
    manager.remove_hooks()
    manager.remove_hooks()
    assert hooks_of(layer) == 0
    with pytest.raises(RuntimeError), SurpriseHookManager(empty()).register_hooks(layer):
        layer(x[:, :3])
    assert hooks_of(layer) == 0
    with pytest.raises(RuntimeError), capture_surprise(layer):
        layer(x[:, :3])
    assert hooks_of(layer) == 0


def test_rows_that_do_not_fit_are_named_and_the_hooks_removed():
    class Forgetful(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.last_expert_token_indices = [rows[:-1] for rows in self.last_expert_token_indices]
            return out

    torch.manual_seed(0)
    layer, x = Forgetful(), batch()
    message = r"last_expert_token_indices\[\d\] must have an index for each of the \d+ rows of expert \d, got \d"
    with pytest.raises(ValueError, match=message), SurpriseHookManager(empty()).register_hooks(layer):
        layer(x)
    assert hooks_of(layer) == 0


def test_rows_that_nobody_names_are_refused():
    layer = nn.Module()
    layer.experts = nn.ModuleList([Expert("w2")] * 1)
    SurpriseHookManager(torch.zeros(TOKENS, 1)).register_hooks(layer)
    with pytest.raises(ValueError, match="Module needs last_expert_token_indices, or a router or gate that returns expert indices"):
        layer.experts[0](batch()).square().sum().backward()
    assert hooks_of(layer) == 0


def test_one_buffer_a_layer():
    model = nn.Sequential(mixture(), mixture())
    with pytest.raises(ValueError, match="per_token_surprise must be one matrix a layer, got one for 2: 0, 1"):
        SurpriseHookManager(empty()).register_hooks(model)
    shared = empty()
    with pytest.raises(ValueError, match="must be a matrix of its own for each layer, got one for '0' and '1'"):
        SurpriseHookManager({"0": shared, "1": shared}).register_hooks(model)
    with pytest.raises(ValueError, match="per_token_surprise must be given for 0, 1, got 0"):
        SurpriseHookManager({"0": shared}).register_hooks(model)
    with pytest.raises(ValueError, match=r"must have shape \(tokens, 5\), got \(12, 4\)"):
        SurpriseHookManager(torch.zeros(12, 4)).register_hooks(model[0])
    with pytest.raises(TypeError, match=r"module contains no experts with a w2 or down_proj \(got Linear\)"):
        SurpriseHookManager(empty()).register_hooks(nn.Linear(2, 2))
    assert hooks_of(model) == 0
    buffers = {"0": empty(), "1": empty()}
    with SurpriseHookManager(buffers).register_hooks(model):
        model(batch()).square().sum().backward()
    assert all((buffer.isfinite().sum(-1) == 2).all() for buffer in buffers.values())


def test_capture_gives_every_kind_of_mixture_by_name():
    """Fused, unfused and transformers' own, in one model."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"fused": DynMoE(FEATURES, 6, num_experts=4, thresholds="learned"), "loop": mixture(remembers=False)})
    x = batch()
    with capture_surprise(model) as surprise:
        assert len(surprise) <= 1
        model["loop"](x + model["fused"](x)).square().sum().backward()
    assert set(surprise) == {"fused", "loop"}
    assert surprise["fused"].shape == (TOKENS, 4)
    routing = model["fused"].route(x)
    assert torch.equal(surprise["fused"].isfinite().sum(-1), (routing.top_k_index < 4).sum(-1))
    expected = empty()
    with SurpriseHookManager(expected).register_hooks(model["loop"]):
        model["loop"](x + model["fused"](x)).square().sum().backward()
    torch.testing.assert_close(surprise["loop"], expected)
    with pytest.raises(TypeError, match="model contains no DynMoE"), capture_surprise(nn.Linear(2, 2)):
        pass


def test_capture_of_a_model_of_transformers():
    import tinyonn.hf.experts  # noqa: F401  # registers the implementation

    model = tiny_causal_lm("qwen3_moe")
    with pytest.raises(TypeError, match=r"experts after model.set_experts_implementation\('tinyonn'\)"), capture_surprise(model):
        pass
    model.set_experts_implementation("tinyonn")
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    with capture_surprise(model) as surprise:
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
    assert list(surprise) == [f"model.layers.{i}.mlp.experts" for i in range(model.config.num_hidden_layers)]
    for found in surprise.values():
        assert found.shape == (36, 5)
        torch.testing.assert_close(found[:18], found[18:])
        assert (found.isfinite().sum(-1) == 2).all()


def test_capture_of_a_mixture_that_is_registered(monkeypatch):
    """Any module whose forward takes a probe can be captured: its kind is registered, not known to the library."""
    from tinyonn.nn import surprise_capture

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            probe = surprise_capture.probe_for(self, torch.zeros(len(x), 1, dtype=torch.int64), 1, x.dtype)
            return 2 * x if probe is None else 2 * x + probe * x

    model = nn.Sequential(Doubled())
    monkeypatch.setattr(surprise_capture, "_capturable", [*surprise_capture._capturable])
    with pytest.raises(TypeError, match="model contains no DynMoE"), capture_surprise(model):
        pass
    surprise_capture.register_capturable(lambda module: isinstance(module, Doubled))
    x = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    with capture_surprise(model) as surprise:
        model(x).sum().backward()
    torch.testing.assert_close(surprise["0"], x.sum(-1, keepdim=True))
