"""Classification tasks: fields of a record, training rows, evaluation rows, and batches of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._io.config import read_yaml
from ..._io.options import REQUIRED, Options, integer, non_empty, option
from ..._io.records import Located, as_number, field_names, is_no_label, open_records, short, whole
from ..._io.units import counted
from ...errors import InputError, did_you_mean, listed, needs, reason, shown

if TYPE_CHECKING:
    from .config import PlasticityConfig

TASKS = Path(__file__).parents[1] / "tasks"
SUFFIXES = (".jsonl", ".json", ".parquet")
EVAL_SIZE = 1024  # default of configuration and task
_SKIP = "; --skip-unlabelled leaves out rows without a label"
_EVALUATION_STEMS = ("validation", "dev")  # file names in a folder, after the task's own


def _fields(value: Any, name: str) -> tuple[str, ...]:
    """A check: the name of a field, or a list of names."""
    fields = [value] if isinstance(value, str) else value
    if not isinstance(fields, (list, tuple)) or not fields or not all(isinstance(field, str) and field for field in fields):
        raise InputError(f"{name} must be the name of a field, or a list of names, got {shown(value)}.")
    return tuple(fields)


def _classes(value: Any, name: str) -> tuple[str, ...]:
    """A check: names of at least two classes; no two are the same name or the same number."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(label, str) and label for label in value):
        raise InputError(f"{name} must be a list of names, in quotation marks where YAML reads them as something else, got {shown(value)}.")
    if len({label.casefold() for label in value}) != len(value) or len(value) < 2:
        raise InputError(f"{name} must be at least two different names, got {listed(value)}.")
    numbers = [number for number in map(as_number, value) if number is not None]
    if len(set(numbers)) != len(numbers):
        raise InputError(f"{name} must differ as numbers, got {listed(value)}.")
    return tuple(value)


