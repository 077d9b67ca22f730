"""Converted models do what stock models do until a budget is set, and are models of transformers in every other way."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from tinyonn.errors import InputError
from tinyonn.hf import BudgetSchedule, collected_budget_loss, convert_attention, statistics
from tinyonn.hf.dyn_nsa import cores
from tinyonn.nn import OPEN, normalised_entropy
from tinyonn.testing import assert_close_rms, poisoned, rms_error_ratio, tiny_causal_lm

SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}
ARCHS = ("llama", "qwen3", "mistral", "gpt_neox")
LENGTH = 130


def stock(arch: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    if arch == "mistral":
        overrides = {"sliding_window": None, **overrides}
    if arch != "gpt_neox":
        return tiny_causal_lm(arch, dtype=dtype, max_position_embeddings=512, **overrides)
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.25, hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def sparse(
    arch: str = "llama", dtype: torch.dtype = torch.float32, *, layers: int = 2, weight: float = 0.1, **options: Any
) -> PreTrainedModel:
    """Converted, its schedule run to the end, gates and thresholds away from their start: every branch and threshold counts."""
    model = stock(arch, dtype, **({"num_hidden_layers": layers} if arch != "gpt_neox" else {}))
    torch.manual_seed(1)
    convert_attention(model, **{**SMALL, **options})
    BudgetSchedule(3.0, 1, weight=weight, max_blocks=5).apply(model, 1)
    with torch.no_grad():
        for core in cores(model):
            for parameter in core.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def token_ids(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def left_padding(length: int = LENGTH, padding: int = 21) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


@pytest.fixture(autouse=True)
def _no_grad_unless_asked(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("training" in request.node.name):
        yield


# ---- the start ----


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_converted_model_reproduces_the_logits(arch, padded):
    model, x = stock(arch), token_ids()
    mask = left_padding() if padded else None
    expected = model(x, attention_mask=mask).logits
    assert convert_attention(model, **SMALL) is model
    got = model(x, attention_mask=mask).logits
    real = slice(None) if mask is None else mask.bool()
    assert_close_rms(got[real], expected[real], 1e-5)
    exact = stock(arch, torch.float64)
    expected = exact(x, attention_mask=mask).logits
    got = convert_attention(exact, **SMALL)(x, attention_mask=mask).logits
    # RMSNorm and rotation stay in float32 in some models, so not to the last digit.
    assert_close_rms(got[real], expected[real], 1e-6)
    assert all(value["mean_count"] > 4 for value in statistics(model).values())


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_implementation_works_without_conversion(arch, padded):
    model, x = stock(arch), token_ids()
    mask = left_padding() if padded else None
    expected = model(x, attention_mask=mask).logits
    model.config.dyn_nsa = SMALL
    model.set_attn_implementation("dyn_nsa")
    real = slice(None) if mask is None else mask.bool()
    assert_close_rms(model(x, attention_mask=mask).logits[real], expected[real], 1e-5)
    model.config.dyn_nsa = {**SMALL, "base": 1.0}
    assert (model(x, attention_mask=mask).logits - expected)[real].abs().max() > 1e-2
    model.config.dyn_nsa = {**SMALL, "budget_weight": 1.0}
    with pytest.raises(InputError, match="nothing learnt or collected"):
        model(x)


def test_it_is_registered_for_attention_and_masks():
    assert "dyn_nsa" in AttentionInterface()
    assert "dyn_nsa" in AttentionMaskInterface()


def test_it_starts_at_gates_that_can_move_training():
    model = convert_attention(stock(), **SMALL).train()
    for core in cores(model):
        assert core.opening == OPEN
        assert torch.equal(core.gates(torch.randn(1, 5, 4, 12)), torch.tensor([0.0, 1.0, 0.0]).expand(1, 5, 4, 3))
    x = token_ids()
    model(x, labels=x).loss.backward()
    for core in cores(model):
        for parameter in (core.gate_bias, core.gate_weight):
            assert (parameter.grad.flatten(0, -2).abs().amax(0) > 0).all()


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_gradients_at_the_start_are_those_of_the_stock_model_training(arch):
    x = token_ids()
    plain, model = stock(arch).train(), convert_attention(stock(arch), **SMALL).train()
    plain(x, labels=x).loss.backward()
    model(x, labels=x).loss.backward()
    converted = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert_close_rms(converted[name].grad, parameter.grad, 1e-4, name)


# ---- which layers ----


def test_layers_with_a_sliding_window_stay():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model, x = stock("qwen3", layer_types=kinds, sliding_window=20, use_sliding_window=True), token_ids()
    mask = left_padding()
    expected = [model(x).logits, model(x, attention_mask=mask).logits[mask.bool()]]
    convert_attention(model, **SMALL)
    assert list(statistics(model)) == [f"model.layers.{layer}.self_attn.dyn_nsa" for layer in (0, 2)]
    assert_close_rms(model(x).logits, expected[0], 1e-5)
    assert_close_rms(model(x, attention_mask=mask).logits[mask.bool()], expected[1], 1e-5)


@pytest.mark.parametrize(
    ("arch", "overrides", "message"),
    [
        ("mistral", {"sliding_window": 5}, "MistralForCausalLM must have attention layers .* no sliding window, got 3 with one"),
        ("bloom", {}, "BloomForCausalLM must have attention layers that ask AttentionInterface"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "must not pass softcap to its attention"),
        ("gpt_oss", {}, "must not pass s_aux to its attention"),
        ("llama", {"attention_dropout": 0.1}, "attention dropout must be 0 to convert, got 0.1"),
    ],
)
def test_models_that_cannot_be_converted_are_named(arch, overrides, message):
    model = tiny_causal_lm(arch, **overrides)
    with pytest.raises(InputError, match=message):
        convert_attention(model)
    assert next(cores(model), None) is None
    assert model.config._attn_implementation != "dyn_nsa"


def test_a_model_is_converted_once():
    with pytest.raises(InputError, match="must not have been converted before"):
        convert_attention(convert_attention(stock()))
    model = stock()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match="must not be quantised"):
        convert_attention(model)


def test_conversion_while_loading_is_refused(tmp_path):
    model = stock()
    model.save_pretrained(tmp_path)
    conversion = convert_attention(model).config.quantization_config
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=conversion)


# ---- masks ----


@pytest.mark.parametrize("arch", ARCHS)
def test_padding_is_not_attended_to(arch):
    model, x = sparse(arch), token_ids()
    alone = model(x[:1, 21:]).logits
    mask = left_padding()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(x, attention_mask=mask, position_ids=positions).logits
    assert_close_rms(padded[0, 21:], alone[0], 1e-5)
    assert_close_rms(padded[1], model(x[1:]).logits[0], 1e-5)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 80:] = 0
    assert_close_rms(model(x, attention_mask=mask).logits[0, :80], model(x[:1, :80]).logits[0], 1e-5)


def test_packed_sequences_are_separate():
    model, x = sparse(), token_ids(batch=1)
    bounds = torch.tensor([0, 50, LENGTH], dtype=torch.int32)
    positions = torch.cat([torch.arange(50), torch.arange(LENGTH - 50)])[None]
    packed = model(x, position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).logits
    assert_close_rms(packed, torch.cat([model(x[:, :50]).logits, model(x[:, 50:]).logits], 1), 1e-5)
    with pytest.raises(InputError, match="packed sequences are told by cu_seq_lens_q"):
        model(x, position_ids=positions, use_cache=False)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="sequences must not be packed under"):
        torch.compile(model, backend="aot_eager")(x, position_ids=positions, use_cache=False)


def test_masks_that_are_not_padding_are_refused():
    model, x = sparse(), token_ids()
    holes = torch.ones(2, LENGTH, dtype=torch.long)
    holes[1, 40:50] = 0
    with pytest.raises(InputError, match="padding only before or after a row's tokens"):
        model(x, attention_mask=holes)
    with pytest.raises(InputError, match="attention_mask must be None or"):
        model(x, attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril())


# ---- generation ----


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("arch", ARCHS)
def test_generation_with_a_cache_is_generation_without(arch, cache):
    model = sparse(arch)
    x, mask = token_ids(60), left_padding(60)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    without = model.generate(x, use_cache=False, **options)
    cached = model.generate(x, cache_implementation=cache, **options)
    assert torch.equal(cached.sequences, without.sequences)
    assert_close_rms(torch.stack(cached.logits), torch.stack(without.logits), 1e-5)
    # And a row alone, without padding.
    alone = model.generate(x[:1, 21:], **{**options, "attention_mask": None})
    assert torch.equal(alone.sequences[0], without.sequences[0, 21:])


def compressed_positions(model: PreTrainedModel) -> list[int]:
    """Positions that the first layer's key map is given, call by call."""
    seen: list[int] = []
    next(cores(model)).compress_key.register_forward_hook(lambda module, args, out: seen.append(16 * out.shape[1]))
    return seen


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_decoding_compresses_each_block_once(cache, padded):
    model = sparse()
    seen, x = compressed_positions(model), token_ids(60)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    model.generate(x, attention_mask=left_padding(60) if padded else None, **options)
    if cache == "dynamic" and not padded:
        assert seen == [48, 16, 16, 16]  # three blocks of the prompt; then those that 64, 80 and 96 complete
    else:
        assert seen[1:] == [16] * 39  # rows complete their blocks at different steps
    model.generate(x, **options)
    assert sum(seen[-40:]) <= 112 + 39 * 16


