"""`tinyonn train arc`: teacher forcing and EAVI on generated tasks and ARC's JSON, stopped and continued."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tinyonn.arc import ArcConfig, Vocabulary, generate, train_arc
from tinyonn.store import read_life_log

from .conftest import Cli

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SMALL = [
    "-d", "generated", "--tasks", "24", "--held-out", "3", "--largest", "3", "--batch-size", "2", "--steps", "4", "--eval-steps", "4",
    "--log-steps", "2", "--context", "128",
]  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_training_along_own_answers_is_logged_and_goes_on_with_the_same_bits(cli: Cli, tmp_path: Path) -> None:
    options = [*SMALL, "--objective", "super_batch", "--ramp-first", "1", "--ramp-last", "3", "--temperature", "1", "--own-share", "0.5"]
    ran = cli("train", "arc", *options, "-o", str(tmp_path / "whole"))
    assert ran.code == 0, ran.err
    assert re.search(r"trained +4 steps, [\d,]+ parameters", ran.out)
    assert "held out" in ran.out
    assert "All of 24 tasks fit the context of 128 tokens." in ran.err
    assert "store: the first save writes the whole state" in ran.err
    assert Vocabulary.load(tmp_path / "whole" / "model") == Vocabulary(numbered_rows=True)
    logged = lines(tmp_path / "whole")
    assert next(line["own_share"] for line in logged if "loss" in line) == 0
    assert sum(line.get("generated_tokens", 0) for line in logged) > 0
    assert any("eval_exact" in line for line in logged)
    stretch = next(one for one in read_life_log(tmp_path / "whole" / "store" / "life.jsonl").records if one["event"] == "stretch")
    assert stretch["objective"] == "EAVI, super_batch"
    assert stretch["options"]["temperature"] == 1

    assert cli("train", "arc", *options, "--steps", "2", "--schedule", "constant", "-o", str(tmp_path / "parts")).code == 0
    refused = cli("train", "arc", *options, "-o", str(tmp_path / "parts"))
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "schedule must be 'constant', as in the training in" in refused.err

    constant = [*options, "--schedule", "constant"]
    assert cli("train", "arc", *constant, "-o", str(tmp_path / "parts")).code == 0
    assert cli("train", "arc", *constant, "-o", str(tmp_path / "at_once")).code == 0
    one, two = weights(tmp_path / "parts"), weights(tmp_path / "at_once")
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert (
        "an earlier run did these steps; give more --steps to go on\n"
        in cli("train", "arc", *constant, "-o", str(tmp_path / "at_once")).out
    )

    forked = cli("life", "fork", str(tmp_path / "at_once"), str(tmp_path / "fork"))
    given = str(tmp_path / "fork" / "options.yaml")
    assert (tmp_path / "fork" / "held_out.txt").read_bytes() == (tmp_path / "at_once" / "held_out.txt").read_bytes()
    assert f"tinyonn train arc --config {given} --output-dir {tmp_path / 'fork'} --steps N" in forked.out
    assert cli("train", "arc", "--config", given, "-o", str(tmp_path / "fork"), "--steps", "5").code == 0

    assert cli("life", "restore", str(tmp_path / "at_once"), "--step", "2").code == 0
    assert cli("train", "arc", *constant, "--steps", "2", "-o", str(tmp_path / "at_once")).code == 0
    assert cli("train", "arc", *constant, "--steps", "2", "-o", str(tmp_path / "new")).code == 0
    one, two = weights(tmp_path / "at_once"), weights(tmp_path / "new")
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("steps", ["1", "2"], ids=["done before", "going on"])
def test_a_changed_configuration_of_the_model_is_refused(cli: Cli, tmp_path: Path, steps: str) -> None:
    assert cli("train", "arc", *SMALL, "--steps", "1", "-o", str(tmp_path)).code == 0
    assert cli("train", "arc", *SMALL, "--steps", "1", "-o", str(tmp_path)).code == 0
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    ran = cli("train", "arc", *SMALL, "--steps", steps, "-o", str(tmp_path))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert (
        f"rms_norm_eps of {path} must be 1e-06, by the options of the training, got 0.5: correct it, or give another --output-dir."
        in ran.err
    )


def test_making_tasks_shows_progress(tmp_path: Path) -> None:
    reported: list[tuple[float | None, str]] = []
    options = {"held_out": 2, "largest": 3, "context": 128, "batch_size": 2, "device": "cpu"}
    train_arc(ArcConfig(data="generated", output_dir=str(tmp_path), tasks=250, steps=1, **options), lambda *words: reported.append(words))
    assert [words for share, words in reported if share is None] == ["reading tasks", "made 100 of 250 tasks", "made 200 of 250 tasks"]


def test_tasks_in_a_folder_of_json(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in generate(6, smallest=3, largest=3):
        (folder / f"{task.name}.json").write_text(json.dumps(task.to_json()))
    long = next(iter(generate(1, seed=5, smallest=8, largest=8)))
    (folder / "long.json").write_text(json.dumps(long.to_json()))
    options = ["--held-out", "1", "--steps", "1", "--batch-size", "2", "--context", "200", "--seed", "1"]
    ran = cli("train", "arc", "-d", str(folder), *options, "-o", str(tmp_path / "out"))
    assert ran.code == 0, ran.err
    assert re.search(r"1 of 6 tasks is longer than the context of 200 tokens: long \(\d+\)", ran.err)
    (name,) = (tmp_path / "out" / "held_out.txt").read_text().split()
    assert (folder / f"{name}.json").is_file()

    quick = ["--views", "1", "--samples", "1", "--max-new-tokens", "2", "-o", str(tmp_path / "eval")]
    held_out = ["--only", str(tmp_path / "out" / "held_out.txt")]
    evaluated = cli("eval", "arc", str(tmp_path / "out" / "model"), "-d", str(folder), *held_out, *quick)
    assert evaluated.code == 0, evaluated.err
    assert list(json.loads((tmp_path / "eval" / "submission.json").read_text())) == [name]

    (folder / f"{name}.json").rename(folder / "other.json")
    ran = cli("train", "arc", "-d", str(folder), *options, "--steps", "2", "-o", str(tmp_path / "out"))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "must have the tasks of the training in " in ran.err  # a long path is shortened
    assert "/out, got others: its held_out.txt would change" in ran.err


def test_a_training_goes_on_with_the_same_tasks_alone(cli: Cli, tmp_path: Path) -> None:
    folder, out = tmp_path / "tasks", tmp_path / "out"
    folder.mkdir()
    made = {task.name: task.to_json() for task in generate(4, 3, families=("copy",), largest=3, demonstrations=2)}
    (folder / "tasks.json").write_text(json.dumps(made))
    options = ["-d", str(folder), "--held-out", "1", "--batch-size", "2", "--context", "200", "-o", str(out)]
    assert cli("train", "arc", *options, "--steps", "1").code == 0
    log = out / "store" / "life.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    with pytest.warns(UserWarning, match=r"renamed to life.damaged-1.jsonl"):  # as in any training
        ran = cli("train", "arc", *options, "--steps", "2")
    assert ran.code == 0, ran.err
    for task in made.values():
        task["train"].reverse()
    (folder / "tasks.json").write_text(json.dumps(made))
    ran = cli("train", "arc", *options, "--steps", "3")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "out, got others under the same names: grids have changed." in ran.err
    (out / "held_out.txt").write_bytes(b"\xff")
    ran = cli("train", "arc", *options, "--steps", "2")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "got others: its held_out.txt would change" in ran.err


def test_a_model_that_a_kill_left_half_written_is_written_again(cli: Cli, tmp_path: Path) -> None:
    for folder in ("whole", "killed"):
        assert cli("train", "arc", *SMALL, "--steps", "1", "-o", str(tmp_path / folder)).code == 0
    (tmp_path / "killed" / "model" / "config.json").write_text("")
    ran = cli("train", "arc", *SMALL, "--steps", "1", "-o", str(tmp_path / "killed"))
    assert (ran.code, ran.err.count("\n")) == (2, 1)  # no kill did that: the log ended after the model
    (tmp_path / "killed" / "log" / "sample.json").unlink()
    assert cli("train", "arc", *SMALL, "--steps", "1", "-o", str(tmp_path / "killed")).code == 0
    one, two = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_files_of_the_model_that_are_gone_are_written_again(cli: Cli, tmp_path: Path) -> None:
    assert cli("train", "arc", *SMALL, "--steps", "1", "-o", str(tmp_path)).code == 0
    before = weights(tmp_path)
    for name in ("model.safetensors", "arc_vocabulary.json"):
        (tmp_path / "model" / name).unlink()
        assert cli("train", "arc", *SMALL, "--steps", "1", "-o", str(tmp_path)).code == 0
    assert Vocabulary.load(tmp_path / "model") == Vocabulary(numbered_rows=True)
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path).items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["-d", "generated", "--context", "20"], "context must be at least"),
        (["-d", "nowhere"], "data must be arc1, arc2, a file or a folder, got nowhere"),
        (["-d", "generated", "--ramp-first", "5"], "ramp_last must be at least ramp_first 5"),
        (["-d", "generated", "--own-share", "0.5"], "own_share must be left out with objective teacher, which has no own answers, got 0.5"),
        (["-d", "generated", "--ramp-last", "9"], "ramp_last must be left out with objective teacher"),
        (["-d", "generated", "--split", "training"], "split must be left out for generated tasks, got training"),
        (["-d", "generated", "--smallest", "5"], "largest must be at least smallest 5"),
        (["-d", "generated", "--objective", "both"], "'both' is not one of 'teacher', 'own', 'super_batch'"),
        ([], "data must be given, in a --config file or as --data"),
        *(
            (["-d", "nowhere", f"--{name}", "6"], f"{name} must be left out for tasks that are not generated, got 6")
            for name in ("tasks", "smallest", "largest", "demonstrations")
        ),
    ],
)
def test_bad_input_is_one_line(cli: Cli, tmp_path: Path, given: list[str], message: str) -> None:
    few = ["--tasks", "8"] if "generated" in given else []
    ran = cli("train", "arc", *few, "--held-out", "1", "-o", str(tmp_path / "out"), *given)
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"train": [{"input": [[1]], "output": [[1]]}], "test": []}, "task odd must have at least one test pair, got none"),
        (
            {"train": [{"input": [[1, 2], [3]], "output": [[1]]}], "test": [{"input": [[1]], "output": [[1]]}]},
            "must have rows of one length",
        ),
        (
            {"train": [{"input": [[12]], "output": [[1]]}], "test": [{"input": [[1]], "output": [[1]]}]},
            "must have the colours 0 to 9, got 12 in row 1",
        ),
        (
            {"train": [{"input": [[1] * 31], "output": [[1]]}], "test": [{"input": [[1]], "output": [[1]]}]},
            "must have 1 to 30 rows and columns, got 1 × 31",
        ),
    ],
)
def test_a_bad_task_is_one_line_that_names_it(cli: Cli, tmp_path: Path, task: Any, message: str) -> None:
    (tmp_path / "odd.json").write_text(json.dumps(task))
    ran = cli("train", "arc", "-d", str(tmp_path / "odd.json"), "-o", str(tmp_path / "out"))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "task odd" in ran.err
    assert message in ran.err
    assert not (tmp_path / "out" / "store").exists()


def test_options_of_texts_do_not_stand_before_arc(cli: Cli, tmp_path: Path) -> None:
    ran = cli("train", "--steps", "3", "arc", "-d", "generated", "-o", str(tmp_path))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "--steps must stand after arc" in ran.err


def test_a_folder_of_texts_is_not_one_of_arc(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("data_path: x\n")
    ran = cli("train", "arc", "-d", "generated", "-o", str(tmp_path))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "must be the folder of a training on ARC" in ran.err


def test_a_folder_of_arc_is_not_one_of_texts(cli: Cli, tmp_path: Path) -> None:
    """And the loss that is printed has its step where it is not that of the last step."""
    ran = cli("train", "arc", *SMALL, "--steps", "3", "-o", str(tmp_path / "out"))
    assert ran.code == 0, ran.err
    assert re.search(r"loss +\d\.\d{3} nats a token at step 2\n", ran.out)
    (tmp_path / "book.txt").write_text("a b c")
    ran = cli("train", "-d", str(tmp_path / "book.txt"), "-o", str(tmp_path / "out"))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "output_dir must be the folder of a training on texts" in ran.err
    assert "which has a training on ARC" in ran.err


def test_two_runs_in_one_folder_are_refused(cli: Cli, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinyonn", "train", "arc", *SMALL, "--steps", "100000", "-o", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as other:
        try:
            assert other.stderr is not None
            assert any("store: the first save" in line for line in other.stderr)  # it trains now
            ran = cli("train", "arc", *SMALL, "-o", str(tmp_path))
        finally:
            other.kill()
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "output_dir must be a folder that no other run is writing into" in ran.err
