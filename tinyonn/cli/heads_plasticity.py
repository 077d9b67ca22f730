"""`tinyonn heads plasticity` with its commands train, measure, report and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._io.config import local_model, read_yaml
from .._io.locks import locked
from .._io.records import data_kind
from ..errors import InputError, listed, one_line
from ..heads.plasticity.config import PlasticityConfig
from ..heads.plasticity.records import seed_folders
from ..heads.study import MEASURE_STEP, MEASURED, OPTIONS, TRAIN_STEP, TRAINED
from . import screen
from .options import ConfigFile, print_config_option, takes_options

if TYPE_CHECKING:
    from ..heads.plasticity.summary import PlasticitySummary
    from ..heads.progress import Progress

plasticity = typer.Typer(help="Fine-tune a classifier, and compare the importance of its heads with the change of their weights.")

_CONFIG_HEADER = (
    "Options of `tinyonn heads plasticity run` and `train` with their defaults. Pass the file as --config, to the later steps too; the "
    "command line takes precedence."
)
PrintConfig = Annotated[bool, print_config_option(PlasticityConfig, _CONFIG_HEADER)]

_OF_TRAINING = (
    *("train_size", "max_length", "learning_rate", "epochs", "max_steps", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("checkpoint_steps", "dtype"),
)
_LATER_TEXTS = {
    "seed": "Seed of a trained study; repeat --seed for several. [default: all trained ones]",
    "overwrite": "Replace existing measurements. [default: no]",
}

_takes_options = partial(takes_options, PlasticityConfig, before="seed", several=("seed",))


@plasticity.command("train")
@_takes_options()
def _train_command(given: Mapping[str, Any], config: ConfigFile = None, print_config: PrintConfig = False) -> None:
    """Fine-tune all weights on a classification task.

    Saves the weights before (ckpt_init) and after (ckpt_final). To continue an interrupted training, run the same command again.
    """
    _run(("train",), config, given)


@plasticity.command("measure")
@_takes_options(without=_OF_TRAINING, texts=_LATER_TEXTS)
def _measure_command(given: Mapping[str, Any], config: ConfigFile = None) -> None:
    """Measure the importance of each head and the change of its weights.

    Measures loss increase and accuracy drop without the head, before and after training; gradient norm and Fisher information before
    training; and the change of the head's weights. Needs --task and --output-dir. Model, data and evaluation rows are those of the
    training; options for them, if given, must have the same values. Options of the report are accepted too, so that one set of options
    serves all steps.
    """
    _run(("measure",), config, given)


@plasticity.command("report")
@_takes_options(without=(*_OF_TRAINING, "batch_size", "device", "overwrite"), texts=_LATER_TEXTS)
def _report_command(given: Mapping[str, Any], config: ConfigFile = None) -> None:
    """Summarise the measurements as statistics, cases, figures and a page.

    Also writes means and intervals over all seeds of a task. Needs --task and --output-dir. Model, data and evaluation rows are those of
    the training; options for them, if given, must have the same values.
    """
    _run(("report",), config, given)


@plasticity.command("run")
@_takes_options()
def _run_command(given: Mapping[str, Any], config: ConfigFile = None, print_config: PrintConfig = False) -> None:
    """Train, measure and report.

    Steps that an earlier run completed are kept.
    """
    _run(("train", "measure", "report"), config, given)


def _run(steps: Sequence[str], config: Path | None, typed: Mapping[str, Any]) -> None:
    """Runs steps for the seeds on the command line, else the seed in the config file, else all trained seeds (42 for a training)."""
    seeds = typed.get("seed")
    given = {**(read_yaml(config) if config else {}), **{name: value for name, value in typed.items() if name != "seed"}}
    source = str(config or "a --config file")
    if "train" in steps:
        numbers = seeds or [given.get("seed", PlasticityConfig.seed)]
        run_steps(steps, [PlasticityConfig.from_mapping({**given, "seed": number}, source=source) for number in numbers])
        return
    place = {"model_path": "."} | {name: given[name] for name in ("task", "output_dir", "seed") if name in given}
    study = PlasticityConfig.from_mapping(place)
    numbers = _later_seeds(study.folder.parent, seeds or ([study.seed] if "seed" in given else []), steps[-1])
    run_steps(steps, [_trained_study({**given, "seed": number}, {**place, "seed": number}, source) for number in numbers])


def _trained_study(given: Mapping[str, Any], place: Mapping[str, Any], source: str) -> PlasticityConfig:
    """Options of a trained study: the given ones, and those of its training for the rest."""
    options = PlasticityConfig.from_mapping(place).folder / OPTIONS
    trained = read_yaml(options) if options.is_file() else {"model_path": "."}
    PlasticityConfig.from_mapping({**place, **trained}, source=str(options))  # names the right file in an error
    return PlasticityConfig.from_mapping({**trained, **given}, source=source)


def _later_seeds(folder: Path, asked: Sequence[int], step: str) -> Sequence[int]:
    """Seeds for a step after training: the given ones, or all of OUTPUT/TASK that have the files of earlier steps."""
    needed = [(TRAINED, TRAIN_STEP), *([(MEASURED, MEASURE_STEP)] if step == "report" else [])]
    ready: Sequence[int] = ()
    for file, remedy in needed:
        ready = [number for number, path in seed_folders(folder) if (path / file).exists()]
        lacking = [number for number in asked if number not in ready]
        if lacking or not ready:
            wanted = f"{file} of seed {lacking[0]}" if lacking else f"{file} of at least one seed"
            there = f"that of seed{'s' * (len(ready) > 1)} {listed(ready, 8)}" if ready else "none"
            raise InputError(f"{folder} must hold {wanted}, got {there}; run {remedy}{f' --seed {lacking[0]}' if lacking else ''}.")
    return asked or ready


def run_steps(steps: Sequence[str], studies: Sequence[PlasticityConfig]) -> None:
    """Runs each step of each study and prints a line on each. The report covers all seeds in the folder."""
    for study in studies:
        _check_paths(steps, study)
    from ..heads.plasticity.correlation import require_scipy
    from ..report.scan.figures import require_matplotlib

    if "report" in steps:  # before minutes of work, checks what the end of it needs
        require_scipy()
        require_matplotlib()
    for study in studies:
        lines: list[tuple[str, object]] = []
        with screen.Progress("loading") as bar:
            for step in steps:
                lines += _STEPS[step](study, partial(_show, bar, study.seed))
        print(screen.rows(lines), flush=True)  # hours may lie between two seeds
    if "report" in steps:
        print(screen.rows(_over_seeds(studies[0])))


def _show(bar: screen.Progress, seed: int, state: Progress) -> None:
    bar.update(state.fraction, f"seed {seed}: {state.text}" if state.text else f"seed {seed}", label=state.stage)


def _check_paths(steps: Sequence[str], study: PlasticityConfig) -> None:
    """Checks paths before the slow libraries are loaded; a complete training needs none of them."""
    trained = (study.folder / TRAINED).is_file()
    if "train" in steps and not trained:
        local_model(study.model_path)
    if study.data_path is not None and ("measure" in steps or not trained) and not Path(study.data_path).is_dir():
        data_kind(study.data_path)


def _train(study: PlasticityConfig, progress: Callable[..., None]) -> list[tuple[str, object]]:
    from ..heads.plasticity.training import train

    result = train(study, progress)
    summary = result.summary
    how = "kept from an earlier run" if result.kept else f"in {screen.duration(summary['seconds'])}"
    lines: list[tuple[str, object]] = [
        ("trained", f"seed {study.seed}, {screen.counted(summary['steps'], 'step')}, accuracy {summary['accuracy']:.3f}, {how}")
    ]
    if without := summary.get("unlabelled_rows"):
        lines.append(("left out", f"{screen.counted(without, 'row')} without a label"))
    return lines


def _measure(study: PlasticityConfig, progress: Callable[..., None]) -> list[tuple[str, object]]:
    from ..heads.plasticity.measurement import measure

    result = measure(study, progress)
    how = "kept from an earlier run" if result.kept else f"in {screen.duration(result.summary['seconds'])}"
    summary = result.summary
    lines: list[tuple[str, object]] = [
        ("measured", f"seed {study.seed}, {summary['heads']:,} heads over {summary['samples']:,} samples, {how}")
    ]
    accuracy, commonest = summary["base_accuracy_post"], summary["commonest_class"]
    if accuracy <= commonest:
        said = f"accuracy {accuracy:.2f}, commonest class {commonest:.2f}: training did no better than a constant prediction of that class"
        lines.append(("note", said))
    return lines


def _report(study: PlasticityConfig, progress: Callable[..., None]) -> list[tuple[str, object]]:
    import torch

    from ..heads import Progress, summarise
    from ..heads.plasticity.records import read_measured
    from ..heads.plasticity.train_folder import check_same, training_options
    from ..report import write_plasticity_page

    progress(Progress("reporting", None, ""))
    read_measured(study.folder)  # before the lock, which would create the folder
    options = training_options(study, torch.float32)
    with locked(study.folder):  # held until the page is drawn
        check_same(study.folder, {name: options[name] for name in options if name not in ("dtype", "batch_size")})  # as `measure` does
        summary = summarise(study)
        page = write_plasticity_page(summary.folder)
    return [*_findings(summary), ("page", page.html.resolve())]


_STEPS = {"train": _train, "measure": _measure, "report": _report}


def _findings(summary: PlasticitySummary) -> list[tuple[str, object]]:
    """Rank correlations and overlaps of importance with change, number of cases, and number of the expectations met."""
    counts, acceptance = summary.stats["counts"], summary.stats["acceptance"]
    lines: list[tuple[str, object]] = []
    for pair in summary.stats["pairs"]:
        rho = pair["reason"] if pair["rho"] is None else f"rho {pair['rho']:+.2f} (p {pair['p']:.2g})"
        overlap = pair["overlap"]
        share = overlap["reason"] or f"{overlap['share']:.2f}"
        lines.append((f"{pair['x']}, {pair['y']}", f"{rho}; top-{overlap['k']} overlap: {share}"))
    static, plastic = counts["important_but_static"], counts["plastic_but_unimportant"]
    lines.append(("cases", f"{static} important but static, {plastic} plastic but unimportant"))
    return [*lines, ("expectations", f"{sum(bool(row['met']) for row in acceptance)} of {len(acceptance)} met")]


def _over_seeds(study: PlasticityConfig) -> list[tuple[str, object]]:
    """Writes the page over all complete seeds of the task."""
    from ..heads.plasticity.seeds import SeedsDifferError, aggregate
    from ..report import write_plasticity_aggregate

    folder = study.folder.parent
    try:
        found = aggregate(folder)
    except SeedsDifferError as error:  # seeds of an earlier study with other options; the pages of this study remain
        return [("all seeds", f"not joined: {one_line(str(error))}")]
    page = write_plasticity_aggregate(folder)
    lines: list[tuple[str, object]] = [("all seeds", f"{len(found['seeds'])} complete")]
    lines += [("left out", f"{seed['folder']}: {seed['found']}; run {seed['step']}") for seed in found["incomplete"]]
    lines += [("note", note) for note in found["notes"]]
    return [*lines, ("page", page.html.resolve())]
