"""`surprise_budget` as a keyword of converted models, through decoder layers that know nothing of it."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf.dyn_moe import calibrate_experts, convert_mlp_to_dynmoe, expert_statistics
from tinyonn.hf.dyn_moe.calibration import mixtures
from tinyonn.nn import surprise_budget_of
from tinyonn.testing import assert_close_rms, tiny_causal_lm, token_ids
from tinyonn.train import HyperStep

ARCHS = ("llama", "qwen3", "gpt2", "mistral", "gemma2")
SHAPE = token_ids(40).shape


def stock(arch: str = "llama", **overrides: Any) -> PreTrainedModel:
    overrides = {"n_positions": 256, **overrides} if arch == "gpt2" else {"intermediate_size": 96, **overrides}
    return tiny_causal_lm(arch, **overrides)


def converted(arch: str = "llama", layers: int = 3, **options: Any) -> PreTrainedModel:
    model = stock(arch, **({} if layers == 3 else {"num_hidden_layers": layers}))
    return convert_mlp_to_dynmoe(model, **{"num_experts": 8, "sample": token_ids(), "routing": "budget", "scale": 10.0, **options})


def mean_k(model: PreTrainedModel) -> list[float]:
    return [found["mean_k"] for found in expert_statistics(model, reset=True).values()]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_keyword_of_the_model_is_the_argument_of_every_mixture(arch):
    """The oracle: layers that hand the budget to their mixtures themselves."""
    model, x = converted(arch), token_ids(40)
    each = torch.linspace(0.1, 1, x.numel()).view(x.shape)
    for budget in (0.4, each):
        found = model(x, surprise_budget=budget).logits
        handed = copy.deepcopy(model)
        for module in mixtures(handed).values():
            module.register_forward_pre_hook(lambda _, args, budget=budget: (*args, budget))
        assert torch.equal(found, handed(x).logits)
        assert torch.equal(model.base_model(x, surprise_budget=budget)[0], handed.base_model(x)[0])
        assert not torch.equal(found, model(x).logits)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_larger_budget_activates_more_experts(arch):
    model, x = converted(arch), token_ids(40)
    counts = []
    for budget in (0.2, 0.5, 0.8, 1.0):
        model(x, surprise_budget=budget)
        counts.append(mean_k(model))
    assert all(list(layer) == sorted(set(layer)) for layer in zip(*counts, strict=True))
    assert counts[-1] == [8.0] * 3


def test_each_token_has_its_own():
    model, x = converted(), token_ids(40)
    each = torch.full(x.shape, 0.2)
    each[1] = 1.0
    model(x[:1], surprise_budget=0.2)
    low = mean_k(model)
    for budget in (each, each[:, :1]):
        model(x, surprise_budget=budget)
        assert mean_k(model) == pytest.approx([(k + 8) / 2 for k in low], abs=0.05)


@pytest.mark.parametrize("arch", ARCHS)
def test_at_first_the_outputs_are_those_of_the_dense_model(arch):
    x = token_ids(40)
    with torch.no_grad():
        assert_close_rms(converted(arch)(x).logits, stock(arch)(x).logits, 1e-5)
        # A smaller budget of calls without one is no reason for the proof to fail.
        module = next(iter(mixtures(converted(arch, surprise_budget=0.3)).values()))
    assert module.surprise_budget == 0.3


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_it_generates_with_the_keyword(arch):
    model, x = converted(arch), token_ids(12)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(x, surprise_budget=0.3, **options)
    count = mean_k(model)
    with surprise_budget_of(model, 0.3):
        assert torch.equal(model.generate(x, **options), found)
    assert mean_k(model) == count
    handed = converted(arch, surprise_budget=0.3)
    assert torch.equal(handed.generate(x, **options), found)
    model.generate(x, **options)
    assert all(k == 8 for k in mean_k(model))
    rows = model.generate(x, surprise_budget=torch.tensor([[0.3], [1.0]]), num_beams=2, **options)
    assert torch.equal(rows[:1], model.generate(x[:1], surprise_budget=0.3, num_beams=2, **options))
    with pytest.raises(ValueError, match=r"surprise_budget must be a number or of shape \(2, 1\)"):
        model.generate(x, surprise_budget=torch.full(x.shape, 0.5), **options)  # of the prompt; what follows has none


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("by", ["keyword", "context"])
def test_layers_run_again_in_backward_see_the_same_budget(by, arch, reentrant):
    x, grads = token_ids(40), []
    for checkpointed in (False, True):
        model = converted(arch).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = []
        torch.manual_seed(0)  # GPT-2 drops out
        for budget in (0.3, 0.9):  # two calls before one backward
            if by == "keyword":
                losses.append(model(x, labels=x, surprise_budget=budget).loss)
            else:
                with surprise_budget_of(model, budget):
                    losses.append(model(x, labels=x).loss)
        assert losses[0] != losses[1]
        (losses[0] + losses[1]).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_the_routers_learn_with_the_keyword():
    model, x = converted(gating_loss="both").train(), token_ids(40)
    before = [module.router.prototypes.detach().clone() for module in mixtures(model).values()]
    step = HyperStep(model, torch.optim.Adam(model.parameters(), lr=3e-3))
    losses = [step(lambda: model(x, labels=x, surprise_budget=0.5).loss).loss.item() for _ in range(10)]
    assert losses[-1] < losses[0] - 0.1
    assert all(2 < k < 7 for k in mean_k(model))
    assert all(not torch.equal(module.router.prototypes, old) for module, old in zip(mixtures(model).values(), before, strict=True))


def test_an_exception_leaves_nothing_behind():
    model, x = converted(), token_ids(40)
    expected = model(x).logits

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(x, surprise_budget=0.3)
    handle.remove()
    assert torch.equal(model(x).logits, expected)


class Wrapped(nn.Module):
    """Calls `forward` and passes hooks by, as PEFT does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


