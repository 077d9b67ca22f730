"""The schedule, the budget's loss, the statistics, and tau."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tinyonn.errors import InputError
from tinyonn.hf import BudgetSchedule, collected_budget_loss, convert_attention, parameter_groups, statistics
from tinyonn.hf.dyn_nsa import cores
from tinyonn.hf.dyn_nsa.parts import set_options
from tinyonn.nn import OPEN, DynNSAAttention, DynNSAOptions, normalised_entropy
from tinyonn.testing import assert_close_rms, left_padding, tiny_causal_lm, tiny_dyn_nsa_lm, token_ids
from tinyonn.testing.families import tiny_family_lm

SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}
LENGTH = 130


def stock(arch: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    overrides = {"sliding_window": None, **overrides} if arch == "mistral" else overrides
    return tiny_causal_lm(arch, dtype=dtype, max_position_embeddings=512, **overrides)


def mean_counts(model: PreTrainedModel) -> float:
    found = [value["mean_count"] for value in statistics(model, reset=True).values()]
    return sum(found) / len(found)


ALL_BLOCKS = sum(t // 16 + 1 for t in range(LENGTH)) / LENGTH


def test_the_price_follows_the_path_to_the_target():
    schedule = BudgetSchedule(4.0, 60, max_blocks=6)
    model, x, reads = convert_attention(stock(num_hidden_layers=2), **SMALL).train(), token_ids(), []
    expected = stock(num_hidden_layers=2).train()(x).logits
    for step in range(61):
        schedule.apply(model, step)
        if step == 0:
            assert_close_rms(model(x).logits, expected, 1e-5)
        elif step < 60:
            with torch.no_grad():
                model(x)
        reads.append(mean_counts(model))
        prices = {float(core.price) for core in cores(model)}
        assert len(prices) == 1
    assert reads[0] == pytest.approx(ALL_BLOCKS, rel=1e-5)
    assert schedule.start == pytest.approx(ALL_BLOCKS, rel=1e-5)
    assert reads[10] > 4.3  # the path takes 18 steps
    assert reads[40:60] == pytest.approx([4.0] * 20, abs=0.03)
    assert -20 < prices.pop() < 0
    options = model.config.tinyonn["dyn_nsa"]["options"]
    assert (options["max_blocks"], options["temperature"]) == (6, pytest.approx(0.1))
    # The budget is one for the model, not one for each layer.
    model.eval()(x)
    counts = [value["mean_count"] for value in statistics(model).values()]
    assert max(counts) - min(counts) > 0.02


def test_the_path_and_the_temperature_are_formulas():
    schedule = BudgetSchedule(4.0, 10, start=64.0)
    assert [schedule.target_at(step) for step in (0, 3, 10, 99)] == [64.0, 4.0, 4.0, 4.0]
    assert BudgetSchedule(4.0, 100, start=64.0).target_at(15) == pytest.approx(16.0)
    found = [BudgetSchedule(4.0, 70).temperature_at(step) for step in range(71)]
    assert (found[0], found[49], found[70]) == (1.0, pytest.approx(0.1), pytest.approx(0.1))
    assert len(set(found)) == 6  # a compiled model compiles again at each
    assert found == sorted(found, reverse=True)
    assert BudgetSchedule(4.0, 70, temperature=(0.5, 0.5)).temperature_at(3) == 0.5
    model = convert_attention(stock(), **SMALL)
    BudgetSchedule(4.0, 10, temperature=None).apply(model, 9)
    assert {core.options.temperature for core in cores(model)} == {0.05}


def test_bases_are_centred_and_the_thresholds_stay():
    model = tiny_dyn_nsa_lm()
    before = torch.stack([core.threshold_base() for core in cores(model)]).detach()
    BudgetSchedule(3.0, 9).apply(model, 0)
    after = torch.stack([core.threshold_base() for core in cores(model)]).detach()
    torch.testing.assert_close(after, before)
    assert torch.stack([core.base for core in cores(model)]).mean().abs() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bfloat16", "float16", "float32"])
def test_a_schedule_that_moves_no_price_moves_no_threshold(dtype):
    model = tiny_dyn_nsa_lm().to(dtype)
    with torch.no_grad():
        for core, low in zip(cores(model), (-2.0, -1.99), strict=True):
            core.price.fill_(-3.0)
            core.base.copy_(torch.tensor([2.0, low]))
    before = torch.stack([core.threshold_base() for core in cores(model)]).detach()
    schedule = BudgetSchedule(3.0, 300, rate=0.0)
    for step in range(300):
        schedule.apply(model, step)
    after = torch.stack([core.threshold_base() for core in cores(model)]).detach()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    # A mean that the precision holds becomes a part of the price.
    with torch.no_grad():
        for core in cores(model):
            core.base.add_(1.0)
    schedule.apply(model, 300)
    assert torch.stack([core.base for core in cores(model)]).float().mean().abs() < 0.01
    assert float(next(cores(model)).price) == pytest.approx(-2.0, abs=0.01)


def test_the_first_price_is_set_where_something_is_to_move():
    """Not before anything was read, and not by a schedule that leaves the number of blocks alone."""
    x, prices, slopes = token_ids(), {}, {}
    for rate, weight in ((0.3, 0.0), (0.0, 0.0), (0.0, 1.0)):
        model, schedule = convert_attention(stock(num_hidden_layers=2), **SMALL).train(), BudgetSchedule(3.0, 9, rate=rate, weight=weight)
        schedule.apply(model, 0)
        schedule.apply(model, 1)
        assert all(core.price == OPEN for core in cores(model))
        for step in (2, 3):
            loss = model(x, labels=x).loss
            slopes[rate, weight, step] = torch.autograd.grad(loss, [core.base for core in cores(model)])[0].abs().max()
            schedule.apply(model, step)
        prices[rate, weight] = float(next(cores(model)).price)
    assert prices[0.3, 0.0] > -8
    assert (prices[0.0, 0.0], prices[0.0, 1.0]) == (OPEN, -8)
    assert slopes[0.0, 1.0, 2] < 1e-9  # at the price of a new conversion the budget loss is flat
    assert slopes[0.0, 1.0, 3] > 1e-6


def test_the_call_after_the_last_step_counts_it_and_sets_the_limit():
    model, x, schedule = convert_attention(stock(num_hidden_layers=2), **SMALL).train(), token_ids(), BudgetSchedule(3.0, 4, max_blocks=8)
    for step in range(4):
        schedule.apply(model, step)
        with torch.no_grad():
            model(x)
    price = float(next(cores(model)).price)
    assert next(cores(model)).options.max_blocks is None
    schedule.apply(model, 4)
    assert next(cores(model)).options.max_blocks == 8
    assert float(next(cores(model)).price) > price  # it still read too many


def test_layers_of_ones_own_share_a_budget_too():
    torch.manual_seed(0)
    options = DynNSAOptions(compress_size=16, block_size=16, window=20)
    model = nn.ModuleList([DynNSAAttention(32, 4, 2, options=options) for _ in range(2)])
    with torch.no_grad():
        model[0].q_proj.weight.mul_(12)  # its importances spread wider than the other layer's
    schedule, x = BudgetSchedule(4.0, 40), torch.randn(2, 160, 32)
    for step in range(40):
        schedule.apply(model, step)
        with torch.no_grad():
            counts = [layer(x).counts.double().mean() for layer in model]
    assert sum(counts) / 2 == pytest.approx(4.0, abs=0.05)
    assert abs(counts[0] - counts[1]) > 0.05


def test_a_training_that_resumes_goes_on_with_the_path(tmp_path):
    schedule, x = BudgetSchedule(3.0, 100), token_ids()
    model = convert_attention(stock(), **SMALL).train()
    for step in range(12):
        schedule.apply(model, step)
        model(x)
    model.save_pretrained(tmp_path)
    resumed, other = BudgetSchedule(3.0, 100), type(model).from_pretrained(tmp_path).train()
    resumed.apply(other, 11)
    assert [resumed.target_at(step) for step in (11, 20, 60)] == pytest.approx([schedule.target_at(step) for step in (11, 20, 60)])
    assert next(cores(other)).price == next(cores(model)).price


def test_a_trainer_that_resumes_moves_the_price_as_one_that_went_on(tmp_path):
    def trained(**arguments: Any) -> Trainer:
        torch.manual_seed(0)
        model = convert_attention(stock(num_hidden_layers=1), **SMALL)
        return trainer_of(
            model, tmp_path, schedule=BudgetSchedule(3.0, 8), logging_steps=1, save_strategy="steps", save_steps=5, **arguments
        )

    whole, resumed = trained(max_steps=8), trained(max_steps=8)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    prices = [[entry["key_blocks_price"] for entry in run.state.log_history if "key_blocks" in entry] for run in (whole, resumed)]
    assert prices[1] == pytest.approx(prices[0], abs=1e-5)


def test_a_schedule_begins_anew_with_another_model():
    schedule, starts = BudgetSchedule(3.0, 100), []
    for length in (130, 260):
        model = convert_attention(stock(num_hidden_layers=1), **SMALL).train()
        for step in range(3):
            schedule.apply(model, step)
            model(token_ids(length))
        starts.append(schedule.start)
    assert starts == pytest.approx([sum(t // 16 + 1 for t in range(length)) / length for length in (130, 260)])


def test_the_loss_holds_the_budget():
    model, x = tiny_dyn_nsa_lm(weight=0.7).train(), token_ids()
    with torch.no_grad():
        next(cores(model)).base.sub_(2.0)
        for core in cores(model):
            core.budget_target.fill_(4.0)
    softs: list[Tensor] = []
    for core in cores(model):
        core.register_forward_hook(lambda module, args, out: softs.append(out.soft_counts))
    got = model(x, labels=x).loss
    budget = 0.7 * (torch.stack(softs[:2]).mean() / 4 - 1) ** 2
    assert budget < 0.9 * sum(0.7 * (soft.mean() / 4 - 1) ** 2 for soft in softs[:2]) / 2  # not a budget for each layer
    plain = torch.nn.functional.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(got, plain + budget)
    torch.testing.assert_close(collected_budget_loss(model), budget)
    with pytest.raises(RuntimeError, match="there is no loss of the attention to collect"):
        collected_budget_loss(model)
    torch.testing.assert_close(model(x, labels=x, return_dict=False)[0], plain + budget)
    # A step of accumulated batches gathers it once.
    items = torch.tensor(4 * x[:, 1:].numel())
    part = (
        model(x, labels=x, num_items_in_batch=items).loss
        - torch.nn.functional.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum") / items
    )
    torch.testing.assert_close(part, budget / 4, rtol=1e-4, atol=1e-6)
    shifted = torch.nn.functional.pad(x, (0, 1), value=-100)[:, 1:].contiguous()  # of a collator: its first token may count
    shifted[:, 0] = -100
    got = model(x, labels=x, shift_labels=shifted, num_items_in_batch=items).loss
    plain_part = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), shifted.flatten(), reduction="sum") / items
    torch.testing.assert_close(got - plain_part, budget * (shifted != -100).sum() / items, rtol=1e-4, atol=1e-6)
    model.eval()
    torch.testing.assert_close(model(x, labels=x).loss, plain)


def test_the_loss_counts_every_call_of_a_layer():
    """The first four layers of this family run six times in a forward, and the others twice."""
    model, x = convert_attention(tiny_family_lm("hrm_text"), **SMALL).train(), token_ids()
    softs: list[Tensor] = []
    for number, core in enumerate(cores(model)):
        core.register_forward_hook(lambda module, args, out: softs.append(out.soft_counts))
        with torch.no_grad():
            core.base.fill_(float(number))
    BudgetSchedule(4.0, 9, weight=0.7).apply(model, 0)
    for core in cores(model):
        core.price.fill_(-2.0)
        core.budget_target.fill_(4.0)
    model(x)
    assert len(softs) == 4 * 6 + 4 * 2
    mean = torch.cat([soft.flatten() for soft in softs]).mean()
    torch.testing.assert_close(collected_budget_loss(model), 0.7 * (mean / 4 - 1) ** 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.9, "steps": 1}, "target must be at least 1, got 0.9"),
        ({"target": 4.0, "steps": 1, "rate": -0.1}, "rate must be at least 0, got -0.1"),
        (
            {"target": 4.0, "steps": 1, "temperature": (1.0,)},
            r"temperature must be two numbers, at the beginning and the end, got \(1.0,\)",
        ),
        ({"target": 4.0, "steps": 1, "temperature": (1.0, 11.0)}, "temperature must be above 0 and at most 10, got 11.0"),
        ({"target": 4.0, "steps": 1, "start": 0.0}, "start must be above 0, got 0.0"),
        ({"target": 4.0, "steps": 0}, "steps must be at least 1, got 0"),
        ({"target": 4.0, "steps": 1, "weight": -1.0}, "weight must be at least 0, got -1.0"),
        ({"target": 4.5, "steps": 1, "max_blocks": 4}, "max_blocks must be at least target, 4.5, got 4"),
    ],
    ids=["target", "rate", "temperature", "hot", "start", "steps", "weight", "max_blocks_below_target"],
)
def test_bad_schedules_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BudgetSchedule(**options)


@pytest.mark.parametrize(("number", "kind"), [(8.5, "float"), (True, "bool"), ("8", "str")])
def test_the_last_limit_is_an_int(number, kind):
    with pytest.raises(TypeError, match=f"max_blocks must be an int, got {kind}"):
        BudgetSchedule(4.0, 9, max_blocks=number)


def test_options_of_a_model_are_checked_when_they_are_set():
    model, x = convert_attention(stock(), **SMALL), token_ids(20)
    shared, before = next(cores(model)).options, copy.deepcopy(model.config.tinyonn)
    with pytest.raises(ValueError, match=r"temperature must be above 0 and at most 10, got 11\.0"):
        set_options(model, max_blocks=8, temperature=11.0)
    assert (shared.max_blocks, model.config.tinyonn) == (None, before)
    set_options(model, max_blocks=8)
    assert all(core.options is shared for core in cores(model))  # layers share one
    assert (shared.max_blocks, model.config.tinyonn["dyn_nsa"]["options"]["max_blocks"]) == (8, 8)
    assert model(x).logits.isfinite().all()


def test_a_schedule_needs_a_converted_model():
    with pytest.raises(InputError, match="model must be converted by convert_attention, got an unconverted Llama"):
        BudgetSchedule(4.0, 1).apply(stock(), 0)
    with pytest.raises(InputError, match=r"target of BudgetSchedule must be at least 3, the forced blocks, got 2\.5"):
        BudgetSchedule(2.5, 1).apply(convert_attention(stock(), **SMALL), 0)
    with pytest.raises(InputError, match=r"start of BudgetSchedule must be at least 3, the forced blocks, got 2"):
        BudgetSchedule(4.0, 1, start=2).apply(convert_attention(stock(), **SMALL), 0)
    with pytest.raises(InputError, match="model must be converted by convert_attention, got an unconverted NoneType"):
        BudgetSchedule(4.0, 1).apply(None, 0)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [(math.nan, TypeError, "an int, got float"), ("1", TypeError, "an int, got str"), (-5, ValueError, "at least 0, got -5")],
    ids=str,
)
def test_a_step_is_a_count(step, error, message):
    with pytest.raises(error, match=f"step must be {message}"):
        BudgetSchedule(4.0, 9).apply(convert_attention(stock(), **SMALL), step)
    with pytest.raises(TypeError, match="steps must be an int, got float"):
        BudgetSchedule(4.0, 2.5)


def test_a_schedule_reaches_its_end_with_the_training(tmp_path):
    model = convert_attention(stock(num_hidden_layers=2), **SMALL)
    trainer = trainer_of(
        model, tmp_path, schedule=BudgetSchedule(3.0, 2, max_blocks=4), logging_steps=1, save_strategy="steps", save_steps=2
    )
    trainer.train()
    assert all(core.budget_target == 3 and core.options.max_blocks == 4 for core in cores(model))
    assert all(core.options.temperature == pytest.approx(0.1) for core in cores(model))
    saved = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())
    assert saved["tinyonn"]["dyn_nsa"]["options"]["max_blocks"] == 4
    assert saved["tinyonn"]["dyn_nsa"]["options"]["temperature"] == pytest.approx(0.1)
    logged = [entry for entry in trainer.state.log_history if "key_blocks" in entry]
    every = sum(t // 16 + 1 for t in range(60)) / 60
    assert [entry["key_blocks_target"] for entry in logged] == [3.0, 3.0]
    assert logged[0]["key_blocks"] == pytest.approx(every, rel=1e-5)
    assert logged[0]["key_blocks_far"] == pytest.approx(every - sum(min(t // 16 + 1, 3) for t in range(60)) / 60, rel=1e-4)
    far = logged[0]["key_blocks_far"]
    first = -8 + 0.3 * math.log(far / (3 - (every - far)))
    assert [entry["key_blocks_price"] for entry in logged] == [pytest.approx(first, abs=1e-4), next(cores(model)).price]
    with pytest.warns(UserWarning, match="ended after 2 of the 9 steps of BudgetSchedule, so the budget of 3.0 key blocks is not"):
        trainer_of(convert_attention(stock(), **SMALL), tmp_path, schedule=BudgetSchedule(3.0, 9)).train()
    with pytest.warns(UserWarning, match="ended after 2 of the 3 steps of BudgetSchedule, so the last temperature is not"):
        trainer_of(convert_attention(stock(), **SMALL), tmp_path, schedule=BudgetSchedule(3.0, 3)).train()


def test_reporters_get_the_blocks_of_training_steps_alone(tmp_path):
    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    seen: list[dict[str, float]] = []
    model, schedule = convert_attention(stock(num_hidden_layers=2), **SMALL), BudgetSchedule(3.0, 2)
    rows = [{"input_ids": token_ids(20, 1)[0], "labels": token_ids(20, 1)[0]}] * 4
    trainer = trainer_of(model, tmp_path, schedule=schedule, rows=rows, logging_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.callback_handler.callbacks.insert(0, Reporter())  # where a Trainer has those of report_to
    schedule.before_reporters(trainer)
    trainer.train()
    every = sum(t // 16 + 1 for t in range(60)) / 60
    training, evaluation = [[log for log in seen if key in log] for key in ("loss", "eval_loss")]
    assert [log["key_blocks"] for log in training] == pytest.approx([every, every], rel=1e-5)
    assert len(evaluation) == 2
    assert not any("key_blocks" in log for log in evaluation)
    with pytest.raises(ValueError, match="trainer must have this callback; pass it in callbacks"):
        BudgetSchedule(3.0, 2).before_reporters(trainer)


def test_a_training_that_ends_off_its_budget_says_where(tmp_path):
    ended, end = "training ended at {} key blocks per query, {}", ", and the budget of BudgetSchedule is {}; call calibrate before"
    model = convert_attention(stock(num_hidden_layers=1), **SMALL, forced_first=0, forced_local=1)
    every = f"{sum(t // 16 + 1 for t in range(60)) / 60:.2f}"
    message = ended.format(every, "more than the price could leave out in these steps") + end.format(1.5)
    with pytest.warns(UserWarning, match=re.escape(message)):
        trainer_of(model, tmp_path, schedule=BudgetSchedule(1.5, 2)).train()
    for core in cores(model):
        core.price.fill_(50.0)
    message = ended.format("1.00", "no block beyond the forced ones") + end.format(2)
    with pytest.warns(UserWarning, match=re.escape(message)):
        trainer_of(model, tmp_path, schedule=BudgetSchedule(2, 2)).train()
    for core in cores(model):
        core.price.fill_(-30.0)
    with warnings.catch_warnings(record=True) as told:  # all that there are
        warnings.simplefilter("always")
        trainer_of(model, tmp_path, schedule=BudgetSchedule(4, 2)).train()
    assert not [one for one in told if "training ended" in str(one.message)]


def test_parameter_groups_hold_each_parameter_once():
    model = convert_attention(stock(), **SMALL)
    model.model.embed_tokens.requires_grad_(False)
    own, parts, thresholds = parameter_groups(model, lr=1e-5, weight_decay=0.1)
    assert (own["lr"], own["weight_decay"]) == (1e-5, 0.1)
    assert (parts["lr"], parts["weight_decay"]) == (3e-4, 0.0)
    assert (thresholds["lr"], thresholds["weight_decay"]) == (0.03, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)].split(".")[-1] for parameter in thresholds["params"]} == {"base", "slope"}
    assert all(".dyn_nsa." in names[id(parameter)] for parameter in parts["params"])
    everything = [id(parameter) for group in (own, parts, thresholds) for parameter in group["params"]]
    assert len(everything) == len(set(everything))
    assert set(everything) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    torch.optim.AdamW([own, parts, thresholds])
    model.requires_grad_(False)
    next(cores(model)).base.requires_grad_(True)
    assert [group["lr"] for group in parameter_groups(model, lr=1.0)] == [0.03]
    for name in ("lr", "parts_lr", "threshold_lr", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
            parameter_groups(model, **{"lr": 1.0, name: math.nan})
    with pytest.raises(InputError, match="model must be converted by convert_attention, got an unconverted"):
        parameter_groups(stock(), lr=1.0)


def test_statistics_have_every_layer():
    model = tiny_dyn_nsa_lm()
    model(token_ids(), attention_mask=left_padding())
    got = statistics(model, reset=True)
    assert list(got) == [f"model.layers.{layer}.self_attn.dyn_nsa" for layer in (0, 1)]
    for value in got.values():
        assert list(value) == ["mean_count", "far_count", "overflow", "tau", "share_compressed", "share_selected", "share_window"]
        assert 1 < value["mean_count"] <= 5
        assert 0 < value["far_count"] < value["mean_count"] - 1
        assert 0 < value["tau"] < 1
        assert sum(value[f"share_{name}"] for name in ("compressed", "selected", "window")) == pytest.approx(1)
    assert all(number != number for value in statistics(model).values() for number in value.values())


def taus_of(model: PreTrainedModel) -> list[Tensor]:
    taus: list[Tensor] = []
    next(cores(model)).register_forward_hook(lambda module, args, out: taus.append(out.tau))
    return taus


def test_a_given_tau_reaches_every_layer():
    model, x = tiny_dyn_nsa_lm(), token_ids()
    expected = model(x).logits
    taus = taus_of(model)
    given = torch.rand(2, LENGTH)
    assert (model(x, tau=given).logits - expected).abs().max() > 1e-3
    assert torch.equal(taus[0], given[..., None].expand(2, LENGTH, 2))


def test_output_tau_is_the_previous_tokens_entropy_when_decoding():
    model = tiny_dyn_nsa_lm(tau_source="output")
    taus, x = taus_of(model), token_ids(40)
    got = model.generate(
        x, max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        attention_mask=left_padding(40),
    )  # fmt: skip
    assert (taus[0] == 1).all()  # the prompt: nothing was observed in training
    for step in range(1, 6):
        assert taus[step].shape == (2, 1, 2)
        torch.testing.assert_close(taus[step][:, 0, 0], normalised_entropy(got.logits[step - 1]))
    model(x[:, :1], use_cache=True)
    assert (taus[-1] == 1).all()  # a prompt of one token follows none


def test_output_tau_is_a_running_mean_in():
    model = tiny_dyn_nsa_lm(tau_source="output").train()
    taus, x, mask = taus_of(model), token_ids(), left_padding()
    entropies = []
    for _ in range(3):
        logits = model(x, attention_mask=mask).logits
        log_probs = logits.detach().log_softmax(-1)
        entropies.append((-(log_probs.exp() * log_probs).sum(-1) / torch.tensor(97.0).log())[mask.bool()].mean())
    expected = [torch.tensor(1.0), entropies[0], entropies[0] + 0.05 * (entropies[1] - entropies[0])]
    for tau, mean in zip(taus, expected, strict=True):
        torch.testing.assert_close(tau, mean.expand(tau.shape))
        assert not tau.requires_grad


class Tuner(nn.Module):
    """Calls the model as PEFT's BaseTuner does: its `forward`, not itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


