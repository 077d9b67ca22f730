"""A scan leaves the model exactly as it found it, and keeps nothing of it alive."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyonn.errors import InputError
from tinyonn.scan.engine.engine import ScanEngine
from tinyonn.testing import tiny_causal_lm

TOKENS = torch.arange(24).view(2, 12)


def snapshot(model: nn.Module) -> dict[str, object]:
    """All of a model that a scan could change: hooks, attributes, flags, configuration, weights and gradients."""
    state: dict[str, object] = {"config": model.config.to_dict()}
    for key in ("_attn_implementation", "_experts_implementation"):
        state[key] = getattr(model.config, key)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.startswith("_") and "hooks" in key:
                state[f"{name}:{key}"] = list(value.values())
        state[f"{name}:attributes"] = sorted(vars(module))
        state[f"{name}:training"] = module.training
        state[f"{name}:forward"] = module.forward.__func__
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        state[name] = (parameter.requires_grad, parameter._version, id(grad), grad._version if grad is not None else None)
    return state


def used_model(arch: str) -> nn.Module:
    """A model in the middle of somebody's training: mixed modes, some weights frozen, gradients waiting, a hook of its own."""
    model = tiny_causal_lm(arch)
    model.train()
    next(model.children()).eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 3 == 1:
            parameter.grad = torch.full_like(parameter, 0.5)
    model.register_forward_hook(lambda *args: None)
    model.config.use_cache = True
    return model


@pytest.mark.parametrize("credit", ["full", "local"])
@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "qwen3_moe"])
def test_model_is_as_before(arch, credit):
    model = used_model(arch)
    before = snapshot(model)
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    with ScanEngine(model, credit=credit) as engine:
        engine.scan(TOKENS)
        engine.scan(TOKENS[:1, :5])
    assert snapshot(model) == before
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, grads[name])


@pytest.mark.parametrize("credit", ["full", "local"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_model_is_as_before_when_the_scan_raises(where, credit):
    model = used_model("qwen3_moe")
    fails = False

    def fail(*args):
        if fails:
            raise MemoryError("planted")

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            fail()
            return grad

    norm = model.model.layers[1].input_layernorm
    norm.register_forward_hook(fail if where == "forward" else lambda module, args, output: Fail.apply(output))
    before = snapshot(model)
    with pytest.raises(MemoryError, match="planted"), ScanEngine(model, credit=credit) as engine:  # noqa: PT012
        fails = True
        engine.scan(TOKENS)
    assert snapshot(model) == before


def test_model_is_as_before_when_local_credit_is_refused():
    model = used_model("lfm2")
    before = snapshot(model)
    with pytest.raises(InputError), ScanEngine(model, credit="local"):
        pass
    assert snapshot(model) == before


def test_a_failed_scan_leaves_the_engine_usable():
    with ScanEngine(tiny_causal_lm("qwen3")) as engine:
        (expected,) = engine.scan(TOKENS[:1])
        with pytest.raises(InputError, match="input_ids must be"):
            engine.scan(torch.tensor([[5, 10_000]]))
        (again,) = engine.scan(TOKENS[:1])
    assert (again.grad_norm[:-1] == expected.grad_norm[:-1]).all()


@pytest.mark.parametrize("credit", ["full", "local"])
def test_the_model_generates_as_usual_between_scans(credit):
    model = tiny_causal_lm("qwen3")
    alone = model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False)
    with ScanEngine(model, credit=credit) as engine:
        engine.scan(TOKENS)
        with torch.no_grad():
            assert torch.equal(model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False), alone)
        engine.scan(TOKENS)


def test_scan_works_inside_no_grad_and_inference_mode():
    with ScanEngine(tiny_causal_lm("llama")) as engine:
        (expected,) = engine.scan(TOKENS[:1])
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                (result,) = engine.scan(TOKENS[:1])
            assert (result.grad_norm[:-1] == expected.grad_norm[:-1]).all()


def test_scan_outside_its_context_says_what_to_do():
    with pytest.raises(RuntimeError, match="is not entered; call scan inside"):
        ScanEngine(tiny_causal_lm("qwen3")).scan(TOKENS)


def test_entering_twice_is_refused():
    with ScanEngine(tiny_causal_lm("qwen3")) as engine, pytest.raises(RuntimeError, match="is entered already"):
        engine.__enter__()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive, after every operation, other than those given."""

    def __init__(self, *own: torch.Tensor) -> None:
        super().__init__()
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.own:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, self.bytes())
        return output

    def bytes(self) -> int:
        return sum(size for _, size in self.alive.values())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe"])
def test_scan_keeps_no_activation_that_autograd_does_not(arch):
    model = tiny_causal_lm(arch, vocab_size=500).requires_grad_(False)
    tokens = torch.randint(0, 500, (2, 96), generator=torch.Generator().manual_seed(0))
    after_forward: list[int] = []
    live = LiveBytes(tokens, *model.parameters(), *model.buffers())
    handle = model.register_forward_hook(lambda *args: after_forward.append(live.bytes()))

    def plain():
        leaf = model.get_input_embeddings()(tokens).requires_grad_()
        logits = model(inputs_embeds=leaf, use_cache=False).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()

    with live:
        plain()
    plain_peak = live.peak
    with ScanEngine(model) as engine:
        live.peak = 0
        after_forward[1:] = []
        with live:
            results = engine.scan(tokens)
    handle.remove()
    planes = 2 * results[0].activation.nbytes * len(tokens)
    row_norms = 4 * tokens.numel() * len(engine.layout)
    ids_and_labels = 3 * tokens.nbytes
    assert after_forward[1] <= after_forward[0] + planes + row_norms + ids_and_labels
    assert live.peak <= plain_peak + planes + row_norms + ids_and_labels
    del results
    gc.collect()
    with live:
        torch.zeros(1)
    assert live.bytes() < 100
