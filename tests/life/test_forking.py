"""`tinyonn life fork` of a training folder, and `tinyonn train` in the fork, as commands."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tinyonn.cli.app import run
from tinyonn.life import LifeConfig
from tinyonn.life.forking import FORKABLE, FREE
from tinyonn.life.trainer import Schedule
from tinyonn.store import read_life_log, verify
from tinyonn.store.overview import newest_step, overview

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SMALL = {
    "hidden_size": 32, "head_dim": 16, "init_num_experts": 6, "max_num_experts": 8, "vocab_size": 300, "context": 16, "batch_size": 4,
    "eval_size": 4, "eval_steps": 4, "log_steps": 1, "keep": "all", "steps": 6, "device": "cpu", "attention": "full",
}  # fmt: skip


def texts(folder: Path, seed: int) -> Path:
    folder.mkdir()
    words = ["the", "small", "model", "reads", "a", "short", "text", "and", "learns", "the", "next", "word", "of", "it"]
    generator = np.random.default_rng(seed)
    for number in range(6):
        (folder / f"{number:02}.txt").write_text(" ".join(generator.choice(words, 120)))
    return folder


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a life of six steps, all kept."""
    folder = tmp_path_factory.mktemp("lives")
    assert run(["train", "-d", str(texts(folder / "texts", 0)), "-o", str(folder / "life"), *typed(SMALL)]) == 0
    return folder / "life"


def typed(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def train(folder: Path, *more: str, **options: Any) -> int:
    free = {name: value for name, value in SMALL.items() if name in FREE}
    return run(["train", "--config", str(folder / "options.yaml"), "-o", str(folder), *typed(free | options), *more])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]


def stretch(folder: Path) -> dict[str, Any]:
    return [record for record in read_life_log(folder / "store" / "life.jsonl").records if record["event"] == "stretch"][-1]