def test_a_call_of_forward_alone_loses_nothing():
    plain, inner = tiny_dyn_nsa_lm(tau_source="output").train(), tiny_dyn_nsa_lm(tau_source="output").train()
    model, x = Tuner(inner), token_ids()
    for _ in range(2):  # the second sees the entropy of the first
        expected, got = plain(x, labels=x).loss, model(x, labels=x).loss
        assert torch.equal(got, expected)
    assert statistics(inner) == statistics(plain)
    assert [core.output_tau for core in cores(inner)] == [core.output_tau for core in cores(plain)]
    assert (next(cores(inner)).output_tau < 1).all()
    other = copy.deepcopy(inner)
    with torch.no_grad():
        next(cores(other)).base.fill_(OPEN)
    assert other.forward(x, labels=x).loss != inner.forward(x, labels=x).loss


def test_arguments_count_however_they_are_given():
    plain, model = tiny_dyn_nsa_lm(tau_source="output").train(), tiny_dyn_nsa_lm(tau_source="output").train()
    x, mask = token_ids(), left_padding()
    expected = plain(x, attention_mask=mask, labels=x)
    loss, logits, *_ = model(x, mask, None, None, None, x, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    assert [core.output_tau for core in cores(model)] == [core.output_tau for core in cores(plain)]
    assert (next(cores(model)).output_tau < 1).all()


def test_a_cache_counts_however_it_is_given():
    taus = []
    for positional in (False, True):
        model, x = tiny_dyn_nsa_lm(tau_source="output"), token_ids(40)
        seen = taus_of(model)
        with torch.no_grad():
            cache = model(x, use_cache=True).past_key_values
            given: Any = (None, None, cache) if positional else ()
            model(x[:, :1], *given, **({} if positional else {"past_key_values": cache}))
        taus.append(seen[1])
    assert (taus[0] < 1).all()
    assert torch.equal(*taus)


def trainer_of(
    model: PreTrainedModel,
    path: Any,
    loss: Any = None,
    weight: float = 1.0,
    schedule: BudgetSchedule | None = None,
    rows: Any = None,
    **arguments: Any,
) -> Trainer:
    row = token_ids(60, 1)[0]
    arguments = TrainingArguments(
        str(path), per_device_train_batch_size=1, gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        **{"max_steps": 2, "save_strategy": "no", **arguments},
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row}] * 4
    return Trainer(
        model, arguments, train_dataset=data, eval_dataset=rows, callbacks=[schedule or BudgetSchedule(3.0, 2, weight=weight)],
        compute_loss_func=loss,
    )  # fmt: skip


def test_a_step_without_its_budget_loss_is_refused(tmp_path):
    model = tiny_dyn_nsa_lm()

    def plain(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def whole(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return plain(outputs, labels) + collected_budget_loss(model)

    message = "the loss of this step does not include the budget loss"
    with pytest.raises(RuntimeError, match=message):
        trainer_of(model, tmp_path, label_smoothing_factor=0.1).train()
    with pytest.raises(RuntimeError, match=message):
        trainer_of(model, tmp_path, plain).train()
    trainer_of(model, tmp_path, plain, weight=0.0).train()
    trainer_of(model, tmp_path, whole).train()
    trainer_of(model, tmp_path).train()


def test_a_schedule_tells_which_thresholds_do_not_train():
    model = tiny_dyn_nsa_lm()
    next(cores(model)).requires_grad_(False)
    with pytest.warns(UserWarning, match=r"thresholds of 1 of 2 layers require no gradient, so .*; call requires_grad_\(True\) on them"):
        BudgetSchedule(4.0, 2, weight=0.1).apply(model, 0)
