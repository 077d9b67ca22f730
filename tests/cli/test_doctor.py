"""`tinyonn doctor`: a line for everything, a remedy for what is missing, and an exit code."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyonn.cli import checks
from tinyonn.cli.checks import FAILED, MISSING, OK, Finding, run_checks

from .conftest import Cli

EXPECTED = {
    "Python", "compiler", "extension", "torch", "device", "Triton", "bf16", "fp16", "transformers", "numpy", "safetensors",
    "matplotlib", "scipy", "zstandard", "pyarrow", "datasets", "gguf", "accelerate", "demo model", "encoder", "corpora", "scans",
    "memory", "disk",
}  # fmt: skip


def test_every_part_has_its_line_here(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/sft").mkdir(parents=True)
    (tmp_path / "data/sft/cats_corpus.jsonl").write_text("{}")
    monkeypatch.setenv("TINYONN_CACHE", str(tmp_path / "cache"))
    ran = cli("doctor")
    assert ran.code == 0, ran.out
    lines = ran.out.splitlines()
    assert lines[-1] == "Usable."
    assert {line[6:18].strip() for line in lines[:-1]} == EXPECTED
    assert all(line[:4].strip() in (OK, MISSING) for line in lines[:-1])
    found = {line[6:18].strip(): line for line in lines[:-1]}
    assert "cats_corpus" in found["corpora"]
    assert found["scans"].startswith("--")
    assert "→ tinyonn scan makes one" in found["scans"]
    assert "→" in found["demo model"]  # its cache is empty


def version(package: str, answer: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def pretend(name: str) -> str:
        if name != package:
            return real(name)
        if answer is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return answer

    monkeypatch.setattr(importlib.metadata, "version", pretend)


@pytest.mark.parametrize(
    ("package", "answer", "state", "words", "code"),
    [
        ("transformers", None, FAILED, "not installed → pip install 'transformers>=5.12'", 1),
        ("transformers", "5.9.1", FAILED, "5.9.1 is too old → pip install --upgrade 'transformers>=5.12'", 1),
        ("torch", "2.9.0+cpu", FAILED, "2.9.0+cpu is too old", 1),
        ("zstandard", None, MISSING, "not installed, for compression → pip install 'zstandard>=0.22'", 0),
        ("pyarrow", "3.0", MISSING, "3.0 is too old, for Parquet → pip install --upgrade 'pyarrow>=15'", 0),
        ("triton", None, MISSING, "not installed; the torch paths are used", 0),
    ],
)
def test_what_is_missing_has_a_remedy(
    cli: Cli, package: str, answer: str | None, state: str, words: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    version(package, answer, monkeypatch)
    monkeypatch.setattr(checks, "_precision", lambda: iter(()))  # seconds, and not in question here
    ran = cli("doctor")
    line = next(line for line in ran.out.splitlines() if line[6:18].strip().lower() == package)
    assert line[:4].strip() == state
    assert words in line
    assert ran.code == code
    assert ran.out.splitlines()[-1] == (f"Not usable: {line[6:18].strip()}." if code else "Usable.")


def test_no_compiler_and_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "tinyonn._C", None)
    compiler, extension = checks._extension()
    assert (compiler.state, extension.state) == (MISSING, FAILED)
    assert "apt-get install g++" in compiler.remedy
    assert "pip install -e ." in extension.remedy


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        raise RuntimeError("driver\nwent away")
        yield

    monkeypatch.delenv("TINYONN_DEBUG", raising=False)
    monkeypatch.setattr(checks, "_precision", broken)
    findings = list(run_checks())
    assert findings[-1].name == "disk"
    bad = next(finding for finding in findings if finding.state == FAILED)
    assert bad.found == "RuntimeError: driver went away"
    assert "TINYONN_DEBUG=1" in bad.remedy


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    real = torch.Tensor.matmul
    monkeypatch.setattr(torch.Tensor, "matmul", lambda self, other: real(self, other) * (1.5 if self.dtype == torch.float16 else 1.0))
    states = {finding.name: finding for finding in checks._precision()}
    assert states["bf16"].state == OK
    assert states["fp16"].state == FAILED
    assert re.search(r"relative error 5\.0e-01", states["fp16"].found)
