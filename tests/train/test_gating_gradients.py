"""Routers learn while backward passes: what memory that takes, and every way in which a model calls its mixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tinyonn import ops
from tinyonn.nn import DynMoE
from tinyonn.ops import Routing
from tinyonn.train import HyperStep, SurpriseLoss, capture, capture_surprise, gating_gradients


class Model(nn.Module):
    """Mixtures with residuals."""

    def __init__(self, num_layers: int = 2, features: int = 16, neurons: int = 8, experts: int = 6, **options: Any) -> None:
        super().__init__()
        options = {"target_k": 2.5, "max_experts": 4, **options}
        self.layers = nn.ModuleList(DynMoE(features, neurons, experts, **{"gating_loss": "surprise", **options}) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def model_of(*sizes: int, **options: Any) -> Model:
    torch.manual_seed(0)
    return Model(*sizes, **options)


def batch(*shape: int, features: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, features, generator=generator), torch.randn(*shape, features, generator=generator)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that one call allocates beyond what there was."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("num_layers", [2, 8])
def test_a_step_takes_no_more_memory_than_an_ordinary_one(num_layers, checkpointed):
    """Nothing but mixtures, and few tokens: parameters and activations are of one size, so that whatever is kept shows."""
    model, (x, y) = model_of(num_layers, 64, 16, 32), batch(256, features=64)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def loss() -> Tensor:
        out = x
        for layer in model.layers:
            out = out + (checkpoint(layer, out, use_reentrant=False) if checkpointed else layer(out))
        return (out - y).square().mean()

    def ordinary() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    def with_retained_graph() -> None:
        with capture(model) as visits:
            loss().backward(retain_graph=True)
            total = torch.zeros(())
            for module, calls in visits.items():
                scores = module.router(calls[0].hidden_states).scores
                total = total + ops.surprise_min_loss(scores, module.surprise(calls[0])) / len(visits)
            total.backward()
        optimizer.step()
        optimizer.zero_grad()

    step = HyperStep(model, optimizer)
    for warm in (ordinary, lambda: step(loss), with_retained_graph):
        warm()
    least = peak_bytes(ordinary)
    assert peak_bytes(lambda: step(loss)) <= 1.05 * least
    if not checkpointed:  # there a retained graph keeps inputs alone
        assert peak_bytes(with_retained_graph) > 1.1 * least


def by_hand(model: nn.Module, loss: Callable[[], Tensor], *, weight: float = 1.0) -> dict[str, Tensor]:
    """All calls remembered, then each router's loss from its scores, computed again."""
    with capture(model) as visits:
        loss().backward()
        calls = [(module, visit) for module, found in visits.items() for visit in found if visit.probe.grad is not None]
        for module, visit in calls:
            scores = module.router(visit.hidden_states).scores
            (ops.surprise_min_loss(scores, module.surprise(visit)) * weight / len(calls)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def listeners(layer: DynMoE) -> set[str]:
    """Kinds of listeners of the layer, without `capture_surprise`."""
    assert not layer._forward_hooks
    capture = vars(layer).get("_tinyonn_capture")
    return set() if capture is None else {*capture.listeners} - {"surprise"}


def gradients(model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> dict[str, Tensor]:
    with gating_gradients(model, **options):
        loss().backward()
    assert not any(listeners(layer) for layer in model.modules() if isinstance(layer, DynMoE))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(call: Callable[[Model, Tensor], Tensor]) -> None:
    (x, y), results = batch(20), []
    for function in (gradients, by_hand):
        model = model_of()
        results.append(function(model, lambda model=model: (call(model, x.clone().requires_grad_()) - y).square().mean()))
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[1].items():
        torch.testing.assert_close(results[0][name], wanted, msg=lambda text, name=name: f"{name}: {text}")


CALLS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "once": lambda model, x: model(x),
    "a layer twice": lambda model, x: model.layers[0](model.layers[0](x)),
    "a layer never": lambda model, x: model.layers[1](x),
    "a layer for nothing": lambda model, x: model.layers[1](x) + 0 * model.layers[0](x).detach(),
    "a layer without gradients too": lambda model, x: model.layers[1](x) + torch.no_grad()(model.layers[1])(x),
    "two batches": lambda model, x: torch.cat([model(x[:7]), model(x[7:])]),
    "checkpointed": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "checkpointed, twice": lambda model, x: checkpoint(model, checkpoint(model, x, use_reentrant=False), use_reentrant=False),
    "checkpointed within": lambda model, x: checkpoint(
        lambda x: checkpoint(model, x, use_reentrant=False), x, use_reentrant=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_call_with_a_gradient_counts_once(call):
    check(call)


def test_reentrant_checkpoints_count_once():
    (x, y), model, plain = batch(20), model_of(), model_of()
    found = gradients(model, lambda: (checkpoint(model, x.clone().requires_grad_(), use_reentrant=True) - y).square().mean())
    wanted = gradients(plain, lambda: (plain(x) - y).square().mean())
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad)


def test_a_compiled_model_learns_as_an_eager_one():
    (x, y), model, eager = batch(20), model_of(), model_of()
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients(compiled, lambda: (compiled(x) - y).square().mean())
    for name, grad in gradients(eager, lambda: (eager(x) - y).square().mean()).items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], grad)


