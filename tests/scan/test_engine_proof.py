"""A weight is recorded only where its hook fires and what would be recorded is its gradient; the others are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from tinyonn.errors import InputError
from tinyonn.scan.engine.engine import ScanEngine
from tinyonn.testing import tiny_causal_lm

TOKENS = torch.arange(24).view(2, 12)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
FAMILIES = {
    "mamba": ({"state_size": 8}, {r"mixer.dt_proj"}, "without calling its module"),
    "falcon_mamba": ({"state_size": 8}, {r"mixer.dt_proj"}, "without calling its module"),
    "jamba": ({"num_experts": 4, "mamba_d_state": 8, "attn_layer_offset": 1, "attn_layer_period": 2}, {"mamba.dt_proj"}, "without calling"),
    "phimoe": (MOE, {"mlp.router"}, "output is a tuple"),
    "llama4_text": ({**MOE, "intermediate_size_mlp": 48}, {"feed_forward.router"}, "output is a tuple"),
    "jetmoe": (
        MOE | {"kv_channels": 8},
        {f"{part}.{name}_linear" for part in ("mlp", "experts") for name in ("input", "output")},
        "JetMoeParallelExperts multiplies this 3-D parameter itself",
    ),
    "deepseek_v4": (
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "q_lora_rank": 16, "head_dim": 8},
        {"self_attn.o_a_proj"},
        "whose rows are not the",
    ),
    "bart": (
        {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4},
        {f"encoder_attn.{name}_proj" for name in ("k", "q", "v", "out")},
        "does not run",
    ),
}


def family(model_type: str) -> nn.Module:
    options = FAMILIES[model_type][0]
    config = AutoConfig.for_model(model_type, **{**SIZES, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_default_scan_leaves_out_what_it_must_and_says_why(model_type):
    _, names, why = FAMILIES[model_type]
    model = family(model_type)
    with ScanEngine(model) as engine:
        results = engine.scan(TOKENS)
    reasons = {name: reason for name, reason in engine.not_measured.items() if why in reason}
    assert {".".join(name.removesuffix(".weight").split(".")[-2:]) for name in reasons} == names
    experts = {entry.name for entry in engine.layout if entry.name.rsplit(".", 1)[-1].isdigit()}
    for entry in engine.layout:
        if entry.name not in experts:
            assert (results[0].integral.count[entry.base : entry.base + entry.blocks] == 11).all(), entry.name
    name = next(iter(reasons))
    with (
        pytest.raises(InputError, match=f"targets must leave out {name}: .*{why}"),
        ScanEngine(model, targets=name),
    ):
        pass


class Uses(nn.Module):
    """A down projection whose weight has another use beside its module's call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 0.1 * functional.linear(x.tanh(), self.inner.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_weight_with_another_use_is_left_out(dtype):
    model = tiny_causal_lm("llama", dtype=dtype, initializer_range=0.1)
    model.model.layers[1].mlp.down_proj = Uses(model.model.layers[1].mlp.down_proj)
    with ScanEngine(model) as engine:
        pass
    assert list(engine.not_measured) == ["model.layers.1.mlp.down_proj.inner.weight"]
    assert "its weight has other uses" in engine.not_measured["model.layers.1.mlp.down_proj.inner.weight"]
    assert not engine.unproven


def test_two_modules_of_one_weight_are_left_out():
    model = tiny_causal_lm("llama")
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight
    with ScanEngine(model) as engine:
        pass
    assert list(engine.not_measured) == [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 2)]


def test_a_module_whose_output_the_loss_does_not_see_is_left_out():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.proj(x).argmax(-1, keepdim=True) * 1e-3

    model = tiny_causal_lm("llama")
    model.model.norm = Beside()
    with ScanEngine(model) as engine:
        pass
    assert engine.not_measured == {"model.norm.proj.weight": "no gradient of the loss reaches its output"}


def test_a_module_that_does_not_see_the_tokens_is_left_out():
    """With its weight trainable its output has a gradient; in a scan, where it is frozen, it has none."""

    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.proj(torch.ones_like(x))

    model = tiny_causal_lm("llama")
    model.model.norm = Position()
    with ScanEngine(model) as engine:
        pass
    assert engine.not_measured == {"model.norm.proj.weight": "no gradient of the loss reaches its output"}


