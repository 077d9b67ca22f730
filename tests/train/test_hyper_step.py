"""A step in which surprise teaches the router: against the form that keeps the graph, and in every setting of training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tinyonn
from tinyonn import ops
from tinyonn.nn import DynMoE
from tinyonn.testing import tiny_causal_lm
from tinyonn.train import HyperStep, HyperStepMixin, SurpriseLoss, capture, gating_gradients


class Model(nn.Module):
    """Two mixtures with residuals."""

    def __init__(self, *, recompute: bool | None = None, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DynMoE(16, 8, **{"num_experts": 6, "target_k": 2.5, "max_experts": 4, "gating_loss": "surprise", **options}) for _ in range(2)
        )
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + (layer(x) if self.recompute is None else checkpoint(layer, x, use_reentrant=self.recompute))
        return x


def model_of(**options) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def batch(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 16, generator=generator), torch.randn(*shape, 16, generator=generator)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class NoStep(torch.optim.SGD):
    """Leaves gradients to be looked at."""

    def __init__(self, parameters, **options) -> None:
        super().__init__(parameters, lr=0.0, **options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


def with_retained_graph(model: Model, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What the step saves: the main graph kept alive, and the routers' losses added to it."""
    with capture(model) as visits:
        loss = (model(x) - y).square().mean()
        loss.backward(retain_graph=True)
        total = torch.zeros(())
        for module, calls in visits.items():
            surprise = module.surprise(calls[0])
            flat = None if mask is None else mask.reshape(-1)
            scores = module.router(calls[0].hidden_states).scores
            total = total + ops.surprise_min_loss(scores, surprise, token_mask=flat) / len(visits)
        total.backward()
    return gradients(model)


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_those_of_a_retained_graph(masked):
    x, y = batch(3, 20)
    mask = torch.arange(20).expand(3, 20) < torch.tensor([[20], [7], [13]]) if masked else None
    model, kept = model_of(), model_of()
    step = HyperStep(model, NoStep(model.parameters()))
    result = step(lambda: (model(x) - y).square().mean(), token_mask=mask)
    assert result.stepped
    assert result.gating_loss > 0
    assert_same(gradients(model), with_retained_graph(kept, x, y, mask))


def test_the_main_graph_is_gone_when_the_routers_learn(monkeypatch):
    model, (x, y) = model_of(), batch(20)
    losses = []
    original = DynMoE.gating_loss

    def look(self, *args, **kwargs):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            losses[0].backward()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DynMoE, "gating_loss", look)

    def compute() -> torch.Tensor:
        losses.append((model(x) - y).square().mean())
        return losses[0]

    HyperStep(model, NoStep(model.parameters()))(compute)
    assert all("_tinyonn_capture" not in vars(layer) for layer in model.layers)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_have_the_same_gradients(reentrant):
    x, y = batch(30)
    results = []
    for model in (model_of(), model_of(recompute=reentrant)):
        step = HyperStep(model, NoStep(model.parameters()))
        step(lambda model=model: (model(x.clone().requires_grad_()) - y).square().mean())
        results.append(gradients(model))
    assert_same(results[1], results[0])


def test_two_optimisers_step_their_own():
    x, y = batch(40)
    one, two = model_of(), model_of()
    routers = [p for name, p in two.named_parameters() if ".router." in name]
    others = [p for name, p in two.named_parameters() if ".router." not in name]
    steps = [
        HyperStep(one, torch.optim.SGD(one.parameters(), 0.1)),
        HyperStep(two, torch.optim.SGD(others, 0.1), torch.optim.SGD(routers, 0.1)),
    ]
    for step, model in zip(steps, (one, two), strict=True):
        for _ in range(3):
            step(lambda model=model: (model(x) - y).square().mean())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is None


