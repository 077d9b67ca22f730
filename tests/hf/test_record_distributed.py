"""Converted models under fully_shard: outputs, gradients and saved folders are those of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinyonn.hf import BudgetSchedule, calibrate, calibrate_experts, convert_attention, convert_mlp_to_dynmoe
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


def work(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "base")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    loss = step(model, token_ids())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(Path(folder) / "sharded", state_dict=state)
        torch.save(loss, Path(folder) / "loss.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="torch has no gloo")
def test_a_sharded_model_steps_and_saves_like_one_in_one_process(tmp_path):
    converted().save_pretrained(tmp_path / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(2)]
    workers = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    outputs = [process.communicate(timeout=300)[0] for process in workers]
    assert [process.returncode for process in workers] == [0, 0], "\n".join(outputs)
    alone, x = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), token_ids()
    assert_close_rms(torch.load(tmp_path / "loss.pt"), step(alone, x), 1e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    for name, tensor in alone.state_dict().items():
        assert_close_rms(again.state_dict()[name], tensor, 1e-4, name)
    with torch.no_grad():
        assert_close_rms(again(x).logits, alone.eval()(x).logits, 1e-4)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
