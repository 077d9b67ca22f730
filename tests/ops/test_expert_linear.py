"""`expert_linear`: values, gradients and surprise against the dense float64 reference, and against gradients of single tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tinyonn
from tinyonn import ops, reference
from tinyonn.testing import IMPLS, assert_close_rms, impl_device

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
FORMS = [(rows, weighed, biased) for rows in ("token", "slot") for weighed in (False, True) for biased in (False, True)]
NAMES = [f"rows by {rows}, {'summed' if weighed else 'per slot'}{', bias' if biased else ''}" for rows, weighed, biased in FORMS]
every_form = pytest.mark.parametrize(("rows", "weighed", "biased"), FORMS, ids=NAMES)


def case(
    rows: str, weighed: bool, biased: bool, *, tokens: int = 23, slots: int = 3, experts: int = 5, features: int = 12, outputs: int = 9,
    dtype: torch.dtype = torch.float64, device: str = "cpu", unused: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Leaves by name, and the indices; a fifth of the slots is unused in three different ways."""
    generator = torch.Generator().manual_seed(tokens + features)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    shape = (tokens, features) if rows == "token" else (tokens, slots, features)
    leaves = {"hidden_states": draw(*shape), "weight": draw(experts, outputs, features)}
    if weighed:
        leaves["top_k_weights"] = draw(tokens, slots)
    if biased:
        leaves["bias"] = draw(experts, outputs)
    index = torch.randint(experts, (tokens, slots), generator=generator)
    if unused:
        index[torch.rand(tokens, slots, generator=generator) < 0.2] = experts
        index[0, 0], index[1, -1] = -1, experts + 7
    return leaves, index.to(device)


def call(library: Any, leaves: dict[str, Tensor], index: Tensor, **options: Any) -> Tensor:
    return library.expert_linear(**leaves, top_k_index=index, **options)


def wide(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().cpu().double().requires_grad_() for name, x in leaves.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@every_form
def test_values_gradients_and_surprise(rows, weighed, biased, impl, dtype):
    device = impl_device(impl)
    if impl == "triton" and (dtype == torch.float64 or (dtype == torch.bfloat16 and device == "cpu")):
        pytest.skip("not a dtype of the kernels here")
    leaves, index = case(rows, weighed, biased, dtype=dtype, device=device)
    probe = torch.zeros(index.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device, requires_grad=True)
    out = call(ops, leaves, index, surprise=probe, impl=impl)
    exact = wide(leaves)
    expected = call(reference, exact, index.cpu())
    assert out.shape == expected.shape
    assert out.dtype == dtype
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device, dtype)
    grads = torch.autograd.grad(out, [*leaves.values(), probe], cotangent)
    wanted = torch.autograd.grad(expected, [*exact.values()], cotangent.cpu().double())
    assert_close_rms(out, expected, LIMITS[dtype], "output")
    for name, got, right in zip(leaves, grads, wanted, strict=False):
        assert right.any()
        assert_close_rms(got, right, LIMITS[dtype], f"gradient of {name}")
    assert_close_rms(grads[-1], surprise_by_hand(exact, index.cpu(), cotangent.cpu().double()), LIMITS[dtype], "surprise")
    used = (index >= 0) & (index < len(leaves["weight"]))
    assert (grads[-1][~used] == 0).all()
    assert (grads[-1][used] > 0).all()
    if not weighed:
        assert (out[~used] == 0).all()


def surprise_by_hand(leaves: dict[str, Tensor], index: Tensor, cotangent: Tensor) -> Tensor:
    """Autograd of each slot alone: all other slots of all tokens are unused."""
    found = torch.zeros(index.shape, dtype=torch.float64)
    watched = [leaves[name] for name in ("weight", "bias") if name in leaves]
    for token, slot in ((token, slot) for token in range(index.shape[0]) for slot in range(index.shape[1])):
        alone = torch.full_like(index, -1)
        alone[token, slot] = index[token, slot]
        grads = torch.autograd.grad(call(reference, leaves, alone), watched, cotangent)
        found[token, slot] = torch.cat([grad.flatten() for grad in grads]).norm()
    return found


