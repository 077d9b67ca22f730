"""What cannot be measured exactly is refused, and the module is named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tinyonn.errors import InputError
from tinyonn.scan.engine import local_credit
from tinyonn.scan.engine.engine import ScanEngine
from tinyonn.testing import tiny_causal_lm

TOKENS = torch.arange(20).view(2, 10)


def left_out(model: nn.Module) -> dict[str, str]:
    """What a scan of everything leaves out; all else is recorded, every token but the last."""
    with ScanEngine(model) as engine:
        for result in engine.scan(TOKENS):
            assert torch.tensor(result.grad_norm[:-1]).isfinite().all()
    assert not {entry.name for entry in engine.layout} & set(engine.not_measured)
    return dict(engine.not_measured)


@pytest.mark.parametrize(
    ("arch", "module"),
    [
        ("bloom", r"transformer\.h\.0\.self_attention \(BloomAttention\)"),
        ("gptj", r"transformer\.h\.0\.attn \(GPTJAttention\)"),
        ("lfm2", r"model\.layers\.2\.conv \(Lfm2ShortConv\)"),
        ("qwen3_next", r"model\.layers\.2\.linear_attn \(Qwen3NextGatedDeltaNet\)"),
    ],
)
def test_local_credit_is_refused_where_tokens_mix_elsewhere(arch, module):
    model = tiny_causal_lm(arch)
    with pytest.raises(InputError, match=f"credit must be 'full' for this model: {module}"), ScanEngine(model, credit="local"):
        pass
    with ScanEngine(model) as engine:
        assert engine.scan(TOKENS)[0].integral.count.max() == 9


def test_local_credit_names_a_mixer_that_somebody_added():
    class Shift(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x + 0.1 * x.roll(1, 1))

    model = tiny_causal_lm("llama")
    model.model.layers[1].mlp = Shift(model.model.layers[1].mlp)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp \(Shift\) mixes tokens"), ScanEngine(model, credit="local"):
        pass


def test_the_proof_catches_an_attention_that_drops_what_the_model_passes(monkeypatch):
    """A function that ignores the softcap must not pass for the model's own."""
    apply = local_credit._LocalCreditAttention.apply
    monkeypatch.setattr(local_credit._LocalCreditAttention, "apply", lambda *args: apply(*args[:-1], None))
    with (
        pytest.raises(InputError, match="credit='local' changes its logits"),
        ScanEngine(tiny_causal_lm("gemma2"), credit="local"),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "LlamaAttention passes position_bias"),
        ({"dropout": 0.1}, "dropout must be 0"),
        ({"is_causal": False}, "attends to later tokens"),
        ({"attention_mask": torch.zeros(2, 1, 10, 10)}, "adds a torch.float32 mask"),
        ({"key": torch.zeros(2, 2, 11, 8)}, "without a cache, got 10 queries and 11 keys in LlamaAttention"),
    ],
    ids=["unknown", "dropout", "bidirectional", "additive-mask", "cache"],
)
def test_attention_refuses_what_it_does_not_know(changes, message):
    module = tiny_causal_lm("llama").model.layers[0].self_attn
    arguments = {"query": torch.zeros(2, 4, 10, 8), "key": torch.zeros(2, 2, 10, 8), "value": torch.zeros(2, 2, 10, 8)}
    with pytest.raises(InputError, match=message):
        local_credit.local_credit_attention(module, **{"attention_mask": None, **arguments, **changes})


def test_unknown_credit_is_refused():
    with pytest.raises(InputError, match="credit must be one of full, local, got 'partial'"):
        ScanEngine(tiny_causal_lm("qwen3"), credit="partial")


def test_a_model_without_memory_is_refused():
    with torch.device("meta"):
        model = tiny_causal_lm("qwen3")
    with pytest.raises(InputError, match="model must be on one device, got meta"):
        ScanEngine(model)


def test_a_model_that_sees_later_tokens_is_refused():
    model = tiny_causal_lm("llama")
    mlp = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: mlp(x + 0.1 * x.roll(-1, 1))
    with (
        pytest.raises(InputError, match="model must be a causal language model, got LlamaForCausalLM, whose tokens see"),
        ScanEngine(model),
    ):
        pass


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(InputError, match="model must be a transformers causal language model, got Linear"):
        ScanEngine(nn.Linear(3, 3))


def test_weights_without_autograd_are_refused():
    with torch.inference_mode():
        model = tiny_causal_lm("llama")
    with pytest.raises(InputError, match=r"got some made under torch\.inference_mode: load it outside"):
        ScanEngine(model)


def test_a_module_without_a_tensor_is_refused():
    model = tiny_causal_lm("llama")
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.register_forward_hook(lambda module, args, output: (output,))
    mlp.act_fn.forward = lambda pair: nn.functional.silu(pair[0])
    with pytest.raises(InputError, match=r"leave out .*gate_proj\.weight: its output is a tuple"), ScanEngine(model, targets="gate_proj"):
        pass
    assert left_out(model) == {"model.layers.0.mlp.gate_proj.weight": "its output is a tuple, not a tensor"}


def test_a_token_without_a_logit_is_refused():
    model = tiny_causal_lm("llama")
    model.lm_head = nn.Linear(48, 20, bias=False)
    with ScanEngine(model) as engine:
        engine.scan(TOKENS)
        with pytest.raises(InputError, match="input_ids must be 0 … 19, which the model has logits for"):
            engine.scan(TOKENS + 1)


