"""With any cache of transformers a converted model generates what it generates without."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from tinyonn.errors import InputError
from tinyonn.hf import BudgetSchedule, calibrate, revert_attention, statistics
from tinyonn.hf.dyn_nsa import cores
from tinyonn.hf.dyn_nsa.options import price_of_budget
from tinyonn.testing import assert_close_rms, left_padding, tiny_causal_lm, tiny_dyn_nsa_lm, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")
ARCHS = ("llama", "qwen3", "mistral", "gpt_neox")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("arch", ARCHS)
def test_generation_with_a_cache_is_generation_without(arch, cache):
    model = tiny_dyn_nsa_lm(arch)
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
    model = tiny_dyn_nsa_lm()
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
    model, x = tiny_dyn_nsa_lm(dtype=torch.float64), token_ids(100)
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
    model, x = tiny_dyn_nsa_lm(dtype=torch.float64), token_ids(100)
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
    model, x = tiny_dyn_nsa_lm(dtype=torch.float64), token_ids(100)
    cache = model(x[:, :70], attention_mask=left_padding(70), past_key_values=DynamicCache(config=model.config)).past_key_values
    model(x[:, 70:72], attention_mask=left_padding(72), past_key_values=cache)
    got = []
    for past in (cache, copy.deepcopy(cache)):
        mask = left_padding(100, padding=10)
        got.append(model(x[:, 72:], attention_mask=mask, past_key_values=past).logits)
    assert_close_rms(*got, 1e-12)


def test_a_cache_filled_by_another_attention_goes_on():
    model, x = tiny_dyn_nsa_lm(dtype=torch.float64), token_ids(100)
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
    model, x = tiny_dyn_nsa_lm(), token_ids(50)
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
    model, x = tiny_dyn_nsa_lm(dtype=torch.float64), token_ids(100)
    expected, cache, parts = model(x).logits, None, []
    if static:
        cache = StaticCache(config=model.config, max_cache_len=150)
    for begin, end in ((0, 37), (37, 38), (38, 90), (90, 100)):
        got = model(x[:, begin:end], past_key_values=cache, use_cache=True)
        cache = got.past_key_values
        parts.append(got.logits)
    assert_close_rms(torch.cat(parts, 1), expected, 1e-6)


@pytest.mark.parametrize(("padding", "tau_source"), [(0, "output"), (21, "attention")])
def test_all_steps_of_a_generation_with_a_static_cache_are_one_graph(padding, tau_source):
    model, x = tiny_dyn_nsa_lm(layers=1, tau_source=tau_source), token_ids(40)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": left_padding(40, padding), "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(x, **options)
    compilation = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compilation._compile_all_devices = True  # transformers compiles by itself on a GPU alone
    torch._dynamo.reset()
    counters.clear()
    got = model.generate(x, cache_implementation="static", compile_config=compilation, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert_close_rms(torch.stack(got.logits), torch.stack(expected.logits), 1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_rows_keep_their_tau_when_beams_change_places():
    model, x = tiny_dyn_nsa_lm(tau_source="output"), token_ids(60)
    logits = []
    for order in ([0, 1], [1, 0]):
        prompt = model(x, use_cache=True)
        cache, following = prompt.past_key_values, prompt.logits[:, -1:].argmax(-1)
        cache.reorder_cache(torch.tensor(order))
        logits.append(model(following[order], past_key_values=cache).logits[order])
    assert torch.equal(*logits)


def test_caches_by_turns_keep_their_own_tau():
    model, x = tiny_dyn_nsa_lm(tau_source="output"), token_ids(60)
    y = x.flip(1)
    alone = []
    for ids in (x, y):
        cache = model(ids[:, :50], use_cache=True).past_key_values
        alone.append(model(ids[:, 50:51], past_key_values=cache).logits)
    caches = [model(ids[:, :50], use_cache=True).past_key_values for ids in (x, y)]
    by_turns = [model(ids[:, 50:51], past_key_values=cache).logits for ids, cache in zip((y, x), reversed(caches), strict=True)]
    assert torch.equal(by_turns[0], alone[1])
    # Only the last forward's rows are known: the other cache goes on with the mean, not with this one's tau.
    cache = model(x[:, :50], use_cache=True).past_key_values
    assert torch.equal(by_turns[1], model(x[:, 50:51], past_key_values=cache, tau=next(cores(model)).output_tau).logits)


def test_a_call_has_its_own_price():
    model, x = tiny_dyn_nsa_lm(), token_ids(60)
    own, logits = next(cores(model)).price.clone(), {}
    for price in (-4.0, -1.0):
        for core in cores(model):
            core.price.fill_(price)
        logits[price] = model(x).logits
        tokens = model.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for core in cores(model):
            core.price.copy_(own)
        assert torch.equal(model(x, block_price=price).logits, logits[price])
        assert torch.equal(model(x, block_price=torch.tensor(price)).logits, logits[price])
        assert torch.equal(model.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0, block_price=price), tokens)
    assert not torch.equal(logits[-4.0], logits[-1.0])
    assert all(core.price == own for core in cores(model))
    statistics(model, reset=True)
    reads = []
    for price in (-4.0, -1.0):
        model(x, block_price=price)
        reads.append(sum(value["mean_count"] for value in statistics(model, reset=True).values()))
    assert reads[0] > reads[1]


def test_a_price_needs_a_converted_model():
    model, x = tiny_causal_lm("llama", attn_implementation="dyn_nsa"), token_ids(60)
    for given in ({"block_price": -1.0}, {"tau": 0.3}):
        with pytest.raises(InputError, match="tau and block_price need a model that convert_attention has converted, or"):
            model(x, **given)
    assert torch.equal(model(x, block_price=None).logits, model(x).logits)


def test_a_call_has_its_own_budget(tmp_path):
    model, x = tiny_dyn_nsa_lm(temperature=0.05), token_ids(240)
    with pytest.raises(InputError, match="block_budget must follow calibrate, got a model that was not calibrated"):
        model(x, block_budget=4.0)
    for core in cores(model):
        core.options.max_blocks = None
    calibrate(model, [x], 4.0)
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for core in cores(loaded):
        core.options.max_blocks = None
    for budget in (3.3, 5.0, 7.0):
        statistics(loaded, reset=True)
        loaded(x, block_budget=budget)
        blocks = [value["mean_count"] for value in statistics(loaded).values()]
        assert sum(blocks) / 2 == pytest.approx(budget, abs=0.25)
    assert torch.equal(loaded(x).logits, expected)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    price = price_of_budget(next(cores(model)).options, 5.0)
    assert torch.equal(loaded.generate(x, block_budget=5.0, **options), loaded.generate(x, block_price=price, **options))
    for given, message in (
        ({"block_budget": 2.5}, "block_budget must be above 2.8, the forced blocks per query in the sample of calibrate, got 2.5"),
        ({"block_budget": 4.0, "block_price": -2.0}, "a call must be given block_price or block_budget, got both"),
    ):
        with pytest.raises(InputError, match=message):
            model(x, **given)
    BudgetSchedule(4.0, 9).apply(model, 0)
    with pytest.raises(InputError, match="not calibrated, or that BudgetSchedule or distil_compression changed since"):
        model(x, block_budget=4.0)


@pytest.mark.parametrize(
    ("price", "error", "message"),
    [
        (math.nan, ValueError, "block_price must be finite, got nan"),
        ("low", TypeError, "block_price must be a number, got str"),
        (torch.zeros(2), ValueError, r"block_price must be a number or 0-d, one for all layers and rows, got \(2,\)"),
        (torch.tensor(math.nan), ValueError, "block_price must be finite, got nan"),
        (torch.tensor(-math.inf), ValueError, "block_price must be finite, got -inf"),
        (torch.tensor(True), TypeError, "block_price must be of real numbers, got torch.bool"),
        (torch.tensor(1j), TypeError, "block_price must be of real numbers, got torch.complex64"),
        (1e300, ValueError, "block_price must be at least -3.40282e.38 and at most 3.40282e.38, got 1e.300"),
    ],
    ids=["nan", "word", "rows", "nan tensor", "-inf tensor", "bool", "complex", "large"],
)
def test_a_bad_price_is_named(price, error, message):
    with pytest.raises(error, match=message):
        tiny_dyn_nsa_lm()(token_ids(20), block_price=price)


@pytest.mark.parametrize("helper", ["stock", "converted", "lookup"])
def test_guesses_that_are_checked_do_not_change_the_answer(helper):
    model, x = tiny_dyn_nsa_lm(), token_ids(30, 1).repeat(1, 2)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    guesses: dict[str, Any] = {
        "stock": {"assistant_model": tiny_causal_lm("llama", num_hidden_layers=1, max_position_embeddings=512)},
        "converted": {"assistant_model": tiny_dyn_nsa_lm(layers=1)},
        "lookup": {"prompt_lookup_num_tokens": 4},
    }[helper]
    assert torch.equal(model.generate(x, **options, **guesses), model.generate(x, **options))


@pytest.mark.parametrize("helper", ["model", "lookup", "configured lookup"])
def test_guesses_are_refused_where_tau_is_of_the_output(helper):
    """A guess is checked beside others, so the output of the token before it is not there yet."""
    model, x = tiny_dyn_nsa_lm(tau_source="output", layers=1), token_ids(30, 1)
    guesses: dict[str, Any] = {"model": {"assistant_model": tiny_causal_lm("llama")}, "lookup": {"prompt_lookup_num_tokens": 4}}
    if helper == "configured lookup":
        model.generation_config.prompt_lookup_num_tokens = 4
    with pytest.raises(InputError, match="tau_source must be 'attention' or 'constant' for assisted generation, got 'output'"):
        copy.deepcopy(model).generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0, **guesses.get(helper, {}))
    model.generation_config.prompt_lookup_num_tokens = None
    assert model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 33)
    revert_attention(model)
    assert model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0, **guesses["lookup"]).shape == (1, 33)


def test_continuous_batching_is_refused():
    model = tiny_dyn_nsa_lm(layers=1)
    message = "DynNSA does not support the paged cache of continuous batching; use generate"
    with pytest.raises(InputError, match=message):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(InputError, match=message):
        model.init_continuous_batching()
    assert model.config._attn_implementation == "dyn_nsa"
    assert model.generate(token_ids(9), max_new_tokens=1, pad_token_id=0).shape == (2, 10)


def test_sampling_with_a_cache_is_sampling_without():
    model, x, drawn = tiny_dyn_nsa_lm(), token_ids(50), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(
            model.generate(
                x,
                attention_mask=left_padding(50),
                max_new_tokens=12,
                do_sample=True,
                top_k=20,
                num_return_sequences=3,
                pad_token_id=0,
                use_cache=use_cache,
            )
        )
    assert torch.equal(*drawn)


def test_threads_do_not_mix_what_they_keep():
    model = tiny_dyn_nsa_lm()
    prompts = [token_ids(50), token_ids(50).flip(0, 1)]

    def generate(prompt: Tensor) -> Tensor:
        return model.generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=0)

    expected = [generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        for got, wanted in zip(pool.map(generate, prompts), expected, strict=True):
            assert torch.equal(got, wanted)
