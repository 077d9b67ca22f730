"""Losses of the router against a loop over tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tinyonn
from tinyonn import ops, reference


def case(tokens: int = 40, experts: int = 6, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """scores, a surprise of raw size with tokens that went nowhere, to one expert, everywhere; a mask."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    surprise = 1e-3 * torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    surprise[torch.rand(tokens, experts, generator=generator) < 0.5] = math.inf
    surprise[0], surprise[1], surprise[2] = math.inf, 2e-3, 0.0
    surprise[3], surprise[3, 2] = math.inf, 1e-3
    return scores.to(dtype), surprise.to(dtype), torch.rand(tokens, generator=generator) < 0.7


OPTIONS = [
    {}, {"w_ce": 0.0}, {"w_kl": 0.0}, {"temperature": 0.2}, {"w_ce": 0.3, "w_kl": 2.0, "temperature": 3.0}, {"among": "chosen"},
]  # fmt: skip


@pytest.mark.parametrize("signed", [False, True], ids=["norms", "signed"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_and_its_gradient_equal_the_definition(options, masked, signed):
    scores, surprise, mask = case()
    if signed:
        surprise = torch.where(surprise.isinf(), surprise, surprise * scores.sign().flip(0))
        assert (surprise < 0).any()
    results = []
    for function in (reference.surprise_min_loss, ops.surprise_min_loss):
        leaf = scores.clone().requires_grad_()
        loss = function(leaf, surprise, token_mask=mask if masked else None, **options)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_experts_that_are_not_there_have_no_gradient():
    scores, surprise, _ = case()
    surprise[:, 4] = math.inf
    leaf = scores.clone().requires_grad_()
    mask = torch.arange(6) != 4
    loss = ops.surprise_min_loss(torch.where(mask, leaf, -math.inf), surprise)
    fewer = scores[:, mask].clone().requires_grad_()
    wanted = ops.surprise_min_loss(fewer, surprise[:, mask])
    torch.testing.assert_close(loss, wanted)
    (grad,), (wanted_grad,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(wanted, fewer)
    torch.testing.assert_close(grad[:, mask], wanted_grad)
    assert (grad[:, 4] == 0).all()


def test_a_ranking_among_the_chosen_moves_no_other_score():
    scores, surprise, _ = case()
    unseen = surprise.isinf()
    leaf = scores.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.surprise_min_loss(leaf, surprise, among="chosen"), leaf)
    assert (grad[unseen] == 0).all()
    assert (grad[~unseen] != 0).any()
    assert grad.isfinite().all()
    (grad,) = torch.autograd.grad(ops.surprise_min_loss(leaf, surprise), leaf)
    assert (grad[unseen & (surprise != math.inf).any(-1, keepdim=True)] != 0).any()
    with pytest.raises(ValueError, match="among must be one of all, chosen, got 'seen'"):
        ops.surprise_min_loss(leaf, surprise, among="seen")


def test_gradcheck():
    scores, surprise, mask = case(8, 4)
    assert torch.autograd.gradcheck(lambda x: ops.surprise_min_loss(x, surprise, token_mask=mask), scores.requires_grad_())


@pytest.mark.parametrize("scale", [1e-6, 65536.0])
def test_the_scale_of_the_surprise_does_not_matter(scale):
    scores, surprise, _ = case(dtype=torch.float32)
    torch.testing.assert_close(ops.surprise_min_loss(scores, surprise * scale), ops.surprise_min_loss(scores, surprise))


def test_surprise_next_to_the_largest_float_is_not_summed_to_infinity():
    scores, surprise, _ = case(dtype=torch.float32)
    surprise = torch.where(surprise.isfinite(), torch.rand(surprise.shape, generator=torch.Generator().manual_seed(1)), math.inf)
    raised = surprise * 3e38
    assert torch.where(raised.isfinite(), raised, 0).sum(-1).isinf().any()
    torch.testing.assert_close(ops.surprise_min_loss(scores, raised), ops.surprise_min_loss(scores, surprise))


def test_a_step_moves_a_token_towards_the_least_surprised_expert():
    scores, surprise, _ = case()
    leaf = scores.clone().requires_grad_()
    ops.surprise_min_loss(leaf, surprise).backward()
    routed = surprise.isfinite().any(-1) & (surprise.amin(-1) > 0)
    least = surprise.argmin(-1)
    assert (leaf.grad.gather(1, least[:, None])[routed] < 0).all()
    assert (leaf.grad[0] == 0).all()


@pytest.mark.parametrize("function", [ops.surprise_min_loss, reference.surprise_min_loss])
def test_an_unknown_surprise_is_an_unknown_loss_unless_it_is_masked(function):
    scores, surprise, mask = case()
    number = int(mask.nonzero()[-1])
    surprise[number, 0] = math.nan
    leaf = scores.requires_grad_()
    loss = function(leaf, surprise, token_mask=mask)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad[number].isnan().all()
    mask[number] = False
    loss = function(leaf, surprise, token_mask=mask)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_nothing_routed_is_no_loss_and_no_gradient():
    scores = torch.randn(5, 3, requires_grad=True)
    loss = ops.surprise_min_loss(scores, torch.full((5, 3), math.inf))
    loss.backward()
    assert loss.item() == 0
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_scores_have_the_loss_of_their_values(dtype):
    """Computed in float32: only the gradient is rounded."""
    scores, surprise, mask = case(dtype=dtype)
    leaf, exact = scores.clone().requires_grad_(), scores.double().requires_grad_()
    loss = ops.surprise_min_loss(leaf, surprise.float(), token_mask=mask)
    wanted = reference.surprise_min_loss(exact, surprise.double(), token_mask=mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-7)
    loss.backward()
    wanted.backward()
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("experts", [1, 3])
def test_no_tokens_are_no_loss(experts):
    scores = torch.zeros(0, experts, requires_grad=True)
    loss = ops.surprise_min_loss(scores, torch.zeros(0, experts), token_mask=torch.ones(0, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.shape == (0, experts)


def test_one_expert_is_the_least_surprised():
    scores = torch.randn(4, 1, requires_grad=True)
    loss = ops.surprise_min_loss(scores, torch.rand(4, 1))
    loss.backward()
    assert loss.item() == 0
    assert (scores.grad == 0).all()


def test_scores_of_masked_tokens_do_not_matter():
    scores, surprise, mask = case(dtype=torch.float32)
    wild = torch.where(mask[:, None], scores, math.nan).requires_grad_()
    loss = ops.surprise_min_loss(wild, surprise, token_mask=mask)
    torch.testing.assert_close(loss.detach(), ops.surprise_min_loss(scores, surprise, token_mask=mask))
    loss.backward()
    assert wild.grad.isfinite().all()


def test_it_compiles_whole():
    scores, surprise, mask = case(dtype=torch.float32)
    compiled = torch.compile(ops.surprise_min_loss, fullgraph=True)
    torch.testing.assert_close(compiled(scores, surprise, token_mask=mask), ops.surprise_min_loss(scores, surprise, token_mask=mask))


def test_sparse_diversity_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    count = torch.randint(1, 5, (30,), generator=generator).double()
    results = []
    for function in (reference.sparse_diversity_loss, ops.sparse_diversity_loss):
        leaves = [prototypes.clone().requires_grad_(), count.clone().requires_grad_()]
        loss = function(*leaves, 2.0)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", [ops.sparse_diversity_loss, reference.sparse_diversity_loss], ids=["ops", "reference"])
def test_orthogonal_prototypes_are_only_shortened(function):
    """The norm of their cosines is 0, and so is its gradient; the mean of their lengths pulls each towards 0."""
    prototypes = torch.eye(4, dtype=torch.float64, requires_grad=True)
    function(prototypes, torch.ones(3, dtype=torch.float64), 1.0).backward()
    torch.testing.assert_close(prototypes.grad, torch.eye(4, dtype=torch.float64) / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": torch.zeros(4, 2)}, r"surprise must have shape \(4, 3\)"),
        ({"scores": torch.zeros(4)}, r"scores must have shape \(N, E\)"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"w_ce": -1.0}, "w_ce must be at least 0"),
        ({"w_kl": math.nan}, "w_kl must be finite"),
        ({"scores": torch.zeros(4, 0), "surprise": torch.zeros(4, 0)}, r"scores must have shape \(N, E\), got \(4, 0\)"),
        ({"token_mask": torch.ones(3, dtype=torch.bool)}, r"token_mask must have shape \(4,\)"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.surprise_min_loss(**{"scores": torch.zeros(4, 3), "surprise": torch.ones(4, 3), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(4, 3, dtype=torch.long)}, TypeError, "scores must be"),
        ({"surprise": torch.zeros(4, 3, dtype=torch.long)}, TypeError, "surprise must be"),
        ({"surprise": torch.ones(4, 3, device="meta")}, ValueError, "surprise must be on cpu"),
        ({"token_mask": torch.ones(4, dtype=torch.bool, device="meta")}, ValueError, "token_mask must be on cpu"),
    ],
    ids=["integer scores", "integer surprise", "surprise elsewhere", "mask elsewhere"],
)
def test_another_dtype_or_device_is_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.surprise_min_loss(**{"scores": torch.zeros(4, 3), "surprise": torch.ones(4, 3), **change})


def test_debug_names_nan():
    with tinyonn.debug(), pytest.raises(ValueError, match="surprise must not contain NaN"):
        ops.surprise_min_loss(torch.zeros(4, 3), torch.full((4, 3), math.nan))


@pytest.mark.parametrize(
    ("prototypes", "count", "target", "message"),
    [
        (torch.zeros(3), torch.ones(4), 1.0, r"prototypes must have shape \(E, F\)"),
        (torch.zeros(3, 2), torch.ones(0), 1.0, r"count must have shape \(N,\), N at least 1"),
        (torch.zeros(3, 2), torch.ones(4), 0.0, "target_k must be above 0"),
    ],
)
def test_bad_diversity_input_is_named(prototypes, count, target, message):
    with pytest.raises(ValueError, match=message):
        ops.sparse_diversity_loss(prototypes, count, target)


def test_sparse_diversity_of_masked_tokens_and_experts_is_that_of_the_others():
    prototypes, count = (torch.randn(6, 16, dtype=torch.float64), torch.rand(9, dtype=torch.float64) * 4)
    tokens, experts = torch.rand(9) < 0.6, torch.tensor([True, True, False, True, False, True])
    prototypes[2] = torch.nan
    count[~tokens] = torch.nan
    for leaf in (prototypes, count):
        leaf.requires_grad_()
    found = ops.sparse_diversity_loss(prototypes, count, 2.0, token_mask=tokens, expert_mask=experts)
    wanted = reference.sparse_diversity_loss(prototypes[experts], count[tokens], 2.0)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for got, grad in zip(torch.autograd.grad(found, (prototypes, count)), torch.autograd.grad(wanted, (prototypes, count)), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-14)


def test_sparse_diversity_of_no_token_is_zero():
    prototypes = torch.randn(6, 16, requires_grad=True)
    loss = ops.sparse_diversity_loss(prototypes, torch.ones(3), 2.0, token_mask=torch.zeros(3, dtype=torch.bool))
    assert loss == 0
    assert (torch.autograd.grad(loss, prototypes)[0] == 0).all()


def test_sparse_diversity_is_not_rounded_by_autocast():
    prototypes, count = torch.linalg.qr(torch.randn(16, 16)).Q, torch.full((4,), 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.sparse_diversity_loss(prototypes, count, 2.0)
    assert found == ops.sparse_diversity_loss(prototypes, count, 2.0)
    assert found.item() == pytest.approx(1, abs=1e-5)


def test_sparse_diversity_of_tiny_prototypes_is_that_of_their_directions():
    prototypes, count = torch.randn(8, 16), torch.full((4,), 2.0)
    wanted = ops.sparse_diversity_loss(prototypes, count, 2.0) - prototypes.norm(dim=-1).mean()
    torch.testing.assert_close(ops.sparse_diversity_loss(prototypes * 1e-25, count, 2.0), wanted)
