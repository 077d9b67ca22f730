"""`tinyonn arc-demo` at small sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyonn.cli.app import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_model_learns_and_a_page_shows_what_it_solves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    command = ["arc-demo", "-o", str(folder), "--steps", "10", "--tasks", "2"]
    assert run(command) == 0
    told = capfd.readouterr()
    parts = [line.split()[2:4] for line in told.err.splitlines() if line.startswith("$ tinyonn")]
    assert parts == [["train", "arc"], ["eval", "arc"]]
    assert json.loads((folder / "evaluation" / "scores.json").read_text())["tasks"] == 2
    assert len(json.loads((folder / "evaluation" / "submission.json").read_text())) == 2
    page = (folder / "evaluation" / "index.html").read_text()
    assert page.count("<svg") >= 2 * (2 * 2 + 2)
    assert str((folder / "evaluation" / "index.html").resolve()) in told.out
    assert run(command) == 0  # again: nothing is trained or evaluated twice
    assert "an earlier run did these steps" in capfd.readouterr().out