def test_the_surprise_can_be_captured_beside():
    (x, y), model = batch(20), model_of()
    with capture_surprise(model) as surprise:
        gradients(model, lambda: (model(x) - y).square().mean())
    plain = model_of()
    with capture_surprise(plain) as wanted:
        (plain(x) - y).square().mean().backward()
    for name, matrix in wanted.items():
        assert torch.equal(surprise[name], matrix)


class NothingIsRead(TorchDispatchMode):
    """Whatever needs a value on the host, or waits until one has come from there, is an error."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        assert not any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount"))
        assert given != {"cpu", "meta"} or "copy" not in str(function), f"{function} must not wait for the host."
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"routing": "budget"}, {"combine": "uniform", "checkpoint": True}, {"gating_loss": "both"}], ids=str
)
def test_nothing_is_read_by_the_host(options, masked):
    """On tensors without data no value can be read."""
    model, x = model_of(**options).to("meta"), torch.empty(20, 16, device="meta")
    mask = torch.empty(20, dtype=torch.bool, device="meta") if masked else None
    with NothingIsRead(), gating_gradients(model, token_mask=mask) as gating:
        model(x).square().mean().backward()
    assert gating.loss.is_meta
    assert all(parameter.grad.is_meta for parameter in model.parameters())


def test_frozen_routers_are_left_alone():
    (x, y), model = batch(20), model_of()
    model.layers[0].router.requires_grad_(False)
    model.layers[1].router.thresholds.requires_grad_(False)
    with gating_gradients(model) as gating:
        (model(x) - y).square().mean().backward()
    assert gating.loss > 0
    names = {name for name, parameter in model.named_parameters() if ".router." in name and parameter.grad is not None}
    assert names == {"layers.1.router.prototypes"}


def test_bfloat16_parameters_learn():
    (x, y), model, exact = batch(64), model_of().bfloat16(), model_of()
    exact.load_state_dict({name: value.to(exact.state_dict()[name].dtype) for name, value in model.state_dict().items()})
    found = gradients(model, lambda: (model(x.bfloat16()) - y.bfloat16()).float().square().mean())
    wanted = gradients(exact, lambda: (exact(x.bfloat16().float()) - y).square().mean())
    for name in ("layers.0.router.prototypes", "layers.0.router.thresholds"):
        assert found[name].dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(found[name].float().flatten(), wanted[name].flatten(), dim=0) > 0.98


def test_routers_learn_under_autocast():
    """In the precision of their parameters, from the surprise of experts in bfloat16."""
    (x, y), model, exact = batch(64), model_of(), model_of()

    def autocast_loss() -> Tensor:
        with torch.autocast("cpu"):
            return (model(x) - y).float().square().mean()

    found, wanted = gradients(model, autocast_loss), gradients(exact, lambda: (exact(x) - y).square().mean())
    for name in ("layers.0.router.prototypes", "layers.0.router.thresholds"):
        assert found[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), wanted[name].flatten(), dim=0) > 0.98


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_no_memory_is_kept():
    model, (x, y) = model_of(4, 256, 32, 64).cuda(), (part.cuda() for part in batch(1024, features=256))
    mask = torch.ones(1024, dtype=torch.bool, device="cuda")

    def ordinary() -> None:
        (model(x) - y).square().mean().backward()

    def learning() -> None:
        with gating_gradients(model, token_mask=mask):
            ordinary()

    def peak(step: Callable[[], None]) -> int:
        for parameter in model.parameters():
            parameter.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    for step in (ordinary, learning, ordinary, learning):  # the fastest tiles are found
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        learning()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    least = peak(ordinary)
    assert peak(learning) <= 1.05 * least


def test_the_weight_of_the_routers_losses():
    (x, y), grads = batch(20), []
    for weight in (0.0, 0.25, 1.0):
        model = model_of()
        grads.append(gradients(model, lambda model=model: (model(x) - y).square().mean(), weight=weight))
    name = "layers.0.router.prototypes"
    torch.testing.assert_close(grads[1][name] - grads[0][name], 0.25 * (grads[2][name] - grads[0][name]))
    plain = model_of()
    (plain(x) - y).square().mean().backward()
    assert torch.equal(grads[0][name], plain.layers[0].router.prototypes.grad)


def test_an_error_adds_nothing_and_leaves_no_hook():
    (x, y), model = batch(20), model_of()
    x.requires_grad_().register_hook(lambda grad: 1 / 0)  # when all mixtures have been passed
    with pytest.raises(ZeroDivisionError), gating_gradients(model, weight=1e6):
        (model(x) - y).square().mean().backward()
    assert all(parameter.grad.abs().max() < 1e3 for parameter in model.parameters())
    with pytest.raises(ValueError, match="hidden_states must have shape"), gating_gradients(model):
        model(x[:, :3])
    assert not any(listeners(layer) for layer in model.layers)


def test_a_second_pass_through_one_call_is_refused():
    (x, y), model = batch(20), model_of()
    with gating_gradients(model):
        loss = (model(x) - y).square().mean()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="backward ran twice through the same forward"):
            loss.backward()


def test_one_context_at_a_time():
    model = model_of()
    with gating_gradients(model), pytest.raises(RuntimeError, match="only one context can capture it"), gating_gradients(model):
        pass
    assert not any(listeners(layer) for layer in model.layers)


@pytest.mark.parametrize("shape", [(4, 5), (19,), (2, 10, 1)], ids=str)
def test_a_mask_of_another_shape_is_refused_in_forward(shape):
    model, (x, _) = model_of(), batch(5, 4)
    message = r"token_mask must have the shape of the tokens a mixture is given, \(5, 4\), got "
    with pytest.raises(ValueError, match=message), gating_gradients(model, token_mask=torch.ones(shape, dtype=torch.bool)):
        model(x)


def test_a_mask_of_the_batch_fits_tokens_in_one_row():
    """transformers' mixtures are given (batch * tokens, features); and the other way round."""
    (x, y), grads = batch(20), []
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    for given in (mask, mask.flatten().long()):
        model = model_of()
        grads.append(gradients(model, lambda model=model: (model(x) - y).square().mean(), token_mask=given))
    assert all(torch.equal(grads[0][name], grad) for name, grad in grads[1].items())
    model = model_of()
    found = gradients(model, lambda: (model(x.view(4, 5, 16)) - y.view(4, 5, 16)).square().mean(), token_mask=mask.flatten())
    assert all(torch.equal(found[name], grad) for name, grad in grads[0].items())
    with pytest.raises(ValueError, match=r"\(20,\), got \(4, 4\)"), gating_gradients(model, token_mask=mask[:, :4]):
        model(x)


