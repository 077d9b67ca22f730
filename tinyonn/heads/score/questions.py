"""Multiple-choice questions from a file: JSONL, a JSON list or Parquet, in any layout that a field map describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._io.records import field_names, open_records
from ...errors import InputError
from ..fields import AbsentError, FieldMap, Fields, find_field_map, load_field_map

DEFAULT_SAMPLES = 1024


@dataclass(frozen=True)
class Question(Fields):
    """One question of a data set.

    Attributes:
        question, context: texts without surrounding white space; context is None if the data set has none.
        labels, texts: labels and texts of the choices, in order.
        answer: number of the correct choice; None if the row has none, as in a test split. No score needs it.
        row: line number, or number of the record in a list or table; from 1.
    """

    row: int


@dataclass(frozen=True)
class QuestionSet:
    """Questions sampled from a file.

    Attributes:
        questions: questions in the order of the file.
        rows: number of records in the file.
        field_map: name of the field map used.
        unlabelled: number of records left out because they have no answer.
    """

    questions: tuple[Question, ...]
    rows: int
    field_map: str
    unlabelled: int = 0


def load_questions(
    data_path: str, *, field_map: str | None = None, max_samples: int | None = None, seed: int = 42, skip_unlabelled: bool = False
) -> QuestionSet:
    """Samples questions without replacement. With the same seed, a smaller sample is part of a larger one.

    The whole file is read. All records must be objects; only the sampled ones must be valid questions.

    Args:
        data_path: file of records.
        field_map: one of `builtin_field_maps()` or a YAML file; None detects it from the fields of the first record.
        max_samples: number of questions; None for all, up to 1,024.
        seed: seed of the row sampler.
        skip_unlabelled: sample only records with an answer.

    Raises:
        InputError: the file cannot be read, a line is malformed, a record lacks fields or is invalid, or the file has fewer than
            max_samples records.
    """
    records: list[tuple[int, Mapping[str, Any]]] = []
    file = open_records(data_path)
    place = f"{data_path}, {file.unit}"
    for located in file.located:
        if located.record is None:
            raise InputError(f"{place} {located.number}: {located.error}.")
        records.append((located.number, located.record))
    if not records:
        raise InputError(f"data_path must hold at least one record, got none in {data_path}.")
    chosen = load_field_map(field_map) if field_map is not None else _read(find_field_map, place, *records[0])
    rows = len(records)
    if skip_unlabelled:
        records = [(number, record) for number, record in records if _has_answer(chosen, record)]
        if not records:
            raise InputError(f"data_path must hold rows with an answer where skip_unlabelled is set, got {rows:,} without in {data_path}.")
    if max_samples is not None and max_samples > len(records):
        held = f"{len(records)} rows{' with an answer' if len(records) < rows else ''}"
        raise InputError(f"max_samples must be at most the {held} of {data_path}, got {max_samples}.")
    count = min(DEFAULT_SAMPLES if max_samples is None else max_samples, len(records))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(records))[:count])
    found = ((records[index][0], _read(chosen.read, place, *records[index])) for index in drawn.tolist())
    questions = tuple(Question(**vars(fields), row=row) for row, fields in found)
    return QuestionSet(questions, rows, chosen.name, rows - len(records))


def _has_answer(field_map: FieldMap, record: Mapping[str, Any]) -> bool:
    try:
        return field_map.read(record).answer is not None
    except InputError:  # raised only if the record is sampled
        return True


def _read(read: Callable[[Mapping[str, Any]], Any], place: str, row: int, record: Mapping[str, Any]) -> Any:
    """What `read` makes of a record; its errors name the place."""
    try:
        return read(record)
    except InputError as error:
        fields = f"; its fields are {field_names(record)}" if isinstance(error, AbsentError) else ""
        raise InputError(f"{place} {row}: {error}{fields}.") from None