def test_training_goes_on_in_a_fork_as_in_its_parent(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fork = tmp_path / "fork"
    capsys.readouterr()
    assert run(["life", "fork", str(parent), str(fork), "--step", "3"]) == 0
    shown = capsys.readouterr()
    assert f"tinyonn train --config {fork / 'options.yaml'} --output-dir {fork} --steps N" in shown.out
    assert "are shared by hard links" in shown.err
    assert max(line["step"] for line in lines(fork)) == 3
    assert (fork / "tokens.npy").stat().st_nlink >= 2
    assert not (fork / "model").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fork"]
    assert train(fork) == 0
    out = capsys.readouterr().out
    assert " 6 steps, " in out
    assert [line["step"] for line in lines(fork) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    found, expected = (load_file(folder / "model" / "model.safetensors") for folder in (fork, parent))
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name
    assert stretch(fork)["changed"] == {}
    assert stretch(fork)["step"] == 3
    assert verify(fork / "store").faults == []
    assert overview(fork).life != overview(parent).life
    assert overview(fork).parent == {"life": overview(parent).life, "step": 3}


def test_a_fork_changes_texts_rate_and_thresholds_once(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fork = tmp_path / "fork"
    assert run(["life", "fork", str(parent), str(fork), "--step", "4"]) == 0
    other = texts(tmp_path / "other", 1)
    new = {
        "data_path": str(other), "learning_rate": 0.01, "schedule": "linear", "weight_decay": 0.2, "batch_size": 2, "context": 24,
        "growth_threshold": 0.5, "gamma": 0.25, "w_ce": 0.1,
    }  # fmt: skip
    assert train(fork, "--drive-weights", steps=8, **new) == 0
    changed = stretch(fork)["changed"]
    assert {name: now for name, (_, now) in changed.items()} == new | {"drive_weights": True}
    assert changed["learning_rate"] == [0.001, 0.01]
    rates = {line["step"]: line["learning_rate"] for line in lines(fork) if "loss" in line}
    assert rates[4] == 0.001
    assert [rates[step] for step in (5, 6, 7, 8)] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert yaml.safe_load((fork / "options.yaml").read_text())["data_path"] == str(other)
    assert (fork / "tokenizer" / "tokenizer.json").read_bytes() == (parent / "tokenizer" / "tokenizer.json").read_bytes()
    assert not np.array_equal(np.load(fork / "tokens.npy"), np.load(parent / "tokens.npy"))
    capsys.readouterr()
    assert train(fork, "--drive-weights", steps=9) == 0
    assert stretch(fork)["step"] == 8
    assert run(["train", "-d", str(parent.parent / "texts"), "-o", str(parent), *typed(SMALL)]) == 0  # the parent is as before
    capsys.readouterr()
    assert train(fork, steps=9, learning_rate=0.002) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "learning_rate must be 0.01" in err
    assert err.endswith("got 0.002: give that, or fork the life with `tinyonn life fork`, and change it there.\n")
    assert run(["life", "fork", str(fork), str(tmp_path / "grandchild"), "--step", "6"]) == 0
    origin = yaml.safe_load((tmp_path / "grandchild" / "parent.yaml").read_text())
    assert (origin["step"], origin["schedule_begin"], origin["options"]["learning_rate"]) == (6, 4, 0.01)


@pytest.mark.parametrize(
    ("option", "value"),
    {"seed": 1, "size": "10m", "hidden_size": 64, "vocab_size": 400, "max_num_experts": 9, "attention": "dyn_smha"}.items(),
)
def test_a_fork_refuses_other_options_in_one_line(
    parent: Path, tmp_path: Path, option: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["life", "fork", str(parent), str(tmp_path / "fork"), "--step", "3"]) == 0
    before = (tmp_path / "fork" / "options.yaml").read_bytes()
    capsys.readouterr()
    assert train(tmp_path / "fork", **{option: value}) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{option} must be " in err
    assert err.endswith(": a fork cannot change it.\n")
    assert (tmp_path / "fork" / "options.yaml").read_bytes() == before


def test_texts_that_do_not_fit_leave_the_fork_as_it_was(parent: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    assert run(["life", "fork", str(parent), str(fork), "--step", "3"]) == 0
    (tmp_path / "short.txt").write_text("too short")
    assert train(fork, data_path=str(tmp_path / "short.txt")) == 2
    assert train(fork, context=4000) == 2
    assert yaml.safe_load((fork / "options.yaml").read_text()) == yaml.safe_load((parent / "options.yaml").read_text())
    assert np.array_equal(np.load(fork / "tokens.npy"), np.load(parent / "tokens.npy"))


def test_a_fork_of_a_bare_store_is_a_store(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["life", "fork", str(parent / "store"), str(tmp_path / "one")]) == 0
    assert newest_step(tmp_path / "one") == 6
    shutil.copytree(parent / "store", tmp_path / "other" / "store")  # one in a folder that `tinyonn train` did not make
    assert run(["life", "fork", str(tmp_path / "other"), str(tmp_path / "two")]) == 0
    assert newest_step(tmp_path / "two") == 6
    assert "go on" not in capsys.readouterr().out


@pytest.mark.parametrize("existed", [False, True])
def test_an_error_leaves_nothing(parent: Path, tmp_path: Path, existed: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if existed:
        (tmp_path / "fork").mkdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tinyonn.life.forking.cut_log", full)
    assert run(["life", "fork", str(parent), str(tmp_path / "fork")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [*tmp_path.rglob("*")] == [tmp_path / "fork"] * existed
    assert run(["life", "fork", str(parent), str(tmp_path / "fork"), "--step", "99"]) == 2
    assert [*tmp_path.rglob("*")] == [tmp_path / "fork"] * existed


def test_the_rest_of_a_killed_fork_is_replaced(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, time; from tinyonn.life import forking\n"
        "def hang(*_): print('half', flush=True); time.sleep(60)\n"
        "forking.cut_log = hang; forking.fork_life(sys.argv[1], sys.argv[2])"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(parent), str(tmp_path / "fork")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    assert run(["life", "fork", str(parent), str(tmp_path / "fork")]) == 2
    assert "target must be a folder that no other process is making" in capsys.readouterr().err
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".fork.unfinished"]
    assert run(["life", "fork", str(parent), str(tmp_path / "fork")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fork"]
    assert newest_step(tmp_path / "fork" / "store") == 6


def test_files_are_copied_where_there_are_no_links(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refused)
    assert run(["life", "fork", str(parent), str(tmp_path / "fork")]) == 0
    monkeypatch.undo()
    assert (tmp_path / "fork" / "tokens.npy").stat().st_nlink == 1
    assert verify(tmp_path / "fork" / "store").faults == []


def test_each_option_is_of_one_kind() -> None:
    known = set(LifeConfig.__dataclass_fields__)
    assert set(FREE) < known
    assert set(FORKABLE) < known
    assert not set(FREE) & set(FORKABLE)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0, 0.5, 1, 0.8535534, 0.5, 0.1464466, 0]),
    ],
)
def test_schedules_begin_at_their_step(schedule: str, rates: list[float]) -> None:
    config = LifeConfig(data_path="x", steps=16, schedule=schedule, warmup_steps=2)
    assert [Schedule(config, 10)(10 + step) for step in range(7)] == pytest.approx(rates)
