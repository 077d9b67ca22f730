"""Dense MLPs become experts: the same logits until calibration makes them sparse; what cannot be converted is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf.dyn_moe import calibrate_experts, convert_mlp_to_dynmoe, expert_statistics
from tinyonn.hf.dyn_moe.calibration import mixtures
from tinyonn.nn import DynMoE, token_mask_of
from tinyonn.testing import assert_close_rms, left_padding, tiny_causal_lm, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")
ARCHS = ("llama", "qwen3", "gpt2", "mistral", "gemma2")


def stock(arch: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    overrides = {"n_positions": 256, **overrides} if arch == "gpt2" else {"intermediate_size": 96, **overrides}
    return tiny_causal_lm(arch, dtype=dtype, **overrides)


def neurons_of(model: PreTrainedModel) -> Tensor:
    """Of the first layer, (I, F): what each reads, a row."""
    mlp = next(module for name, module in model.named_modules() if name.endswith("mlp"))
    weight = mlp.c_fc.weight.T if hasattr(mlp, "c_fc") else mlp.gate_proj.weight
    return weight.clone()


@pytest.mark.parametrize("with_sample", [False, True], ids=["in-order", "by-sample"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_converted_model_reproduces_the_logits(arch, with_sample):
    x, sample = token_ids(), token_ids(90) if with_sample else None
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10 if arch == "gpt2" else 1e-6)):
        model = stock(arch, dtype)
        padded, plain = model(x, attention_mask=left_padding()).logits, model(x).logits
        assert convert_mlp_to_dynmoe(model, num_experts=8, sample=sample) is model
        real = left_padding().bool()
        assert_close_rms(model(x, attention_mask=left_padding()).logits[real], padded[real], limit)
        expert_statistics(model, reset=True)  # padding may be NaN, which goes nowhere
        assert_close_rms(model(x).logits, plain, limit)
        assert [found["mean_k"] for found in expert_statistics(model).values()] == [8.0] * 3


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_one_layer_is_equal_to_the_last_digits(arch):
    model = stock(arch, torch.float64, **({} if arch != "llama" else {"mlp_bias": True}))
    blocks = [name for name, _ in model.named_modules() if name.endswith("mlp")]
    dense = {name: copy.deepcopy(model.get_submodule(name)) for name in blocks}
    convert_mlp_to_dynmoe(model, num_experts=6, sample=token_ids(90))
    x = torch.randn(50, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert len(dense) == 3
    for name, mlp in dense.items():
        assert_close_rms(model.get_submodule(name)(x), mlp(x), 1e-10)


def test_neurons_are_split_in_order_or_by_what_they_do_together():
    rows = neurons_of(stock())
    in_order = convert_mlp_to_dynmoe(stock(), num_experts=8).model.layers[0].mlp
    assert torch.equal(in_order.gate_up_proj[:, :12].reshape(96, 48), rows)
    expected = nn.functional.normalize(rows.view(8, 12, 48).mean(1), dim=-1)
    torch.testing.assert_close(in_order.router.prototypes.data, expected)

    model = stock()
    twins = model.model.layers[0].mlp  # neurons i and i + 48 do the same
    for layer in (twins.gate_proj, twins.up_proj):
        layer.weight[48:] = layer.weight[:48]
    module = convert_mlp_to_dynmoe(model, num_experts=8, sample=token_ids()).model.layers[0].mlp
    gate = module.gate_up_proj[:, :12]
    together = (torch.cdist(gate, gate) < 1e-6).sum((1, 2)) - 12  # pairs of different neurons that are equal, twice
    assert together.sum() >= 2 * 40  # of 48 pairs; in order there would be none
    assert sorted(gate.reshape(96, 48)[:, 0].tolist()) == sorted(torch.cat([rows[:48], rows[:48]])[:, 0].tolist())


@pytest.mark.parametrize(("target", "price"), [(2.0, "none"), (2.0, "gradient"), (3.5, "gradient"), (8.0, "gradient")])
def test_calibration_reaches_the_mean_number_of_experts(target, price):
    model, sample = stock(), token_ids(100, 8)
    convert_mlp_to_dynmoe(model, num_experts=8, sample=sample)
    reached = calibrate_experts(model, sample, target, price=price)
    assert set(reached) == {f"model.layers.{layer}.mlp" for layer in range(3)}
    assert sum(reached.values()) / 3 == pytest.approx(target, abs=0.05)
    equal = all(mean == pytest.approx(target, abs=0.05) for mean in reached.values())
    assert equal == (price == "none" or target == 8.0)
    model(sample)
    for name, found in expert_statistics(model, reset=True).items():
        assert found["mean_k"] == pytest.approx(reached[name], abs=0.02)
        assert found["dead_experts"] == 0
    assert all(found["mean_k"] != found["mean_k"] for found in expert_statistics(model).values())
    assert [module.router.target_k for module in mixtures(model).values()] == pytest.approx(list(reached.values()), abs=0.05)


def test_a_top_k_is_calibration_without_freedom():
    model, sample = convert_mlp_to_dynmoe(stock(), num_experts=8, sample=token_ids()), token_ids()
    calibrate_experts(model, sample, 3, min_experts=3, max_experts=3)
    module = model.model.layers[1].mlp
    routing = module.route(torch.randn(30, 48, generator=torch.Generator().manual_seed(1)))
    assert routing.top_k_index.shape == (30, 3)
    assert (routing.top_k_index < 8).all()


def planted() -> PreTrainedModel:
    """Each expert in order reads its own eighth of the features, positive ones alone."""
    model = stock(hidden_act="silu")
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.zero_()
        for neuron in range(96):
            layer.mlp.gate_proj.weight[neuron, (neuron // 12) * 6 + neuron % 6] = 8.0
    return model


def test_a_sample_makes_routers_that_pick_the_experts_that_give_most():
    model, sample, held_out = planted(), token_ids(100, 8), token_ids(60, 3)
    expected, x = model(held_out).logits, held_out
    convert_mlp_to_dynmoe(model, num_experts=8, sample=sample)
    calibrate_experts(model, sample, 4.0)
    error = (model(x).logits - expected).norm()
    other = convert_mlp_to_dynmoe(planted(), num_experts=8, sample=sample)
    for module in mixtures(other).values():  # the same experts, routers that know nothing
        module.router.prototypes.normal_(generator=torch.Generator().manual_seed(0))
    calibrate_experts(other, sample, 4.0)
    assert error < 0.8 * (other(x).logits - expected).norm()


def test_a_shift_keeps_what_thresholds_were_taught():
    model, sample = convert_mlp_to_dynmoe(stock(), num_experts=8, sample=token_ids()), token_ids()
    first = calibrate_experts(model, sample, 5.0)
    before = [module.router.thresholds.clone() for module in mixtures(model).values()]
    reached = calibrate_experts(model, sample, 3.0, shift=True)
    for module, old in zip(mixtures(model).values(), before, strict=True):
        moved = module.router.thresholds - old
        assert (moved > 0).all()
        torch.testing.assert_close(moved, moved[0].expand(8))
    assert sum(reached.values()) / 3 == pytest.approx(3.0, abs=0.05)
    parts = [before / after for before, after in zip(first.values(), reached.values(), strict=True)]
    assert max(parts) < 1.2 * min(parts)  # layers keep their parts of the budget; none of these is at a bound


def test_modes_and_gradients_are_those_of_the_mlp():
    model = stock("gpt2", resid_pdrop=0.25).train()
    model.transformer.h[1].eval()
    model.requires_grad_(False)
    convert_mlp_to_dynmoe(model, num_experts=4, sample=token_ids(20))
    calibrate_experts(model, token_ids(20), 2.0)
    assert [block.mlp.training for block in model.transformer.h] == [True, False, True]
    assert {block.mlp.dropout.p for block in model.transformer.h} == {0.25}
    asked = {name.split("mlp.")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert asked == {"router.prototypes", "router.thresholds"}


@pytest.mark.parametrize(
    ("arch", "trained", "expected"),
    [
        ("gpt2", "bias", {"gate_up_bias", "down_bias", "output_bias"}),
        ("gpt2", "c_proj.weight", {"down_proj"}),
        ("llama", "up_proj.weight", {"gate_up_proj"}),
        ("llama", "down_proj.weight", {"down_proj"}),
    ],
)
def test_parts_that_were_frozen_stay_frozen(arch, trained, expected):
    model = stock(arch)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    convert_mlp_to_dynmoe(model, num_experts=4)
    for module in mixtures(model).values():
        asked = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert asked == expected | {"router.prototypes", "router.thresholds"}


class Sharpened(nn.Module):
    """Has the layers of an MLP, and does something else with them."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(2 * self.gate_proj(x)) * self.up_proj(x))