def test_a_layer_that_multiplies_other_rows_than_it_was_given_is_left_out():
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.unflatten(1, (-1, 2)).sum(2).repeat_interleave(2, 1))

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = Twice(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.proj(torch.stack([x, x], 2).flatten(1, 2))[:, ::2]

    model = tiny_causal_lm("llama")
    model.model.norm = Pairs()
    with ScanEngine(model) as engine:
        pass
    assert list(engine.not_measured) == ["model.norm.proj.weight"]


def test_a_scan_of_nothing_that_can_be_measured_is_refused():
    model = tiny_causal_lm("llama", num_hidden_layers=1)
    for layer in model.model.layers:
        for name in ("gate", "up", "down"):
            getattr(layer.mlp, f"{name}_proj").register_forward_hook(lambda module, args, output: 2 * output)
    refusal = r"none of the 3 weights in targets can be measured: .*not the product"
    with pytest.raises(InputError, match=refusal), ScanEngine(model, targets="mlp"):
        pass


def test_a_model_of_nan_is_no_fault_of_its_weights():
    model = tiny_causal_lm("qwen3_moe")
    model.model.norm.weight.data.fill_(torch.nan)
    with ScanEngine(model) as engine:
        engine.scan(TOKENS)
    assert all("uses this parameter itself" in why for why in engine.not_measured.values())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_whole_model_proves_itself_in_every_precision(arch, dtype):
    with ScanEngine(tiny_causal_lm(arch, dtype=dtype, initializer_range=0.1)) as engine:
        pass
    assert all("uses this parameter itself" in why for why in engine.not_measured.values())  # routers
    assert not engine.unproven


@pytest.mark.parametrize("credit", ["full", "local"])
def test_a_quantised_model_is_recorded_and_left_as_it_was(credit):
    """4-bit layers repack their weights in a forward without gradients, and then give wrong gradients."""
    bnb = pytest.importorskip("bitsandbytes", reason="4-bit layers need bitsandbytes")
    model = tiny_causal_lm("llama", hidden_size=64, intermediate_size=128)
    for module in [*model.model.layers]:
        for name in ("gate_proj", "up_proj", "down_proj"):
            plain = getattr(module.mlp, name)
            quantised = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            quantised.load_state_dict({"weight": plain.weight.data})
            setattr(module.mlp, name, quantised.to("cpu"))

    def logits_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), embedded)[0]

    before = logits_and_gradient()
    plain = tiny_causal_lm("llama", hidden_size=64, intermediate_size=128)
    for name, module in model.named_modules():  # the same function in plain weights
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(values)
    with ScanEngine(model, credit=credit) as engine, ScanEngine(plain, credit=credit) as oracle:
        results, expected = engine.scan(TOKENS), oracle.scan(TOKENS)
    assert not engine.not_measured
    assert {name.rsplit(".", 2)[1] for name in engine.unproven} == {"gate_proj", "up_proj", "down_proj"}
    assert all("no gradient of its own" in reason for reason in engine.unproven.values())
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.tensor(result.grad_norm), torch.tensor(wanted.grad_norm), equal_nan=True, rtol=1e-3, atol=1e-5)
    for after, was in zip(logits_and_gradient(), before, strict=True):
        assert torch.equal(after, was)


def test_weights_repacked_for_inference_are_refused_in_one_line():
    bnb = pytest.importorskip("bitsandbytes", reason="4-bit layers need bitsandbytes")
    model = tiny_causal_lm("llama", hidden_size=64, intermediate_size=128)
    plain = model.model.layers[0].mlp.up_proj
    quantised = bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    quantised.load_state_dict({"weight": plain.weight.data})
    model.model.layers[0].mlp.up_proj = quantised.to("cpu")
    with ScanEngine(model) as engine:
        engine.scan(TOKENS)
        with torch.no_grad():
            model(TOKENS)
        if not getattr(model.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False):
            pytest.skip("bitsandbytes repacks no weights on this CPU")
        refusal = r"model must not have run without gradients before a scan, got model\.layers\.0\.mlp\.up_proj\.weight"
        with pytest.raises(InputError, match=refusal):
            engine.scan(TOKENS)
    with pytest.raises(InputError, match=refusal), ScanEngine(model):
        pass


@pytest.mark.parametrize(
    ("arch", "names", "why"),
    [
        ("qwen3_moe", {"gate.weight"}, "Qwen3MoeTopKRouter uses this parameter itself"),
        ("gpt_oss", {"router.weight"}, "GptOssTopKRouter uses this parameter itself"),
        ("mamba", {"mixer.A_log", "conv1d.weight"}, "uses this parameter itself"),
    ],
)
def test_matrices_outside_linear_layers_are_told(arch, names, why):
    model = tiny_causal_lm(arch)
    others = {name: reason for name, reason in ScanEngine(model).not_measured.items() if why in reason}
    assert {".".join(name.split(".")[-2:]) for name in others} == names
    assert not any("embed" in name or "bias" in name for name in others)
    covered = {entry.name for entry in ScanEngine(model).layout}
    assert not covered & set(others)
    assert not any(why in reason for reason in ScanEngine(model, targets="mlp,lm_head").not_measured.values())