@pytest.mark.parametrize("mask", [torch.zeros(20), [True] * 20], ids=["floats", "a list"])
def test_a_mask_that_is_none_is_refused(mask):
    message = r"token_mask must be a tensor of bool or integers, got (torch.float32|list)"
    with pytest.raises(TypeError, match=message), gating_gradients(model_of(), token_mask=mask):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be at least 0, got -1.0"),
        ({"weight": float("nan")}, "weight must be finite, got nan"),
        ({"w_ce": -0.1}, "w_ce must be at least 0, got -0.1"),
        ({"w_kl": float("inf")}, "w_kl must be finite, got inf"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message), gating_gradients(model_of(), **options):
        pass


def test_other_wrappers_are_refused():
    wrapped = nn.DataParallel(model_of())
    with pytest.raises(TypeError, match="DistributedDataParallel or fully_shard, got DataParallel"), gating_gradients(wrapped):
        pass


class OfLabels(NamedTuple):
    layer: DynMoE
    inputs: Tensor
    routing: Routing
    losses: list[float]
    least: list[Tensor]


def of_two_labellings(kind: str) -> OfLabels:
    """The router's loss, and each token's expert of the lowest surprise, for two sets of labels of the same tokens."""
    torch.manual_seed(0)
    layer = DynMoE(16, 8, 6, target_k=2.5, max_experts=4, gating_loss="surprise", surprise_kind=kind)
    head = nn.Linear(16, 5)
    x = torch.randn(200, 16)
    losses, least = [], []
    for seed in range(2):
        labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(seed))
        with layer.capturing() as visits:
            nn.functional.cross_entropy(head(x + layer(x)), labels).backward()
            losses.append(layer.gating_loss(visits[0]).item())
            least.append(layer.surprise(visits[0]).argmin(-1))
            routing = visits[0].routing
    return OfLabels(layer, x, routing, losses, least)


