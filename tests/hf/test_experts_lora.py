"""LoRA on the experts' own parameters under `experts_implementation="tinyonn"`: the adapters learn what they learn under eager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tinyonn.hf  # noqa: F401  # registers the implementation
from tinyonn.testing import tiny_causal_lm
from tinyonn.train import capture_surprise

peft = pytest.importorskip("peft", reason="LoRA is peft's")
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def model_of(implementation: str, checkpointing: bool | None = None) -> nn.Module:
    """`checkpointing`: use_reentrant, or None for none. B starts as zeros in peft: here it does not, so that A has a gradient too."""
    model = tiny_causal_lm("qwen3_moe", num_hidden_layers=2).train()
    model.set_experts_implementation(implementation)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS, init_lora_weights=False))
    if checkpointing is not None:
        adapted.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        adapted.enable_input_require_grads()
    return adapted


def batch(rank: int = 0) -> Tensor:
    return torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(rank))


def first_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor | None]:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_both_adapters_learn_in_the_first_backward_as_under_eager(checkpointing):
    wanted = first_gradients(model_of("eager"), batch())
    found = first_gradients(model_of("tinyonn", checkpointing), batch())
    assert set(found) == set(wanted)
    assert len(wanted) == 2 * 2 * 2
    for name, grad in wanted.items():
        assert found[name] is not None, name
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_the_surprise_is_that_of_the_adapted_weights():
    adapted = model_of("tinyonn")
    with capture_surprise(adapted) as surprise:
        adapted(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
    found = dict(surprise)
    merged = adapted.merge_and_unload()
    with capture_surprise(merged) as surprise:
        merged(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
    assert len(found) == len(surprise) == 2
    for got, wanted in zip(found.values(), surprise.values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-7)


def compare_with_one_process(rank: int) -> None:
    found = first_gradients(DistributedDataParallel(model_of("tinyonn")), batch(rank))
    alone = [first_gradients(model_of("eager"), batch(number)) for number in range(2)]
    for name, grad in found.items():
        wanted = torch.stack([grads[name] for grads in alone]).mean(0)
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-7)
        assert wanted.abs().max() > 0


def test_two_processes_have_the_mean_of_both_gradients(two_ranks):
    two_ranks(compare_with_one_process)