def test_a_router_in_no_optimiser_is_named():
    model = model_of()
    others = [p for name, p in model.named_parameters() if ".router." not in name]
    with pytest.raises(ValueError, match=r"layers.0.router.prototypes must be in one optimiser, got 0"):
        HyperStep(model, torch.optim.SGD(others, 0.1))
    with pytest.raises(ValueError, match=r"layers.0.router.prototypes must be in one optimiser, got 2"):
        HyperStep(model, torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(model.layers[0].router.parameters(), 0.1))
    with pytest.raises(TypeError, match=r"model contains no tinyonn\.nn\.DynMoE or DynSMHA layer"):
        HyperStep(nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1))
    with pytest.raises(ValueError, match="accumulation_steps must be at least 1"):
        HyperStep(model, torch.optim.SGD(model.parameters(), 0.1), accumulation_steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gating_weight": -0.5}, "gating_weight must be at least 0, got -0.5"),
        ({"gating_weight": math.nan}, "gating_weight must be finite, got nan"),
        ({"w_kl": -1.0}, "w_kl must be at least 0, got -1.0"),
        ({"temperature": math.inf}, "temperature must be finite, got inf"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, got 0.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0, got -1.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be finite, got nan"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, message):
    model = model_of()
    with pytest.raises(ValueError, match=message):
        HyperStep(model, torch.optim.SGD(model.parameters(), 0.1), **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda loss: loss.expand(3), ValueError, r"compute_loss must return one number, a 0-d tensor, got shape \(3,\)"),
        (lambda loss: loss.detach(), ValueError, r"compute_loss must return a loss with a graph; this one is detached"),
        (lambda loss: loss.item(), TypeError, "compute_loss must return a tensor, got float"),
        (lambda loss: {"loss": loss}, TypeError, "compute_loss must return a tensor, got dict"),
    ],
    ids=["vector", "detached", "float", "dict"],
)
def test_what_is_no_loss_is_named(change, error, message):
    model, (x, y) = model_of(), batch(20)
    step = HyperStep(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(error, match=message):
        step(lambda: change((model(x) - y).square().mean()))
    with pytest.raises(ValueError, match="a loss with a graph"), torch.no_grad():
        step(lambda: (model(x) - y).square().mean())
    assert not gradients(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_debug_names_a_loss_that_is_not_finite(value):
    """Without it the step is as any: nothing waits for the device to look."""
    model, (x, y) = model_of(), batch(20)
    step = HyperStep(model, NoStep(model.parameters()))
    with tinyonn.debug(), pytest.raises(ValueError, match=f"compute_loss must return a finite loss, got {value}"):
        step(lambda: (model(x) - y).square().mean() * value)
    assert step(lambda: (model(x) - y).square().mean() * value).gating_loss.isnan()


def test_an_error_drops_what_was_accumulated():
    x, y = batch(4, 10)
    model, fresh = model_of(), model_of()
    steps = [HyperStep(one, torch.optim.SGD(one.parameters(), 0.1), accumulation_steps=2) for one in (model, fresh)]
    steps[0](lambda: (model(x[0]) - y[0]).square().mean())
    with pytest.raises(ZeroDivisionError):
        steps[0](lambda: (model(x[1]) - y[1]).square().mean() / 0 * (1 // 0))
    assert not gradients(model)
    for one, step in zip((model, fresh), steps, strict=True):
        for i in range(2):
            step(lambda one=one, i=i: (one(x[i]) - y[i]).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_an_unfinished_accumulation_goes_on_or_is_dropped():
    x, y = batch(4, 10)
    model = model_of()
    step = HyperStep(model, torch.optim.SGD(model.parameters(), 0.1), accumulation_steps=3)

    def run(i: int) -> bool:
        return step(lambda: (model(x[i]) - y[i]).square().mean()).stepped

    assert [run(i) for i in range(4)] == [False, False, True, False]
    step.reset()
    assert not gradients(model)
    assert [run(i) for i in range(4)] == [False, False, True, False]


def test_accumulated_batches_equal_one():
    x, y = batch(4, 10)
    whole, parts = model_of(), model_of()
    HyperStep(whole, NoStep(whole.parameters()))(lambda: (whole(x) - y).square().mean())
    step = HyperStep(parts, NoStep(parts.parameters()), accumulation_steps=4)
    stepped = [step(lambda i=i: (parts(x[i]) - y[i]).square().mean()).stepped for i in range(4)]
    assert stepped == [False, False, False, True]
    assert_same(gradients(parts), gradients(whole))


def test_a_loss_scale_changes_nothing():
    x, y = batch(30)
    plain, scaled = model_of(), model_of()
    for model, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=4096.0))):
        step = HyperStep(model, torch.optim.SGD(model.parameters(), 0.1), scaler=scaler, max_grad_norm=0.5)
        for _ in range(3):
            step(lambda model=model: (model(x) - y).square().mean())
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_that_overflows_is_skipped():
    x, y = batch(30)
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    HyperStep(model, torch.optim.SGD(model.parameters(), 0.1), scaler=scaler)(lambda: 1e3 * (model(x) - y).square().mean())
    assert scaler.get_scale() < 3e38
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradients_are_clipped_together():
    x, y = batch(30)
    model = model_of()
    HyperStep(model, NoStep(model.parameters()), max_grad_norm=1e-3)(lambda: (model(x) - y).square().mean())
    total = torch.stack([grad.norm() for grad in gradients(model).values()]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)


def test_clipping_counts_both_optimisers_and_nothing_else():
    x, y = batch(30)
    model = model_of()
    model.stranger = nn.Parameter(torch.ones(16))  # in no optimiser
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    others = [p for name, p in model.named_parameters() if ".router." not in name and name != "stranger"]
    step = HyperStep(model, NoStep(others), NoStep(routers), max_grad_norm=1e-3)
    step(lambda: (model(x) + 1e4 * model.stranger - y).square().mean())
    total = torch.stack([p.grad.norm() for p in (*others, *routers)]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)


def test_an_overflow_of_the_routers_skips_both_optimisers_when_clipping():
    """Clipping by an infinite norm would leave the other optimiser gradients of zero, and its weight decay and momentum."""
    x, y = batch(30)
    model = model_of()
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    others = [p for name, p in model.named_parameters() if ".router." not in name]
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = HyperStep(
        model, torch.optim.SGD(others, 0.1, weight_decay=0.1), torch.optim.SGD(routers, 0.1), gating_weight=1e38, max_grad_norm=1.0,
        scaler=scaler,
    )  # fmt: skip
    step(lambda: (model(x) - y).square().mean())
    assert scaler.get_scale() == 2.0**9
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_sparse_gradients_of_an_embedding_pass():
    model, (_, y) = model_of(), batch(30)
    model.embedding = nn.Embedding(50, 16, sparse=True)
    index = torch.arange(30) % 7
    before = copy.deepcopy(model.state_dict())
    HyperStep(model, torch.optim.SGD(model.parameters(), 0.1))(lambda: (model(model.embedding(index)) - y).square().mean())
    moved = (model.embedding.weight != before["embedding.weight"]).any(-1)
    assert torch.equal(moved.nonzero().squeeze(-1), torch.arange(7))
    assert not torch.equal(model.layers[0].router.prototypes, before["layers.0.router.prototypes"])


def test_the_router_learns_the_expert_that_is_surprised_least():
    """A planted expert already does what the data asks; its gradient is small, and tokens come to prefer it."""
    torch.manual_seed(0)
    module = DynMoE(16, 8, num_experts=6, target_k=3.0, max_experts=6, scale=4.0, combine="uniform", thresholds="learned")
    for parameter in (module.gate_up_proj, module.down_proj):
        parameter.requires_grad_(False)
    with torch.no_grad():
        module.down_proj.normal_(std=1.0)
        module.gate_up_proj[2] *= 0.05  # quiet: little output, little gradient
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    step = HyperStep(module, optimizer)
    x = batch(256)[0]

    def share() -> float:
        scores = module.route(x).scores
        return (scores.argmax(-1) == 2).float().mean().item()

    before = share()
    for seed in range(60):
        inputs, _ = batch(128, seed=seed)
        step(lambda inputs=inputs: module(inputs).square().mean())
    assert share() > max(0.6, 2 * before)


def language_model() -> nn.Module:
    model = tiny_causal_lm("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = DynMoE(48, 8, num_experts=6, target_k=2.0, max_experts=4, thresholds="learned")
    return model


def test_the_mixin_stands_before_the_trainer():
    from transformers import Trainer

    with pytest.raises(TypeError, match="HyperStepMixin must stand before Trainer in the bases of Reversed"):
        type("Reversed", (Trainer, HyperStepMixin), {})


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_it_runs_under_trainer(tmp_path, checkpointing):
    from transformers import Trainer, TrainingArguments

    class SurpriseTrainer(HyperStepMixin, Trainer):
        gating_weight = 0.5

    ids = torch.randint(97, (12, 24), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones(24, dtype=torch.long)} for row in ids]
    model = language_model()
    start = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=2, use_cpu=True, report_to=[],
        gradient_checkpointing=checkpointing, disable_tqdm=True, learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant",
        save_strategy="no", max_grad_norm=0.0, data_seed=0, seed=0,
    )  # fmt: skip
    trainer = SurpriseTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.last_gating_loss > 0
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert any("router.prototypes" in name for name in moved)
    plain = language_model()
    Trainer(model=plain, args=arguments, train_dataset=rows).train()
    differs = [name for name, value in plain.state_dict().items() if "router." in name and not torch.equal(value, model.state_dict()[name])]
    assert differs


@pytest.mark.parametrize("name", ["surprise_loss", "gating_options"])
def test_trainer_takes_the_steps_of_hyper_step(name, tmp_path):
    """Three batches an epoch, accumulated by two: the second step has one batch alone, and counts it whole."""
    from transformers import Trainer, TrainingArguments

    class SurpriseTrainer(HyperStepMixin, Trainer):
        gating_weight = 0.5

    setattr(SurpriseTrainer, name, {"temperature": 0.3, "w_kl": 2.0})
    row = torch.randint(97, (24,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(24) < 20
    inputs = {"input_ids": row, "labels": row.masked_fill(~mask, -100), "attention_mask": mask.long()}
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=1, use_cpu=True, report_to=[],
        disable_tqdm=True, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", save_strategy="no", max_grad_norm=0.0,
    )  # fmt: skip
    trained, model = language_model(), language_model()
    SurpriseTrainer(model=trained, args=arguments, train_dataset=[inputs] * 9).train()
    batch = {name: value.expand(3, 24) for name, value in inputs.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"gating_weight": 0.5, "temperature": 0.3, "w_kl": 2.0}
    model.train()
    for accumulation_steps in (2, 1):
        step = HyperStep(model, optimizer, accumulation_steps=accumulation_steps, **options)
        for _ in range(accumulation_steps):
            result = step(lambda: model(**batch).loss, token_mask=batch["attention_mask"])
        assert result.stepped
    for (name, wanted), got in zip(model.state_dict().items(), trained.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_nothing_captured_is_no_loss():
    model, (x, y) = model_of(), batch(5)
    with gating_gradients(model) as gating, torch.no_grad():
        (model(x) - y).square().mean()
    assert gating.loss == 0
    assert not gradients(model)


def test_a_trainer_with_both_names_of_the_loss_is_refused(tmp_path):
    from transformers import Trainer, TrainingArguments

    class SurpriseTrainer(HyperStepMixin, Trainer):
        surprise_loss = SurpriseLoss()
        gating_options = {"w_kl": 2.0}  # noqa: RUF012

    row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    with pytest.raises(TypeError, match=r"^gating_options is the earlier name of surprise_loss; set surprise_loss only\.$"):
        SurpriseTrainer(model=language_model(), args=arguments, train_dataset=[row]).train()
