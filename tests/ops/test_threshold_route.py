"""Routing by threshold and by budget against their float64 definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tinyonn
from tinyonn import ops, reference

IMPLS = ("torch", "reference")
COSINES = ("sigmoid_cosine", "cosine")
FORMS = (*COSINES, "linear")
SHARES = ("softmax", "gated", "uniform")  # that a budget takes
COMBINES = (*SHARES, "softmax_logits")  # sum to 1
WEIGHTINGS = (*COMBINES, "sigmoid", "relu")


def router(tokens: int, experts: int, features: int = 12, *, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, prototypes, thresholds of which a token passes a few."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(tokens, features), draw(experts, features), 0.1 * draw(experts) + 0.2


@pytest.mark.parametrize("combine", WEIGHTINGS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("lowest", "highest"), [(1, 8), (0, 3), (3, 3), (2, 30)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_routing_equals_its_definition(dtype, lowest, highest, form, combine):
    tensors = router(50, 16, dtype=dtype)
    if form == "cosine":
        tensors = (tensors[0], tensors[1], tensors[2] - 1.6)  # σ(G) about 0.2
    if form == "linear":
        tensors = (tensors[0], tensors[1], tensors[2] + 4.0)  # scores have a standard deviation of √12
    options = {"form": form, "scale": 3.0, "min_experts": lowest, "max_experts": highest, "combine": combine}
    found = ops.threshold_route(*tensors, **options, impl="torch")
    wanted = reference.threshold_route(*tensors, **options)
    assert torch.equal(found.top_k_index, wanted.top_k_index)
    assert found.top_k_index.shape == (50, highest)
    limit = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for got, expected in zip(found[1:], wanted[1:], strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, **limit)
    numbers = (found.top_k_index < 16).sum(-1)
    assert torch.equal(numbers.to(dtype), found.count)
    assert numbers.min() >= lowest
    assert len(numbers.unique()) > (lowest < highest)  # a fixed number of experts would prove nothing
    used = numbers > 0
    if combine in COMBINES:
        torch.testing.assert_close(found.top_k_weights.sum(-1)[used], torch.ones(int(used.sum()), dtype=dtype))
    assert (found.top_k_weights[found.top_k_index == 16] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_has_one_to_eight_experts_unless_told(impl):
    x, prototypes, thresholds = router(20, 12)
    for threshold, count in ((-9.0, 8), (9.0, 1)):  # every expert is above its threshold, or none
        found = ops.threshold_route(x, prototypes, torch.full_like(thresholds, threshold), impl=impl)
        assert found.top_k_index.shape == (20, 8)
        assert (found.count == count).all()
    found = ops.select_by_budget(torch.zeros(20, 12, dtype=torch.float64), 1.0, impl=impl)
    assert found.top_k_index.tolist() == [list(range(8))] * 20


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("combine", ["softmax", "gated", "softmax_logits", "sigmoid", "relu"])
def test_gradcheck_with_the_set_fixed(combine, form, impl):
    leaves = [x.requires_grad_() for x in router(6, 7)]
    scores = reference.threshold_route(*leaves, form=form).scores
    assert scores.abs().min() > 1e-5  # no margin so near 0 that a step of gradcheck changes the set

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.threshold_route(*tensors, form=form, combine=combine, max_experts=4, impl=impl)
        return found.top_k_weights, found.scores

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_a_count_is_that_of_the_scores(impl):
    leaves = [x.requires_grad_() for x in router(20, 7)]
    found = ops.threshold_route(*leaves, impl=impl)
    through_count = torch.autograd.grad(found.count.sum(), leaves, retain_graph=True)
    through_scores = torch.autograd.grad(found.scores.sum(), leaves)
    for a, b in zip(through_count, through_scores, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_straight_through_gradient_of_equal_shares(impl):
    """w_e = m_e / Σ m with ∂m_j/∂l_j = 1 for every expert: ∂w_e/∂l_j = δ_ej / Σ m − m_e / (Σ m)²."""
    tensors = router(20, 7)
    leaves = [x.requires_grad_() for x in tensors]
    found = ops.threshold_route(*leaves, combine="uniform", impl=impl)
    cotangent = torch.randn(found.top_k_weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((found.top_k_weights * cotangent).sum(), leaves, retain_graph=True)
    index, number = found.top_k_index, found.count.detach()[:, None]
    grad_scores = torch.zeros(20, 8, dtype=torch.float64)
    used = index < 7
    grad_scores.scatter_add_(1, index, torch.where(used, cotangent / number, 0))
    grad_scores = grad_scores[:, :7] - (torch.where(used, cotangent, 0).sum(-1, keepdim=True) / number**2)
    wanted = torch.autograd.grad(found.scores, leaves, grad_scores)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_ties_go_to_the_lower_index(dtype, impl):
    scores = torch.tensor([[1, 2, 2, 0, 2, 1], [0, -0.0, 0, 0, 0, 0]], dtype=dtype)
    found = ops.select_by_budget(scores, 1.0, max_experts=4, impl=impl)
    assert found.top_k_index.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_where_no_margin_is_positive(impl):
    x, prototypes, thresholds = router(5, 6)
    found = ops.threshold_route(x, prototypes, thresholds + 10, min_experts=2, combine="gated", max_experts=3, impl=impl)
    assert (found.scores < 0).all()
    torch.testing.assert_close(found.top_k_weights, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).expand(5, 3))
    none = ops.threshold_route(x, prototypes, thresholds + 10, min_experts=0, max_experts=3, impl=impl)
    assert (none.top_k_index == 6).all()
    assert (none.top_k_weights == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("combine", WEIGHTINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_is_marked_and_changes_no_other(value, combine, impl):
    x, prototypes, thresholds = router(4, 6)
    options = {"combine": combine, "impl": impl, "min_experts": 0}
    mask = torch.tensor([False, True, True, True, True, True])
    wanted = ops.threshold_route(x, prototypes, thresholds, expert_mask=mask, **options)
    x[1, 3] = value
    found = ops.threshold_route(x, prototypes, thresholds, expert_mask=mask, **options)
    assert found.top_k_index[1].tolist() == [1] + [6] * 7
    assert found.top_k_weights[1].isnan().tolist() == [True] + [False] * 7
    assert found.count[1].isnan()
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got[[0, 2, 3]], expected[[0, 2, 3]])
    with tinyonn.debug(), pytest.raises(ValueError, match="hidden_states must be finite, got NaN or infinity in 1 of 48 values"):
        ops.threshold_route(x, prototypes, thresholds, combine=combine, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("combine", WEIGHTINGS)
def test_a_router_that_is_not_finite_marks_every_token(combine, impl):
    x, prototypes, thresholds = router(4, 6)
    prototypes[2] = math.nan
    found = ops.threshold_route(x, prototypes, thresholds, combine=combine, impl=impl)
    assert found.top_k_index[:, 0].tolist() == [2] * 4
    assert found.top_k_weights[:, 0].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("combine", SHARES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_budget_for_scores_that_are_not_finite_marks_the_row(value, combine, impl):
    scores = torch.tensor([[-math.inf, 1.0, value], [-math.inf, 1.0, 0.5]])
    found = ops.select_by_budget(scores, 0.5, max_experts=2, combine=combine, impl=impl)
    assert found.top_k_index.tolist() == [[1, 3], [1, 3]]
    assert found.top_k_weights[0].isnan().tolist() == [True, False]
    assert found.top_k_weights[1].isfinite().all()
    assert found.count.isnan().tolist() == [True, False]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("combine", WEIGHTINGS)
def test_masked_experts_might_as_well_not_be_there(combine, impl):
    x, prototypes, thresholds = router(30, 9)
    mask = torch.tensor([True, False, True, True, False, True, True, True, False])
    leaves = [prototypes.requires_grad_(), thresholds.requires_grad_()]
    results = []
    for options in ({"prototypes": prototypes, "thresholds": thresholds, "expert_mask": mask},
                    {"prototypes": prototypes[mask], "thresholds": thresholds[mask]}):  # fmt: skip
        found = ops.threshold_route(x, **options, min_experts=2, max_experts=8, combine=combine, impl=impl)
        results.append((found, torch.autograd.grad(found.top_k_weights.square().sum() + found.count.square().sum(), leaves)))
    (masked, masked_grads), (fewer, grads) = results
    places = torch.cat([mask.nonzero().squeeze(-1), torch.tensor([9])])
    assert torch.equal(masked.top_k_index, places[fewer.top_k_index])
    torch.testing.assert_close(masked.top_k_weights, fewer.top_k_weights)
    torch.testing.assert_close(masked.scores[:, mask], fewer.scores)
    assert (masked.scores[:, ~mask] == -math.inf).all()
    for a, b in zip(masked_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("budget", [0.0, 0.3, 0.7, 0.95, 1.0, "each"])
def test_budget_equals_its_definition(budget, dtype):
    scores = 2 * router(60, 10, 10, dtype=dtype)[0]
    limit = torch.linspace(0, 1, 60, dtype=dtype) if budget == "each" else budget
    found = ops.select_by_budget(scores, limit, max_experts=6, impl="torch")
    wanted = reference.select_by_budget(scores, limit, max_experts=6)
    assert torch.equal(found.top_k_index, wanted.top_k_index)
    torch.testing.assert_close(found.top_k_weights.double(), wanted.top_k_weights, rtol=1e-5, atol=1e-7)
    share = scores.double().softmax(-1)
    for row, index in zip(share, found.top_k_index, strict=True):
        chosen = row[index[index < 10]]
        if budget != "each" and len(chosen) < 6:
            assert chosen.sum() >= budget - 1e-6
            assert len(chosen) == 1 or chosen[:-1].sum() < budget


@pytest.mark.parametrize("impl", IMPLS)
def test_a_larger_budget_activates_more_experts(impl):
    scores = router(60, 10, 10)[0]
    counts = [ops.select_by_budget(scores, budget, max_experts=10, impl=impl).count.mean().item() for budget in (0.2, 0.5, 0.8, 0.99)]
    assert counts == sorted(counts)
    assert counts[-1] > 2 * counts[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", COSINES)
@pytest.mark.parametrize(("of_tokens", "of_prototypes"), [(1e30, 1.0), (1e-30, 1.0), (1.0, 1e30), (1.0, 1e-30), (1e-36, 1e37)])
def test_no_length_changes_a_cosine(of_tokens, of_prototypes, form, impl):
    x, prototypes, thresholds = router(30, 8, dtype=torch.float32)
    expected = ops.threshold_route(x.double(), prototypes.double(), thresholds.double(), form=form)
    x, prototypes = (x * of_tokens).requires_grad_(), (prototypes * of_prototypes).requires_grad_()
    found = ops.threshold_route(x, prototypes, thresholds, form=form, impl=impl)
    assert torch.equal(found.top_k_index, expected.top_k_index)
    torch.testing.assert_close(found.scores.double(), expected.scores, rtol=1e-4, atol=1e-6)
    grads = torch.autograd.grad(found.scores.square().sum(), (x, prototypes))
    for leaf, grad in zip((x, prototypes), grads, strict=True):  # a length has no part in it, so none lies along the vector
        along = (leaf.detach().double() * grad.double()).sum(-1)
        assert grad.isfinite().all()
        assert along.abs().max() < 1e-5
        assert (leaf.detach().double().norm(dim=-1) * grad.double().norm(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_zero_vector_is_at_right_angles_to_all(impl):
    x, prototypes, thresholds = router(3, 5)
    x[1] = 0
    x.requires_grad_()
    found = ops.threshold_route(x, prototypes, thresholds, form="cosine", impl=impl)
    torch.testing.assert_close(found.scores[1], -thresholds.sigmoid())
    (grad,) = torch.autograd.grad(found.scores.sum(), x)
    assert grad.abs().max() < 100


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("combine", ["gated", "uniform"])
def test_a_budget_chooses_the_same_experts_whatever_their_weights(combine, impl):
    scores = 2 * router(60, 10, 10)[0]
    shares = ops.select_by_budget(scores, 0.7, max_experts=6, impl=impl)
    found = ops.select_by_budget(scores, 0.7, max_experts=6, combine=combine, impl=impl)
    assert torch.equal(found.top_k_index, shares.top_k_index)
    used = found.top_k_index < 10
    picked = torch.where(used, functional.pad(scores, (0, 1)).gather(-1, found.top_k_index).clamp(min=0), 0)
    wanted = used.double() if combine == "uniform" else picked
    torch.testing.assert_close(found.top_k_weights, wanted / wanted.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_widened(dtype):
    tensors = router(50, 16, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.threshold_route(*tensors)
    wanted = reference.threshold_route(*tensors)
    assert found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores.double(), wanted.scores, rtol=1e-4, atol=1e-6)


def test_a_mask_of_no_expert_is_named_in_debug():
    tensors, none = router(4, 6), torch.zeros(6, dtype=torch.bool)
    found = ops.threshold_route(*tensors, expert_mask=none)
    assert (found.top_k_index == 6).all()
    assert (found.top_k_weights == 0).all()
    with tinyonn.debug(), pytest.raises(ValueError, match="expert_mask masks out every expert"):
        ops.threshold_route(*tensors, expert_mask=none)


def test_a_budget_compiles_whole():
    scores = router(30, 16, 16, dtype=torch.float32)[0]
    select = torch.compile(ops.select_by_budget, fullgraph=True, backend="aot_eager")
    for budget in (0.3, 0.7, torch.linspace(0.1, 1, 30)):
        assert torch.equal(select(scores, budget).top_k_index, ops.select_by_budget(scores, budget).top_k_index)


def test_it_compiles_whole():
    tensors = router(30, 16, dtype=torch.float32)
    wanted = ops.threshold_route(*tensors)
    found = torch.compile(ops.threshold_route, fullgraph=True)(*tensors)
    assert torch.equal(found.top_k_index, wanted.top_k_index)
    torch.testing.assert_close(found.top_k_weights, wanted.top_k_weights)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl):
    found = ops.threshold_route(*router(0, 5), max_experts=3, impl=impl)
    assert found.top_k_index.shape == found.top_k_weights.shape == (0, 3)
    assert ops.select_by_budget(found.scores, 0.5, max_experts=3, impl=impl).top_k_index.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 2, 8)}, r"hidden_states must have shape \(N, F\)"),
        ({"prototypes": torch.zeros(5, 7)}, r"prototypes must have shape \(E, 8\)"),
        ({"thresholds": torch.zeros(4)}, r"thresholds must have shape \(5,\)"),
        ({"thresholds": torch.zeros(5, device="meta")}, "thresholds must be on cpu"),
        ({"max_experts": 0}, "max_experts must be at least 1"),
        ({"max_experts": 2, "min_experts": 3}, "max_experts must be at least min_experts, 3, got 2"),
        ({"form": "dot"}, "form must be one of sigmoid_cosine, cosine, linear, got"),
        ({"combine": "sum"}, "combine must be one of softmax, gated, uniform, softmax_logits, sigmoid, relu, got"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"scale": 0.0}, "scale must be above 0, got 0.0"),
        ({"scale": math.inf}, "scale must be finite, got inf"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"hidden_states": torch.zeros(4, 8), "prototypes": torch.zeros(5, 8), "thresholds": torch.zeros(5)}
    ops.threshold_route(**good)
    with pytest.raises(ValueError, match=message):
        ops.threshold_route(**{**good, **change})


@pytest.mark.parametrize(
    ("scores", "budget", "message"),
    [
        (torch.zeros(4), 0.5, r"scores must have shape \(N, E\)"),
        (torch.zeros(4, 3), 1.5, "budget must be at least 0 and at most 1, got 1.5"),
        (torch.zeros(4, 3), math.nan, "budget must be finite, got nan"),
        (torch.zeros(4, 3), torch.zeros(3), r"budget must have shape \(\) or \(4,\)"),
    ],
)
def test_bad_budgets_are_named(scores, budget, message):
    with pytest.raises(ValueError, match=message):
        ops.select_by_budget(scores, budget)


@pytest.mark.parametrize("combine", ["sigmoid", "relu", "softmax_logits"])
def test_a_budget_has_shares_only(combine):
    with pytest.raises(ValueError, match=f"combine must be one of softmax, gated, uniform, got '{combine}'"):
        ops.select_by_budget(torch.zeros(4, 3), 0.5, combine=combine)


@pytest.mark.parametrize("budget", [1.0, torch.ones(500)], ids=["number", "tensor"])
def test_a_budget_of_one_takes_every_expert_in_float32(budget):
    scores = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 3
    assert (ops.select_by_budget(scores, budget, max_experts=64).count == 64).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_number_as_budget_does_not_wait_for_the_device():
    scores = torch.randn(64, 16, device="cuda")
    ops.select_by_budget(scores, 0.5)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.select_by_budget(scores, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": torch.zeros(4, 0), "prototypes": torch.zeros(5, 0)}, ValueError, "hidden_states must have at least 1 feature"),
        ({"max_experts": 2.5}, TypeError, "max_experts must be an int, got float"),
        ({"min_experts": 0.5}, TypeError, "min_experts must be an int, got float"),
        ({"max_experts": True}, TypeError, "max_experts must be an int, got bool"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_arguments_of_another_type_and_no_features_are_named(change, error, message, impl):
    good = {"hidden_states": torch.randn(4, 8), "prototypes": torch.randn(5, 8), "thresholds": torch.zeros(5)}
    with pytest.raises(error, match=message):
        ops.threshold_route(**{**good, **change}, impl=impl)


def test_a_number_of_slots_that_is_no_int_is_named():
    with pytest.raises(TypeError, match="max_experts must be an int, got float"):
        ops.select_by_budget(torch.zeros(4, 5), 0.5, max_experts=2.5)


def test_tangents_and_second_derivatives_of_routing_are_right():
    generator = torch.Generator().manual_seed(0)
    x, p, v = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (4, 5, 4))

    def call(x: torch.Tensor) -> torch.Tensor:
        return ops.threshold_route(x, p, torch.zeros(5, dtype=torch.float64), max_experts=3).top_k_weights

    _, tangent = torch.func.jvp(call, (x,), (v,))
    torch.testing.assert_close(tangent, (call(x + 1e-6 * v) - call(x - 1e-6 * v)) / 2e-6, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(call, x.requires_grad_())
