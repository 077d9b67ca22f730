"""The YAML that the docs show of the head laboratory is a field map and a task."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from tinyonn.heads.plasticity.classification import find_task
from tinyonn.heads.score.questions import load_questions

DOCS = Path(__file__).parents[2] / "docs"


def test_yaml_is_a_field_map_and_a_task(tmp_path):
    pages = [page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    (layouts,) = [block for block in blocks if "layouts" in yaml.safe_load(block)]
    (task,) = [block for block in blocks if "labels" in yaml.safe_load(block)]
    (tmp_path / "map.yaml").write_text(layouts)
    row = {"stem": "where do cats sleep?", "option_a": "on mats", "option_b": "in hats", "label": 1}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = load_questions(str(tmp_path / "own.jsonl"), field_map=str(tmp_path / "map.yaml"), max_samples=None, seed=0).questions
    assert (question.question, question.texts, question.answer) == ("where do cats sleep?", ("on mats", "in hats"), 1)
    (tmp_path / "nli.yaml").write_text(task)
    assert find_task(str(tmp_path / "nli.yaml")).labels == tuple(yaml.safe_load(task)["labels"])
