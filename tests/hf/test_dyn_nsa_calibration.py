"""Thresholds of a budget without training: the price in closed form, and those of heads from one backward pass."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf import BudgetSchedule, calibrate, convert_attention, distil_compression, register_attention, statistics
from tinyonn.hf.dyn_nsa import calibration, cores, fitting, measures, shares
from tinyonn.hf.dyn_nsa.options import price_of_budget
from tinyonn.nn import DynNSAOptions
from tinyonn.testing import left_padding, tiny_causal_lm, token_ids

from .regression import by_hand

SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}
LENGTH = 130


def stock(arch: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    return tiny_causal_lm(arch, dtype=dtype, max_position_embeddings=512, **overrides)


def kept_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any) -> Any:
    """Softmax attention written out, which keeps what it saw."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    shares = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)
    out = shares @ value.repeat_interleave(groups, 1)
    out.requires_grad_().retain_grad()
    kept[module.layer_idx] = (query * scaling, key, shares, value, out)
    return out.transpose(1, 2), None


kept: dict[int, tuple[Tensor, ...]] = {}
register_attention("kept_attention", kept_attention)


def far_blocks(length: int) -> Tensor:
    own = torch.arange(length)[:, None] // 16
    block = torch.arange(-(-length // 16))
    return (block >= 1) & (block < own - 1)


def pairs_by_hand(model: PreTrainedModel, rows: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Log of the estimated share, and Σ_heads |∂L/∂o|² |P_b (v_b - o)|², of the far blocks of each key/value head; block by block."""
    model.set_attn_implementation("kept_attention")
    found: list[list[Tensor]] = []
    slopes = []
    for row in rows:
        logits = model(row[None], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum").backward()
        far, blocks, whole = far_blocks(len(row)), range(-(-len(row) // 16)), len(row) // 16
        slopes.append(torch.stack([out.grad[0].square().sum((-1, -2)) for *_, out in kept.values()]))
        estimates, effects = [], []
        for query, key, probabilities, value, out in kept.values():
            means = torch.stack([key[0, :, 16 * b : 16 * b + 16].mean(1) for b in range(whole)], 1).repeat_interleave(2, 0)
            products = query[0] @ means.transpose(1, 2)
            ended = (torch.arange(whole) + 1) * 16 <= torch.arange(len(row))[:, None] + 1
            shares = products.masked_fill(~ended, -1e30).softmax(-1)
            estimates.append(shares.unflatten(0, (2, 2)).mean(1).log()[:, far[:, :whole]])
            effect = []
            for b in blocks:
                mass = probabilities[0, :, :, 16 * b : 16 * b + 16].sum(-1, keepdim=True)
                part = probabilities[0, :, :, 16 * b : 16 * b + 16] @ value[0, :, 16 * b : 16 * b + 16].repeat_interleave(2, 0)
                effect.append((part - mass * out[0]).square().sum(-1))
            effects.append(torch.stack(effect, -1)[:, far])
        found.append([torch.stack(estimates).flatten(0, 1).detach(), torch.stack(effects).detach()])
    slope = torch.stack(slopes).sum(0) / sum(map(len, rows))  # (layers, H)
    x = torch.cat([estimates for estimates, _ in found], -1)
    effect = (torch.cat([effects for _, effects in found], -1) * slope[..., None]).unflatten(1, (2, 2)).sum(2).flatten(0, 1)
    return [(x[head], effect[head], torch.ones_like(x[head])) for head in range(len(x))]


def heads_of(model: PreTrainedModel, name: str) -> Tensor:
    return torch.cat([getattr(core, name).detach().double() for core in cores(model)])


@pytest.mark.parametrize("how", ["plain", "padded", "packed", "embeddings"])
def test_thresholds_lie_where_blocks_of_all_heads_matter_as_much(how, monkeypatch):
    monkeypatch.setattr(fitting, "FARTHEST", 20.0)  # layers of a random model differ by more than that of a trained one
    x = token_ids(200 if how == "packed" else LENGTH)
    rows = {"padded": [x[0, 21:], x[1]], "packed": [x[0, :90], x[0, 90:]]}.get(how, [x[0], x[1]])
    level, power = by_hand(pairs_by_hand(stock(dtype=torch.float64), rows))
    model = convert_attention(stock(dtype=torch.float64), **SMALL)
    batch: dict[str, Any] = {"input_ids": x}
    if how == "padded":
        batch["attention_mask"] = left_padding()
    if how == "packed":
        batch = {"input_ids": x[:1], "position_ids": torch.cat([torch.arange(90), torch.arange(110)])[None]}
    if how == "embeddings":
        batch = {"inputs_embeds": model.get_input_embeddings()(x), "labels": x}
    calibrate(model, [batch], 2.9 if how == "packed" else 3.5)
    gain, base = heads_of(model, "gain"), heads_of(model, "base")
    assert gain.std() > 0.05
    assert base.std() > 0.05
    for price in (-1.5, -4.0):
        effects = level + power * (price * gain + base)
        torch.testing.assert_close(effects, effects.mean().expand(6), rtol=0, atol=1e-4)
    assert gain.mean().item() == pytest.approx(1, abs=1e-6)
    assert base.mean().item() == pytest.approx(0, abs=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_head_with_other_keys_gets_the_threshold_of_its_own_estimates():
    """Where the queries of the compressed branch are half as long, estimates are flatter, and their differences mean more."""
    x, gains = token_ids(200), []
    for factor in (1.0, 0.5):
        model = convert_attention(stock(dtype=torch.float64), **SMALL, compress_query=True)
        core = list(cores(model))[1]
        with torch.no_grad():
            core.query_map[2:].mul_(factor)  # of the second key/value head
        reached = calibrate(model, [x], 4.0)
        assert reached == pytest.approx(4.0, abs=0.03)
        gains.append(heads_of(model, "gain"))
    others = torch.arange(6) != 3
    assert (gains[1][3] / gains[1][others].mean()) < 0.8 * (gains[0][3] / gains[0][others].mean())


def test_a_sample_of_the_pairs_gives_nearly_the_same_thresholds(monkeypatch):
    x, found = token_ids(400), []
    for pairs in (2**15, 3000):
        monkeypatch.setattr(measures, "PAIRS", pairs)
        model = convert_attention(stock(dtype=torch.float64), **SMALL)
        calibrate(model, [x], 4.0)
        found.append((heads_of(model, "gain"), heads_of(model, "base")))
    (gain, base), (some_gain, some_base) = found
    assert not torch.equal(gain, some_gain)
    torch.testing.assert_close(-2.0 * some_gain + some_base, -2.0 * gain + base, rtol=0, atol=0.3)


def test_every_budget_of_a_call_follows_the_gains():
    model, x = convert_attention(stock(), **SMALL), token_ids(300)
    calibrate(model, [x], 4.0)
    assert heads_of(model, "gain").std() > 0.02
    for budget in (3.5, 6.0, 8.0):
        forced = sum(min(t // 16 + 1, 3) for t in range(300)) / 300
        assert blocks_read(model, x, budget) - forced == pytest.approx(budget - forced, rel=0.12)


def blocks_read(model: PreTrainedModel, x: Tensor, budget: float) -> float:
    statistics(model, reset=True)
    with torch.no_grad():
        model(x, block_budget=budget)
    return sum(value["mean_count"] for value in statistics(model).values()) / 3


@pytest.mark.parametrize("target", [2.8, 3.75])
def test_the_budget_of_the_calibration_reads_what_it_read(target, tmp_path):
    """In a short text queries read fewer forced blocks than three on average, here 2.63."""
    model, x = convert_attention(stock(), **SMALL), token_ids()
    reached = calibrate(model, [x], target)
    assert reached == pytest.approx(target, abs=0.03)
    assert blocks_read(model, x, target) == pytest.approx(target, abs=0.06)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert blocks_read(loaded, x, target) == blocks_read(model, x, target)
    forced = sum(min(t // 16 + 1, 3) for t in range(LENGTH)) / LENGTH
    with pytest.raises(
        InputError, match=f"block_budget must be above {forced:.4g}, the forced blocks per query in the sample of calibrate"
    ):
        model(x, block_budget=forced - 0.01)


def test_prices_of_earlier_versions_count_every_forced_block():
    options = DynNSAOptions(prices=((1.0, -2.0), (3.0, -4.0)))
    assert [price_of_budget(options, budget) for budget in (3.5, 4.0, 5.0, 6.0, 9.0)] == [-2.0, -2.0, -3.0, -4.0, -4.0]
    with pytest.raises(InputError, match="block_budget must be above 3, the forced blocks per query"):
        price_of_budget(options, 3.0)


def test_the_price_of_a_new_conversion_opens_every_block_of_a_calibrated_model():
    model, x = stock(), token_ids()
    expected = model(x).logits
    convert_attention(model, **SMALL)
    calibrate(model, [x], 3.0)
    with torch.no_grad():
        for core in cores(model):
            core.gain.copy_(torch.tensor([0.5, 2.0]))
            core.base.copy_(torch.tensor([-2.0, 2.0]))
    torch.testing.assert_close(model(x, block_price=-30.0).logits, expected, rtol=0, atol=1e-4)
    assert (model(x, block_price=-0.5).logits - expected).abs().max() > 1e-3
    # A schedule centres them, and leaves the thresholds where they are.
    before = torch.stack([core.threshold_base() for core in cores(model)]).detach()
    BudgetSchedule(4.0, 5).apply(model, 0)
    torch.testing.assert_close(torch.stack([core.threshold_base() for core in cores(model)]).detach(), before)
    # A calibration without a gradient keeps how thresholds differ, at the price that it finds.
    assert calibrate(model, [x], 3.5, price="none") == pytest.approx(3.5, abs=0.05)
    assert torch.equal(next(cores(model)).gain, torch.tensor([0.5, 2.0]))


def test_chunks_of_queries_change_nothing(monkeypatch):
    x, found = token_ids(), []
    for elements in (2**23, 5000):
        monkeypatch.setattr(shares, "ELEMENTS", elements)
        model = convert_attention(stock(dtype=torch.float64), **SMALL)
        reached = calibrate(model, [x], 3.5)
        found.append((torch.stack([core.base for core in cores(model)]).detach(), next(cores(model)).price, reached))
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(chunked), torch.as_tensor(whole))


def test_a_part_of_the_queries_gives_nearly_the_same_price(monkeypatch):
    monkeypatch.setattr(calibration, "VALUES", 1500)
    model = convert_attention(stock(), **SMALL)
    assert calibrate(model, [token_ids(200)], 4.0) == pytest.approx(4.0, rel=0.01)


def test_without_a_gradient_heads_keep_their_differences():
    model, x = convert_attention(stock(), **SMALL), token_ids()
    with torch.no_grad():
        for number, core in enumerate(cores(model)):
            core.base.copy_(torch.tensor([0.3 * number, 1.0]))
    before = torch.stack([core.base for core in cores(model)]).detach()
    assert calibrate(model, [x], 3.5, price="none") == pytest.approx(3.5, abs=0.02)
    after = torch.stack([core.base for core in cores(model)]).detach()
    torch.testing.assert_close(after, before - before.mean())
    assert len({float(core.price) for core in cores(model)}) == 1


def test_a_price_that_selects_nothing_or_everything_is_told():
    model, x = convert_attention(stock(), **SMALL), token_ids()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.zero_()
            layer.self_attn.k_proj.bias.zero_()
    for target, reached, which in ((2.4, "2.50", "all"), (2.3, "2.25", "none")):
        message = (
            f"no price reads target={target} key blocks per query on this sample, got {reached}: {which} of the blocks that are not forced"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            calibrate(model, [x[:, :64]], target, price="none")
    assert all(core.price == -30 and (core.base == 0).all() for core in cores(model))


def test_the_price_of_a_gradient_needs_a_loss():
    x = token_ids()
    with pytest.raises(InputError, match="model must have a language head for price='gradient', got LlamaModel: give price='none'"):
        calibrate(convert_attention(AutoModel.from_config(stock().config), **SMALL), [x], 3.5)
    model = convert_attention(stock(), **SMALL)
    with pytest.raises(InputError, match="sample must have input_ids or labels for price='gradient', got neither"):
        calibrate(model, [{"inputs_embeds": model.get_input_embeddings()(x).detach()}], 3.5)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(InputError, match="loss over the sample must be finite, got nan"):
        calibrate(model, [x], 3.5)
    assert all(core.price == -30 and (core.base == 0).all() for core in cores(model))


def test_a_calibrated_model_comes_back_from_its_folder(tmp_path):
    model, x = convert_attention(stock(), **SMALL), token_ids()
    reached = calibrate(model, [x], 3.5)
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(x).logits, expected)
    assert torch.equal(heads_of(loaded, "gain"), heads_of(model, "gain"))
    assert not torch.equal(heads_of(loaded, "gain"), torch.ones(6, dtype=torch.float64))
    assert all(core.gain.dtype == torch.float32 for core in cores(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)))
    assert sum(value["mean_count"] for value in statistics(loaded).values()) / 3 == pytest.approx(reached, rel=1e-5)


def test_calibration_finds_the_thresholds_of_a_budget():
    model, x = convert_attention(stock(), **SMALL), token_ids()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)  # importance must differ between blocks
    reached = calibrate(model.train(), [x, {"input_ids": x[:1]}], 4.0)
    assert reached == pytest.approx(4.0, abs=0.03)
    assert model.training
    counts = []
    for batch in (x, x[:1]):
        model.eval()(batch)
        counts.append(sum(value["mean_count"] for value in statistics(model, reset=True).values()) / 3)
    assert (2 * counts[0] + counts[1]) / 3 == pytest.approx(reached, rel=1e-5)  # of three rows, each query counts once
    price = next(cores(model)).price.clone()
    BudgetSchedule(4.0, 5).apply(model, 0)  # goes on from there
    assert all(core.price == price for core in cores(model))


def test_calibration_refuses_what_it_cannot_reach():
    model, x = convert_attention(stock(), **SMALL), token_ids()
    before = [(core.price.clone(), core.base.clone()) for core in cores(model)]
    with pytest.raises(InputError, match=r"target must be in \d\.\d\d … 4\.57, the range that this sample can reach, got 1\.0"):
        calibrate(model, [x], 1.0)
    assert all(core.price == price and torch.equal(core.base, base) for core, (price, base) in zip(cores(model), before, strict=True))
    with pytest.raises(InputError, match="sample contains no batch"):
        calibrate(model, [], 4.0)
    with pytest.raises(ValueError, match="price must be one of gradient, none, got 'mass'"):
        calibrate(model, [x], 4.0, price="mass")
    for target, error in ((math.nan, ValueError), (math.inf, ValueError), ("4", TypeError)):
        with pytest.raises(error, match=r"target must be (finite|a number), got"):
            calibrate(model, [x], target)
    with pytest.raises(InputError, match="model must be converted by convert_attention, got an unconverted"):
        calibrate(stock(), [x], 4.0)


@pytest.mark.parametrize(
    ("length", "target", "options", "held", "needed"),
    [
        (20, 5.0, {}, "20 tokens, 2 blocks of 16", 144),
        (1, 2.5, {}, "1 token, 1 block of 16", 64),
        (46, 2.25, {}, "46 tokens, 3 blocks of 16", 64),  # all of its blocks are forced: every threshold reads the same
        (20, 5.0, {"max_blocks": 6}, "20 tokens, 2 blocks of 16", 240),
    ],
)
def test_a_sample_too_short_to_calibrate_says_how_long_it_should_be(length, target, options, held, needed):
    def calibrated(tokens: int) -> float:
        return calibrate(convert_attention(stock(), **SMALL, **options), [token_ids(tokens, 1)], target)

    words = re.escape(f"sample is too short for target={target} key blocks per query: it has {held}, and needs about {needed} tokens.")
    with pytest.raises(InputError, match=f"^{words}$"):
        calibrated(length)
    assert calibrated(needed) == pytest.approx(target, abs=0.3)
    with pytest.raises(InputError, match="sample is too short"):  # no more is called for than is needed
        calibrated(needed - 16)


def test_padding_makes_a_sample_no_longer():
    x, mask = token_ids(100, 2), torch.ones(2, 100, dtype=torch.int64)
    mask[:, :80] = 0
    model = convert_attention(stock(), **SMALL)
    for batch in ({"input_ids": x, "attention_mask": mask}, {"input_ids": x, "position_ids": torch.arange(20).repeat(2, 5)}):
        with pytest.raises(InputError, match="it has 20 tokens, 2 blocks of 16, and needs about 144 tokens"):
            calibrate(model, [batch], 5.0)


def test_a_target_that_no_sample_reads_is_refused():
    with pytest.raises(InputError, match=r"target must be at least 2\.25 key blocks per query, because 3 are always read, got 2\.0\."):
        calibrate(convert_attention(stock(), **SMALL), [token_ids(48)], 2.0)  # each of its queries reads two blocks, at any threshold
    with pytest.raises(InputError, match=r"target must be below max_blocks=4, got 4\.0\."):
        calibrate(convert_attention(stock(), **SMALL, max_blocks=4), [token_ids()], 4.0)


def test_calibration_to_more_blocks_follows_one_to_fewer():
    model, x = convert_attention(stock(), **SMALL), token_ids()
    for target in (3.0, 4.0, 2.8):
        assert calibrate(model, [x], target) == pytest.approx(target, abs=0.15)


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (None, TypeError, "sample must be a list of batches, got NoneType"),
        (token_ids(), TypeError, "sample must be a list of batches, got Tensor"),
        ({"input_ids": token_ids()}, TypeError, "sample must be a list of batches, got dict"),
        (["text"], TypeError, "batches of the sample must be token ids or dicts of the model's arguments, got str"),
        ([{"labels": token_ids()}], InputError, "batches of the sample must have input_ids or inputs_embeds, got neither"),
        ([{"input_ids": [[1, 2]]}], TypeError, "input_ids of the sample must be a tensor (B, T), got list"),
        ([token_ids()[0]], InputError, "input_ids of the sample must be (B, T) of at least one token, got (130,)"),
        ([token_ids()[:, :0]], InputError, "input_ids of the sample must be (B, T) of at least one token, got (2, 0)"),
        ([token_ids().float()], TypeError, "input_ids of the sample must be integers, got torch.float32"),
        (
            [{"inputs_embeds": torch.zeros(130, 48)}],
            InputError,
            "inputs_embeds of the sample must be (B, T, features) of at least one token",
        ),
        ([{"input_ids": token_ids(), "block_price": -3.0}], InputError, "batches of the sample must not have block_price"),
        ([token_ids() + 97], InputError, "input_ids of the sample must be in 0 … 96, got"),
        ([token_ids() - 97], InputError, "input_ids of the sample must be in 0 … 96, got -"),
        (
            [token_ids(), {"input_ids": token_ids(), "attention_mask": torch.zeros(2, 130)}],
            InputError,
            "batches of the sample must have a token that is not padding, got one with none",
        ),
        (
            [{"input_ids": token_ids(), "attention_mask": torch.ones(2, 129)}],
            InputError,
            "attention_mask of the sample must be (2, 130) like input_ids, got (2, 129)",
        ),
        (
            [{"input_ids": token_ids(), "labels": token_ids(131)}],
            InputError,
            "labels of the sample must be (2, 130) like input_ids, got (2, 131)",
        ),
    ],
)
def test_a_sample_of_another_kind_is_named(sample, error, message):
    model = convert_attention(stock(), **SMALL)
    for measured in (lambda: calibrate(model, sample, 3.5), lambda: distil_compression(model, sample, 5)):
        with pytest.raises(error, match=re.escape(message)):
            measured()


def test_a_model_that_runs_another_attention_is_not_measured():
    model, x = convert_attention(stock(), **SMALL), token_ids()
    model.set_attn_implementation("sdpa")
    message = re.escape("attn_implementation must be 'dyn_nsa', got 'sdpa'; call model.set_attn_implementation('dyn_nsa').")
    for measured in (lambda: calibrate(model, [x], 3.5), lambda: distil_compression(model, [x], 5)):
        with pytest.raises(InputError, match=message):
            measured()
    model.set_attn_implementation("dyn_nsa")
    assert calibrate(model, [x], 3.5) == pytest.approx(3.5, abs=0.05)


def test_a_model_with_a_weight_that_is_not_finite_gets_no_price():
    model, x = convert_attention(stock(), **SMALL), token_ids()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 3] = math.nan
    with pytest.raises(InputError, match="importances over the sample must be finite, got nan: a weight or an activation of the model"):
        calibrate(model, [x], 3.5, price="none")
    assert all(core.price == -30 for core in cores(model))


@pytest.mark.parametrize(("limit", "target"), [(5, 4.0), (5, 4.3), (6, 4.3), (6, 5.0)], ids=str)
def test_a_target_near_the_limit_of_blocks_is_reached(limit, target):
    model = convert_attention(stock(num_hidden_layers=2), **SMALL, max_blocks=limit)
    assert calibrate(model, [token_ids(320, 1)], target) == pytest.approx(target, rel=0.02)


def test_a_budget_near_the_limit_of_blocks_is_read():
    model, ids = convert_attention(stock(num_hidden_layers=2), **SMALL, max_blocks=5), token_ids(320, 1)
    calibrate(model, [ids], 4.0)
    with torch.no_grad():
        model(ids, block_budget=4.4)
    read = [layer["mean_count"] for layer in statistics(model).values()]
    assert sum(read) / len(read) == pytest.approx(4.4, rel=0.03)


def test_a_calibration_that_misses_its_target_says_what_it_reached(monkeypatch):
    monkeypatch.setattr(calibration, "_corrected", lambda tried, wanted, most: 0.5 * most)
    monkeypatch.setattr(calibration, "_price_at", lambda ordered, place: float(ordered[len(ordered) // 2]))
    model = convert_attention(stock(num_hidden_layers=2), **SMALL)
    with pytest.warns(UserWarning, match=r"calibrate reached [\d.]+ key blocks per query, not target=4.0, in 5 runs of the sample"):
        calibrate(model, [token_ids(320, 1)], 4.0)


def test_ids_of_int32_are_those_of_int64():
    models = [convert_attention(stock(num_hidden_layers=2), **SMALL) for _ in range(2)]
    assert calibrate(models[0], [token_ids().int()], 3.5) == calibrate(models[1], [token_ids()], 3.5)


@pytest.mark.parametrize("made", ["before", "within"])
def test_inference_mode_changes_no_calibration(made):
    model, x = convert_attention(stock(num_hidden_layers=2), **SMALL), token_ids(150)
    models = [model, copy.deepcopy(model)]
    expected = [distil_compression(models[0], [x], 2), calibrate(models[0], [x], 3.5)]
    with torch.inference_mode():
        x = x.clone() if made == "within" else x
        assert [distil_compression(models[1], [x], 2), calibrate(models[1], [x], 3.5)] == expected
    models[1](x.clone(), labels=x.clone()).loss.backward()
