"""Converted models under fully_shard: outputs, gradients and saved folders are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinyonn.hf import BudgetSchedule, calibrate, calibrate_experts, convert_attention, convert_mlp_to_dynmoe, statistics
from tinyonn.hf.dyn_nsa import cores
from tinyonn.testing import assert_close_rms, tiny_causal_lm, token_ids

SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}


def converted() -> PreTrainedModel:
    model, x = tiny_causal_lm("llama", intermediate_size=96, max_position_embeddings=512, num_hidden_layers=2), token_ids()
    convert_mlp_to_dynmoe(convert_attention(model, **SMALL), num_experts=8, sample=x)
    calibrate_experts(model, x, 3.0, max_experts=5)
    calibrate(model, [x], 4.5)
    return model


def step(model: Any, x: Tensor) -> Tensor:
    """One step of SGD on the model's own loss with the budget's; gives the loss."""
    BudgetSchedule(3.0, 2, start=4.0, weight=1.0).apply(model, 1)
    output = model.train()(x, labels=x)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return output.loss.detach()


def work(rank: int, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    loss = step(model, token_ids())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "sharded", state_dict=state)
        torch.save(loss, folder / "loss.pt")


def test_a_sharded_model_steps_and_saves_like_one_in_one_process(tmp_path, two_ranks):
    converted().save_pretrained(tmp_path / "base")
    two_ranks(lambda rank: work(rank, tmp_path))
    alone, x = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), token_ids()
    assert_close_rms(torch.load(tmp_path / "loss.pt"), step(alone, x), 1e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    for name, tensor in alone.state_dict().items():
        assert_close_rms(again.state_dict()[name], tensor, 1e-4, name)
    with torch.no_grad():
        assert_close_rms(again(x).logits, alone.eval()(x).logits, 1e-4)


def budgeted(rank: int, folder: Path) -> None:
    """Some steps of the schedule alone, each rank on a text of its own length."""
    model = convert_attention(tiny_causal_lm("llama", max_position_embeddings=512, num_hidden_layers=1), **SMALL).train()
    schedule, x = BudgetSchedule(3.2, 40), token_ids(200)[:, : 200 if rank else 80]
    for step in range(40):
        schedule.apply(model, step)
        with torch.no_grad():
            model(x)
        counts = [value["mean_count"] for value in statistics(model, reset=True).values()]
    torch.save((counts[0], x.numel(), float(next(cores(model)).price)), folder / f"rank{rank}.pt")


def test_ranks_share_one_budget(tmp_path, two_ranks):
    two_ranks(lambda rank: budgeted(rank, tmp_path))
    (short, few, price), (long, many, other) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert price == other
    assert long - short > 0.3
    assert abs((short * few + long * many) / (few + many) - 3.2) < 0.05