def sharpened() -> PreTrainedModel:
    model = stock()
    model.model.layers[1].mlp = Sharpened(model.model.layers[1].mlp)
    return model


def adapted() -> PreTrainedModel:
    model = stock()

    class Adapter(nn.Linear):
        pass

    model.model.layers[2].mlp.up_proj = Adapter(48, 96)
    return model


def lone_bias() -> PreTrainedModel:
    model = stock()
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.ones(96))
    return model


def shared() -> PreTrainedModel:
    model = stock()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    return model


def shared_weight() -> PreTrainedModel:
    model = stock()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


REFUSED = {
    "shared MLP": (shared, "model.layers.2.mlp cannot be converted: it shares weights with model.layers.0.mlp"),
    "shared weight": (shared_weight, "model.layers.1.mlp cannot be converted: it shares weights with model.layers.0.mlp"),
    "indivisible": (stock, "num_experts must divide the intermediate size 96 of model.layers.0.mlp, got 7"),
    "mixture": (lambda: tiny_causal_lm("qwen3_moe"), "model cannot be converted: it has a mixture already, model.layers.0.mlp.experts"),
    "unknown": (
        lambda: tiny_causal_lm("gpt_neox"),
        "GPTNeoXForCausalLM cannot be converted: it must have only MLPs made of gate_proj, up_proj, down_proj or of c_fc, c_proj, got "
        "gpt_neox.layers.0.mlp with dense_h_to_4h, dense_4h_to_h, act",
    ),
    "activation": (lambda: stock(hidden_act="tanh"), "activation of model.layers.0.mlp must be one of silu, gelu, .*, got Tanh"),
    "other function": (
        sharpened,
        "model.layers.1.mlp cannot be converted: the output of Sharpened.* differs from that of gate_proj, up_proj, down_proj by",
    ),
    "adapter": (
        adapted,
        "up_proj must be a Linear of torch .*, got Adapter of .*; convert MLPs before quantising the model or adding adapters",
    ),
    "one bias": (lone_bias, "model.layers.0.mlp cannot be converted: only one of gate_proj and up_proj has a bias"),
    "converted": (lambda: convert_mlp_to_dynmoe(stock(), num_experts=8), "model was converted before: model.layers.0.mlp is a DynMoE"),
    "meta": (lambda: stock().to("meta"), "model has weights on the meta device; load them before the conversion"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_converted_are_named_and_left_alone(case):
    make, message = REFUSED[case]
    model = make()
    before = [id(module) for module in model.modules()]
    with pytest.raises(InputError, match=message):
        convert_mlp_to_dynmoe(model, num_experts=7 if case == "indivisible" else 8)
    assert [id(module) for module in model.modules()] == before


def test_a_sample_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"sample must be token ids of shape \(B, T\), got torch.int64 \(130,\)"):
        convert_mlp_to_dynmoe(stock(), num_experts=8, sample=token_ids()[0])
    with pytest.raises(ValueError, match=r"sample must be token ids .*, got list"):
        convert_mlp_to_dynmoe(stock(), num_experts=8, sample=[[1, 2]])
    with pytest.raises(InputError, match="model must be converted by convert_mlp_to_dynmoe, got an unconverted LlamaForCausalLM"):
        calibrate_experts(stock(), token_ids(), 2.0)
    with pytest.raises(InputError, match="model must be converted by convert_mlp_to_dynmoe, got an unconverted Linear"):
        calibrate_experts(nn.Linear(2, 2), token_ids(), 2.0)
    with pytest.raises(TypeError, match="model must be a PreTrainedModel of transformers, got Linear; convert the model inside it"):
        convert_mlp_to_dynmoe(nn.Linear(2, 2), num_experts=2)


def test_a_sample_that_makes_no_numbers_is_named_and_changes_nothing():
    model, sample = stock(), token_ids(40)
    model.model.embed_tokens.weight[sample[0, 3]] = float("nan")
    message = r"inputs of model.layers.0.mlp contain NaN or infinity in \d+ of (80|40) tokens"
    with pytest.raises(InputError, match=message):
        convert_mlp_to_dynmoe(model, num_experts=8, sample=sample)
    assert not mixtures(model)
    convert_mlp_to_dynmoe(model, num_experts=8)
    with pytest.raises(InputError, match=message):
        calibrate_experts(model, sample, 2.0)
    assert all((module.router.thresholds == -2).all() for module in mixtures(model).values())


def overflowing() -> PreTrainedModel:
    model = stock(dtype=torch.float16)
    last = model.model.layers[2].mlp  # nothing after it would tell
    last.up_proj.weight.mul_(3e4)
    last.down_proj.weight.mul_(1e-4)
    return model


def test_neurons_that_overflow_for_the_sample_are_named():
    with pytest.raises(InputError, match=r"neurons of model.layers.2.mlp contain NaN or infinity in \d+ of 80"):
        convert_mlp_to_dynmoe(overflowing(), num_experts=8, sample=token_ids(40))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.ones(1, 4, dtype=torch.bool), r"token ids of shape \(B, T\), got torch.bool \(1, 4\)"),
        (torch.tensor([[1, 2, 97]]), r"token ids of shape \(B, T\), 0 … 96, got 97"),
        (torch.tensor([[1, -100]], dtype=torch.int32), r"token ids of shape \(B, T\), 0 … 96, got -100"),
    ],
    ids=["bool", "beyond the vocabulary", "negative"],
)
def test_ids_that_are_none_are_named(sample, message):
    model = stock()
    with pytest.raises(ValueError, match=f"sample must be {message}"):
        convert_mlp_to_dynmoe(model, num_experts=8, sample=sample)
    with pytest.raises(ValueError, match=f"sample must be {message}"):
        calibrate_experts(convert_mlp_to_dynmoe(model, num_experts=8), sample, 2.0)


