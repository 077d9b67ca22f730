"""Hooks on a mixture written as Mixtral's was, with w1, w2 and w3: each way of calling it, each way of failing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tinyonn.train import SurpriseHookManager, capture_surprise

TOKENS, FEATURES, EXPERTS, SLOTS = 14, 8, 6, 3


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(FEATURES, 5, bias=False)
        self.w2 = nn.Linear(5, FEATURES, bias=False)
        self.w3 = nn.Linear(FEATURES, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Gate(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = super().forward(x)
        weight, index = logits.softmax(-1).topk(SLOTS)
        return logits, weight, index


class Block(nn.Module):
    """Rows of an expert: of the first slot, then of the second, and so on. `scaled` experts are given other values than the gate."""

    def __init__(self, *, scaled: bool = False, by_slot: bool = True) -> None:
        super().__init__()
        self.gate = Gate(FEATURES, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.scaled, self.by_slot = scaled, by_slot

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, FEATURES)
        _, weight, index = self.gate(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            chosen = index == number
            slot, token = torch.where(chosen.T) if self.by_slot else torch.where(chosen)[::-1]
            part = expert(flat[token] * (2 if self.scaled else 1))
            part *= weight[token, slot, None]  # in place, on what the hooked layer gave
            out.index_add_(0, token, part.to(out.dtype))
        return out.view(hidden_states.shape)


def block(**options: bool) -> Block:
    torch.manual_seed(0)
    return Block(**options).double()


def batch(tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randn(tokens, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def empty(tokens: int = TOKENS) -> Tensor:
    return torch.full((tokens, EXPERTS), math.inf, dtype=torch.float64)


def loss(out: Tensor) -> Tensor:
    return out.square().sum()


def oracle(layer: Block, x: Tensor) -> Tensor:
    """One backward a token, no hook."""
    found = empty(len(x))
    index = layer.gate(x)[2]
    for token in range(len(x)):
        grads = torch.autograd.grad(loss(layer(x)[token]), [expert.w2.weight for expert in layer.experts])
        for expert in index[token].tolist():
            found[token, expert] = grads[expert].norm()
    return found


def filled(layer: nn.Module, run: Callable[[], None], tokens: int = TOKENS) -> Tensor:
    surprise = empty(tokens)
    with SurpriseHookManager(surprise).register_hooks(layer):
        run()
    return surprise


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("by_slot", [True, False], ids=["by slot", "by token"])
def test_rows_are_found_in_either_order(by_slot):
    layer, x = block(by_slot=by_slot), batch()
    found = filled(layer, lambda: loss(layer(x)).backward())
    torch.testing.assert_close(found, oracle(layer, x), rtol=1e-10, atol=1e-12)
    assert int(found.isfinite().sum()) == TOKENS * SLOTS


def test_an_order_that_nobody_can_tell_is_refused():
    layer, x = block(scaled=True), batch()
    message = "Block needs last_expert_token_indices: the inputs of expert 0 differ from the router's"
    with pytest.raises(ValueError, match=message):
        filled(layer, lambda: loss(layer(x)).backward())
    assert hooks_of(layer) == 0
    layer.last_expert_token_indices = {e: torch.where((layer.gate(x)[2] == e).T)[1] for e in range(EXPERTS)}
    torch.testing.assert_close(filled(layer, lambda: loss(layer(x)).backward()), oracle(layer, x), rtol=1e-10, atol=1e-12)
    del layer.last_expert_token_indices[3]
    with pytest.raises(ValueError, match=r"last_expert_token_indices\[3\] must have an index .* of expert 3; it is missing"):
        filled(layer, lambda: loss(layer(x)).backward())


def test_calls_without_gradients_between_forward_and_backward_change_nothing():
    layer, x = block(), batch()

    def run() -> None:
        out = layer(x)
        with torch.no_grad():
            layer(batch(TOKENS + 5, seed=2))  # more tokens than the matrix has rows
        loss(out).backward()

    torch.testing.assert_close(filled(layer, run), oracle(layer, x), rtol=1e-10, atol=1e-12)


def test_a_call_that_no_backward_reaches_changes_nothing():
    layer, x = block(), batch()

    def run() -> None:
        layer(batch(seed=2))
        loss(layer(x)).backward()

    torch.testing.assert_close(filled(layer, run), oracle(layer, x), rtol=1e-10, atol=1e-12)


def reentrant(layer: Block, x: Tensor) -> Tensor:
    return checkpoint(layer, x.clone().requires_grad_(), use_reentrant=True)


CALLS = {"plain": lambda layer, x: layer(x), "reentrant": reentrant}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_two_calls_before_backward_are_refused(call):
    """Two micro-batches, or one layer at two depths: the matrix has room for one."""
    layer, x = block(), batch()
    manager = SurpriseHookManager(empty()).register_hooks(layer)
    total = loss(call(layer, call(layer, x)))
    with pytest.raises(RuntimeError, match="Block was called twice before one backward"):
        total.backward()
    assert hooks_of(layer) == 0
    manager.register_hooks(layer)
    first, second = loss(layer(x)), loss(layer(batch(seed=2)))
    first.backward()
    with pytest.raises(RuntimeError, match="Block was called twice before one backward"):
        second.backward()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_step_after_step(call):
    layer, surprise = block(), empty()
    with SurpriseHookManager(surprise).register_hooks(layer):
        for seed in range(3):
            surprise.fill_(math.inf)
            loss(call(layer, batch(seed=seed))).backward()
            torch.testing.assert_close(surprise, oracle(block(), batch(seed=seed)), rtol=1e-10, atol=1e-12)


def test_capture_gives_every_call():
    """In the order of the calls, whichever backward comes first."""
    layer, x, other = block(), batch(), batch(9, seed=2)
    with capture_surprise(layer) as surprise:
        first, second = loss(layer(x)), loss(layer(other))
        first.backward()
        second.backward()
    torch.testing.assert_close(surprise[""], torch.cat([oracle(layer, x), oracle(layer, other)]), rtol=1e-10, atol=1e-12)
    with capture_surprise(layer) as surprise:
        loss(layer(layer(x))).backward()
    assert surprise[""].shape == (2 * TOKENS, EXPERTS)
    torch.testing.assert_close(surprise[""][TOKENS:], oracle(layer, layer(x).detach()), rtol=1e-10, atol=1e-12)
    assert hooks_of(layer) == 0


@pytest.mark.parametrize("whole", [True, False], ids=["layer", "experts"])
def test_checkpointing_changes_nothing(whole):
    layer, x = block(), batch().requires_grad_()
    expected = oracle(layer, x)
    if not whole:
        for expert in layer.experts:
            expert.forward = lambda x, inner=expert.forward: checkpoint(inner, x, use_reentrant=False)

    def call() -> Tensor:
        return checkpoint(layer, x, use_reentrant=False) if whole else layer(x)

    torch.testing.assert_close(filled(layer, lambda: loss(call()).backward()), expected, rtol=1e-10, atol=1e-12)
    with capture_surprise(layer) as surprise:
        loss(call()).backward()
    torch.testing.assert_close(surprise[""], expected, rtol=1e-10, atol=1e-12)


def test_hooks_removed_between_forward_and_backward_fill_nothing():
    layer, x, surprise = block(), batch(), empty()
    manager = SurpriseHookManager(surprise).register_hooks(layer)
    total = loss(layer(x))
    manager.remove_hooks()
    total.backward()
    assert surprise.isinf().all()
    with manager.register_hooks(layer):
        loss(layer(x)).backward()
    torch.testing.assert_close(surprise, oracle(layer, x), rtol=1e-10, atol=1e-12)


def test_an_error_of_the_model_leaves_no_hook():
    layer, x = block(), batch().requires_grad_()
    with pytest.raises(RuntimeError, match="shape"):
        filled(layer, lambda: layer(x.new_zeros(3, 5)))
    assert hooks_of(layer) == 0
    x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        filled(layer, lambda: loss(layer(x)).backward())
    assert hooks_of(layer) == 0


def test_after_a_call_that_failed_the_next_is_right():
    layer, x, surprise = block(), batch(), empty()
    last = layer.experts[-1].w2
    whole = last.weight
    with SurpriseHookManager(surprise).register_hooks(layer):
        last.weight = nn.Parameter(whole[:, :3].detach())
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            layer(x)
        last.weight = whole
        loss(layer(x)).backward()
    torch.testing.assert_close(surprise, oracle(layer, x), rtol=1e-10, atol=1e-12)


def test_the_loss_scale_multiplies_the_surprise():
    layer, x = block(), batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = filled(layer, lambda: scaler.scale(loss(layer(x))).backward())
    torch.testing.assert_close(scaled, 1024 * oracle(layer, x), rtol=1e-10, atol=1e-12)


def test_the_first_backward_through_a_call_counts():
    layer, x = block(), batch()

    def run() -> None:
        total = loss(layer(x))
        total.backward(retain_graph=True)
        (3 * total).backward()

    torch.testing.assert_close(filled(layer, run), oracle(layer, x), rtol=1e-10, atol=1e-12)


def test_managers_within_each_other_fill_their_own():
    layer, x, outer = block(), batch(), empty()
    with SurpriseHookManager(outer).register_hooks(layer), capture_surprise(layer) as between:
        inner = filled(layer, lambda: loss(layer(x)).backward())
    expected = oracle(layer, x)
    for found in (outer, between[""], inner):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert hooks_of(layer) == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    layer, x = block().float(), batch().float()
    expected = oracle(block(), x.double())
    surprise = empty().float()
    model, inputs = (layer, x) if autocast else (layer.bfloat16(), x.bfloat16())
    with SurpriseHookManager(surprise).register_hooks(layer):
        with torch.autocast("cpu", enabled=autocast):
            out = model(inputs)
        loss(out.double()).backward()
    both = surprise.isfinite() & expected.isfinite()
    assert int(both.sum()) >= 0.9 * TOKENS * SLOTS  # a rounded score can choose another expert
    assert int(surprise.isfinite().sum()) == TOKENS * SLOTS
    assert ((surprise[both] - expected[both]).norm() / expected[both].norm()).item() < 5e-2


def test_frozen_experts_are_surprised_too():
    layer, x = block(), batch()
    expected = oracle(layer, x)
    layer.experts.requires_grad_(False)
    torch.testing.assert_close(filled(layer, lambda: loss(layer(x)).backward()), expected, rtol=1e-10, atol=1e-12)
    assert layer.gate.weight.grad is not None


def test_a_larger_matrix_keeps_its_other_rows():
    layer, x = block(), batch()
    found = filled(layer, lambda: loss(layer(x)).backward(), tokens=TOKENS + 3)
    torch.testing.assert_close(found[:TOKENS], oracle(layer, x), rtol=1e-10, atol=1e-12)
    assert found[TOKENS:].isinf().all()
    with pytest.raises(ValueError, match="per_token_surprise of '' must have a row for each of 14 tokens, got 13"):
        filled(layer, lambda: layer(x), tokens=TOKENS - 1)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.zeros(TOKENS, EXPERTS, dtype=torch.long), TypeError, "per_token_surprise of '' must be of floats, got torch.int64"),
        (torch.zeros(TOKENS, EXPERTS, requires_grad=True), ValueError, "per_token_surprise of '' must have no gradient"),
        (None, TypeError, "per_token_surprise must be a tensor, or tensors by layer name, got NoneType"),
        (torch.zeros(TOKENS, EXPERTS).tolist(), TypeError, "per_token_surprise must be a tensor, or tensors by layer name, got list"),
        ({"": None}, TypeError, "per_token_surprise of '' must be of floats, got NoneType"),
        ({0: torch.zeros(TOKENS, EXPERTS)}, ValueError, "per_token_surprise must be given for , got 0"),
    ],
    ids=["integers", "gradient", "none", "list", "no matrix", "number for a name"],
)
def test_a_matrix_that_cannot_be_filled_is_named(matrix, error, message):
    with pytest.raises(error, match=message):
        SurpriseHookManager(matrix).register_hooks(block())


def test_a_matrix_that_another_manager_fills_is_refused():
    shared, first, second = empty(), block(), block()
    manager = SurpriseHookManager(shared).register_hooks(first)
    with pytest.raises(ValueError, match="per_token_surprise of '' must be filled by one manager, got a matrix that another fills"):
        SurpriseHookManager(shared).register_hooks(second)
    assert hooks_of(second) == 0
    manager.remove_hooks()
    with SurpriseHookManager(shared).register_hooks(second):
        loss(second(batch())).backward()
    torch.testing.assert_close(shared, oracle(second, batch()), rtol=1e-10, atol=1e-12)


def test_matrices_of_no_tokens_are_not_taken_for_one():
    model = nn.ModuleList([block(), block()])
    surprise = {"0": empty(0), "1": empty(0)}
    with SurpriseHookManager(surprise).register_hooks(model):
        loss(model[1](model[0](batch(0).requires_grad_()))).backward()
    assert {name: matrix.shape for name, matrix in surprise.items()} == {"0": (0, EXPERTS), "1": (0, EXPERTS)}
    assert hooks_of(model) == 0


def test_an_expert_that_is_called_twice_in_a_call_is_refused():
    layer, x = block(), batch()
    layer.experts[2].forward = lambda x, inner=layer.experts[2].forward: inner(x) + inner(x)
    with pytest.raises(RuntimeError, match="Block called expert 2 twice in one call"):
        filled(layer, lambda: loss(layer(x)).backward())