def test_a_changed_cache_is_compressed_anew():
    model, x = sparse(dtype=torch.float64), token_ids(100)
    expected = model(x).logits
    cache = model(x[:, :70], use_cache=True).past_key_values
    model(x[:, 70:72], past_key_values=cache)
    model(x[:, 80:97], past_key_values=cache)  # not what follows
    cache.crop(-17)
    assert_close_rms(model(x[:, 72:90], past_key_values=cache).logits, expected[:, 72:90], 1e-6)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert_close_rms(model(x[:, 90:].flip(0), past_key_values=cache).logits, expected[:, 90:].flip(0), 1e-6)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_two_caches_do_not_mix(static):
    model, x = sparse(dtype=torch.float64), token_ids(100)
    y = token_ids(100).flip(1)
    expected = [model(ids).logits[:, 60:] for ids in (x, y)]
    caches = [StaticCache(config=model.config, max_cache_len=120) if static else DynamicCache(config=model.config) for _ in range(2)]
    got: list[list[Tensor]] = [[], []]
    for begin, end in ((0, 60), (60, 61), (61, 90), (90, 100)):
        for number, ids in enumerate((x, y)):
            got[number].append(model(ids[:, begin:end], past_key_values=caches[number]).logits)
    for parts, logits in zip(got, expected, strict=True):
        assert_close_rms(torch.cat(parts[1:], 1), logits, 1e-6)
    # Written over from the beginning.
    caches[0].reset()
    again = [model(y[:, begin:end], past_key_values=caches[0]).logits for begin, end in ((0, 60), (60, 100))]
    assert_close_rms(again[1], expected[1], 1e-6)


