"""`tinyonn eval arc`: from a checkpoint to scores, a submission and a page."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyonn.arc import ArcEvalConfig, TaskBatches, Vocabulary, check_submission, evaluate_checkpoint, generate
from tinyonn.hf import TinyOnnConfig, TinyOnnForCausalLM
from tinyonn.testing import tiny_causal_lm

from .conftest import Cli, one_line

COMMAND = "tinyonn eval arc"
TASKS = generate(4, 1, families=("copy", "mirror"), largest=3, demonstrations=2)
GENERATED = ("-d", "generated", "--families", "copy,mirror", "--largest", 3, "--data-seed", 1, "--limit", 4)
QUICK = ("--views", 9, "--samples", 2, "--max-new-tokens", 16)
NAMES = ("scores.json", "predictions.jsonl", "submission.json", "index.html")


def saved(model: Any, folder: Path, vocabulary: Vocabulary) -> Path:
    model.save_pretrained(folder)
    vocabulary.save(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that knows the answers to two of the tasks of `data`."""
    torch.manual_seed(0)
    model, vocabulary = tiny_causal_lm("llama", max_position_embeddings=160, initializer_range=0.05, vocab_size=16), Vocabulary()
    batches = TaskBatches(TASKS[:2], vocabulary, context=160, batch_size=2, augment=False)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=6e-3)
    for step in range(60):
        loss = model(**batches.batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    return saved(model.eval(), tmp_path_factory.mktemp("arc") / "tiny-llama", vocabulary)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in TASKS:
        pairs = {
            part: [{"input": given.tolist(), "output": output.tolist()} for given, output in getattr(task, part)]
            for part in ("train", "test")
        }
        (folder / f"{task.name}.json").write_text(json.dumps(pairs))
    return folder


def without_times(folder: Path) -> list[Any]:
    """Scores and predictions without what a clock showed, and the submission."""
    scores = json.loads((folder / "scores.json").read_text())
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return [{**scores, "minutes": 0}, [{**one, "seconds": 0, "crc": ""} for one in records], (folder / "submission.json").read_bytes()]


def test_a_checkpoint_is_evaluated_and_goes_on_after_a_stop(cli: Cli, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ran = cli("eval", "arc", checkpoint, "-d", data, "-o", whole, *QUICK)
    assert ran.code == 0, ran.err
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["methods"]["greedy"]["attempts_1"] == {"test_pairs": 2, "tasks": 2, "score": 0.5}
    assert scores["methods"]["sampling"]["attempts_2"]["tasks"] >= 1
    assert scores["token_accuracy"] > 0.5
    assert scores["parameters"] == 57_600
    assert "of 4 test pairs and 4 tasks\n" in ran.out
    assert f"greedy  {100 * scores['token_accuracy']:.1f} % of tokens right, 100.0 % of cells where the shape is" in ran.out
    assert ran.out.splitlines()[0].startswith("method    pairs, 1 attempt  tasks")
    assert ran.out.splitlines()[1].split()[:4] == ["greedy", "2", "2", "50.0"]
    assert max(len(line) for line in ran.out.splitlines()[:9] if str(checkpoint) not in line) <= 80
    found = check_submission(whole / "submission.json", TASKS)
    solved = [any(np.array_equal(grid, task.test[0].output) for grid in found[task.name][0]) for task in TASKS]
    assert sum(solved) == scores["methods"]["augscore"]["attempts_2"]["tasks"]

    page = (whole / "index.html").read_text()
    for task, right in zip(TASKS, solved, strict=True):
        assert f"<h3>{task.name} " in page
        assert f'task {"solved" if right else "unsolved"}"><h3>{task.name} ' in page
    assert page.count('aria-label="truth, ') == 4
    assert "http://" not in page
    assert "https://" not in page

    def stop(fraction: float, text: str) -> None:
        if text.startswith("2 of 4"):
            raise KeyboardInterrupt

    config = ArcEvalConfig(checkpoint=checkpoint, data=data, output_dir=stopped, views=9, samples=2, max_new_tokens=16)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(config, stop)
    before = (stopped / "predictions.jsonl").read_bytes()
    assert before.count(b"\n") == 3
    (stopped / "predictions.jsonl").write_bytes(before + b'{"task":"cut')
    assert cli("eval", "arc", checkpoint, "-d", data, "-o", stopped, *QUICK).code == 0
    assert (stopped / "predictions.jsonl").read_bytes().startswith(before)
    assert without_times(stopped) == without_times(whole)

    again = cli("eval", "arc", checkpoint, "-d", data, "-o", stopped, *QUICK, "--temperature", 0.5)
    one_line(again, "same model and options to go on, got temperature 1.0, now 0.5", command=COMMAND)


def test_a_checkpoint_with_another_configuration_does_not_go_on(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    for model in (checkpoint, other):  # a copy is the same model
        assert cli("eval", "arc", model, *GENERATED[:-1], 1, "-o", tmp_path / "out", *QUICK, "--views", 1).code == 0
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    ran = cli("eval", "arc", other, *GENERATED[:-1], 1, "-o", tmp_path / "out", *QUICK, "--views", 1)
    one_line(ran, "must be of the same model and options to go on, got model ", command=COMMAND)


@pytest.mark.parametrize("attention", ["full", "dyn_nsa", "dyn_smha"])
def test_tinyonn_models_are_evaluated(cli: Cli, attention: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TinyOnnConfig(vocab_size=45, hidden_size=32, head_dim=16, num_hidden_layers=1, init_num_experts=6, attention=attention)
    folder = saved(TinyOnnForCausalLM(config), tmp_path / "model", Vocabulary(numbered_rows=True))
    out = tmp_path / "out"
    ran = cli("eval", "arc", folder, *GENERATED[:-1], 2, "-o", out, "--views", 2, "--samples", 1, "--max-new-tokens", 3)
    assert ran.code == 0, ran.err
    assert all((out / name).exists() for name in NAMES)
    tasks = generate(2, 1, families=("copy", "mirror"), largest=3, demonstrations=2)
    assert len(check_submission(out / "submission.json", tasks)) == 2
    assert "no attempt" in (out / "index.html").read_text()


def test_a_task_longer_than_the_context_is_listed(cli: Cli, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    big = {"train": [{"input": [[1] * 12] * 12, "output": [[1]]}], "test": [{"input": [[1]]}]}
    (data / "zz-big.json").write_text(json.dumps(big))
    ran = cli("eval", "arc", checkpoint, "-d", data, "-o", tmp_path / "out", *QUICK)
    assert "too long  1 task, unsolved" in ran.out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "1 task has a test pair longer than the context of 160 tokens, which counts as unsolved." in page
    assert "1 test pair without a known output: predictions only." in page
    submission = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert submission["zz-big"] == [{"attempt_1": [[0, 0], [0, 0]], "attempt_2": [[0, 0], [0, 0]]}]


PAIR = {"input": [[1, 2]], "output": [[2, 1]]}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"train": [PAIR], "test": []}, "task strange must have at least one test pair, got none"),
        ({"train": [PAIR], "test": [{"input": [[1, 2], [3]]}]}, "task strange, test pair 1: input must have rows of one length"),
        ({"train": [PAIR], "test": [{"input": [[1] * 31]}]}, "task strange, test pair 1: input must have 1 to 30 rows and columns"),
        ({"train": [{"input": [[1]], "output": [[10]]}], "test": [PAIR]}, "task strange, demonstration 1: output must have the colours 0"),
    ],
    ids=["no test pair", "ragged", "large", "colour"],
)
def test_a_bad_task_is_one_line_that_names_it(cli: Cli, checkpoint: Path, tmp_path: Path, content: dict[str, Any], part: str) -> None:
    path = tmp_path / "strange.json"
    path.write_text(json.dumps(content))
    one_line(cli("eval", "arc", checkpoint, "-d", path, "-o", tmp_path / "out"), part, command=COMMAND)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--context", 20), "context must be at least "),
        (("--context", 200), "context must be at most 160, the positions of the model, got 200"),
        (("--split", "training"), "split must be left out for generated tasks, got training"),
        (("--families", "mirrors"), "families must be among copy, mirror"),
        (("--smallest", 4), "smallest must be at most largest 3, got 4"),
        (("--views", 0), "views must be a whole number of at least 1, got 0"),
    ],
    ids=["short context", "long context", "split", "family", "sizes", "views"],
)
def test_a_bad_option_is_one_line(cli: Cli, checkpoint: Path, tmp_path: Path, arguments: tuple[object, ...], part: str) -> None:
    one_line(cli("eval", "arc", checkpoint, *GENERATED, "-o", tmp_path / "out", *arguments), part, command=COMMAND)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--families", "copy"), "families must be left out for tasks that are not generated, got copy"),
        (("--smallest", 4), "smallest must be left out for tasks that are not generated, got 4"),
        (("--largest", 5), "largest must be left out for tasks that are not generated, got 5"),
        (("--demonstrations", 3), "demonstrations must be left out for tasks that are not generated, got 3"),
        (("--data-seed", 3), "data_seed must be left out for tasks that are not generated, got 3"),
        (("--split", "mine"), "split must be a subfolder or in the name of a *_challenges.json in"),
        (("--only", "nowhere.txt"), "only must be a file that can be read, got nowhere.txt: No such file"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, tuple) else "",
)
def test_a_bad_option_with_a_folder_is_one_line(
    cli: Cli, checkpoint: Path, data: Path, tmp_path: Path, arguments: tuple[object, ...], part: str
) -> None:
    one_line(cli("eval", "arc", checkpoint, "-d", data, "-o", tmp_path / "out", *arguments), part, command=COMMAND)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"copy-1\nmirror-2\n", "only must have names of tasks in"),
        (b"copy-1\nmirror-2\n", "got copy-1, mirror-2"),
        (b" \n", "only must have a name of a task on each line, got none in"),
        (b"\xff", "only must be text in UTF-8, got"),
    ],
)
def test_a_bad_list_of_tasks_is_one_line(cli: Cli, checkpoint: Path, data: Path, tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    ran = cli("eval", "arc", checkpoint, "-d", data, "-o", tmp_path / "out", "--only", tmp_path / "list.txt")
    one_line(ran, part, command=COMMAND)


def test_a_list_of_tasks_may_begin_with_a_byte_order_mark(cli: Cli, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + TASKS[1].name.encode() + b"\r\n")
    quick = ("--views", 1, "--samples", 1, "--max-new-tokens", 2, "--only", tmp_path / "list.txt")
    ran = cli("eval", "arc", checkpoint, "-d", data, "-o", tmp_path / "out", *quick)
    assert ran.code == 0, ran.err
    assert list(json.loads((tmp_path / "out" / "submission.json").read_text())) == [TASKS[1].name]


@pytest.mark.parametrize("option", ["checkpoint", "--only", "-o"])
def test_the_home_of_an_unknown_user_is_one_line(cli: Cli, checkpoint: Path, data: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "~nobody-here").write_text("")
    where = {"-d": data, "-o": tmp_path / "out", "--only": None} | ({} if option == "checkpoint" else {option: "~nobody-here/x"})
    with contextlib.chdir(tmp_path):
        given = [part for pair in where.items() if pair[1] is not None for part in pair]
        ran = cli("eval", "arc", "~nobody-here/x" if option == "checkpoint" else checkpoint, *given)
    one_line(ran, "got ~nobody-here/x: Not a directory", command=COMMAND)


@pytest.mark.parametrize("split", [(), ("--split", "tasks")], ids=["folder", "subfolder"])
def test_the_folder_of_the_tasks_gets_no_scores(cli: Cli, checkpoint: Path, data: Path, split: tuple[str, ...]) -> None:
    before = sorted(data.iterdir())
    ran = cli("eval", "arc", checkpoint, "-d", data.parent if split else data, *split, "-o", data)
    one_line(ran, "output_dir must be another folder than that of the tasks, got", command=COMMAND)
    assert sorted(data.iterdir()) == before


def test_a_subfolder_of_any_name_is_evaluated(cli: Cli, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    quick = ("--views", 1, "--samples", 1, "--max-new-tokens", 2, "--limit", 1)
    ran = cli("eval", "arc", checkpoint, "-d", data.parent, "--split", data.name, "-o", tmp_path / "out", *quick)
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["split"] == data.name


def test_a_list_of_generated_tasks_names_the_limit(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("copy-1\n")
    ran = cli("eval", "arc", checkpoint, *GENERATED, "--only", tmp_path / "list.txt", "-o", tmp_path / "out")
    one_line(ran, "only must have names of tasks in generated among the 4 that are made, see --limit, got copy-1", command=COMMAND)


def test_a_checkpoint_with_another_vocabulary_is_one_line(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    one_line(cli("eval", "arc", other, *GENERATED), "checkpoint must be one trained on ARC, with arc_vocabulary.json", command=COMMAND)
    (other / "model").mkdir()
    (other / "model" / "arc_vocabulary.json").write_text("{}")
    one_line(cli("eval", "arc", other, *GENERATED), "/other/model?", command=COMMAND)
    (other / "arc_vocabulary.json").write_text(json.dumps({"tokens": ["a", "b"]}))
    one_line(cli("eval", "arc", other, *GENERATED), "must have the tokens of ARC, got ['a', 'b']: train the model anew", command=COMMAND)
    (other / "arc_vocabulary.json").write_text((checkpoint / "arc_vocabulary.json").read_text())
    (other / "config.json").write_text(json.dumps({**json.loads((checkpoint / "config.json").read_text()), "vocab_size": 12}))
    one_line(cli("eval", "arc", other, *GENERATED), "vocab_size of", "must be at least 16, the tokens of ARC, got 12", command=COMMAND)
    one_line(cli("eval", "arc"), "CHECKPOINT must be given: the folder of a model that was trained on ARC", command=COMMAND)
