"""JSON that one step of the laboratory writes and another reads: what is wrong names the file and the command."""

from __future__ import annotations

import json

import pytest

from tinyonn.errors import InputError
from tinyonn.heads.step_files import is_finite, read_json, read_record


def test_json_of_the_wanted_kind_is_read(tmp_path):
    path = tmp_path / "a.json"
    for kind, value in ((dict, {"a": [1, None]}), (list, [{"a": 0.5}])):
        path.write_text(json.dumps(value))
        assert read_json(path, kind, "tinyonn make") == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must exist, got no such file; run tinyonn make."),
        (b'{"a": 1', "must be valid JSON, got: Expecting ',' delimiter: line 1 column 8 (char 7); run "),
        (b"\xff", "must be valid JSON, got: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; run "),
        (b"[" * 100_000, "must be valid JSON, got: maximum recursion depth exceeded"),
        (b"[1]", "must be a JSON object, got list; run "),
        (b"null", "must be a JSON object, got NoneType; run "),
    ],
    ids=["missing", "cut", "no text", "deep", "list", "null"],
)
@pytest.mark.parametrize(("again", "remedy"), [(None, "tinyonn make again."), ("tinyonn make --overwrite", "tinyonn make --overwrite.")])
def test_json_that_is_not_whole_names_the_command_that_writes_it(tmp_path, content, message, again, remedy):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_json(path, dict, "tinyonn make", again)
    said = str(raised.value)
    assert said.startswith(f"{path} {message}")
    assert content is None or said.endswith(f"; run {remedy}")
    assert "\n" not in said


def test_json_that_cannot_be_read_is_told_with_the_reason(tmp_path):
    with pytest.raises(InputError, match=r"must be a file that can be read, got: Is a directory\.$"):
        read_json(tmp_path, dict, "tinyonn make")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "have a number as loss, got none"),
        ({"loss": "0.5"}, "have a number as loss, got str '0.5'"),
        ({"loss": True}, "have a number as loss, got bool True"),
        ({"loss": float("nan")}, "have a number as loss, got float nan"),
        ({"loss": 10**400}, "have a number as loss, got int 1000"),
        ({"loss": 1, "heads": 2.0}, "have a whole number as heads, got float 2.0"),
        ({"loss": 1, "heads": 2, "rho": []}, "have a number or null as rho, got list []"),
    ],
    ids=["missing", "text", "truth", "nan", "beyond a float", "no whole number", "list"],
)
def test_a_record_has_every_field_that_is_read(tmp_path, record, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError) as raised:
        read_record(path, {"loss": "a number", "heads": "a whole number", "rho": "a number or null"}, "tinyonn make")
    assert str(raised.value).startswith(f"{path} must {said}")
    assert str(raised.value).endswith("; run tinyonn make again.")


def test_a_whole_record_is_read(tmp_path):
    record = {"loss": 3, "heads": 2, "rho": None, "more": []}
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert read_record(tmp_path / "a.json", {"loss": "a number", "heads": "a whole number", "rho": "a number or null"}, "make") == record
    assert [is_finite(value) for value in (0, -1.5, 10**300, False, "1", None, float("inf"), 10**400)] == [True] * 3 + [False] * 5
