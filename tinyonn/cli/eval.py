"""`tinyonn eval`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .._io.config import read_yaml
from ..arc.evaluation_config import ArcEvalConfig
from ..errors import InputError
from . import screen
from .options import ConfigFile, print_config_option, takes_options

eval = typer.Typer(help="Evaluate a trained model.")
_CONFIG_HEADER = "Options of `tinyonn eval arc` with their defaults. Pass the file as --config; the command line takes precedence."
PrintConfig = Annotated[bool, print_config_option(ArcEvalConfig, _CONFIG_HEADER)]
Checkpoint = Annotated[
    Path | None, typer.Argument(metavar="CHECKPOINT", help="Folder of the model, with arc_vocabulary.json.", show_default=False)
]


@eval.callback()
def _group() -> None:
    pass  # makes a group of the one command


@eval.command()
@takes_options(ArcEvalConfig, without=("checkpoint",))
def arc(given: Mapping[str, Any], checkpoint: Checkpoint = None, config: ConfigFile = None, print_config: PrintConfig = False) -> None:
    """Evaluate a model on ARC: free generation, two attempts, votes over augmentations and AugScore.

    Writes scores, predictions, a submission in ARC Prize's format and the page index.html. To go on after a stop, run the same command
    again.
    """
    from ..arc.evaluation_run import evaluate_checkpoint

    values = {**(read_yaml(config) if config else {}), **given, **({"checkpoint": str(checkpoint)} if checkpoint else {})}
    if "checkpoint" not in values:
        raise InputError("CHECKPOINT must be given: the folder of a model that was trained on ARC.")
    options = ArcEvalConfig.from_mapping(values, source=str(config or "a --config file"))
    with screen.Progress("evaluating") as bar:
        result = evaluate_checkpoint(options, bar.update)
    scores = result.scores
    if scores["known_test_pairs"]:
        print(_table(scores))
    longer = scores["longer_than_context"]
    lines: list[tuple[str, object]] = [
        ("model", f"{options.checkpoint}, {scores['parameters']:,} parameters"),
        *([("greedy", _accuracy(scores))] if scores["token_accuracy"] is not None else []),
        ("tasks", f"{scores['tasks']:,}, {screen.counted(scores['test_pairs'], 'test pair')}"),
        *([("too long", f"{screen.counted(len(longer), 'task')}, unsolved")] if longer else []),
        ("took", screen.duration(60 * scores["minutes"])),
    ]
    print(screen.rows([*lines, ("page", Path(os.path.expanduser(options.output_dir)) / "index.html")]))


def _table(scores: Mapping[str, Any]) -> str:
    """What each method solved, with one and two attempts."""

    def solved(method: str, attempts: int) -> list[str]:
        found = scores["methods"][method][f"attempts_{attempts}"]
        return [f"{found['test_pairs']:,}", f"{found['tasks']:,}", "–" if found["score"] is None else f"{100 * found['score']:.1f} %"]

    head = ("method", "pairs, 1 attempt", "tasks", "score", "pairs, 2 attempts", "tasks", "score")
    table = screen.columns(head, [(method, *solved(method, 1), *solved(method, 2)) for method in scores["methods"]])
    return f"{table}\nof {screen.counted(scores['known_test_pairs'], 'test pair')} and {screen.counted(scores['known_tasks'], 'task')}\n"


def _accuracy(scores: Mapping[str, Any]) -> str:
    """Accuracy of greedy answers in words."""
    cells = "" if scores["cell_accuracy"] is None else f", {100 * scores['cell_accuracy']:.1f} % of cells where the shape is"
    return f"{100 * scores['token_accuracy']:.1f} % of tokens right{cells}"
