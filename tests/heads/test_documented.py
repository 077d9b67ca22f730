"""What docs/heads.md and README show of the head laboratory runs as it stands there, on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tinyonn.heads.classification import find_task
from tinyonn.heads.questions import load_questions
from tinyonn.heads.scores import SCORES
from tinyonn.testing import save_tiny_model

ROOT = Path(__file__).parents[2]
PAGES = ("docs/heads.md", "README.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


PYTHON = [(page, code) for page in PAGES for code in blocks(page, "python") if "tinyonn.heads" in code]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the blocks name: two models and questions."""
    pytest.importorskip("matplotlib")
    save_tiny_model(tmp_path / "path/to/model", "qwen3")
    save_tiny_model(tmp_path / "path/to/encoder", "bert", num_labels=2)
    (line,) = blocks("docs/heads.md", "json")
    (tmp_path / "questions.jsonl").write_text(line * 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_blocks_to_run():
    assert [page for page, _ in PYTHON] == ["docs/heads.md"] * 3 + ["README.md"]


@pytest.mark.parametrize("code", [code for _, code in PYTHON], ids=["own score", "statistics", "parts", "readme"])
def test_python_runs(place, code, monkeypatch):
    monkeypatch.setattr("tinyonn.heads.scores.SCORES", dict(SCORES))  # what a block registers stays there
    names: dict[str, Any] = {}
    exec(compile(code, "block", "exec"), names)
    for layer in names.get("layers", ()):
        assert layer.entropy.shape == layer.span_mass.shape
        assert layer.entropy.shape[2] == 4
        assert 0 < layer.span_mass.max() <= 1 + 1e-6
    if "largest_feature" in names:
        assert "peak_raw" in (place / "scores/scores_raw.csv").read_text().splitlines()[0]
        assert (place / "scores/map_peak.png").stat().st_size
    if "gates" in names:
        assert names["gates"].flatten().tolist() == [1.0, 1.0, 0.0] + [1.0] * 9
    assert {"layers", "largest_feature", "gates"} & names.keys()


def test_yaml_is_a_field_map_and_a_task(place, tmp_path):
    layouts, task = blocks("docs/heads.md", "yaml")
    (tmp_path / "map.yaml").write_text(layouts)
    row = {"stem": "where do cats sleep?", "option_a": "on mats", "option_b": "in hats", "label": 1}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = load_questions(str(tmp_path / "own.jsonl"), field_map=str(tmp_path / "map.yaml"), max_samples=None, seed=0).questions
    assert (question.question, question.texts, question.answer) == ("where do cats sleep?", ("on mats", "in hats"), 1)
    (tmp_path / "nli.yaml").write_text(task)
    assert find_task(str(tmp_path / "nli.yaml")).labels == tuple(yaml.safe_load(task)["labels"])
