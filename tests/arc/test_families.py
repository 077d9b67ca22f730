"""Generated tasks: solved by programs that share nothing with the generator, from the demonstrations and the test input alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tinyonn.arc import FAMILIES, Augmentation, generate
from tinyonn.errors import InputError


def mirrors(rows):
    yield [row[::-1] for row in rows]
    yield rows[::-1]
    yield [list(column) for column in zip(*rows, strict=True)]


def fallen(column):
    """A column whose cells fell to its end."""
    cells = [cell for cell in column if cell]
    return [0] * (len(column) - len(cells)) + cells


def falls(rows):
    columns = list(zip(*rows, strict=True))
    yield [fallen(row) for row in rows]
    yield [fallen(row[::-1])[::-1] for row in rows]
    yield [list(row) for row in zip(*map(fallen, columns), strict=True)]
    yield [list(row) for row in zip(*(fallen(column[::-1])[::-1] for column in columns), strict=True)]


def recoloured(rows):
    for old, new in itertools.permutations(range(1, 10), 2):
        yield [[new if cell == old else cell for cell in row] for row in rows]


def filled(rows):
    height, width = len(rows), len(rows[0])
    outside, waiting = set(), [(r, c) for r in range(-1, height + 1) for c in range(-1, width + 1) if r in (-1, height) or c in (-1, width)]
    while waiting:
        r, c = waiting.pop()
        if (r, c) in outside or not (-1 <= r <= height and -1 <= c <= width):
            continue
        if 0 <= r < height and 0 <= c < width and rows[r][c]:
            continue
        outside.add((r, c))
        waiting += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
    for colour in range(1, 10):
        yield [[cell if cell or (r, c) in outside else colour for c, cell in enumerate(row)] for r, row in enumerate(rows)]


def cropped(rows):
    for colour in range(1, 10):
        inside = [r for r, row in enumerate(rows) if colour in row]
        columns = [c for c in range(len(rows[0])) if any(row[c] == colour for row in rows)]
        yield [row[columns[0] : columns[-1] + 1] for row in rows[inside[0] : inside[-1] + 1]] if inside else None


def counted(rows):
    for colour in range(1, 10):
        yield [[colour] * sum(row.count(colour) for row in rows)]


def composed(rows):
    for moved in (*mirrors(rows), *falls(rows)):
        yield from recoloured(moved)


# Every form that an input can take under the rules of a family, always in the same order of rules.
FORMS = {
    "copy": lambda rows: [rows],
    "mirror": mirrors,
    "recolour": recoloured,
    "fill": filled,
    "gravity": falls,
    "crop": cropped,
    "count": counted,
    "compose": composed,
}


def solutions(family, task):
    """Outputs of the test under each rule of the family that explains the demonstrations."""
    demonstrations = [
        [form == pair.output.tolist() for form in FORMS[family](pair.input.tolist())] for pair in task.train
    ]  # (pairs, rules)
    tests = list(FORMS[family](task.test[0].input.tolist()))
    return [form for form, *explains in zip(tests, *demonstrations, strict=True) if all(explains)]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_independent_program_solves_every_task(family):
    for task in generate(15, 3, families=[family]):
        found = solutions(family, task)
        assert found, task.name
        assert all(form == task.test[0].output.tolist() for form in found), task.name


@pytest.mark.parametrize("sizes", [(3, 3), (3, 8)], ids=["3", "3 to 8"])
def test_demonstrations_leave_no_other_rule_of_any_family(sizes):
    for task in generate(24, 5, smallest=sizes[0], largest=sizes[1], demonstrations=2):
        answer = task.test[0].output.tolist()
        for family in FAMILIES:
            assert all(form == answer for form in solutions(family, task)), (task.name, family)


def test_tasks_are_seeded_different_and_of_the_wanted_form():
    tasks = generate(32, 1, smallest=4, largest=6, demonstrations=4)
    assert tasks == generate(32, 1, smallest=4, largest=6, demonstrations=4)
    assert tasks[:10] == generate(10, 1, smallest=4, largest=6, demonstrations=4)
    assert {task.digest for task in tasks}.isdisjoint(task.digest for task in generate(32, 2, smallest=4, largest=6, demonstrations=4))
    assert [task.name.partition("-")[0] for task in tasks[:8]] == list(FAMILIES)
    for task in tasks:
        inputs = [pair.input for pair in (*task.train, *task.test)]
        assert len(inputs) == 5
        assert all(4 <= side <= 6 for grid in inputs for side in grid.shape)
        assert len({grid.tobytes() for grid in inputs}) == 5
        if not task.name.startswith("copy"):
            assert not any(np.array_equal(*pair) for pair in (*task.train, *task.test))


def test_no_task_of_training_comes_again_in_the_test():
    train = generate(100, 0, smallest=3, largest=3, families=["count"])
    assert len({task.digest for task in train}) == 100
    assert {task.digest for task in generate(100, 0, smallest=3, largest=3, families=["count"], exclude=train)}.isdisjoint(
        task.digest for task in train
    )


def test_augmented_copies_are_still_copies():
    for task in generate(10, 0, families=["copy"]):
        changed = Augmentation.random(1, 3).task(task)
        assert all(np.array_equal(*pair) for pair in (*changed.train, *changed.test))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": ["mirrors"]}, "families must be among copy, .*, got 'mirrors'; did you mean 'mirror'"),
        ({"families": []}, "families must have at least one name"),
        ({"smallest": 2}, "smallest and largest must be 3 to 30 and in this order, got 2 and 8"),
        ({"smallest": 9}, "got 9 and 8"),
        ({"largest": 31}, "got 3 and 31"),
        ({"demonstrations": 1}, "demonstrations must be at least 2, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
    ids=["family", "no family", "small", "order", "large", "demonstrations", "seed"],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        generate(1, **arguments)
