"""What `make` runs before and beside the library: the check of the machine, the GPU script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
CHECK = ROOT / ".ci" / "check-machine"

pytestmark = pytest.mark.skipif(not CHECK.is_file(), reason="needs the checkout")


def check_machine(**environment: str) -> subprocess.CompletedProcess[str]:
    keep = {key: value for key, value in os.environ.items() if key not in ("CXX", "PYTHON")}
    return subprocess.run(["sh", CHECK], capture_output=True, text=True, env={**keep, "PYTHON": sys.executable, **environment}, check=False)


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def refused(ran: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert ran.returncode == 1
    lines = ran.stderr.splitlines()
    assert len(lines) == 1, ran.stderr
    assert lines[0].startswith("tinyonn: ")
    for part in parts:
        assert part in lines[0]


def test_this_machine_passes() -> None:
    ran = check_machine()
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_python_that_is_not_there_is_named() -> None:
    refused(check_machine(PYTHON="python9"), "'python9' was not found", "make PYTHON=")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("[ $1 = -V ] && echo Python 3.10.4; exit 1", "Python 3.10.4"),
        ("exit 1", "says nothing"),
        ("echo line one; echo line two; exit 1", "line one;"),
    ],
    ids=["old", "silent", "wordy"],
)
def test_a_python_that_will_not_do_is_named(tmp_path: Path, script: str, says: str) -> None:
    python = program(tmp_path, "python", script)
    refused(check_machine(PYTHON=str(python)), "Python 3.11 or later is needed", str(python), says)


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused(check_machine(CXX="c++-99"), "CXX is 'c++-99', which was not found")
    assert check_machine(CXX=f"{shutil.which('env')} c++").returncode == 0
    for name in ("sh", "cat", "head", "grep"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    refused(check_machine(PATH=str(tmp_path)), "a C++17 compiler is needed", "apt-get install g++", "set CXX")


def test_a_python_without_headers_is_named(tmp_path: Path) -> None:
    python = program(tmp_path, "python", f'[ "$1" = - ] && exit 1; exec {sys.executable} "$@"')
    refused(check_machine(PYTHON=str(python)), "headers", "python3-dev")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_gpu_script_says_that_there_is_none(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path)}
    ran = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py"], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 1
    assert ran.stderr == (
        "make gpu: this machine has no CUDA device that torch can use; nothing was tested or measured. "
        "Try the script itself with --device cpu.\n"
    )
    assert list(tmp_path.iterdir()) == []
