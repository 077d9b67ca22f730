"""The page of an evaluation on ARC."""

from __future__ import annotations

import re

import pytest

from tinyonn.report.arc import write_arc_page
from tinyonn.report.arc.grids import cell_size, grid_svg


def drawn(svg):
    """The grid that an SVG draws: the colour of each cell."""
    columns, rows = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    grid = [[None] * columns for _ in range(rows)]
    for colour, path in re.findall(r'<path class="c(\d)" d="([^"]*)"', svg):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path):
            for cell in range(int(x), int(x) + int(width)):
                assert grid[int(y)][cell] is None
                grid[int(y)][cell] = int(colour)
    return grid


@pytest.mark.parametrize("grid", [[[7]], [[1, 1, 2], [0, 0, 0]], [[column % 10 for column in range(30)]] * 29], ids=["1", "2", "29"])
def test_a_grid_is_drawn_cell_by_cell(grid):
    svg = grid_svg(grid, "truth", 5)
    assert drawn(svg) == grid
    assert f'aria-label="truth, {len(grid)} × {len(grid[0])}" width="{5 * len(grid[0])}" height="{5 * len(grid)}"' in svg


def test_large_grids_have_smaller_cells():
    assert cell_size([[[0]]]) > cell_size([[[0]], [[0] * 30]]) >= 5


HOSTILE = "</h3><script>alert(1)</script>"


def candidate(grid, votes=1):
    return {"grid": grid, "votes": votes, "samples": 0, "log_prob": -2.5}


def pair(output, *tried, fits=True):
    greedy = {"grid": None, "reason": "no <end>"} if fits else None
    attempts = {"augscore": list(range(len(tried)))}
    return {
        "input": [[1]],
        "output": output,
        "fits": fits,
        "greedy": greedy,
        "candidates": list(map(candidate, tried)),
        "attempts": attempts,
    }


@pytest.fixture
def page(tmp_path):
    found = {"test_pairs": 1, "tasks": 1, "score": 1 / 3}
    options = {"context": 400, "views": 8, "samples": 2, "temperature": 1.0, "batch_size": 4, "max_new_tokens": 99, "seed": 0}
    scores = {
        "checkpoint": HOSTILE, "data": "arc1", "split": "evaluation", "method": "augscore", "tasks": 4, "test_pairs": 5, "known_tasks": 3,
        "known_test_pairs": 4, "token_accuracy": 0.5, "grid_accuracy": 0.25, "right_shape": 0.5, "cell_accuracy": None,
        "among_candidates": 0.5, "minutes": 2.0, "parameters": 1234, "longer_than_context": {"big": 5000}, "options": options,
        "methods": {"augscore": {"attempts_1": found, "attempts_2": found}},
    }  # fmt: skip
    train = [[[[1]], [[2]]]]
    tasks = {
        HOSTILE: [pair([[1, 2]], [[1, 3]], [[5]])],
        "hidden": [pair(None, [[4]])],
        "right": [pair([[2, 2]], [[3]], [[2, 2]]), pair([[6]], [[6]])],
        "none": [pair([[2]]), pair([[3]], fits=False)],
    }
    answered = pair([[1]])
    answered["greedy"] = {"grid": [[4]], "reason": ""}  # an answer, but none by the method of the page
    tasks["none"].append(answered)
    records = [{"task": name, "seconds": 1.0, "train": train, "pairs": pairs} for name, pairs in tasks.items()]
    return write_arc_page(tmp_path / "index.html", scores, records)


def test_the_page_has_every_task_with_its_state(page):
    html = page.read_text()
    cards = re.findall(r'<div class="card task (\w+)"><h3>(\w*|&lt;.*?) <span', html)
    hostile = HOSTILE.replace("<", "&lt;").replace(">", "&gt;")
    assert cards == [("solved", "right"), ("unsolved", hostile), ("unsolved", "none"), ("unknown", "hidden")]
    assert "<script>alert" not in html
    for words in (
        "✗ 1 of 2 cells wrong", "✗ 1 × 1, not 1 × 2", "✓ right", "greedy answer: no &lt;end&gt;", "no sample is a grid",
        "longer than the context", "−2.50 nats",
        "Longer than the context of 400 tokens", "1 task has a test pair longer than the context of 400 tokens, which counts as unsolved.",
        "1 test pair without a known output: predictions only.", "1 of 4", "33.3 %", "1,234", "2:00",
    ):  # fmt: skip
        assert words in html


def test_a_filter_shows_tasks_of_one_state(page, browser):
    browser.open(page)
    assert browser.console() == []
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    seen = "return [...document.querySelectorAll('.task')].filter(one => one.offsetParent).map(one => one.classList[2])"
    assert browser.run(seen) == ["solved", "unsolved", "unsolved", "unknown"]
    for state, count in (("solved", 1), ("unsolved", 2), ("unknown", 1)):
        browser.run(f"document.getElementById('show-{state}').click()")
        assert browser.run(seen) == [state] * count
    browser.run("document.getElementById('show-all').click()")
    assert len(browser.run(seen)) == 4