def test_a_default_device_is_not_asked():
    model, twin, sample = stock(), stock(), token_ids()
    convert_mlp_to_dynmoe(twin, num_experts=8, sample=sample)
    expected = calibrate_experts(twin, sample, 3.0)
    with torch.device("meta"):  # what names no device goes there, and could meet nothing of the model
        convert_mlp_to_dynmoe(model, num_experts=8, sample=sample)
        assert calibrate_experts(model, sample, 3.0) == expected
    assert_close_rms(model(sample).logits, twin(sample).logits, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"scale": 0.0}, "scale must be above 0 and at most 10, got 0.0"),
        ({"gating_loss": "load"}, "gating_loss must be one of surprise, sdl, both, none, got 'load'"),
        ({"surprise_kind": "up"}, "surprise_kind must be one of down_proj, .*, got 'up'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        convert_mlp_to_dynmoe(stock(), **{"num_experts": 8, **options})


@pytest.mark.parametrize("number", [True, "4", 4.0, None], ids=repr)
def test_a_number_of_experts_that_is_no_int_is_named(number):
    with pytest.raises(TypeError, match=f"^num_experts must be an int, got {type(number).__name__}"):
        convert_mlp_to_dynmoe(stock(), num_experts=number)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (9, {}, r"target_k must be 1 … 8, got 9"),
        (1, {"min_experts": 2}, r"target_k must be 2 … 8, got 1"),
        (2, {"max_experts": 9}, "max_experts must be 1 … 8 and at least min_experts, got 9 and 1"),
    ],
)
def test_bad_targets_are_named_and_change_nothing(target, options, message):
    model = convert_mlp_to_dynmoe(stock(), num_experts=8)
    with pytest.raises(ValueError, match=message):
        calibrate_experts(model, token_ids(), target, **options)
    assert all(isinstance(module, DynMoE) and (module.router.thresholds == -2).all() for module in mixtures(model).values())


def test_statistics_leave_out_padding_also_while_tokens_are_generated():
    model, x, mask = convert_mlp_to_dynmoe(stock(), num_experts=8), token_ids(40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :25] = 0
    model(x, attention_mask=mask)
    assert {int(mixture.tokens_seen) for mixture in mixtures(model).values()} == {55}
    expert_statistics(model, reset=True)
    model.generate(x, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert {int(mixture.tokens_seen) for mixture in mixtures(model).values()} == {55 + 2 * 2}
    expert_statistics(model, reset=True)
    model.base_model(x, mask)
    with token_mask_of(model, torch.ones_like(mask)):  # one around the call goes before
        model(x, attention_mask=mask)
    assert {int(mixture.tokens_seen) for mixture in mixtures(model).values()} == {55 + 80}
    expert_statistics(model, reset=True)
    torch._dynamo.reset()
    torch.compile(model, backend="eager", fullgraph=True)(x, attention_mask=mask)
    assert {int(mixture.tokens_seen) for mixture in mixtures(model).values()} == {55}
