"""`experts_implementation="tinyonn"` against transformers' own loop over experts."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.hf.experts import layout_of
from tinyonn.nn.surprise_capture import captured_calls
from tinyonn.testing import assert_close_rms, tiny_causal_lm
from tinyonn.train import capture_surprise

ARCHS = ("qwen3_moe", "gpt_oss", "mixtral", "olmoe")


def model_of(arch: str, **options) -> PreTrainedModel:
    if arch in ("qwen3_moe", "gpt_oss"):
        return tiny_causal_lm(arch, **options)
    experts = {"num_local_experts": 4} if arch == "mixtral" else {"num_experts": 6}
    config = AutoConfig.for_model(
        arch, vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts_per_tok=2, max_position_embeddings=64, **experts,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(options.get("dtype", torch.float32)).eval()


def token_ids() -> Tensor:
    return torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(0))


def experts_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "has_post_expert_norm")]


@pytest.mark.parametrize("arch", ARCHS)
def test_outputs_and_gradients_are_those_of_eager(arch):
    results = []
    for name in ("eager", "tinyonn"):
        model = model_of(arch)
        model.set_experts_implementation(name)
        out = model(token_ids(), labels=token_ids())
        out.loss.backward()
        results.append((out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (wanted, wanted_grads), (got, grads) = results
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("qwen3_moe", ("silu", True, False, False, 0.0)),
        ("mixtral", ("silu", True, False, False, 0.0)),
        ("olmoe", ("silu", True, False, False, 0.0)),
        ("gpt_oss", ("clamped_swiglu", True, True, True, 7.0)),
    ],
)
def test_layouts_are_told_by_what_they_do(arch, expected):
    assert {tuple(layout_of(module)) for module in experts_of(model_of(arch))} == {expected}


def test_an_activation_without_a_name_here_is_refused():
    model = model_of("qwen3_moe")
    model.set_experts_implementation("tinyonn")
    for module in experts_of(model):
        module.act_fn = torch.nn.Softsign()
    with pytest.raises(InputError, match="must not be 'tinyonn' for Qwen3MoeExperts: its activation is none of silu"):
        model(token_ids())


DOORS = {
    "set": lambda model, folder: model.set_experts_implementation("tinyonn"),
    "from_config": lambda model, folder: AutoModelForCausalLM.from_config(copy.deepcopy(model.config), experts_implementation="tinyonn"),
    "from_pretrained": lambda model, folder: AutoModelForCausalLM.from_pretrained(folder, experts_implementation="tinyonn"),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_model_that_cannot_run_on_it_is_refused_before_a_forward(door, tmp_path):
    model = tiny_causal_lm("qwen3_moe", hidden_act="mish")
    wanted = model(token_ids()).logits
    model.save_pretrained(tmp_path)
    before = model.get_experts_implementation()
    with pytest.raises(InputError, match="must not be 'tinyonn' for Qwen3MoeExperts: its activation is none of silu"):
        DOORS[door](model, tmp_path)
    assert model.get_experts_implementation() == before
    assert torch.equal(model(token_ids()).logits, wanted)


def test_another_slope_is_refused():
    model = model_of("gpt_oss")
    model.set_experts_implementation("tinyonn")
    for module in experts_of(model):
        module.alpha = 1.5
    with pytest.raises(InputError, match="its activation is none of"):
        model(token_ids())


CLAMPING = {"deepseek_v4": "DeepseekV4Experts", "hy_v4": "HYV4Experts", "glm5_next": "Glm5NextTextExperts", "gpt_oss": "GptOssExperts"}


@pytest.mark.parametrize("limit", [10.0, 3.5, 250.0])
@pytest.mark.parametrize("family", CLAMPING)
def test_clamped_experts_are_those_of_eager(family, limit):
    """Against the family's own loop, with values on both sides of its clamps; the surprise against the gradient of one token alone."""
    package = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    sizes = {"hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 12, "num_local_experts": 4, "n_routed_experts": 4}
    config = getattr(package, f"{CLAMPING[family].removesuffix('Experts')}Config")(**sizes, swiglu_limit=limit)
    module = getattr(package, CLAMPING[family])(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (limit / 4))
    index = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1], [2, 0]])
    x, weight, cotangent = (torch.randn(5, size, generator=generator) for size in (16, 2, 16))
    results = []
    for name in ("eager", "tinyonn"):
        config._experts_implementation = name
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), *module.parameters()]
        with captured_calls([module]) as calls:
            out = module(leaves[0], index, leaves[1])
            results.append([out.detach(), *torch.autograd.grad((out * cotangent).sum(), leaves, retain_graph=True)])
            if name == "tinyonn":
                (out * cotangent).sum().backward()
                surprise = calls[module][0].surprise()
    for wanted, got in zip(*results, strict=True):
        assert_close_rms(got, wanted.double(), 1e-5)
    config._experts_implementation = "eager"
    out = module(x[:1], index[:1], weight[:1])
    (grad,) = torch.autograd.grad((out * cotangent[:1]).sum(), module.down_proj)
    torch.testing.assert_close(surprise[0, :2], grad.flatten(1).norm(dim=-1)[:2], rtol=1e-4, atol=0)
    assert layout_of(module).limit == limit