def test_a_mask_that_changes_is_heeded():
    model, x = sparse(dtype=torch.float64), token_ids(100)
    cache = model(x[:, :70], attention_mask=left_padding(70), past_key_values=DynamicCache(config=model.config)).past_key_values
    model(x[:, 70:72], attention_mask=left_padding(72), past_key_values=cache)
    got = []
    for past in (cache, copy.deepcopy(cache)):
        mask = left_padding(100, padding=10)
        got.append(model(x[:, 72:], attention_mask=mask, past_key_values=past).logits)
    assert_close_rms(*got, 1e-12)


def test_a_cache_filled_by_another_attention_goes_on():
    model, x = sparse(dtype=torch.float64), token_ids(100)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=120)):
        model(x[:, :50], past_key_values=cache)
        model.set_attn_implementation("sdpa")
        model(x[:, 50:80], past_key_values=cache)
        model.set_attn_implementation("dyn_nsa")
        got = model(x[:, 80:], past_key_values=cache).logits
        fresh = copy.deepcopy(cache)
        fresh.crop(-20) if isinstance(cache, DynamicCache) else fresh.layers[0].cumulative_length.sub_(20)
        for layer in fresh.layers[1:]:
            if not isinstance(cache, DynamicCache):
                layer.cumulative_length.sub_(20)
        assert_close_rms(got, model(x[:, 80:], past_key_values=fresh).logits, 1e-12)


