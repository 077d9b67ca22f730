"""Reading a corpus: what is taken for text, what is refused, and with which words."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from tinyonn.errors import InputError
from tinyonn.scan.corpus.corpus import read_corpus


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def test_plain_texts_come_in_order(jsonl: Path) -> None:
    corpus = read_corpus(write(jsonl, {"text": "first"}, {"content": "sécond"}))
    assert [item.text for item in corpus] == ["first", "sécond"]
    assert [item.messages for item in corpus] == [None, None]
    assert len(corpus) == 2
    assert corpus.skipped == 0


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, [("user", "a"), ("assistant", "b")]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [("user", "a"), ("assistant", "b")]),
        ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "x", "output": "b"}, [("user", "a\n\nx"), ("assistant", "b")]),
        ({"instruction": "a", "input": "", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"system": "s", "instruction": "a", "response": "b"}, [("system", "s"), ("user", "a"), ("assistant", "b")]),
        ({"passage": "p", "question": "q", "options": "A. x\nB. y", "answer": "A"}, [("user", "p\n\nq\n\nA. x\nB. y"), ("assistant", "A")]),
        ({"question": "q"}, [("user", "q")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}, [("user", "a")]),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            [("user", "a"), ("assistant", "b")],
        ),
    ],
    ids=["messages", "sharegpt", "prompt", "alpaca", "empty-input", "system", "passage", "bare-question", "parts", "prompt-chat"],
)
def test_chats_of_every_spelling(jsonl: Path, record: dict[str, object], turns: list[tuple[str, str]]) -> None:
    item = read_corpus(write(jsonl, record))[0]
    assert item.text is None
    assert [(turn["role"], turn["content"]) for turn in item.messages or []] == turns


def test_a_bare_prompt_is_text_to_go_on_from(jsonl: Path) -> None:
    assert read_corpus(write(jsonl, {"prompt": "def f("}))[0].text == "def f("


def test_text_field_names_text_or_chat(jsonl: Path) -> None:
    corpus = read_corpus(write(jsonl, {"text": "no", "body": "yes"}, {"body": [{"role": "user", "content": "hi"}]}), text_field="body")
    assert corpus[0].text == "yes"
    assert corpus[1].messages == [{"role": "user", "content": "hi"}]


def test_ids_are_the_records_own(jsonl: Path) -> None:
    assert read_corpus(write(jsonl, {"id": "a-1", "text": "x"}, {"id": 0, "text": "y"})).sequence_ids == ["a-1", "0"]


def test_an_id_longer_than_a_file_takes_is_named_with_its_line(jsonl: Path) -> None:
    write(jsonl, {"id": "x" * 65536, "text": "a"}, {"id": "é" * 32769, "text": "b"})
    with pytest.raises(InputError, match="line 2: id must take at most 65536 bytes, got 65538"):
        read_corpus(jsonl)
    assert len(read_corpus(jsonl, skip_bad=True)) == 1


def test_made_ids_survive_lines_added_before(tmp_path: Path) -> None:
    texts = [{"text": "one"}, {"text": "two"}, {"text": "one"}]
    before = read_corpus(write(tmp_path / "a.jsonl", *texts)).sequence_ids
    after = read_corpus(write(tmp_path / "b.jsonl", {"text": "new"}, *texts)).sequence_ids
    assert after[1:] == before
    assert len(set(before)) == 3
    assert before[2] == f"{before[0]}-2"


def test_random_access_equals_iteration(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    records = [{"id": f"r{index}", "text": f"text {index} é"} for index in range(50)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "data.parquet", row_group_size=7)
    (tmp_path / "data.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    write(tmp_path / "data.jsonl", *records)
    for name in ("data.jsonl", "data.json", "data.parquet"):
        corpus = read_corpus(tmp_path / name)
        assert [item.text for item in corpus] == [record["text"] for record in records], name
        assert [corpus[index] for index in range(50)] == list(corpus), name
        assert corpus[-1].sequence_id == "r49", name
        with pytest.raises(IndexError):
            corpus[50]


def test_the_content_decides_the_format(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('  [{"text": "a"}]', encoding="utf-8")
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}', encoding="utf-8")
    assert len(read_corpus(tmp_path / "list.jsonl")) == 1
    assert len(read_corpus(tmp_path / "lines.json")) == 2


def test_bom_blank_lines_and_dos_line_ends(jsonl: Path) -> None:
    jsonl.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}')
    corpus = read_corpus(jsonl)
    assert [item.text for item in corpus] == ["a", "b"]


def test_limit_reads_no_further(jsonl: Path) -> None:
    jsonl.write_text('{"text": "a"}\n{"text": "b"}\n{broken\n', encoding="utf-8")
    assert [item.text for item in read_corpus(jsonl, limit=2)] == ["a", "b"]
    with pytest.raises(InputError, match="line 3"):
        read_corpus(jsonl, limit=3)


def test_skip_bad_counts_every_kind(jsonl: Path) -> None:
    jsonl.write_bytes(
        b'{"text": "good", "id": 1}\n{broken\n[1]\n"text"\n{"txt": "x"}\n{"text": ""}\n{"text": 5}\n{"text": "\\ud800"}\n'
        b'{"text": "\xff"}\n{"text": "again", "id": 1}\n{"text": "also good"}\n'
    )
    corpus = read_corpus(jsonl, skip_bad=True)
    assert [item.text for item in corpus] == ["good", "also good"]
    assert corpus.skipped == 9
    assert len(corpus.errors) == 5
    assert "line 2" in corpus.errors[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", r"line 2: must be one JSON object, got malformed JSON \(.* at column 2\)\.$"),
        (b"[1, 2]", r"line 2: must be one JSON object, got a list\.$"),
        (b"null", r"line 2: must be one JSON object, got null\.$"),
        (b'{"body": "x", "n": 1}', r"line 2: must have one of the fields text, .*, its fields are body, n\.$"),
        (b"{}", r"its fields are none\.$"),
        (b'{"text": "  "}', r"line 2: text must not be empty\.$"),
        (b'{"text": ["a"]}', r"line 2: text must be text, got list"),
        (b'{"text": "\xe9"}', r"line 2: must be UTF-8, got byte 0xe9 at column 11\.$"),
        (b'{"text": "\\udc00"}', r"line 2: text must be valid Unicode, got a lone surrogate at character 0\.$"),
        (b'{"messages": []}', r"line 2: messages must be a non-empty list of turns, got list \[\]\.$"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\] must have role and content as text, its fields are role\.$"),
        (b'{"messages": ["hi"]}', r"messages\[0\] must be an object with role and content, got str 'hi'\.$"),
        (b'{"messages": [{"role": "user", "content": " "}]}', r"messages must hold some text, got only empty turns\.$"),
        (b'{"text": "b", "id": "one"}', r"line 2: must have an id of its own, got 'one', which line 1 has too\.$"),
        (b'{"text": "b", "id": ["x"]}', r"id must be a non-empty string or a whole number, got list"),
        (b'{"n": ' + b"9" * 5000 + b"}", r"line 2: must be one JSON object, got malformed JSON"),
        (b"[" * 100_000, r"line 2: must be one JSON object, got malformed JSON"),
    ],
    ids=[
        "broken", "list", "null", "no-field", "no-fields", "blank", "not-text", "latin-1", "surrogate", "no-turns", "no-content",
        "turn-no-object", "empty-turns", "duplicate", "odd-id", "huge-number", "deep",
    ],
)  # fmt: skip
def test_a_bad_line_is_named(jsonl: Path, line: bytes, message: str) -> None:
    jsonl.write_bytes(b'{"text": "a", "id": "one"}\n' + line + b"\n")
    with pytest.raises(InputError, match=message) as caught:
        read_corpus(jsonl)
    assert str(jsonl) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_text_field_names_those_there(jsonl: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: must have the field 'body', its fields are text, label\.$"):
        read_corpus(write(jsonl, {"text": "a", "label": 1}), text_field="body")


def test_bad_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n \n")
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(b"\x1f\x8b\x08" + bytes(20))
    wide = tmp_path / "wide.jsonl"
    wide.write_bytes('{"text": "a"}'.encode("utf-16"))
    all_bad = tmp_path / "bad.jsonl"
    all_bad.write_text("{x\n{y\n")
    broken_list = tmp_path / "list.json"
    broken_list.write_text('[\n{"text": "a"},\n{"text" "b"}\n]')
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, message in (
        (tmp_path / "none.jsonl", r"dataset_path must be an existing file, got .*none\.jsonl\."),
        (tmp_path, r"must be a file, got the folder .*; `tinyonn corpus` makes a file of a folder\."),
        (empty, r"must be a file of records, got an empty file"),
        (blank, r"must hold at least one good record, got none in"),
        (packed, r"must be a whole compressed file, got .*data\.jsonl\.gz: "),
        (wide, r"must be UTF-8, got UTF-16"),
        (broken_list, r"must be a JSON list, got malformed JSON in line 3 of"),
        (pipe, r"must be a file of records, got a pipe or device"),
        (tmp_path / ("x" * 300), r"must be a readable file, got .*: File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            read_corpus(path)
    with pytest.raises(InputError, match=r"got 2 malformed ones in .*line 1"):
        read_corpus(all_bad, skip_bad=True)
    with pytest.raises(InputError, match=r"limit must be a whole number of at least 1, got 0"):
        read_corpus(blank, limit=0)


def test_damaged_parquet_and_missing_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1" + bytes(100))
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="must be a whole Parquet file, got"):
        read_corpus(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match="needs pyarrow: pip install pyarrow"):
        read_corpus(path)


def test_a_file_that_changed_is_noticed(jsonl: Path) -> None:
    corpus = read_corpus(write(jsonl, {"text": "a"}, {"text": "b"}))
    jsonl.write_text('{"text": "longer than before"}\n')
    with pytest.raises(InputError, match="changed while it was read: line 2"):
        list(corpus)


def test_memory_does_not_grow_with_the_text(jsonl: Path) -> None:
    with open(jsonl, "w", encoding="utf-8") as file:
        for index in range(2000):
            file.write(json.dumps({"text": f"{index} " + "x" * 20_000}) + "\n")
    tracemalloc.start()
    corpus = read_corpus(jsonl)
    characters = sum(len(item.text or "") for item in corpus)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert characters > 40_000_000
    assert peak < 2_000_000
