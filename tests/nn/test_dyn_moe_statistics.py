"""What `statistics` counts: each token once, however often its layer runs, and no padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tinyonn.nn import DynMoE, token_mask_of
from tinyonn.train import HyperStep, HyperStepMixin


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(**options) -> DynMoE:
    torch.manual_seed(0)
    return DynMoE(16, 8, **{"num_experts": 6, "target_k": 2.5, "max_experts": 4, **options})


def expected(module: DynMoE, x: torch.Tensor) -> list[int]:
    index = module.route(x.reshape(-1, 16)).top_k_index
    return torch.bincount(index.flatten(), minlength=7)[:6].tolist()


@pytest.mark.parametrize("runs", ["eager", "compiled inside", "compiled around"])
@pytest.mark.parametrize("reentrant", [True, False, None], ids=["reentrant", "non-reentrant", "option"])
def test_a_checkpointed_layer_counts_each_token_once(reentrant, runs):
    module, x = mixture(checkpoint=reentrant is None, thresholds="learned"), tokens(2, 20, 16).requires_grad_()
    counts = expected(module, x)
    layer = torch.compile(module, backend="aot_eager", fullgraph=True) if runs == "compiled inside" else module

    def call(x):
        return layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)

    if runs == "compiled around":
        call = torch.compile(call, backend="aot_eager")
    for number in range(1, 3):
        call(x).square().sum().backward()
        assert int(module.tokens_seen) == 40 * number
        assert module.expert_counts.tolist() == [number * count for count in counts]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = mixture()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_transformers_checkpoints_count_each_token_once(reentrant):
    config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).train()
    model.model.layers[0].mlp = Block()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids = torch.arange(30).view(2, 15)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    assert int(model.model.layers[0].mlp.moe.tokens_seen) == 60


@pytest.mark.parametrize("door", ["argument", "context", "inner context", "step"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_padding_does_not_count(door, dtype):
    module, x = mixture(), tokens(2, 20, 16)
    mask = torch.arange(20) < torch.tensor([[20], [5]])
    given = mask.to(dtype)
    counts = expected(module, x[mask])
    if door == "argument":
        with token_mask_of(module, ~mask):
            module(x, token_mask=given)
    elif door == "context":
        with token_mask_of(nn.Sequential(module), given):
            module(x)
    elif door == "inner context":
        with token_mask_of(module, ~mask), token_mask_of(module, given):
            module(x)
    else:
        step = HyperStep(module, torch.optim.SGD(module.parameters(), 0.0))
        step(lambda: checkpoint(module, x, use_reentrant=False).square().mean(), token_mask=given)
    assert int(module.tokens_seen) == 25
    assert module.expert_counts.tolist() == counts
    module(x)
    assert int(module.tokens_seen) == 65


def test_the_output_does_not_depend_on_the_mask():
    module, x = mixture(), tokens(2, 20, 16)
    assert torch.equal(module(x), module(x, token_mask=torch.zeros(2, 20, dtype=torch.bool)))


class HyperTrainer(HyperStepMixin, Trainer):
    pass


def test_a_trainer_counts_what_the_attention_mask_holds(tmp_path):
    config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.model.layers[0].mlp = Block()
    mask = torch.ones(15, dtype=torch.long)
    mask[6:] = 0
    rows = [{"input_ids": torch.arange(15), "labels": torch.arange(15), "attention_mask": mask}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, gradient_checkpointing=True
    )
    HyperTrainer(model, arguments, train_dataset=rows).train()
    assert int(model.model.layers[0].mlp.moe.tokens_seen) == 2 * 2 * 6


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(20, 2, dtype=torch.bool), ValueError, r"token_mask must have the shape of the tokens a mixture is given, \(2, 20\)"),
        (torch.ones(2, 20), TypeError, r"token_mask must be a tensor of bool or integers, got torch\.float32"),
        ([True], TypeError, "token_mask must be a tensor of bool or integers, got list"),
    ],
    ids=["shape", "floats", "list"],
)
def test_a_mask_that_does_not_fit_is_named(mask, error, message):
    module = mixture()
    with pytest.raises(error, match=message):
        module(tokens(2, 20, 16), token_mask=mask)
    with pytest.raises(error, match=message), token_mask_of(module, mask):
        module(tokens(2, 20, 16))
    assert int(module.tokens_seen) == 0
