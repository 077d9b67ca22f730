"""`index.html` of an evaluation on ARC: scores, then a card for each task with its demonstrations, truth and attempts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._io.files import write_atomically
from ..._io.units import counted, duration
from ..html.page import card, facts, group, notices, page, section, table_card, terms, text
from .grids import Cells, cell_size, grid_svg

_STATES = {"solved": "solved", "unsolved": "unsolved", "unknown": "without a known output"}
METHODS = {
    "greedy": "the most likely answer, one attempt",
    "sampling": "the two most frequent samples",
    "voting": "the two answers that most augmented views of the task gave, each reverted",
    "augscore": "the two candidates with the highest log-probability, summed over the eight symmetries of the task",
}
TERMS = {
    "test pairs": "those with one of the attempts right",
    "tasks": "those with all test pairs right",
    "score": "mean over tasks of the share of test pairs that are right, as ARC Prize counts",
}


def write_arc_page(path: str | os.PathLike[str], scores: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the page of an evaluation.

    Args:
        path: the page.
        scores: what scores.json has.
        records: the lines of predictions.jsonl after the first, of the tasks to show.

    Returns:
        The page.

    Raises:
        InputError: the page cannot be written.
    """
    longer = scores["longer_than_context"]
    body = [notices(_notes(scores)), section("scores", "Scores", _summary(scores))]
    cards = sorted((_task(record, scores) for record in records), key=lambda one: list(_STATES).index(one[0]))
    states = [state for state, _ in cards]
    lead = f"Demonstrations, then each test input with its true output and the attempts by {scores['method']}."
    tasks = f'<div class="tasks">{_filters(states)}{"".join(html for _, html in cards)}</div>'
    body.append(section("tasks", "Tasks", tasks, lead=lead))
    if longer:
        rows = sorted(longer.items(), key=lambda item: item[1])
        table = table_card(("task", "tokens"), rows, f"Longer than the context of {scores['options']['context']:,} tokens", numeric=(1,))
        body.append(section("longer", "Tasks that do not fit", group("grid3", [table])))
    of = scores["data"] + (f", {scores['split']}" if scores["split"] else "")
    subtitle = f"{of}: {counted(scores['tasks'], 'task')}, {counted(scores['test_pairs'], 'test pair')}."
    target = Path(path)
    write_atomically(target, page(f"ARC evaluation of {scores['checkpoint']}", subtitle, body, {}, "arc.css"))
    return target


def _notes(scores: Mapping[str, Any]) -> list[str]:
    notes = []
    if longer := scores["longer_than_context"]:
        what = f"{counted(len(longer), 'task')} {'has' if len(longer) == 1 else 'have'} a test pair longer than the context"
        notes.append(f"{what} of {scores['options']['context']:,} tokens, which counts as unsolved.")
    if unknown := scores["test_pairs"] - scores["known_test_pairs"]:
        notes.append(f"{counted(unknown, 'test pair')} without a known output: predictions only.")
    return notes


def _summary(scores: Mapping[str, Any]) -> str:
    numbers = {
        "parameters": scores["parameters"],
        "time": duration(60 * scores["minutes"]),
        "tokens right": _percent(scores["token_accuracy"]),
        "grids right": _percent(scores["grid_accuracy"]),
        "shapes right": _percent(scores["right_shape"]),
        "cells right, where the shape is": _percent(scores["cell_accuracy"]),
        "truth among candidates": _percent(scores["among_candidates"]),
    }
    options = {
        name.replace("_", " "): scores["options"][name]
        for name in ("context", "views", "samples", "temperature", "batch_size", "max_new_tokens", "seed")
    }
    return group("grid-tables", [_methods(scores), card("Greedy answers and the run", facts(numbers) + facts(options))])


def _methods(scores: Mapping[str, Any]) -> str:
    pairs, tasks = scores["known_test_pairs"], scores["known_tasks"]
    rows = []
    for method, found in scores["methods"].items():
        first, second = found["attempts_1"], found["attempts_2"]
        cells = [f"{one['test_pairs']:,} of {pairs:,}" for one in (first, second)]
        cells += [f"{one['tasks']:,} of {tasks:,}" for one in (first, second)]
        rows.append((method, cells[0], cells[2], _percent(first["score"]), cells[1], cells[3], _percent(second["score"])))
    head = ("method", "test pairs, 1 attempt", "tasks", "score", "test pairs, 2 attempts", "tasks", "score")
    table = table_card(head, rows, "Solved by method", numeric=range(1, 7))
    return f"<div>{table}{terms({**{name: METHODS[name] for name in scores['methods']}, **TERMS})}</div>"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _filters(states: Sequence[str]) -> str:
    """Radio buttons; the style hides the other cards, without a script."""
    counts = {state: states.count(state) for state in _STATES if state in states}
    choices = {"all": f"all {len(states):,}", **{state: f"{_STATES[state]} {count:,}" for state, count in counts.items()}}
    buttons = "".join(
        f'<label><input type="radio" name="show" id="show-{key}"{" checked" if key == "all" else ""}> {text(words)}</label>'
        for key, words in choices.items()
    )
    return f'<div class="controls"><fieldset><legend>Show</legend>{buttons}</fieldset></div>'