@dataclass(frozen=True)
class Task(Options):
    """A classification task, as in its YAML file.

    Args:
        text: field of the text.
        label: field of the label, which is a number from 0, a name of `labels`, or true or false; of several fields, the first that exists.
        labels: names of the classes, in the order of their numbers.
        pair: field of a second text; None for a single text.
        dataset: name for the `datasets` package; None if the data are always files.
        subset: configuration of that data set.
        train: training split, and the stem of its file in a folder.
        evaluation: evaluation split, and the stem of its file in a folder.
        eval_size: number of evaluation rows, if the configuration has none.

    Raises:
        InputError: a value is invalid; the message names the field.
    """

    text: str = option(REQUIRED, non_empty)
    label: str | Sequence[str] = option(REQUIRED, _fields)
    labels: Sequence[str] = option(REQUIRED, _classes)
    pair: str | None = option(None, non_empty)
    dataset: str | None = option(None, non_empty)
    subset: str | None = option(None, non_empty)
    train: str = option("train", non_empty)
    evaluation: str = option("validation", non_empty)
    eval_size: int = option(EVAL_SIZE, integer(1))

    def number(self, value: Any) -> int | None:
        """Class number of a record's label, which is a name in any case or a number; None for no class."""
        names, value = [label.casefold() for label in self.labels], whole(value)
        if isinstance(value, str | bool | int) and str(value).strip().casefold() in names:
            return names.index(str(value).strip().casefold())
        if self.named_by_numbers:  # a number is a name, however it is written
            wanted = as_number(int(value) if isinstance(value, bool) else value)
            return next((at for at, name in enumerate(names) if wanted is not None and as_number(name) == wanted), None)
        if isinstance(value, bool):
            return int(value) if len(names) == 2 else None
        if re.fullmatch(r"\d{1,9}", str(value)) and isinstance(value, str | int):
            return int(value) if int(value) < len(names) else None
        return None

    @property
    def named_by_numbers(self) -> bool:
        """Whether the name of a class is a number. A number in the data is then a name, not a class number."""
        return any(as_number(label) is not None for label in self.labels)

    @property
    def known_labels(self) -> str:
        """Valid labels, for a message."""
        return listed(self.labels, room=48) + ("" if self.named_by_numbers else f" or a number from 0 to {len(self.labels) - 1}")


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task.

    Args:
        row: number of the row in its file or split, from 0.
        text, pair: texts to classify; pair is None in a task with single texts.
        label: class number.
    """

    row: int
    text: str
    pair: str | None
    label: int


Rows = tuple[list[Example], int]  # rows of a file or split, and the number left out without a label


@dataclass(frozen=True)
class TaskData:
    """The rows of a task.

    Args:
        labels: names of the classes, by number.
        train: training rows, by row number.
        evaluation: evaluation rows, by row number; the same for every training seed.
        source: source of `evaluation`: a file, or a data set and its split.
        repeated: number of training rows left out because their texts are in `evaluation`.
        unlabelled: number of rows left out because they have no label.
    """

    labels: tuple[str, ...]
    train: list[Example]
    evaluation: list[Example]
    source: str
    repeated: int
    unlabelled: int = 0

    def digest(self) -> str:
        """Hash of all rows in use, which detects a change of the data."""
        found = hashlib.blake2b(repr(self.labels).encode(), digest_size=16)
        for part in (self.train, self.evaluation):
            found.update(str(len(part)).encode())
            for example in part:
                found.update(repr((example.row, example.text, example.pair, example.label)).encode())
        return found.hexdigest()


def find_task(name: str) -> Task:
    """Built-in task by its name, or task from a YAML file by its path.

    Raises:
        InputError: neither exists, or the file is not a valid task.
    """
    own = name.endswith((".yaml", ".yml"))
    path = Path(name) if own else TASKS / f"{name}.yaml"
    known = sorted(file.stem for file in TASKS.glob("*.yaml"))
    if not own and name not in known:
        raise InputError(f"task must be {', '.join(known)} or the path of a YAML file, got {name!r}{did_you_mean(name, known)}")
    if not path.is_file():
        raise InputError(f"task must be {', '.join(known)} or the path of a YAML file, got {name!r}, which is no file.")
    values = read_yaml(path, "task")
    for field in ("text", "label", "labels"):
        if values.get(field) is None:
            raise InputError(f"{field} must be given in a task's YAML file, got {listed(values, none='nothing')} in {path}.")
    return Task.from_mapping(values, source=str(path))


def load_task(config: PlasticityConfig) -> TaskData:
    """Rows of the task in a configuration.

    A folder or the `datasets` package has separate splits for training and evaluation rows. From a single file, `eval_size` rows are held
    out. The choice of rows depends only on `eval_seed` and the row numbers; a smaller choice is part of a larger one.

    With `skip_unlabelled`, rows without a label (missing, null, blank, NaN, "-" or -1) are left out and counted.

    Raises:
        InputError: the data cannot be read, fields or labels are not those of the task, rows have no label (without `skip_unlabelled`),
            or there are too few rows or only one class.
    """
    task = find_task(config.task)
    size = task.eval_size if config.eval_size is None else config.eval_size
    got = f"{size:,}" if config.eval_size is not None else f"none, which means {size:,} (--eval-size)"
    skip = config.skip_unlabelled
    path = None if config.data_path is None else Path(config.data_path)
    if path is not None and not path.is_dir():
        held, unlabelled = _file_rows(path, task, skip)
        source = str(path)
        if len(held) <= size:
            rows = _counted(held, unlabelled)
            raise InputError(f"eval_size must be less than the {rows} of {path}, got {got}; the rest is trained on.")
        order = fixed_order(len(held), config.eval_seed)
        evaluation, pool = [held[i] for i in order[:size]], [held[i] for i in order[size:]]
    else:
        splits, source = _downloaded(task, skip) if path is None else _in_folder(path, task, skip)
        (train, evaluation), left_out = zip(*splits, strict=True)
        unlabelled = sum(left_out)
        if len(evaluation) < size:
            rows = _counted(evaluation, unlabelled)
            raise InputError(f"eval_size must be at most the {rows} of {source}, got {got}.")
        pool = [train[i] for i in fixed_order(len(train), config.eval_seed)]
        evaluation = [evaluation[i] for i in fixed_order(len(evaluation), config.eval_seed)[:size]]
    taken = {(example.text, example.pair) for example in evaluation}
    fresh = [example for example in pool if (example.text, example.pair) not in taken]
    if config.train_size is not None and len(fresh) < config.train_size:
        raise InputError(f"train_size must be at most the {len(fresh):,} rows there are to train on, got {config.train_size:,}.")
    by_row = attrgetter("row")
    parts = {"train": sorted(fresh[: config.train_size], key=by_row), "evaluation": sorted(evaluation, key=by_row)}
    for name, part in parts.items():
        classes = {example.label for example in part}
        if len(classes) < 2:
            repeated = f"none: all {len(pool):,} repeat what is measured" if pool else "none"
            only = f"only {task.labels[classes.pop()]!r} in {len(part):,}" if classes else repeated
            remedy = "; raise --eval-size" if name == "evaluation" else "; raise --train-size" if config.train_size is not None else ""
            raise InputError(f"{config.data_path or task.dataset} must hold {name} rows of at least two classes, got {only}{remedy}.")
    return TaskData(tuple(task.labels), parts["train"], parts["evaluation"], source, len(pool) - len(fresh), unlabelled)


def fixed_order(count: int, seed: int) -> list[int]:
    """Numbers 0 … count - 1 in an order that depends only on `seed`, and not on the random generator of a library."""
    return sorted(range(count), key=lambda row: hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest())


def batches(
    examples: Sequence[Example], tokenizer: Any, batch_size: int, max_length: int, device: torch.device | str
) -> Iterator[dict[str, Tensor]]:
    """Batches in the order of `examples`, each padded on the right to its longest row.

    Args:
        tokenizer: tokenizer with a padding token.
        max_length: tokens kept of a row; the longer text of a pair is cut first.

    Yields:
        input_ids, attention_mask and, if the tokenizer returns them, token_type_ids, each (B, T); labels (B,). All int64.
    """
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        pairs = [example.pair for example in part]
        encoded = tokenizer(
            [example.text for example in part],
            pairs if pairs[0] is not None else None,
            truncation=True,
            max_length=max_length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = torch.tensor([example.label for example in part])
        yield {name: tensor.to(device) for name, tensor in {**encoded, "labels": labels}.items()}


def _counted(rows: Sequence[Example], unlabelled: int) -> str:
    return counted(len(rows), "row") + (" with a label" if unlabelled else "")


def _in_folder(folder: Path, task: Task, skip: bool) -> tuple[list[Rows], str]:
    train = _file(folder, (task.train,))
    evaluation = _file(folder, tuple(dict.fromkeys((task.evaluation, *_EVALUATION_STEMS))))
    return [_file_rows(path, task, skip) for path in (train, evaluation)], str(evaluation)


def _file(folder: Path, stems: tuple[str, ...]) -> Path:
    for stem in stems:
        if found := [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]:
            if len(found) > 1:
                raise InputError(f"data_path must hold one file called {stem}, got {listed(path.name for path in found)} in {folder}.")
            return found[0]
    held = listed(sorted(path.name for path in folder.iterdir()), none="nothing")
    wanted = " or ".join(f"{stem}.jsonl" for stem in stems)
    raise InputError(f"data_path must be a file, or a folder with {wanted}, got {folder} (holds {held}).")


def _file_rows(path: Path, task: Task, skip: bool) -> Rows:
    records = open_records(path, "data_path")
    return _rows(records.located, records.unit, str(path), task, skip)


def _rows(records: Iterable[Located], unit: str, source: str, task: Task, skip: bool) -> Rows:
    found = [_example(located, row, task, f"{unit} {located.number} of {source}", skip) for row, located in enumerate(records)]
    examples = [example for example in found if example is not None]
    if not found:
        raise InputError(f"data_path must be a file of records, got none in {source}.")
    if not examples:
        fields = " or ".join(map(repr, task.label))
        raise InputError(f"data_path must hold rows with a label in {fields}, got {len(found):,} without in {source}.")
    return examples, len(found) - len(examples)


def _example(located: Located, row: int, task: Task, place: str, skip: bool) -> Example | None:
    """One row; None for a row without a label that is left out."""
    record = located.record
    if record is None:
        raise InputError(f"{place} {located.error}.")
    # Of several fields, the first with a value, else the first that exists.
    label_field = max(task.label, key=lambda name: (name in record) + (record.get(name) is not None))
    given = record.get(label_field)
    label, without = task.number(given), is_no_label(given)
    if label is None and without and skip:
        return None
    for name in filter(None, (task.text, task.pair, label_field)):
        if name in record and record[name] is None:
            hint = _SKIP if name == label_field else ""
            raise InputError(f"data_path must have a value in the field {name!r} of every row, got null in {place}{hint}.")
        if name not in record:
            wanted = " or ".join(map(repr, task.label if name == label_field else (name,)))
            hint = _SKIP if name == label_field and row else ""  # if the field has another name, the first row lacks it
            raise InputError(f"data_path must have the field {wanted} in every row, got {field_names(record)} in {place}{hint}.")
    text, pair = record[task.text], None if task.pair is None else record[task.pair]
    for name in filter(None, (task.text, task.pair)):
        if not isinstance(record[name], str):
            raise InputError(f"{name} must be text, got {short(record[name])} in {place}.")
        try:
            record[name].encode()
        except UnicodeEncodeError as error:  # JSON may contain half of a surrogate pair, which no tokenizer accepts
            raise InputError(f"{name} must be valid Unicode, got a lone surrogate in {place}.") from error
    if not f"{text}{pair or ''}".strip():
        raise InputError(f"{task.text} must not be empty, got a blank one in {place}.")
    if label is None:
        raise InputError(f"{label_field} must be one of {task.known_labels}, got {short(given)} in {place}{_SKIP if without else ''}.")
    return Example(row, text, pair, label)


def _downloaded(task: Task, skip: bool) -> tuple[list[Rows], str]:
    if task.dataset is None:
        raise InputError("data_path must be given for a task whose YAML file names no dataset, got none.")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{needs('without data_path, a task of the hub', 'datasets')}.") from error
    name = "/".join(filter(None, (task.dataset, task.subset)))
    parts = []
    for split in (task.train, task.evaluation):
        try:
            with _quiet_hub():
                table = datasets.load_dataset(task.dataset, task.subset, split=split)
        except Exception as error:  # the types of errors depend on version and transport
            wanted = f"data_path must be given where {name} ({split}) cannot be downloaded"
            raise InputError(f"{wanted}, got none: {reason(error)}") from error
        located = (Located(row, row, record) for row, record in enumerate(table))
        parts.append(_rows(located, "row", f"the {split} split of {name}", task, skip))
    return parts, f"{name} ({task.evaluation})"


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Hides the messages of the hub's client, which retries for half a minute without a network."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
