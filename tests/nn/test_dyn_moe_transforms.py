"""DynMoE under torch.func and torch.export."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap

from tinyonn.nn import DynMoE
from tinyonn.train import capture_surprise


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(seed: int = 0, **options) -> DynMoE:
    torch.manual_seed(seed)
    return DynMoE(16, 8, **{"num_experts": 6, "target_k": 2.5, "max_experts": 4, "bias": True, **options})


def loss_of(module: DynMoE):
    return lambda parameters, x: functional_call(module, parameters, (x,)).square().sum()


@pytest.mark.parametrize("options", [{}, {"routing": "budget", "scale": 10.0}, {"checkpoint": True}], ids=str)
def test_functional_gradients_are_those_of_backward(options):
    module, x = mixture(**options), tokens(3, 7, 16)
    module(x).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.reset_statistics()
    found = grad(loss_of(module))(dict(module.named_parameters()), x)
    assert int(module.tokens_seen) == 21
    for name, got in found.items():
        torch.testing.assert_close(got, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
    jacobian = jacrev(lambda y: module(y).sum(-1))(x[0])
    assert jacobian.shape == (7, 7, 16)
    leaf = x[0].clone().requires_grad_()
    (row,) = torch.autograd.grad(module(leaf).sum(-1)[3], leaf)
    torch.testing.assert_close(jacobian[3], row)


def test_gradients_of_each_token_have_the_surprise_for_norm():
    module, x = mixture(), tokens(9, 16)
    parameters = dict(module.named_parameters())
    module.reset_statistics()
    each = vmap(grad(loss_of(module)), (None, 0))(parameters, x.unsqueeze(1))
    assert int(module.tokens_seen) == 9
    with capture_surprise(module) as surprise:
        module(x).square().sum().backward()
    routed = surprise[""].isfinite()
    norms = each["down_proj"].flatten(2).norm(dim=-1)
    torch.testing.assert_close(norms[routed], surprise[""][routed], rtol=1e-4, atol=1e-6)
    assert (norms[~routed] == 0).all()
    for name, got in each.items():
        torch.testing.assert_close(got.sum(0), grad(loss_of(module))(parameters, x)[name], rtol=1e-4, atol=1e-5)


def test_an_ensemble_runs_as_its_members_do():
    members, x = [mixture(seed) for seed in range(3)], tokens(5, 16)
    wanted = torch.stack([member(x) for member in members])
    parameters, buffers = stack_module_state(members)
    buffers["tokens_seen"].zero_()
    found = vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, wanted)
    assert buffers["tokens_seen"].tolist() == [5, 5, 5]
    assert buffers["expert_counts"].sum(-1).tolist() == [2 * int(member.expert_counts.sum()) for member in members]


def test_second_derivatives_are_refused():
    module = mixture()
    for transform in (hessian, lambda f: jacrev(jacrev(f))):
        with pytest.raises(RuntimeError, match=r"expert_mlp does not support (forward-mode differentiation|second derivatives)"):
            transform(lambda x: module(x).square().sum())(tokens(1, 16))


@pytest.mark.parametrize(
    ("options", "strict"), [({}, True), ({"dropout": 0.1, "combine": "uniform"}, False), ({"routing": "budget"}, False)]
)
def test_it_is_exported_for_any_number_of_tokens(options, strict):
    module = mixture(**options).eval()
    rows, length = torch.export.Dim("rows"), torch.export.Dim("length", min=2)
    exported = torch.export.export(module, (tokens(3, 7, 16),), dynamic_shapes=({0: rows, 1: length},), strict=strict)
    for program in (exported.module(), exported.run_decompositions().module()):
        for shape in ((3, 7), (5, 40), (2, 2)):
            x = tokens(*shape, 16, seed=1)
            assert torch.equal(program(x), module(x))