@pytest.mark.parametrize("how", ["model", "layer"])
def test_a_compiled_model_is_recorded_as_it_is_without(how):
    plain, model = tiny_causal_lm("llama"), tiny_causal_lm("llama")
    with ScanEngine(plain) as engine:
        expected = engine.scan(TOKENS)
    if how == "model":
        model.compile(backend="eager")
    else:
        model.model.layers[0].compile(backend="eager")
    with torch.no_grad():
        model(input_ids=TOKENS)
    with ScanEngine(model) as engine:
        results = engine.scan(TOKENS)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.tensor(result.grad_norm), torch.tensor(wanted.grad_norm), equal_nan=True)


def test_embeddings_that_the_model_changes_in_place_are_recorded():
    plain, model = tiny_causal_lm("llama"), tiny_causal_lm("llama")
    plain.model.embed_tokens.weight.data.mul_(2)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    with ScanEngine(plain) as engine, ScanEngine(model) as in_place:
        for wanted, result in zip(engine.scan(TOKENS), in_place.scan(TOKENS), strict=True):
            torch.testing.assert_close(torch.tensor(result.grad_norm), torch.tensor(wanted.grad_norm), equal_nan=True)


def test_an_output_that_somebody_rescales_is_refused():
    model = tiny_causal_lm("llama")
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: 3 * output)
    refusal = r"leave out model\.layers\.1\.mlp\.up_proj\.weight: its output is not the product"
    with pytest.raises(InputError, match=refusal), ScanEngine(model, targets="up_proj"):
        pass
    assert list(left_out(model)) == ["model.layers.1.mlp.up_proj.weight"]
    with ScanEngine(model, targets="down_proj") as engine:
        engine.scan(TOKENS)


def test_tokens_in_another_order_are_refused_whatever_the_batch():
    class Turned(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model = tiny_causal_lm("llama")
    model.model.layers[0].mlp.down_proj = Turned(model.model.layers[0].mlp.down_proj)
    why = r"down_proj\.inner\.weight: its output has shape \(16, 2, 48\)"
    with pytest.raises(InputError, match=why), ScanEngine(model, targets="inner"):
        pass
    assert list(left_out(model)) == ["model.layers.0.mlp.down_proj.inner.weight"]


def test_flattened_tokens_in_another_order_are_left_out():
    """Their shape alone does not tell: (tokens, sequences) rows, one after another."""

    class Turned(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)

    model = tiny_causal_lm("llama")
    model.model.layers[2].mlp.down_proj = Turned(model.model.layers[2].mlp.down_proj)
    assert left_out(model) == {"model.layers.2.mlp.down_proj.inner.weight": "the rows of its output are not the batch's tokens in order"}


def test_one_engine_at_a_time():
    model = tiny_causal_lm("llama").train()
    with ScanEngine(model) as engine:
        with pytest.raises(RuntimeError, match="another ScanEngine has entered this model"), ScanEngine(model):
            pass
        model.train()
        with pytest.raises(RuntimeError, match="model was put into training mode"):
            engine.scan(TOKENS)
        model.eval()
        engine.scan(TOKENS)
    assert model.training
    with ScanEngine(model):
        pass


def test_threads_take_turns():
    with ScanEngine(tiny_causal_lm("llama")) as engine, ThreadPoolExecutor(4) as pool:
        alone = [engine.scan(TOKENS[row : row + 1])[0].grad_norm for row in (0, 1)]
        for number, result in enumerate(pool.map(lambda row: engine.scan(TOKENS[row : row + 1])[0].grad_norm, [0, 1] * 8)):
            torch.testing.assert_close(torch.tensor(result), torch.tensor(alone[number % 2]), equal_nan=True)


@pytest.mark.parametrize("tokens", [None, "ab", [[1], [1, 2]]])
def test_what_is_no_batch_is_named(tokens):
    with ScanEngine(tiny_causal_lm("llama")) as engine, pytest.raises(InputError, match="input_ids must be"):
        engine.scan(tokens)


def test_a_module_that_runs_twice_is_refused():
    model = tiny_causal_lm("llama")
    layer = model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(forward(x))
    with (
        pytest.raises(InputError, match=r"leave out model\.layers\.0\.mlp\.gate_proj\.weight: it runs more"),
        ScanEngine(model, targets="gate_proj"),
    ):
        pass
    assert list(left_out(model)) == [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


def test_a_module_over_other_rows_than_tokens_is_refused():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.proj(x[:, 0])[:, None]

    model = tiny_causal_lm("llama")
    model.model.norm = Pooled()
    with pytest.raises(InputError, match=r"leave out model\.norm\.proj\.weight: .* shape \(2, 48\)"), ScanEngine(model, targets="proj"):
        pass
    assert list(left_out(model)) == ["model.norm.proj.weight"]


def test_a_model_that_skips_its_embeddings_is_refused():
    model = tiny_causal_lm("llama")
    spare = nn.Embedding(97, 48)
    model.get_input_embeddings = lambda: spare
    with pytest.raises(InputError, match="one embedding call"), ScanEngine(model):
        pass


def test_a_module_with_an_extra_dimension_of_one_is_recorded():
    """Latent attention projects (sequences, 1, tokens, features): the rows are still the tokens in order."""

    class Extra(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x[:, None])[:, 0]

    model = tiny_causal_lm("llama")
    with ScanEngine(model, targets="down_proj") as engine:
        expected = engine.scan(TOKENS)
    for layer in model.model.layers:
        layer.mlp = Extra(layer.mlp)
    with ScanEngine(model, targets="down_proj") as engine:
        results = engine.scan(TOKENS)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.tensor(result.grad_norm), torch.tensor(wanted.grad_norm), equal_nan=True)
