"""How a command ends that is one of several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from torch import distributed

from tinyonn.cli.processes import end

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

# A command that returns while threads of gloo work through collectives and need the interpreter's lock to release each tensor.
COMMAND = """
import importlib, time
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tinyonn import cli
from tinyonn.cli import app

def command(arguments):
    rank = int(arguments[1])
    if rank:  # in the first process DistributedDataParallel imports it, and defaults of its functions then hold the group
        importlib.import_module("torch._dynamo")
    distributed.init_process_group("gloo", init_method="file://" + arguments[0], rank=rank, world_size=2)
    model = DistributedDataParallel(nn.Linear(2, 2))
    model.itself = [model]  # a cycle, as between a trainer and its callbacks
    model(torch.ones(1, 2)).sum().backward()
    time.sleep(rank)  # the first process has begun all of them when the second one comes
    first = distributed.all_reduce(torch.ones(1), async_op=True)
    for _ in range(500):
        distributed.all_reduce(torch.ones(1), async_op=True)
    first.wait()
    print("trained", end="")
    return 0

app.run = command
cli.main()
"""


def test_a_command_ends_well_while_threads_still_release_tensors(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", COMMAND, f"{tmp_path}/meeting"]
    processes = [subprocess.Popen([*line, str(rank)], env=environment, stdout=PIPE, stderr=PIPE, text=True) for rank in range(2)]
    try:
        found = [process.communicate(timeout=40) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [(process.returncode, output) for process, (output, _) in zip(processes, found, strict=True)] == [(0, "trained")] * 2, found


def failed() -> int:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(("command", "code"), [(lambda: 2, 2), (failed, 1)], ids=["bad input", "bug"])
def test_a_command_that_failed_waits_for_nobody(
    command: Callable[[], int], code: int, tmp_path: Path, forked: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Although a collective of it has begun that the other process never reaches."""

    def join(rank: int) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)

    def fails() -> None:
        join(0)
        distributed.all_reduce(torch.ones(1), async_op=True)
        end(command)

    def waits() -> None:
        join(1)
        time.sleep(60)

    process, other = forked(fails), forked(waits)
    process.join(30)
    assert process.exitcode == code
    assert other.is_alive()
    assert ("RuntimeError: a bug" in capfd.readouterr().err) == (command is failed)


def test_a_command_alone_ends_with_its_code() -> None:
    with pytest.raises(SystemExit) as ended:
        end(lambda: 3)
    assert ended.value.code == 3
    with pytest.raises(RuntimeError, match="a bug"):
        end(failed)