def test_the_surprise_of_whole_experts_depends_on_the_labels():
    found = of_two_labellings("expert")
    assert abs(found.losses[1] / found.losses[0] - 1) > 1e-4
    assert not torch.equal(*found.least)


@pytest.mark.parametrize("kind", ["down_proj", "output"])
def test_the_surprise_of_an_outer_product_does_not_depend_on_the_labels(kind):
    """What docs/dyn_moe.md says: the gradient's norm is common to a token's experts and cancels."""
    found = of_two_labellings(kind)
    assert found.losses[1] == pytest.approx(found.losses[0], rel=1e-6)
    assert torch.equal(*found.least)
    # Weight times the norm of what the activation gives, written out for every expert.
    gate, up = torch.einsum("nf,eif->nei", found.inputs, found.layer.gate_up_proj).chunk(2, -1)
    strength = (nn.functional.silu(gate) * up).norm(dim=-1) if kind == "down_proj" else torch.ones(200, 6)
    size = torch.full((200, 7), float("inf")).scatter(1, found.routing.top_k_index, found.routing.top_k_weights)[:, :6]
    size[size == 0] = float("inf")
    assert torch.equal((size * strength).argmin(-1), found.least[0])


def test_the_loss_is_given_as_an_object_or_by_its_numbers():
    (x, y), grads = batch(20), []
    for options in ({"surprise_loss": SurpriseLoss(w_ce=0.3, temperature=2.0)}, {"w_ce": 0.3, "temperature": 2.0}, {}):
        model = model_of()
        grads.append(gradients(model, lambda model=model: (model(x) - y).square().mean(), **options)["layers.0.router.prototypes"])
    assert torch.equal(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surprise_loss": SurpriseLoss(), "w_ce": 1.0}, "surprise_loss already contains w_ce"),
        ({"w_c": 1.0}, "unexpected keyword argument 'w_c'"),
    ],
    ids=["twice", "unknown"],
)
def test_a_loss_that_is_none_is_named(options, message):
    with pytest.raises(TypeError, match=message), gating_gradients(model_of(), **options):
        pass


def test_gradients_and_surprise_come_from_one_probe():
    model, (x, _) = model_of(), batch(20)
    probes = []
    original = ops.expert_mlp

    def noted(*args: Any, surprise: Tensor, **options: Any) -> Tensor:
        probes.append(surprise)
        return original(*args, surprise=surprise, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyonn.nn.dyn_moe.expert_mlp", noted)
        with capture(model) as visits, capture_surprise(model) as surprise:
            model(x).sum().backward()
    found = [visit.probe for calls in visits.values() for visit in calls]
    assert [id(probe) for probe in probes] == [id(probe) for probe in found]
    for (module, calls), name in zip(visits.items(), surprise, strict=True):
        assert torch.equal(module.surprise(calls[0]), surprise[name])