def _task(record: Mapping[str, Any], scores: Mapping[str, Any]) -> tuple[str, str]:
    """State of a task, and its card."""
    method, options = scores["method"], scores["options"]
    tried = [[pair["candidates"][number] for number in pair["attempts"][method]] for pair in record["pairs"]]
    right = [pair["output"] in [one["grid"] for one in attempts] for pair, attempts in zip(record["pairs"], tried, strict=True)]
    unknown = any(pair["output"] is None for pair in record["pairs"])
    state = "unknown" if unknown else "solved" if all(right) else "unsolved"
    grids = [grid for pair in record["train"] for grid in pair]
    grids += [grid for pair in record["pairs"] for grid in (pair["input"], pair["output"]) if grid is not None]
    grids += [one["grid"] for attempts in tried for one in attempts]
    cell = cell_size(grids)
    shown = "".join(
        f'<div class="pair">{grid_svg(given, "input", cell)}<span class="to">→</span>{grid_svg(output, "output", cell)}</div>'
        for given, output in record["train"]
    )
    parts = [f'<div class="demonstrations">{shown}</div>']
    for number, (pair, attempts) in enumerate(zip(record["pairs"], tried, strict=True), start=1):
        name = f"test {number}" if len(tried) > 1 else "test"
        figures = [_figure(pair["input"], f"{name} input", cell)]
        if pair["output"] is not None:
            figures.append(_figure(pair["output"], "truth", cell))
        figures += [_attempt(place, one, pair["output"], options, cell) for place, one in enumerate(attempts, start=1)]
        if not attempts:
            figures.append(f'<figure class="none"><figcaption>no attempt<small>{text(_fault(pair))}</small></figcaption></figure>')
        parts.append(f'<div class="test">{"".join(figures)}</div>')
    badge = f'<span class="badge">{text({"solved": "✓ solved", "unsolved": "✗ unsolved", "unknown": "no known output"}[state])}</span>'
    head = f"<h3>{text(record['task'])} {badge} <small>{text(duration(record['seconds']))}</small></h3>"
    return state, f'<div class="card task {state}">{head}<div class="row">{"".join(parts)}</div></div>'


def _fault(pair: Mapping[str, Any]) -> str:
    if not pair["fits"]:
        return "longer than the context"
    reason = pair["greedy"]["reason"]
    return f"greedy answer: {reason}" if reason else "no sample is a grid"  # other methods try the greedy answer if it is one


def _attempt(place: int, one: Mapping[str, Any], truth: Cells | None, options: Mapping[str, Any], cell: float) -> str:
    words, kind = "", ""
    if truth is not None:
        kind = "right" if one["grid"] == truth else "wrong"
        words = "✓ right" if kind == "right" else f"✗ {_difference(one['grid'], truth)}"
    found = [f"{one['votes']} of {options['views']} views", f"{one['samples']} of {options['samples']} samples"]
    if one["log_prob"] is not None:
        found.append(f"{one['log_prob']:.2f} nats".replace("-", "−"))
    return _figure(one["grid"], f"attempt {place}", cell, words, found, kind)


def _difference(grid: Cells, truth: Cells) -> str:
    if (len(grid), len(grid[0])) != (len(truth), len(truth[0])):
        return f"{len(grid)} × {len(grid[0])}, not {len(truth)} × {len(truth[0])}"
    cells = [own == true for row, right in zip(grid, truth, strict=True) for own, true in zip(row, right, strict=True)]
    return f"{cells.count(False)} of {len(cells)} cells wrong"


def _figure(grid: Cells, label: str, cell: float, words: str = "", notes: Sequence[str] = (), kind: str = "") -> str:
    told = f"<b>{text(words)}</b>" if words else ""
    small = "".join(f"<small>{text(note)}</small>" for note in notes)
    return f'<figure class="{kind}">{grid_svg(grid, label, cell)}<figcaption>{text(label)}{told}{small}</figcaption></figure>'