@pytest.mark.parametrize("impl", ["torch", "reference"])
@every_form
def test_gradcheck(rows, weighed, biased, impl):
    leaves, index = case(rows, weighed, biased, tokens=5, slots=2, experts=3, features=4, outputs=2)
    names = list(leaves)
    assert torch.autograd.gradcheck(lambda *x: call(ops, dict(zip(names, x, strict=True)), index, impl=impl), [*leaves.values()])


@pytest.mark.parametrize("impl", IMPLS)
def test_two_of_them_and_an_activation_are_a_mixture(impl):
    device = impl_device(impl)
    leaves, index = case("token", True, True, dtype=torch.float32, device=device)
    generator = torch.Generator().manual_seed(5)
    down = torch.randn(5, 12, 9, generator=generator).to(device)
    x, up, weights, bias = leaves.values()
    hidden = torch.nn.functional.silu(ops.expert_linear(x, up, index, bias=bias, impl=impl))
    found = ops.expert_linear(hidden, down, index, weights, impl=impl)
    expected = ops.expert_mlp(x, up, down, index, weights, gate_up_bias=bias, gated=False, impl=impl)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighed", [False, True])
def test_nan_stays_with_its_token_and_unused_rows_are_not_read(impl, weighed):
    device = impl_device(impl)
    leaves, index = case("slot", weighed, False, dtype=torch.float32, device=device)
    clean = call(ops, leaves, index, impl=impl)
    used = (index >= 0) & (index < 5)
    with torch.no_grad():
        leaves["hidden_states"][~used] = torch.nan
        leaves["hidden_states"][7] = torch.nan
        if weighed:
            leaves["top_k_weights"][~used] = torch.nan
    out = call(ops, leaves, index, impl=impl)
    other = torch.arange(23, device=device) != 7
    torch.testing.assert_close(out[other], clean[other])
    assert out[7][used[7]].isnan().all() if not weighed else out[7].isnan().all()
    grads = torch.autograd.grad(out[other].sum(), [*leaves.values()])
    for name, grad in zip(leaves, grads, strict=True):
        if name == "weight":  # 0 times the token's NaN stays in its own experts
            elsewhere = [expert for expert in range(5) if expert not in index[7].tolist()]
            assert elsewhere
            assert grad[elsewhere].isfinite().all()
        else:
            assert grad[other].isfinite().all()
            assert (grad[~used] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 0}, {"slots": 0}, {"tokens": 1, "slots": 1}, {"outputs": 1}, {"features": 1}, {"experts": 1},
        {"slots": 17, "experts": 40}, {"experts": 300}, {"features": 130, "outputs": 70},
    ],
    ids=str,
)  # fmt: skip
def test_odd_sizes(impl, sizes):
    device = impl_device(impl)
    for rows, weighed, biased in (("token", False, True), ("slot", True, True)):
        leaves, index = case(rows, weighed, biased, dtype=torch.float32, device=device, unused=False, **sizes)
        probe = torch.zeros(index.shape, device=device, requires_grad=True)
        out = call(ops, leaves, index, surprise=probe, impl=impl)
        exact = wide(leaves)
        expected = call(reference, exact, index.cpu())
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(out, [*leaves.values(), probe], cotangent.to(device))
        wanted = torch.autograd.grad(expected, [*exact.values()], cotangent.double())
        surprise = reference.linear_surprise(
            exact["hidden_states"], exact["weight"], index.cpu(), exact.get("top_k_weights"), cotangent.double(), bias=exact["bias"]
        )
        for got, right in zip((out, *grads), (expected, *wanted, surprise), strict=True):
            torch.testing.assert_close(got.cpu().double(), right.detach(), rtol=1e-4, atol=2e-5 * max(1, index.shape[1]))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_int32(impl):
    device = impl_device(impl)
    leaves, index = case("slot", True, True, dtype=torch.float32, device=device)
    expected = call(ops, leaves, index, impl=impl)
    strided = {name: x.detach().mT.contiguous().mT.requires_grad_() for name, x in leaves.items()}
    out = call(ops, strided, index.T.contiguous().T.int(), impl=impl)
    torch.testing.assert_close(out, expected)
    grads, others = (torch.autograd.grad(x.square().sum(), [*some.values()]) for x, some in ((out, strided), (expected, leaves)))
    for got, right in zip(grads, others, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@every_form
def test_only_what_is_needed_is_differentiated(rows, weighed, biased, impl):
    device = impl_device(impl)
    leaves, index = case(rows, weighed, biased, dtype=torch.float32, device=device)
    grads = torch.autograd.grad(call(ops, leaves, index, impl=impl).square().sum(), [*leaves.values()])
    for name, expected in zip(leaves, grads, strict=True):
        alone = {other: x.detach().requires_grad_(other == name) for other, x in leaves.items()}
        (found,) = torch.autograd.grad(call(ops, alone, index, impl=impl).square().sum(), [alone[name]])
        torch.testing.assert_close(found, expected)


@every_form
def test_transforms_of_torch_func(rows, weighed, biased):
    leaves, index = case(rows, weighed, biased)
    names, values = list(leaves), [x.detach() for x in leaves.values()]

    def loss(*x: Tensor) -> Tensor:
        return call(ops, dict(zip(names, x, strict=True)), index).square().sum()

    found = torch.func.grad(loss, argnums=tuple(range(len(values))))(*values)
    expected = torch.autograd.grad(loss(*leaves.values()), [*leaves.values()])
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)
    many = torch.stack([values[0], 2 * values[0]])
    each = torch.func.vmap(lambda x: call(ops, {**dict(zip(names, values, strict=True)), "hidden_states": x}, index))(many)
    for x, got in zip(many, each, strict=True):
        torch.testing.assert_close(got, call(ops, {**dict(zip(names, values, strict=True)), "hidden_states": x}, index))
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(loss, tuple(values), tuple(values))