def test_generation_with_beams_and_sampling_is_the_same():
    model, x = sparse(), token_ids(50)
    options: dict[str, Any] = {
        "attention_mask": left_padding(50),
        "max_new_tokens": 10,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 0,
    }
    assert torch.equal(model.generate(x, **options), model.generate(x, use_cache=False, **options))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_prompt_in_pieces_is_a_prompt_at_once(static):
    model, x = sparse(dtype=torch.float64), token_ids(100)
    expected, cache, parts = model(x).logits, None, []
    if static:
        cache = StaticCache(config=model.config, max_cache_len=150)
    for begin, end in ((0, 37), (37, 38), (38, 90), (90, 100)):
        got = model(x[:, begin:end], past_key_values=cache, use_cache=True)
        cache = got.past_key_values
        parts.append(got.logits)
    assert_close_rms(torch.cat(parts, 1), expected, 1e-6)


def test_a_decoding_step_with_a_static_cache_compiles():
    model, x = sparse(layers=1), token_ids(40)
    expected = model(x).logits[:, -1]
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(x[:, :39], past_key_values=cache)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close_rms(step(x[:, 39:], past_key_values=cache).logits[:, -1], expected, 1e-5)


# ---- saving ----


@pytest.mark.parametrize("arch", ARCHS)
def test_it_saves_and_loads(arch, tmp_path):
    model, x = sparse(arch, tau_source="constant", tau=0.3), token_ids()
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config._attn_implementation == "dyn_nsa"
    assert torch.equal(loaded(x).logits, expected)
    assert [vars(core.options) for core in cores(loaded)] == [vars(core.options) for core in cores(model)]
    again = type(model).from_pretrained(tmp_path, attn_implementation="sdpa")
    assert_close_rms(again(x).logits, stock(arch, **({} if arch == "gpt_neox" else {"num_hidden_layers": 2}))(x).logits, 1e-6)
    loaded.save_pretrained(tmp_path / "twice")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")(x).logits, expected)


def test_a_loaded_model_is_not_a_quantised_one(tmp_path):
    sparse().save_pretrained(tmp_path)
    with poisoned():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not getattr(model, "is_quantized", False)
    assert model(token_ids()).logits.isfinite().all()
    assert all(1 < value["mean_count"] <= 5 for value in statistics(model).values())
    assert model.float()(token_ids()).logits.dtype == torch.float32
    statistics(model, reset=True)
    for _ in range(300):  # more calls than bfloat16 can count
        for core in cores(model):
            core.sums += 1.0
            core.calls += 1
    assert all(value["mean_count"] == 1.0 for value in statistics(model.bfloat16()).values())


def test_a_copy_is_a_model_of_its_own():
    model, x = sparse(), token_ids()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x).logits, model(x).logits)
    BudgetSchedule(3.0, 1, max_blocks=3).apply(twin, 1)
    assert {core.options.max_blocks for core in cores(model)} == {5}
    assert {core.options.max_blocks for core in cores(twin)} == {3}


# ---- the schedule, the budget, the statistics ----


