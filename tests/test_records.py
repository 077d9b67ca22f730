"""Records of a file are the same in every layout; what is wrong with one is told with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyonn._io.records import Located, field_names, open_records, read_records, short
from tinyonn.errors import InputError

ROWS = [{"text": f"row {index}", "label": index % 3} for index in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def parquet(path: Path, **options: object) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), path, **options)
    return path


def written(path: Path, kind: str) -> Path:
    if kind == "parquet":
        return parquet(path)
    path.write_text(LINES if kind == "jsonl" else json.dumps(ROWS))
    return path


@pytest.mark.parametrize(("kind", "unit", "extent"), [("jsonl", "line", len(LINES)), ("list", "record", 5), ("parquet", "record", 5)])
def test_every_layout_gives_the_same_records(tmp_path, kind, unit, extent):
    records = open_records(written(tmp_path / "data", kind))
    found = list(records.located)
    assert [located.record for located in found] == ROWS
    assert [located.number for located in found] == [1, 2, 3, 4, 5]
    assert (records.unit, records.extent) == (unit, extent)
    starts = [LINES.index(line) for line in LINES.splitlines()]
    assert [located.offset for located in found] == (starts if kind == "jsonl" else list(range(5)))


def test_a_malformed_record_does_not_hide_the_others(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\nnot json\n[2]\n{"a": 3}\n')
    found = list(read_records(tmp_path / "a.jsonl"))
    assert [(located.number, located.record) for located in found] == [(1, {"a": 1}), (3, None), (4, None), (5, {"a": 3})]
    assert found[1].error == "must be one JSON object, got malformed JSON (Expecting value at column 1)"
    assert found[2].error == "must be one JSON object, got a list"
    (tmp_path / "b.json").write_text('[{"a": 1}, "x"]')
    assert list(read_records(tmp_path / "b.json")) == [
        Located(1, 0, {"a": 1}),
        Located(2, 1, None, "must be one JSON object, got a string"),
    ]


def test_a_file_that_cannot_be_read_is_refused_by_its_option_before_a_record_is_asked_for(tmp_path):
    (tmp_path / "empty").touch()
    for name, words in (("none", "an existing file"), ("empty", "a file of records, got an empty file"), (".", "a file, got the folder")):
        with pytest.raises(InputError, match=f"^data_path must be {words}"):
            read_records(tmp_path / name)
    (tmp_path / "list").write_text("[1,")
    with pytest.raises(InputError, match=r"^train_file must be a JSON list, got malformed JSON in line 1 of "):
        read_records(tmp_path / "list", "train_file")


def test_a_table_with_a_damaged_page_is_told_in_one_line(tmp_path):
    path = parquet(tmp_path / "a.parquet", compression="gzip", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[60:120] = bytes(60)
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"^data_path must be a whole Parquet file, got .*a\.parquet: ") as raised:
        list(read_records(path))
    assert "\n" not in str(raised.value)


def test_fields_and_values_are_short_in_messages():
    assert field_names({}) == "none"
    assert field_names({"a": 1, "b" * 50: 2}) == f"a, {'b' * 37}..."
    assert field_names(dict.fromkeys("abcdefghijklmnop")) == "a, b, c, d, e, f, g, h, i, j, k, l and 4 more"
    assert short("two\nlines") == r"str 'two\nlines'"
    assert short("x" * 99) == f"str '{'x' * 56}..."
    assert short("a 'b' \"c\"") == """str 'a \\'b\\' "c"'"""
    assert short([1, {"a": None}]) == "list [1, {'a': None}]"
    assert short(10**70).startswith("int 1000")
    deep: object = "x"
    for _ in range(9):
        deep = [deep] * 10
    assert short(deep).startswith("list [[[[...")  # 10**9 texts, never written out
    assert len(short(deep)) == len("list ") + 60


def test_a_line_that_ends_too_early_is_told_with_its_own_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a"\n')
    found = list(read_records(path))
    assert found[1].error == "must be one JSON object, got malformed JSON (Expecting ':' delimiter at column 5)"