@pytest.mark.parametrize("limit", [10.0, 16.0, 100.0, 2e4])
@pytest.mark.parametrize("part", ["gate", "up"])
def test_a_clamp_is_refused_however_far_out(part, limit):
    """Some families clamp what others do not, at 10 or wherever the configuration says."""

    def apply_gate(pre: Tensor) -> Tensor:
        gate, up = pre.chunk(2, -1)
        gate, up = (gate.clamp(max=limit), up) if part == "gate" else (gate, up.clamp(-limit, limit))
        return torch.nn.functional.silu(gate) * up

    module = experts_of(model_of("qwen3_moe"))[0]
    module._apply_gate = apply_gate
    with pytest.raises(InputError, match="its activation is none of"):
        layout_of(module)


def test_a_setting_that_changes_later_counts():
    module = experts_of(model_of("gpt_oss"))[0]
    assert layout_of(module).activation == "clamped_swiglu"
    module.limit = 5.0
    assert layout_of(module).limit == 5.0
    module.alpha = 1.0
    with pytest.raises(InputError, match="its activation is none of"):
        layout_of(module)
    module = experts_of(model_of("qwen3_moe"))[0]
    assert layout_of(module).activation == "silu"
    module.act_fn = torch.nn.GELU()
    assert layout_of(module).activation == "gelu"


def test_layouts_do_not_depend_on_the_default_device():
    module = experts_of(model_of("mixtral"))[0]
    with torch.device("meta"):
        assert layout_of(module).activation == "silu"


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])
def test_indices_beyond_the_last_expert_are_free(arch):
    model = model_of(arch)
    model.set_experts_implementation("tinyonn")
    module = experts_of(model)[0]
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(0))
    index = torch.randint(4, (9, 2), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(9, 2, generator=torch.Generator().manual_seed(2))
    hidden = torch.arange(18).view(9, 2) % 3 == 0
    num_experts = module.down_proj.shape[0]
    for _ in range(5):
        got = module(x, index.masked_fill(hidden, num_experts), weight)
        torch.testing.assert_close(got, module(x, index, weight.masked_fill(hidden, 0)))


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])
def test_surprise_is_there_for_who_captures_it(arch):
    model = model_of(arch)
    model.set_experts_implementation("tinyonn")
    modules = experts_of(model)
    with captured_calls(modules) as calls:
        model(token_ids(), labels=token_ids()).loss.backward()
        found = {module: calls[module][0].surprise() for module in modules}
        with pytest.raises(RuntimeError, match="only one context can capture it"), captured_calls(modules[:1]):
            pass
    for module, surprise in found.items():
        assert surprise.shape == (34, module.down_proj.shape[0])
        assert (surprise.isfinite().sum(-1) == 2).all()
        # Over all tokens the gradient of an expert's down_proj is at most the sum of what each would change.
        norms = module.down_proj.grad.flatten(1).norm(dim=-1)
        total = torch.where(surprise.isfinite(), surprise, 0).sum(0)
        assert (norms <= total * (1 + 1e-4) + 1e-9).all()
        assert (norms > 0).any()
    with captured_calls(modules) as calls:
        pass
    model(token_ids(), labels=token_ids()).loss.backward()
    assert not any(calls.values())


