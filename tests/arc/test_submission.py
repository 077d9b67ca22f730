"""ARC Prize's submission file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tinyonn.arc import Task, check_submission, write_submission
from tinyonn.errors import InputError

ONE = np.ones((1, 1), dtype=int)
TASKS = [Task("a", ((ONE, ONE),), ((ONE, None), (ONE, None))), Task("b", ((ONE, ONE),), ((ONE, None),))]


def test_a_submission_has_two_attempts_at_every_test_input(tmp_path):
    path = tmp_path / "submission.json"
    write_submission(path, TASKS, {"a": [[np.array([[1, 2]]), np.array([[3]])], [None, np.array([[4], [5]])]]})
    nothing = [[0, 0], [0, 0]]
    assert json.loads(path.read_text()) == {
        "a": [{"attempt_1": [[1, 2]], "attempt_2": [[3]]}, {"attempt_1": nothing, "attempt_2": [[4], [5]]}],
        "b": [{"attempt_1": nothing, "attempt_2": nothing}],
    }
    found = check_submission(path, TASKS)
    assert [[grid.tolist() for grid in pair] for pair in found["a"]] == [[[[1, 2]], [[3]]], [nothing, [[4], [5]]]]


@pytest.mark.parametrize(
    ("attempts", "message"),
    [
        ({"c": [[ONE]]}, "attempts must be at tasks of the challenge, got task c"),
        ({"a": [[ONE]]}, "task a must have 2 entries in a submission, one a test pair, got 1"),
        ({"b": [[ONE] * 3]}, "task b, test pair 1 must have at most 2 attempts, got 3"),
        ({"b": [[ONE * 10]]}, "task b, test pair 1: attempt_1 must have the colours 0 to 9, got 10"),
    ],
    ids=["unknown task", "count", "three", "colour"],
)
def test_attempts_that_do_not_fit_are_refused_and_nothing_is_written(attempts, message, tmp_path):
    with pytest.raises(InputError, match=message):
        write_submission(tmp_path / "submission.json", TASKS, attempts)
    assert not list(tmp_path.iterdir())


GOOD = {"attempt_1": [[1]], "attempt_2": [[2]]}
BAD = {
    "not there": (None, "submission must be a file that can be read, got .*: No such file"),
    "cut off": ("{", "submission.json must be JSON in UTF-8"),
    "list": ([], "submission.json must be a JSON object of tasks, got list"),
    "task missing": ({"a": [GOOD, GOOD]}, "submission.json must have the tasks of the challenge, got no task b"),
    "unknown task": ({"a": [GOOD, GOOD], "b": [GOOD], "c": [GOOD]}, "must have the tasks of the challenge, got an unknown task c"),
    "no list": ({"a": [GOOD, GOOD], "b": GOOD}, "task b must have a list of attempts in a submission, got"),
    "count": ({"a": [GOOD], "b": [GOOD]}, "task a must have 2 entries in a submission, one a test pair, got 1"),
    "one attempt": (
        {"a": [GOOD, {"attempt_1": [[1]]}], "b": [GOOD]},
        "task a, test pair 2 must have attempt_1 and attempt_2, got the fields attempt_1",
    ),
    "no entry": ({"a": [GOOD, 3], "b": [GOOD]}, "task a, test pair 2 must have attempt_1 and attempt_2, got 3"),
    "ragged": (
        {"a": [GOOD, GOOD], "b": [{**GOOD, "attempt_2": [[1], [1, 2]]}]},
        "task b, test pair 1: attempt_2 must have rows of one length",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_submission_is_one_line(content, message, tmp_path):
    path = tmp_path / "submission.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        check_submission(path, TASKS)
    assert "\n" not in str(error.value)


def test_two_tasks_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="tasks must have names of their own, got 3 with 2 names"):
        write_submission(tmp_path / "submission.json", [*TASKS, TASKS[0]], {})
    assert not (tmp_path / "submission.json").exists()