@pytest.mark.parametrize(("rows", "weighed"), [("token", False), ("slot", True)])
def test_compile_takes_it_whole_and_opcheck(rows, weighed):
    leaves, index = case(rows, weighed, True)
    compiled = torch.compile(lambda leaves, index: call(ops, leaves, index), fullgraph=True, backend="aot_eager", dynamic=True)
    for number in (23, 11):
        part = {name: x if name in ("weight", "bias") else x[:number] for name, x in leaves.items()}
        out, expected = compiled(part, index[:number]), call(ops, part, index[:number])
        torch.testing.assert_close(out, expected)
        grads = (torch.autograd.grad(x.square().sum(), [*leaves.values()], materialize_grads=True) for x in (out, expected))
        for got, right in zip(*grads, strict=True):
            torch.testing.assert_close(got, right)
    probe = torch.zeros(index.shape, dtype=torch.float64, requires_grad=True)
    arguments = (leaves["hidden_states"], leaves["weight"], index, leaves.get("top_k_weights"), leaves["bias"], *[None] * 4, probe, "auto")
    torch.library.opcheck(torch.ops.tinyonn.expert_linear.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_surprise_survives_scales_and_an_expert_named_twice_has_two(impl):
    device = impl_device(impl)
    x, weight = torch.full((1, 4), 1e25, device=device), torch.ones(2, 3, 4, device=device)
    probe = torch.zeros(1, 3, device=device, requires_grad=True)
    out = ops.expert_linear(x, weight, torch.tensor([[0, 0, 1]], device=device), surprise=probe, impl=impl)
    out.backward(torch.tensor([[[1e-20] * 3, [2e-20] * 3, [1e25] * 3]], device=device))
    norm = 2e25 * 3**0.5
    assert probe.grad[0, :2].tolist() == pytest.approx([norm * 1e-20, norm * 2e-20])
    assert probe.grad[0, 2] == torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"top_k_index": torch.zeros(23, 3)}, TypeError, "top_k_index must be an int32 or int64 tensor, got torch.float32."),
        ({"top_k_index": torch.zeros(23, dtype=torch.long)}, ValueError, "top_k_index must have shape (N, K), got (23,)."),
        ({"weight": torch.zeros(5, 9)}, ValueError, "weight must have shape (E, O, F), got (5, 9)."),
        ({"hidden_states": torch.zeros(23, 13)}, ValueError, "hidden_states must have shape (23, 12) or (23, 3, 12), got (23, 13)."),
        ({"hidden_states": torch.zeros(23, 2, 12)}, ValueError, "hidden_states must have shape (23, 12) or (23, 3, 12), got (23, 2, 12)."),
        ({"weight": torch.zeros(5, 9, 12, dtype=torch.float16)}, TypeError, "weight must"),
        ({"bias": torch.zeros(5, 8)}, ValueError, "bias must have shape (5, 9)"),
        ({"top_k_weights": torch.zeros(23, 2)}, ValueError, "top_k_weights must have shape (23, 3)"),
        ({"surprise": torch.zeros(23, 2, requires_grad=True)}, ValueError, "surprise must have shape (23, 3)"),
        ({"surprise": torch.zeros(23, 3)}, ValueError, "surprise does not require grad"),
        ({"impl": "cuda"}, ValueError, "impl must be"),
        ({"hidden_states": [1.0]}, TypeError, "hidden_states must be a torch.Tensor, got list."),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes, error, says):
    leaves, index = case("token", True, True, dtype=torch.float32)
    with pytest.raises(error) as caught:
        ops.expert_linear(**{**leaves, "top_k_index": index, **changes})
    assert says in str(caught.value)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_debug_names_bad_values(impl):
    leaves, index = case("token", True, False, unused=False)
    with tinyonn.debug():
        call(ops, leaves, index, impl=impl)
        index[4, 1] = 6
        with pytest.raises(ValueError, match=r"top_k_index must be 0 … 5, 5 for an unused slot, got 6 for token 4\."):
            call(ops, leaves, index, impl=impl)
        index[4, 1] = 5
        leaves["weight"].data[0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="weight"):
            call(ops, leaves, index, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@every_form
def test_a_shared_order_changes_nothing(rows, weighed, biased, impl):
    device = impl_device(impl)
    if impl == "triton":
        pytest.importorskip("triton")
    results = []
    for shared in (False, True):
        leaves, index = case(rows, weighed, biased, dtype=torch.float32, device=device)
        probe = torch.zeros(index.shape, device=device, requires_grad=True)
        order = ops.sort_slots(index, 5, torch.float32, impl=impl) if shared else None
        out = call(ops, leaves, index, surprise=probe, order=order, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves.values(), probe])])
    for alone, together in zip(*results, strict=True):
        torch.testing.assert_close(alone, together, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("tokens", "slots", "experts"), [(23, 3, 5), (1, 1, 1), (300, 4, 70), (6, 2, 9)])