def test_it_runs_under_autocast_and_in_half_precision():
    """Experts alone: a whole model in half precision may route a token elsewhere."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(30, 48, generator=generator), torch.rand(30, 2, generator=generator)
    index = torch.randint(5, (30, 2), generator=generator)
    model = model_of("qwen3_moe")
    model.set_experts_implementation("tinyonn")
    module = experts_of(model)[0]
    wanted = module(x, index, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [module(x, index, weight)]
    found.append(module.bfloat16()(x.bfloat16(), index, weight))
    assert [out.dtype for out in found] == [torch.float32, torch.bfloat16]
    for out in found:
        assert_close_rms(out, wanted.double().detach(), 1e-2)


def test_it_generates_and_compiles():
    model = model_of("qwen3_moe")
    results = []
    for name in ("eager", "tinyonn"):
        model.set_experts_implementation(name)
        results.append(model.generate(token_ids(), max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*results)
    module = experts_of(model)[0]
    x, index, weight = torch.randn(8, 48), torch.randint(5, (8, 2)), torch.rand(8, 2)
    layout_of(module)
    torch.testing.assert_close(torch.compile(module)(x, index, weight), module(x, index, weight))


def test_a_model_compiles_to_one_graph_and_its_surprise_to_another():
    """grouped_mm has one graph. Capturing is no part of the caller's code: the compiled model guards on it."""
    ids, graphs = token_ids(), []
    model = tiny_causal_lm("qwen3_moe", num_hidden_layers=1)
    model.set_experts_implementation("tinyonn")

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert len(graphs) == 1
    found = []
    for run in (model, compiled, compiled):
        with capture_surprise(model) as surprise:
            for number in range(2):  # two calls of a mixture follow one another
                run(ids.roll(number, -1), labels=ids, use_cache=False).loss.backward()
            with torch.no_grad():
                run(ids, use_cache=False)
            run(ids, use_cache=False)  # no backward, no surprise
        found.append(surprise["model.layers.0.mlp.experts"])
    assert found[0].shape == (2 * 34, 5)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    assert len(graphs) <= 4  # with and without gradients, captured and not
    compiled(ids, use_cache=False)
    assert len(graphs) <= 4
    for module in experts_of(model):
        module.act_fn = torch.nn.GELU()
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    for module in experts_of(model):
        module.act_fn = torch.nn.Softsign()
    with pytest.raises(Exception, match="its activation is none of silu"):
        compiled(ids, use_cache=False)


@pytest.mark.parametrize("strict", [False, True])
def test_it_is_exported_for_any_number_of_tokens(strict):
    model = model_of("gpt_oss")
    model.set_experts_implementation("tinyonn")
    module, tokens = experts_of(model)[0], torch.export.Dim("tokens", min=2)

    def inputs(number: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(number, 48), torch.randint(4, (number, 2)), torch.rand(number, 2)

    def export():
        return torch.export.export(module, inputs(8), dynamic_shapes=({0: tokens},) * 3, strict=strict).module()

    exported, more = export(), inputs(20)
    assert torch.equal(exported(*more), module(*more))
    module = copy.deepcopy(module)  # a module alone: nothing has proven it
    with pytest.raises(Exception, match="GptOssExperts must run once before it is exported"):
        export()
    module(*inputs(3))
    assert torch.equal(export()(*more), module(*more))
