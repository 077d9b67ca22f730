"""Multiple-choice questions from a file: JSONL, a JSON list or Parquet, in any layout that a field map describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._io.records import field_names, open_records
from ...errors import InputError
from ..fields import AbsentError, FieldMap, Fields, find_field_map, load_field_map

DEFAULT_SAMPLES = 1024


@dataclass(frozen=True)
class Question(Fields):
    """One row of a data set.

    Attributes:
        question, context: texts without the white space around them; context None where the data set has none.
        labels, texts: of the choices, in order.
        answer: number of the right choice, None where the row does not say (a test split). No score needs it.
        row: line of the file, or the record's number in a list or table; from 1.
    """

    row: int


@dataclass(frozen=True)
class QuestionSet:
    """Questions drawn from a file.

    Attributes:
        questions: in the file's order.
        rows: records of the file.
        field_map: name of the one they were read by.
        unlabelled: records left out because they have no answer.
    """

    questions: tuple[Question, ...]
    rows: int
    field_map: str
    unlabelled: int = 0


def load_questions(
    data_path: str, *, field_map: str | None = None, max_samples: int | None = None, seed: int = 42, skip_unlabelled: bool = False
) -> QuestionSet:
    """Draws questions without replacement; those drawn for one number are among those drawn for a larger one with the same seed.

    The whole file is read, and every record must be an object; only those drawn must be well-formed questions.

    Args:
        data_path: the file.
        field_map: one of `builtin_field_maps()` or a YAML file; None finds it from the fields of the first record.
        max_samples: how many; None for all of up to 1,024.
        seed: of the draw.
        skip_unlabelled: draw only from records with an answer.

    Raises:
        InputError: the file cannot be read, a line is malformed, a record lacks fields (naming those it has) or breaks a rule, or there
            are fewer than max_samples.
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
    chosen = load_field_map(field_map) if field_map is not None else _found(place, *records[0])
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
    questions = tuple(_question(place, chosen, *records[int(index)]) for index in drawn)
    return QuestionSet(questions, rows, chosen.name, rows - len(records))


def _has_answer(field_map: FieldMap, record: Mapping[str, Any]) -> bool:
    try:
        return field_map.read(record).answer is not None
    except InputError:  # told if it is drawn
        return True


def _found(place: str, row: int, record: Mapping[str, Any]) -> FieldMap:
    try:
        return find_field_map(record)
    except InputError as error:
        raise _located(error, place, row, record) from None


def _question(place: str, field_map: FieldMap, row: int, record: Mapping[str, Any]) -> Question:
    try:
        return Question(**vars(field_map.read(record)), row=row)
    except InputError as error:
        raise _located(error, place, row, record) from None


def _located(error: InputError, place: str, row: int, record: Mapping[str, Any]) -> InputError:
    fields = f"; its fields are {field_names(record)}" if isinstance(error, AbsentError) else ""
    return InputError(f"{place} {row}: {error}{fields}.")