def test_the_schedule_goes_from_all_blocks_to_the_target():
    schedule = BudgetSchedule(4.0, 10, start=64.0, weight=0.2, max_blocks=6)
    assert [schedule.opening(step) for step in (0, 10, 11)] == [OPEN, 0.0, 0.0]
    assert all(schedule.opening(step) < schedule.opening(step + 1) for step in range(10))
    assert [schedule.target_at(step) for step in (0, 5, 10, 99)] == [64.0, pytest.approx(16.0), 4.0, 4.0]
    model, x, means = convert_attention(stock(), **SMALL), token_ids(), []
    expected = stock()(x).logits
    for step in (0, 5, 8, 10):
        schedule.apply(model, step)
        statistics(model, reset=True)
        if step == 0:
            assert_close_rms(model(x).logits, expected, 1e-5)
        else:
            model(x)
        means.append(sum(value["mean_count"] for value in statistics(model).values()))
    assert means[0] == pytest.approx(3 * sum(t // 16 + 1 for t in range(LENGTH)) / LENGTH, rel=1e-5)
    assert means[0] > means[2] > means[3]
    assert model.config.quantization_config.options["max_blocks"] == 6


def test_the_loss_holds_the_budget_training():
    model, x = sparse(weight=0.7).train(), token_ids()
    softs: list[Tensor] = []
    for core in cores(model):
        core.register_forward_hook(lambda module, args, out: softs.append(out.soft_counts))
    got = model(x, labels=x).loss
    budget = sum(0.7 * (soft.mean() / 3 - 1) ** 2 for soft in softs) / 2
    plain = torch.nn.functional.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(got, plain + budget)
    torch.testing.assert_close(collected_budget_loss(model), budget)
    with pytest.raises(RuntimeError, match="collected_budget_loss must follow a forward"):
        collected_budget_loss(model)
    torch.testing.assert_close(model(x, labels=x, return_dict=False)[0], plain + budget)
    # A step of accumulated batches gathers it once.
    items = torch.tensor(4 * x.numel())
    part = (
        model(x, labels=x, num_items_in_batch=items).loss
        - torch.nn.functional.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum") / items
    )
    torch.testing.assert_close(part, budget / 4, rtol=1e-4, atol=1e-6)
    model.eval()
    torch.testing.assert_close(model(x, labels=x).loss, plain)


def test_no_forward_keeps_its_graph_training():
    model, x = sparse().train(), token_ids(60)
    seen: list[Any] = []
    next(cores(model)).register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out.out.grad_fn)))
    model(x, labels=x).loss.backward()
    model.eval()
    model(x, labels=x)
    model(x)
    gc.collect()
    assert [graph() for graph in seen] == [None] * 3


def test_statistics_have_every_layer():
    model = sparse()
    model(token_ids(), attention_mask=left_padding())
    got = statistics(model, reset=True)
    assert list(got) == [f"model.layers.{layer}.self_attn.dyn_nsa" for layer in (0, 1)]
    for value in got.values():
        assert list(value) == ["mean_count", "overflow", "tau", "share_compressed", "share_selected", "share_window"]
        assert 1 < value["mean_count"] <= 5
        assert 0 < value["tau"] < 1
        assert sum(value[f"share_{name}"] for name in ("compressed", "selected", "window")) == pytest.approx(1)
    assert all(number != number for value in statistics(model).values() for number in value.values())


# ---- tau ----


def taus_of(model: PreTrainedModel) -> list[Tensor]:
    taus: list[Tensor] = []
    next(cores(model)).register_forward_hook(lambda module, args, out: taus.append(out.tau))
    return taus


def test_a_given_tau_reaches_every_layer():
    model, x = sparse(), token_ids()
    expected = model(x).logits
    taus = taus_of(model)
    given = torch.rand(2, LENGTH)
    assert (model(x, tau=given).logits - expected).abs().max() > 1e-3
    assert torch.equal(taus[0], given[..., None].expand(2, LENGTH, 2))


def test_output_tau_is_the_previous_tokens_entropy_when_decoding():
    model = sparse(tau_source="output")
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


def test_output_tau_is_a_running_mean_in_training():
    model = sparse(tau_source="output").train()
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


# ---- training ----


def gradients(model: PreTrainedModel, x: Tensor, **inputs: Any) -> dict[str, Tensor]:
    model(x, labels=x, **inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tau_source", ["attention", "output"])
def test_gradient_checkpointing_selects_the_same_blocks_training(tau_source):
    x, mask = token_ids(), left_padding()
    plain, model = sparse(tau_source=tau_source).train(), sparse(tau_source=tau_source).train()
    expected = gradients(plain, x, attention_mask=mask)
    model.gradient_checkpointing_enable()
    seen: dict[int, list[Any]] = {}
    for core in cores(model):
        core.register_forward_hook(lambda module, args, out: seen.setdefault(id(module), []).append(out))
    got = gradients(model, x, attention_mask=mask)
    assert [len(calls) for calls in seen.values()] == [2, 2]
    for forward, recomputed in seen.values():
        for a, b in zip(forward, recomputed, strict=True):
            assert torch.equal(a, b)
    for name, grad in expected.items():
        assert torch.equal(got[name], grad), name
    assert statistics(model) == statistics(plain)


def test_recomputation_after_another_forward_selects_the_same_blocks_training():
    """Two forwards before one backward: the running tau has moved on, recomputation must not."""
    x, y = token_ids(), token_ids().flip(0, 1)
    grads = []
    for checkpointing in (False, True):
        model = sparse(tau_source="output").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        (model(x, labels=x).loss + model(y, labels=y).loss).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_reentrant_checkpointing_would_lose_the_budget_and_is_refused_training():
    model, x = sparse().train(), token_ids(60)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="gradient checkpointing must have use_reentrant=False"):
        model(x, labels=x)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("tau_source", ["attention", "output"])