def test_an_order_is_a_permutation_by_expert_and_slot(tokens, slots, experts, impl):
    device = impl_device(impl)
    if impl == "triton":
        pytest.importorskip("triton")
    index = torch.randint(-1, experts + 2, (tokens, slots), generator=torch.Generator().manual_seed(0))
    order = ops.sort_slots(index.to(device), experts, torch.float32, impl=impl)
    flat = [expert if 0 <= expert < experts else experts for expert in index.flatten().tolist()]
    assert order.slots.tolist() == sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))
    assert order.offsets.tolist() == [sum(one < expert for one in flat) for expert in range(experts + 1)]


def test_an_order_of_another_index_is_refused():
    leaves, index = case("token", True, False)
    with pytest.raises(ValueError, match="order must be sort_slots of this index, of 69 slots and 5 experts, got one of 4 and 5"):
        call(ops, leaves, index, order=ops.sort_slots(index[:2, :2], 5, torch.float64))
    with pytest.raises(ValueError, match="of 69 slots and 5 experts, got one of 69 and 6"):
        call(ops, leaves, index, order=ops.sort_slots(index, 6, torch.float64))
    with pytest.raises(ValueError, match="impl must be"):
        ops.sort_slots(index, 5, torch.float64, impl="reference")


def test_an_order_of_another_impl_is_refused():
    pytest.importorskip("triton")
    leaves, index = case("token", True, False, dtype=torch.float32, device=impl_device("triton"))
    order = ops.sort_slots(index, 5, torch.float32, impl="torch")
    with pytest.raises(
        ValueError, match=r"order must be sort_slots with dtype=torch\.float32 and the impl of this call, got one of 0 tiles"
    ):
        call(ops, leaves, index, order=order, impl="triton")


def test_an_order_passes_opcheck_and_compiles():
    leaves, index = case("token", True, True, dtype=torch.float32)
    torch.library.opcheck(torch.ops.tinyonn.sort_slots.default, (index, 5, torch.float32, "auto"))

    def both(x: Tensor) -> Tensor:
        order = ops.sort_slots(index, 5, x.dtype)
        first = ops.expert_linear(x, leaves["weight"], index, order=order)
        return ops.expert_linear(first, leaves["weight"].mT, index, leaves["top_k_weights"], order=order)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaves["hidden_states"]), both(leaves["hidden_states"]))
