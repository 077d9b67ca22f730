"""A block leaves the model as it was, whatever happens in it; what cannot be captured is refused by name."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from tinyonn.errors import InputError
from tinyonn.heads.capture import attention as capturing
from tinyonn.heads.capture.attention import capture_attention_stats
from tinyonn.testing import left_padding, tiny_causal_lm, tiny_encoder, token_ids

LENGTH = 19
TOKENS = token_ids(LENGTH) % 90


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def entropies(model: nn.Module, tokens: Tensor = TOKENS, **options: Any) -> list[Tensor]:
    with torch.no_grad(), capture_attention_stats(model, **options) as layers:
        model(tokens)
    return [stats.entropy for stats in layers]


@pytest.mark.parametrize("arch", ["llama", "deberta-v2"])
def test_an_error_inside_leaves_the_model_as_it_was(arch):
    model = tiny_encoder(arch) if arch == "deberta-v2" else tiny_causal_lm(arch)
    hooks, name = hooks_of(model), model.config._attn_implementation
    with pytest.raises(KeyboardInterrupt), capture_attention_stats(model):  # noqa: PT012
        model(TOKENS)
        raise KeyboardInterrupt
    assert (hooks_of(model), model.config._attn_implementation) == (hooks, name)
    assert not capturing._captures


def test_a_refusal_leaves_the_model_as_it_was():
    model = tiny_causal_lm("gptj")
    model.transformer.h[1].attn.forward = lambda hidden_states: hidden_states
    hooks = hooks_of(model)
    with pytest.raises(InputError, match=r"got neither in transformer\.h\.1\.attn \(GPTJAttention\)"), capture_attention_stats(model):
        pass
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "deberta-v2"])
def test_nested_blocks_each_get_what_they_asked_for(arch):
    model = tiny_encoder(arch) if arch == "deberta-v2" else tiny_causal_lm(arch)
    first, second = torch.arange(LENGTH) < 4, torch.arange(LENGTH) >= 4
    spans = [mask.expand(2, LENGTH) for mask in (first, second)]
    with torch.no_grad(), capture_attention_stats(model, span_mask=spans[0]) as outer:
        with capture_attention_stats(model, span_mask=spans[1]) as inner:
            model(TOKENS)
        for one, other in zip(outer, inner, strict=True):
            torch.testing.assert_close(one.span_mass + other.span_mass, torch.ones_like(one.span_mass))
        before = outer[0].entropy
        model(TOKENS.flip(1))
    assert len(outer) == len(inner)
    assert not torch.allclose(outer[0].entropy, before)
    assert torch.equal(inner[0].entropy, before)


def test_two_models_of_one_configuration_are_kept_apart():
    ours, other = tiny_causal_lm("llama"), tiny_causal_lm("llama", seed=1)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = ours.config
    alone, beside = entropies(ours), entropies(other)
    with torch.no_grad(), capture_attention_stats(ours) as first:
        ours(TOKENS)
        other(TOKENS)
        assert torch.equal(first[0].entropy, alone[0])
        with capture_attention_stats(other) as second:
            other(TOKENS)
    assert torch.equal(first[2].entropy, alone[2])
    assert torch.equal(second[2].entropy, beside[2])


@torch.no_grad()
def test_a_compiled_model_runs_uncompiled_within_a_block():
    torch._dynamo.reset()
    model = tiny_causal_lm("gptj")
    expected = entropies(model)
    wrapper = torch.compile(model, backend="eager")
    stock = wrapper(TOKENS).logits
    with capture_attention_stats(model) as layers:
        torch.testing.assert_close(wrapper(TOKENS).logits, stock)
    for stats, entropy in zip(layers, expected, strict=True):
        torch.testing.assert_close(stats.entropy, entropy)
    with pytest.raises(InputError, match=r"model must not be a wrapper of torch\.compile"), capture_attention_stats(wrapper):
        pass


@pytest.mark.parametrize("part", ["model", "configuration"])
def test_a_model_that_another_thread_captures_is_refused(part):
    model = tiny_causal_lm("llama")
    other = model
    if part == "configuration":
        other = tiny_causal_lm("llama", seed=1)
        for module in other.modules():
            if hasattr(module, "config"):
                module.config = model.config

    def in_thread(function: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()

    alone = in_thread(lambda: entropies(model))
    with torch.no_grad(), capture_attention_stats(model) as layers:
        with pytest.raises(InputError, match="model is being captured by another thread"):
            in_thread(lambda: entropies(other))
        if part == "model":
            with pytest.raises(InputError, match="model was called by another thread than the one that captures it"):
                in_thread(lambda: model(TOKENS.flip(1)))
        assert in_thread(lambda: len(entropies(tiny_causal_lm("llama", seed=2)))) == 3
        model(TOKENS)
    assert all(torch.equal(stats.entropy, entropy) for stats, entropy in zip(layers, alone, strict=True))
    assert len(in_thread(lambda: entropies(other))) == 3


def test_threads_with_one_model_get_errors_or_right_statistics():
    model = tiny_causal_lm("llama")
    tokens = [TOKENS, TOKENS.flip(1)]
    expected = [entropies(model, one) for one in tokens]
    base = model.config._attn_implementation

    def run(number: int) -> list[bool]:
        right = []
        for _ in range(20):
            try:
                found = entropies(model, tokens[number])
            except InputError as error:
                assert "thread" in str(error)  # noqa: PT017
            else:
                right.append(all(torch.equal(*pair) for pair in zip(found, expected[number], strict=True)))
        return right

    with ThreadPoolExecutor(2) as pool:
        right = [one for ones in pool.map(run, range(2)) for one in ones]
    assert right
    assert all(right)
    assert model.config._attn_implementation == base
    assert not capturing._captures


def test_the_last_forward_pass_counts():
    model, eager = tiny_causal_lm("llama"), tiny_causal_lm("llama", attn_implementation="eager")
    with torch.no_grad(), capture_attention_stats(model) as layers:
        model(TOKENS[:, :5])
        assert layers[0].entropy.shape == (2, 5, 4)
        ids = model.generate(TOKENS, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=95)
        attentions = eager(ids[:, :-1], output_attentions=True).attentions  # the last token is generated, not read
    for stats, probs in zip(layers, attentions, strict=True):
        torch.testing.assert_close(stats.entropy, torch.special.entr(probs[:, :, -1:]).sum(-1).transpose(1, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_first_tokens_in_a_static_cache():
    model = tiny_causal_lm("llama")
    with capture_attention_stats(model) as layers:
        model(TOKENS, past_key_values=StaticCache(config=model.config, max_cache_len=40), use_cache=True)
    for stats, entropy in zip(layers, entropies(model), strict=True):
        torch.testing.assert_close(stats.entropy, entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "reentrant"), [("llama", False), ("llama", True), ("gemma2", False), ("gemma2", True), ("deberta-v2", False)]
)
def test_training_with_checkpoints_and_dropout_goes_on_as_before(arch, reentrant):
    if arch == "deberta-v2":
        model = tiny_encoder(arch, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    else:
        model = tiny_causal_lm(arch, attention_dropout=0.4)
    expected = entropies(model)[0]
    model.train().activation_checkpointing_enable({"use_reentrant": reentrant})

    def step() -> list[Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        model(TOKENS)[0].square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    stock = step()
    with capture_attention_stats(model) as layers:
        captured = step()
        first = layers[0].entropy
    assert len(stock) == len(captured) > 10
    assert all(torch.equal(one, other) for one, other in zip(stock, captured, strict=True))
    assert not first.requires_grad
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)


def test_probabilities_thinned_by_dropout_are_refused():
    model = tiny_encoder("deberta-v2", attention_probs_dropout_prob=0.1).train()
    with capture_attention_stats(model), pytest.raises(InputError, match=r"eval mode .* encoder\.layer\.0\.attention\.self \(Disent"):
        model(TOKENS)


@pytest.mark.parametrize("arch", ["llama", "gpt_oss", "gptj", "bert", "deberta-v2"])
@torch.no_grad()
def test_key_mask_leaves_out_keys_that_the_model_attends_to(arch):
    encoder = arch in ("bert", "deberta-v2")
    overrides: dict[str, Any] = {"attn_implementation": "eager"} if arch in ("llama", "bert") else {}
    model = tiny_encoder(arch, **overrides) if encoder else tiny_causal_lm(arch, **overrides)
    kept = left_padding(LENGTH, 6)
    with capture_attention_stats(model, span_mask=kept.bool(), key_mask=kept) as layers:
        attentions = model(TOKENS, output_attentions=True).attentions
    for stats, probs in zip(layers, attentions, strict=True):
        rest = probs.double() * kept[:, None, None]
        if arch != "gpt_oss":  # whose sinks take their share too: of their own test
            rest = rest / rest.sum(-1, keepdim=True).clamp(min=1e-300)
            entropy = -(rest * rest.clamp(min=1e-300).log()).sum(-1).transpose(1, 2)
            torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stats.span_mass.double(), rest.sum(-1).transpose(1, 2), rtol=1e-5, atol=1e-5)
        if not encoder:
            assert (stats.entropy[0, :6] == 0).all()
            assert (stats.span_mass[0, :6] == 0).all()
        assert (stats.span_mass[1] > 0).all()


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "bert", "deberta-v2"])
@torch.no_grad()
def test_a_row_of_padding_alone_has_no_statistics_and_spoils_no_other(arch):
    model = tiny_encoder(arch) if arch in ("bert", "deberta-v2") else tiny_causal_lm(arch)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0] = 0
    span = torch.ones(2, LENGTH, dtype=torch.bool)
    with capture_attention_stats(model, span_mask=span) as layers:
        model(TOKENS, attention_mask=mask)
    alone = entropies(model, TOKENS[1:])
    for stats, entropy in zip(layers, alone, strict=True):
        assert (stats.entropy[0] == 0).all()
        assert (stats.span_mass[0] == 0).all()
        torch.testing.assert_close(stats.entropy[1:], entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(arch, dtype) for arch in ("llama", "gemma2", "deberta-v2") for dtype in (torch.float16, torch.bfloat16)]
    + [("llama", torch.float64), ("deberta-v2", torch.float64)],  # Gemma-2's own softmax is in float32, where its float64 masks overflow
    ids=str,
)
@torch.no_grad()
def test_other_types_are_close_to_float32_and_padding_stays_hidden(arch, dtype):
    make = tiny_encoder if arch == "deberta-v2" else tiny_causal_lm
    mask = left_padding(LENGTH, 6)
    found = []
    for kind in (torch.float32, dtype):
        model = make(arch, dtype=kind)
        with capture_attention_stats(model) as layers:
            model(TOKENS, attention_mask=mask)
        found.append(layers)
    for exact, stats in zip(*found, strict=True):
        assert stats.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (stats.entropy[0, :6] == 0).all()
        error = (stats.entropy - exact.entropy)[mask.bool()].abs().mean()
        assert error < {torch.float64: 1e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_under_autocast_statistics_are_close_and_outputs_stay_bit_identical(attention):
    model = tiny_causal_lm("qwen3", attn_implementation=attention)
    exact = entropies(model)
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(TOKENS).logits
        with capture_attention_stats(model) as layers:
            assert torch.equal(model(TOKENS).logits, stock)
    for stats, entropy in zip(layers, exact, strict=True):
        assert stats.entropy.dtype == torch.float32
        assert (stats.entropy - entropy).abs().mean() < 5e-2


@torch.no_grad()
def test_no_matrix_of_probabilities_is_made_beside_sdpa():
    model, tokens = tiny_causal_lm("llama", max_position_embeddings=2048, num_hidden_layers=1), token_ids(1024, 1)
    largest: dict[str, int] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple) else (out,):
                if isinstance(part, Tensor):
                    largest[str(func)] = max(largest.get(str(func), 0), part.numel())
            return out

    with capture_attention_stats(model), Watch():
        model(tokens)
    assert any("flash_attention" in name for name in largest)
    assert max(largest.values()) < 4 * 1024 * 1024 / 8


def test_another_implementation_is_refused():
    model = tiny_causal_lm("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match=r"must be sdpa or eager .*, got flex_attention in model\.layers\.0\.self_attn \(LlamaAttention\)"):
        entropies(model)


def test_two_implementations_in_one_model_are_refused():
    model, other = tiny_causal_lm("llama"), tiny_causal_lm("llama", attn_implementation="eager")
    model.model.layers[1].self_attn.config = other.config
    with pytest.raises(InputError, match="must use one attention implementation, got sdpa, eager"):
        entropies(model)


def test_attention_of_gpt2_that_bypasses_the_interface_is_refused():
    with pytest.raises(InputError, match=r"must be sdpa .* got eager with reorder_and_upcast_attn"):
        entropies(tiny_causal_lm("gpt2", attn_implementation="eager", reorder_and_upcast_attn=True))


def test_arguments_of_unknown_meaning_are_refused():
    model = tiny_causal_lm("llama")
    with capture_attention_stats(model), pytest.raises(InputError, match=r"model\.layers\.0\.self_attn .* \(position_bias\)"):
        model(TOKENS, position_bias=torch.zeros(1, 4, LENGTH, LENGTH))


def test_an_eager_function_that_does_more_than_its_arguments_say_is_refused(monkeypatch):
    model = tiny_causal_lm("llama", attn_implementation="eager")
    file = sys.modules[type(model).__module__]
    stock = file.eager_attention_forward

    def warmer(module, query, key, value, attention_mask, scaling, **kwargs):
        return stock(module, query, key, value, attention_mask, scaling=scaling * 0.7, **kwargs)

    monkeypatch.setattr(file, "eager_attention_forward", warmer)
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn \(LlamaAttention\) has attention probabilities that differ"):
        entropies(model)


def test_a_layer_that_does_not_report_is_named():
    model = tiny_causal_lm("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(InputError, match=r"got none of it in model\.layers\.1\.self_attn \(LlamaAttention\)"):
        entropies(model)


def test_a_layer_that_runs_twice_is_named():
    model = tiny_causal_lm("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(InputError, match=r"once, got model\.layers\.1\.self_attn \(LlamaAttention\) twice"):
        entropies(model)


def test_a_call_of_a_part_of_the_model_is_no_forward_pass_of_it():
    model = tiny_causal_lm("llama")
    with pytest.raises(InputError, match="only parts of LlamaForCausalLM were called"), capture_attention_stats(model):
        model.model(TOKENS)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "span of integers": ({"span_mask": torch.ones(2, LENGTH, dtype=torch.long)}, TypeError, "span_mask must be a bool tensor of 2 dim"),
    "float mask": ({"key_mask": torch.ones(2, LENGTH)}, TypeError, "key_mask must be a bool or integer tensor of 2 dim"),
    "flat mask": ({"key_mask": torch.ones(LENGTH, dtype=torch.bool)}, TypeError, r"key_mask must .*, got torch.bool of shape \(19,\)"),
    "short span": (
        {"span_mask": torch.ones(2, 18, dtype=torch.bool)}, ValueError, r"span_mask must have shape \(2, 19\), .* got \(2, 18\)"
    ),
    "rows": ({"key_mask": torch.ones(3, LENGTH, dtype=torch.bool)}, ValueError, r"key_mask must have shape \(2, 19\), .* got \(3, 19\)"),
    "float queries": ({"queries": torch.zeros(2)}, TypeError, "queries must be an int64 tensor of 1 dimension, got torch.float32"),
    "few queries": ({"queries": torch.tensor([1])}, ValueError, "queries must have 2 positions, one a row, got 1"),
    "late queries": ({"queries": torch.tensor([1, 19])}, ValueError, r"queries must lie between 0 and 18, got \[1, 19\]"),
    "early queries": ({"queries": torch.tensor([-1, 1])}, ValueError, r"queries must lie between 0 and 18, got \[-1, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_the_batch_is_named(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        entropies(tiny_causal_lm("llama"), **options)