def test_it_compiles_whole_training(tau_source, padded):
    x = token_ids()
    inputs = {"attention_mask": left_padding()} if padded else {}
    eager, model = sparse(tau_source=tau_source).train(), sparse(tau_source=tau_source).train()
    expected = gradients(eager, x, **inputs)
    torch._dynamo.reset()
    got = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x, **inputs)
    for name, grad in expected.items():
        assert_close_rms(got[f"_orig_mod.{name}"], grad, 1e-4, name)
    for name, value in statistics(eager).items():
        assert statistics(model)[name] == pytest.approx(value, rel=1e-4)


def test_inductor_agrees_training():
    x = token_ids(70)
    eager, model = sparse(layers=1).train(), sparse(layers=1).train()
    expected = gradients(eager, x)
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        got = gradients(torch.compile(model), x)
    for name, grad in expected.items():
        assert_close_rms(got[f"_orig_mod.{name}"], grad, 1e-4, name)


def test_compiling_refuses_padding_between_tokens():
    model, x = sparse(layers=1), token_ids(50)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    mask = left_padding(50)
    assert_close_rms(compiled(x, attention_mask=mask).logits[mask.bool()], model(x, attention_mask=mask).logits[mask.bool()], 1e-5)
    mask[1, 20:30] = 0
    with pytest.raises(RuntimeError, match="padding only before or after"):
        compiled(x, attention_mask=mask)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_it_runs_under_trainer_training(checkpointing, tmp_path):
    model = convert_attention(stock(num_hidden_layers=2), **SMALL)
    row = token_ids(100, 1)[0]
    data = [{"input_ids": row, "labels": row}] * 8
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.01, report_to=[],
        use_cpu=True, gradient_checkpointing=checkpointing, logging_steps=1, lr_scheduler_type="constant", save_steps=8, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[BudgetSchedule(2.0, 4, weight=1.0)])
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    moved = {name: (parameter - start[name]).abs().max() for name, parameter in model.named_parameters()}
    assert all(moved.values())
    assert all((core.base > 0).all() for core in cores(model))  # the budget wants fewer blocks
    model.eval()
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")(row[None]).logits
        assert torch.equal(again, model(row[None]).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0, "steps": 1}, "target and start must be positive, got 0.0 and 64.0"),
        ({"target": 1.0, "steps": 0}, "steps must be at least 1, got 0"),
        ({"target": 1.0, "steps": 1, "weight": -1.0}, "weight must be at least 0, got -1.0"),
        ({"target": 1.0, "steps": 1, "max_blocks": 2}, "max_blocks must be at least 3, the forced ones, got 2"),
    ],
    ids=["target", "steps", "weight", "max_blocks"],
)
def test_bad_schedules_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BudgetSchedule(**options)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_autocast_costs_no_more_than_it_costs_the_stock_model_training(arch):
    x = token_ids()
    expected = stock(arch)(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = stock(arch)(x).logits
        model = convert_attention(stock(arch), **SMALL).train()
        got = model(x, labels=x)
    assert got.logits.dtype == torch.bfloat16
    assert rms_error_ratio(got.logits, expected) < 1.2 * rms_error_ratio(rounded, expected)
    got.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_checkpointing_within_compilation_training():
    x = token_ids()
    plain, model = sparse().train(), sparse().train()
    expected = gradients(plain, x)
    model.gradient_checkpointing_enable()
    torch._dynamo.reset()
    got = gradients(torch.compile(model, backend="aot_eager"), x)
    for name, grad in expected.items():
        assert_close_rms(got[f"_orig_mod.{name}"], grad, 1e-4, name)
    assert statistics(model) == statistics(plain)
