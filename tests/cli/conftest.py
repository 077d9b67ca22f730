"""The command run in this process, as a shell would see it; a tiny model and corpora for it to scan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tinyonn.cli.app import run
from tinyonn.testing import save_tiny_model


@dataclass(frozen=True)
class Ran:
    """Exit code, stdout, stderr."""

    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("scan", "--limit", 3)` runs that command line."""
    monkeypatch.delenv("TINYONN_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return invoke


def shell(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A real process: `python -m tinyonn ...`."""
    return subprocess.run(
        [sys.executable, "-m", "tinyonn", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80", **environment},
        timeout=240,
        check=False,
    )


def one_line(ran: Ran, *parts: str, command: str) -> None:
    """Bad input: exit code 2, nothing on stdout, one line that names the command and every part."""
    assert ran.code == 2, ran
    assert ran.out == ""
    lines = ran.err.strip().split("\n")
    assert len(lines) == 1, ran.err
    assert lines[0].startswith(f"{command}: ")
    for part in parts:
        assert part in lines[0], (part, lines[0])
    assert "Traceback" not in lines[0]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and a tokenizer that pads."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve short texts."""
    path = tmp_path / "cats_corpus.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"s{i}", "text": f"Cat number {i} sat on the mat {'again ' * (i % 3)}."}) + "\n" for i in range(12))
    )
    return path


QUESTION = {"question": "where do cats sleep?", "choices": {"text": ["mat", "hat", "rat"], "label": ["A", "B", "C"]}, "answerKey": "A"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSONL of the rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twelve multiple-choice questions with their answers."""
    return write(tmp_path / "questions.jsonl", [{**QUESTION, "question": f"where do {n} cats sleep?"} for n in range(12)])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two kinds of passage, told apart by a letter."""
    rows = [{"question": f"is {n} odd", "passage": "yes it is" if n % 2 else "no it is not", "answer": bool(n % 2)} for n in range(40)]
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-bert", "bert")


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`without_figures()`: from then on PNGs are empty. Drawing them takes longer than a study of a tiny model."""
    return lambda: monkeypatch.setattr("tinyonn.report.heads.figures.save_figure", lambda figure, path: path.touch())


@pytest.fixture
def plain(without_figures: Callable[[], None]) -> None:
    """PNGs are empty in this test."""
    without_figures()


def study(encoder: Path, pairs: Path, out: Path, *more: object) -> list[object]:
    """Options of a plasticity run of two steps."""
    return ["-m", encoder, "-t", "boolq", "-d", pairs, "-o", out, "--eval-size", 8, "--max-steps", 2, "--batch-size", 8, *more]
