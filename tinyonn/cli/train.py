"""`tinyonn train`: on texts, and on ARC."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._io.config import read_yaml
from ..arc.config import ArcConfig
from ..errors import InputError
from ..life.config import LifeConfig
from . import screen
from .options import ConfigFile, configured, print_config_option, takes_options

if TYPE_CHECKING:
    from ..life.running import TrainingResult

Line = tuple[str, object]

_CONFIG_HEADER = "Options of `tinyonn train{}` with their defaults. Pass the file as --config; the command line takes precedence."
PrintConfig = Annotated[bool, print_config_option(LifeConfig, _CONFIG_HEADER.format(""))]
PrintArcConfig = Annotated[bool, print_config_option(ArcConfig, _CONFIG_HEADER.format(" arc"))]

train = typer.Typer()


@train.callback(invoke_without_command=True)
@takes_options(LifeConfig)
def train_texts(line: typer.Context, given: Mapping[str, Any], config: ConfigFile = None, print_config: PrintConfig = False) -> None:
    """Train a small self-organising model on texts, from scratch.

    Learns a vocabulary, then trains a bonsai, whose experts are born and recycled. The page OUTPUT/life.html is kept current, and steps are
    saved in OUTPUT/store. To go on after a stop, run the same command again. In a fork (`tinyonn life fork`) the first run may choose other
    texts, another learning rate and more. Under torchrun, every process takes its share of each batch.
    """
    if line.invoked_subcommand is not None:
        if given or config:
            name = f"--{next(iter(given), 'config').replace('_', '-')}"
            raise InputError(f"{name} must stand after {line.invoked_subcommand}, got it before.")
        return
    values = {**(read_yaml(config) if config else {}), **given}
    run_life(LifeConfig.from_mapping(values, source=str(config or "a --config file")))


def run_life(config: LifeConfig) -> None:
    """Trains with progress on the screen, and prints how it ended."""
    from ..life.training import train

    with screen.Progress("training", enabled=os.environ.get("RANK", "0") == "0") as bar:
        result = train(config, bar.update, screen.say)
    last = result.metrics
    learned: list[Line] = []
    if "loss" in last:
        held_out = "" if result.eval_loss is None else f", held out {result.eval_loss:.3f}"
        learned.append(("loss", f"{last['loss']:.3f} nats a token{_at(result)}{held_out}"))
    if "pi" in last:
        learned.append(("integrity", f"{last['pi']:.3f}{_at(result)}"))
    if "live_experts" in last:
        changes = f"{screen.counted(result.births, 'birth')}, {screen.counted(result.recyclings, 'recycling')}"
        learned.append(("experts", f"{last['live_experts']:.0f} live, {changes}"))
    if result.skipped:
        learned.append(("skipped", f"{screen.counted(result.skipped, 'step')} whose loss or gradients were not finite"))
    sample = " ".join(result.sample.split())
    _print_result(result, learned, [("sample", sample)] if sample else [])


def _print_result(result: TrainingResult, learned: list[Line], after: Sequence[Line] = ()) -> None:
    """Prints how a training ended, on the first process: what it learned, where it is, and what comes after that."""
    if not result.first:
        return
    lines: list[Line] = [("trained", f"{screen.counted(result.steps, 'step')}, {result.parameters:,} parameters")]
    if result.stopped:
        lines.append(("stopped", _stopped(result.stopped)))
    places: list[Line] = [("model", result.model), ("page", result.page), ("took", screen.duration(result.seconds))]
    print(screen.rows([*lines, *learned, *places, *after]), flush=True)


def _at(result: TrainingResult) -> str:
    """Of which step the last logged metrics are, where it is not the last one; in a fork, they may be its parent's."""
    step = result.metrics.get("step", result.steps)
    return "" if step == result.steps else f" at step {step:,.0f}"


def _stopped(reason: str) -> str:
    """Why a run stopped, and how to go on."""
    from ..life.running import EARLIER

    return f"{reason}; {'give more --steps' if reason == EARLIER else 'run the same command'} to go on"


@train.command("arc")
@takes_options(ArcConfig)
def train_arc(given: Mapping[str, Any], config: ConfigFile = None, print_config: PrintArcConfig = False) -> None:
    """Train a small self-organising model on ARC, from scratch, by teacher forcing or along its own answers (EAVI).

    The page OUTPUT/life.html is kept current, and steps are saved in OUTPUT/store. To go on after a stop, run the same command again. Then
    `tinyonn eval arc OUTPUT/model` scores the model.
    """
    from ..arc.training import train_arc as run

    options = configured(ArcConfig, config, given)
    with screen.Progress("training", enabled=os.environ.get("RANK", "0") == "0") as bar:
        result = run(options, bar.update, screen.say)
    last = result.metrics
    learned: list[Line] = []
    if "loss" in last:
        learned.append(("loss", f"{last['loss']:.3f} nats a token{_at(result)}"))
    if "own_exact" in last:
        learned.append(("own", f"{last['own_exact']:.1%} of the model's own answers in training were exact"))
    if result.exact is not None:
        learned.append(("held out", f"{result.exact:.1%} of the answers exact"))
    _print_result(result, learned)
