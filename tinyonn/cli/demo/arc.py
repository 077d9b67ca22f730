"""`tinyonn arc-demo`: a model learns small tasks in the form of ARC, and a page shows what it solves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .. import screen
from .commands import run_command

SIDE = 3  # rows and columns of each input
Output = Annotated[Path, typer.Option("--output-dir", "-o", "--output", metavar="DIR", help="Folder of the training and the evaluation.")]


def arc_demo(
    output_dir: Output = Path("data/arc-demo"),
    steps: Annotated[int, typer.Option(metavar="N", min=10, help="Steps of the training.")] = 1500,
    tasks: Annotated[int, typer.Option(metavar="N", min=1, help="Tasks of the evaluation.")] = 40,
) -> None:
    """Train bonsai-1m on generated tasks in the form of ARC, evaluate it, and write a page of solved and unsolved grids.

    The tasks are of eight families, such as mirror and gravity, with two demonstrations each. Each part is a command, printed before it
    runs. Takes under 10 minutes on two cores.
    """
    begin = time.monotonic()
    training, evaluation = output_dir / "training", output_dir / "evaluation"
    sizes = ("--data", "generated", "--smallest", SIDE, "--largest", SIDE)
    screen.say("\n1. A model learns generated tasks.")
    run_command("train", "arc", *sizes, "--output-dir", training, "--steps", steps, "--context", 256)
    screen.say("\n2. It answers tasks that it has not seen, with two attempts each.")
    run_command("eval", "arc", training / "model", *sizes, "--output-dir", evaluation, "--limit", tasks, "--views", 8, "--samples", 4)
    screen.say(f"\nThe demo took {screen.duration(time.monotonic() - begin)}.")
    print(f"Open {(evaluation / 'index.html').resolve()}")