def test_copies_wrappers_and_saved_models_take_it(tmp_path):
    model, x = converted(surprise_budget=0.7), token_ids(40)
    expected = model(x, surprise_budget=0.3).logits
    assert not torch.equal(expected, model(x).logits)
    twin = copy.deepcopy(model)
    for module in mixtures(model).values():  # its own mixtures, not those of the model that it was copied from
        module.surprise_budget = 1.0
    assert torch.equal(twin(x, surprise_budget=0.3).logits, expected)
    assert torch.equal(Wrapped(twin)(x, surprise_budget=0.3).logits, expected)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x, surprise_budget=0.3).logits, expected)
    twin.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close_rms(loaded(x, surprise_budget=0.3).logits, expected, 1e-5)
    assert_close_rms(loaded(x).logits, twin(x).logits, 1e-5)
    assert {(module.routing_kind, module.surprise_budget) for module in mixtures(loaded).values()} == {("budget", 0.7)}
    base = AutoModel.from_pretrained(tmp_path)
    assert_close_rms(base(x, surprise_budget=0.3)[0], twin.model(x, surprise_budget=0.3)[0], 1e-5)
    with pytest.raises(InputError, match=r"nn\.DataParallel does not support converted models"):
        loaded._replicate_for_data_parallel()


def test_the_signature_names_it():
    model = converted()
    names = list(inspect.signature(model.forward).parameters)
    assert names == [*list(inspect.signature(stock().forward).parameters)[:-1], "surprise_budget", "kwargs"]


def test_it_compiles_whole():
    model, x = converted(layers=1), token_ids(40)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for budget in (0.3, torch.linspace(0.1, 1, x.numel()).view(x.shape)):
            assert_close_rms(compiled(x, surprise_budget=budget, use_cache=False).logits, model(x, surprise_budget=budget).logits, 1e-5)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
def test_checkpointed_layers_compile(whole):
    x, grads = token_ids(40), []
    for compiled in (False, True):
        model = converted(layers=1).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        run = torch.compile(model, backend="aot_eager") if compiled and whole else model
        for layer in model.model.layers if compiled and not whole else ():
            layer.compile(backend="aot_eager")
        run(x, labels=x, use_cache=False, surprise_budget=0.3).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (0.0, ValueError, r"surprise_budget must be above 0 and at most 1, got 0\.0"),
        (1.5, ValueError, r"surprise_budget must be above 0 and at most 1, got 1\.5"),
        ("much", TypeError, "surprise_budget must be a number or a tensor, got str"),
        (torch.full((2, 39), 0.5), ValueError, r"must be a number or of shape \(2, 40\), where a size may be 1, got \(2, 39\)"),
        (torch.full((3, 40), 0.5), ValueError, r"must be a number or of shape \(2, 40\), where a size may be 1, got \(3, 40\)"),
    ],
    ids=["none", "too much", "no number", "too short", "too many rows"],
)
def test_what_is_no_budget_is_named(budget: Tensor | float | str, error: type[Exception], message: str):
    model, x = converted(), token_ids(40)
    with pytest.raises(error, match=message):
        model(x, surprise_budget=budget)


def test_a_budget_of_a_model_that_routes_by_threshold_is_named():
    model, x = converted(routing="threshold"), token_ids(40)
    assert model(x, surprise_budget=None).logits.isfinite().all()
    for part in (model, model.model):
        message = f"surprise_budget must go to mixtures with routing='budget', got {type(part).__name__}, where none routes by budget"
        with pytest.raises(ValueError, match=message):
            part(x, surprise_budget=0.5)
    with pytest.raises(ValueError, match="surprise_budget must be left out unless routing='budget'"):
        converted(routing="threshold", surprise_budget=0.5)
    with pytest.raises(InputError, match="routing must be 'threshold' to calibrate a model, got 'budget'; choose a budget instead"):
        calibrate_experts(converted(), x, 2.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"routing": "top-k"}, ValueError, "routing must be one of threshold, budget, got 'top-k'"),
        ({"surprise_budget": 1.2}, ValueError, r"surprise_budget must be above 0 and at most 1, got 1\.2"),
        ({"surprise_budget": torch.tensor(0.5)}, TypeError, "surprise_budget must be a number, got Tensor"),
        ({"num_experts": 8.0}, TypeError, "num_experts must be an int, got float"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"checkpoint": "yes"}, TypeError, "checkpoint must be True or False, got 'yes'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        converted(**options)
