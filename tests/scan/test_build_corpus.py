"""Cutting a topical corpus: what is kept, why the rest is dropped, and what never happens to the output."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinyonn.errors import InputError
from tinyonn.scan.corpus import sources
from tinyonn.scan.corpus.build import CorpusProgress, build_corpus, cut_text
from tinyonn.scan.corpus.corpus import read_corpus
from tinyonn.scan.corpus.language import guess_language
from tinyonn.scan.corpus.topic import Topic, builtin_topics, load_topic

CATS = Topic("cats", keywords=("cat", "kitten", "purring sound"))
LONG = " and it slept in the sun until evening"


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def texts(path: Path) -> list[str]:
    return [item.content for item in read_corpus(path)]


def test_keeps_the_topic_and_counts_the_rest(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl",
        {"id": "a", "text": "The cat sat on the mat" + LONG},
        {"id": "b", "text": "The dog sat on the mat" + LONG},
        {"id": "c", "text": "The CAT  sat on the mat" + LONG},
        {"id": "d", "text": "A cat."},
        {"id": "e", "text": "Concatenation and category" + LONG},
        {"id": "f", "messages": [{"role": "user", "content": "Two kittens" + LONG}]},
    )
    report = build_corpus(source, CATS, tmp_path / "out.jsonl")
    assert report.kept == 2
    assert report.read == 6
    assert report.dropped == {"off topic": 2, "duplicate": 1, "shorter than 32 characters": 1}
    rows = [json.loads(line) for line in report.output.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["a", "f"]
    assert rows[1]["messages"] == [{"role": "user", "content": "Two kittens" + LONG}]
    assert rows[0]["source"] == f"{source}, line 1"
    assert report.characters == sum(map(len, texts(report.output)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a cat", None),
        ("Cats!", None),
        ("a PURRING\n sound", None),
        ("purring sounds", None),
        ("the category", "off topic"),
        ("purring", "off topic"),
        ("wildcat", "off topic"),
    ],
)
def test_keywords_are_whole_words_in_any_case_and_number(text: str, reason: str | None) -> None:
    assert CATS.reject(text) == reason


def test_matches_must_be_different_ones() -> None:
    topic = Topic("t", keywords=("cat", "dog", "c++"), patterns=(r"\d+ lives",), min_matches=2)
    assert topic.reject("cat cats cat") == "off topic"
    assert topic.reject("cat and dog") is None
    assert topic.reject("a cat with 9 lives") is None
    assert topic.reject("C++ for dogs") is None
    assert topic.reject("c for dogs") == "off topic"
    assert Topic("t", keywords=("->",)).reject("a -> b") is None
    assert Topic("t", keywords=("Cat", "cat"), patterns=("x",), min_matches=2).reject("a cat") == "off topic"  # one keyword, written twice


def test_density_and_exclusion() -> None:
    topic = Topic("t", keywords=("cat",), patterns=("meow",), exclude=("(?i)advert",), min_density=10)
    assert topic.reject("cat " * 3 + "x" * 200) is None
    assert topic.reject("cat meow meow " + "x" * 200) is None
    assert topic.reject("cat" + "x" * 2000) == "off topic"
    assert topic.reject("cat " + "x" * 2000) == "too thin on the topic"
    assert topic.reject("cat Advertisement") == "excluded by a pattern"


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("python", "import os\n\ndef main() -> None:\n    print(os.name)\n", "The python is a large snake of Asia and Africa."),
        ("finance", "The central bank raised interest rates by 0.5 percent to slow inflation.", "The C-H bond joins carbon and hydrogen."),
        ("math", "Prove the theorem: if n is a prime number then the polynomial has no square root.", "She went home after the play."),
        ("math", "Sandra had six cups and Marcie two cups. How many cups did they have?", "Which of the two paintings is in Paris?"),
    ],
)
def test_built_in_topics(name: str, inside: str, outside: str) -> None:
    topic = load_topic(name)
    assert topic.reject(inside) is None
    assert topic.reject(outside) == "off topic"


def test_there_are_three_built_in_topics() -> None:
    assert builtin_topics() == ["finance", "math", "python"]
    assert all(load_topic(name).name == name and load_topic(name).description for name in builtin_topics())


def test_topic_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "birds.yaml"
    path.write_text("keywords: [heron, stork]\nmin_matches: 2\n", encoding="utf-8")
    topic = load_topic(str(path))
    assert topic.name == "birds"
    assert topic.reject("a heron and a stork") is None
    assert topic.reject("a heron") == "off topic"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("keywords: heron", r"keywords must be a list of non-empty strings, got 'heron'"),
        ("keywords: [1]", r"keywords must be a list of non-empty strings"),
        ("keyword: [a]", r"key must be one of name, .*, got 'keyword'; did you mean 'keywords'\?"),
        ("patterns: ['(']", r"patterns must be regular expressions, got '\('"),
        ("min_matches: 3\nkeywords: [a]", r"min_matches must be at most its 1 keywords and patterns, got 3"),
        ("min_matches: 0", r"min_matches must be a whole number of at least 1, got 0"),
        ("min_density: -1", r"min_density must be at least 0 and finite, got -1"),
        ("name: ../x", r"topic must be letters, digits"),
        ("- a", r"topic must be a YAML mapping of options, got list"),
        ("a: [", r"topic must be valid YAML"),
        ("name: 2024-99-99", r"topic must be valid YAML, got .*t\.yaml: month must be in 1..12"),
        ("description: [a]", r"description must be text"),
    ],
)
def test_bad_topic_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_topic(str(path))
    assert "\n" not in str(caught.value)


def test_an_output_that_is_the_source_or_no_file_is_left_alone(tmp_path: Path) -> None:
    source, link, pipe = tmp_path / "a.jsonl", tmp_path / "link.jsonl", tmp_path / "pipe"
    source.write_text('{"text": "a text of some length, about python"}\n')
    link.symlink_to(source)
    os.mkfifo(pipe)
    before = source.read_bytes()
    for output in (source, link):
        with pytest.raises(InputError, match=r"output must be another file than the source, got .*\.jsonl"):
            build_corpus(source, "python", output, overwrite=True)
    with pytest.raises(InputError, match=r"output must be a file, got a pipe or device: .*pipe"):
        build_corpus(source, "python", pipe, overwrite=True)
    assert source.read_bytes() == before
    assert pipe.is_fifo()


def test_unknown_topics(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"topic must be one of finance, math, python or a YAML file, .* got 'cooking'"):
        load_topic("cooking")
    with pytest.raises(InputError, match=r"topic must be a readable file, got .*none\.yaml: No such file"):
        load_topic(str(tmp_path / "none.yaml"))


def test_the_sample_is_seeded_uniform_and_in_order(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *({"id": str(index), "text": f"cat number {index:02} {LONG}"} for index in range(20)))
    chosen: Counter[str] = Counter()
    for seed in range(200):
        report = build_corpus(source, CATS, tmp_path / "out.jsonl", limit=5, seed=seed, overwrite=True)
        ids = read_corpus(report.output).sequence_ids
        assert len(ids) == 5
        assert sorted(ids, key=int) == ids
        assert report.dropped == {"not in the sample": 15}
        chosen.update(ids)
    # 200 draws of 5 in 20: 50 each on average, standard deviation 6.1.
    assert all(25 < chosen[str(index)] < 75 for index in range(20))
    first = build_corpus(source, CATS, tmp_path / "a.jsonl", limit=5, seed=7).output.read_bytes()
    assert build_corpus(source, CATS, tmp_path / "b.jsonl", limit=5, seed=7).output.read_bytes() == first


def test_first_reads_no_further(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        json.dumps({"text": "one cat" + LONG}) + "\n" + json.dumps({"text": "two cats" + LONG}) + "\n{broken", encoding="utf-8"
    )
    report = build_corpus(source, CATS, tmp_path / "out.jsonl", limit=2, first=True)
    assert texts(report.output) == ["one cat" + LONG, "two cats" + LONG]
    with pytest.raises(InputError, match=r"in\.jsonl, line 3: must be one JSON object"):
        build_corpus(source, CATS, tmp_path / "other.jsonl", limit=2)


def test_malformed_records_stop_or_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "one cat" + LONG}) + "\n{broken\n" + json.dumps({"body": "x"}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2: must be one JSON object"):
        build_corpus(source, CATS, tmp_path / "out.jsonl")
    assert os.listdir(tmp_path) == ["in.jsonl"]  # neither the output nor a part of it
    report = build_corpus(source, CATS, tmp_path / "out.jsonl", skip_bad=True)
    assert report.kept == 1
    assert report.bad == 2
    assert report.dropped == {"malformed": 2}
    assert "line 3" in report.errors[1]


def test_length_and_token_limits(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *({"text": "cat " * count} for count in (1, 10, 20, 30, 40)))

    def tokenizer(text: str) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    report = build_corpus(
        source, CATS, tmp_path / "out.jsonl", min_chars=8, max_chars=130, min_tokens=15, max_tokens=25, tokenizer=tokenizer
    )
    assert texts(report.output) == ["cat " * 20]
    assert report.dropped == {
        "shorter than 8 characters": 1,
        "longer than 130 characters": 1,
        "fewer than 15 tokens": 1,
        "more than 25 tokens": 1,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "xml"}, "format must be one of auto, text, chat, got 'xml'"),
        ({"code_blocks": "no"}, "code_blocks must be one of"),
        ({"language": "tlh"}, "language must be one of .*, got 'tlh'"),
        ({"min_chars": 50, "max_chars": 10}, "max_chars must be at least 50, got 10"),
        ({"min_chars": -1}, "min_chars must be a whole number of at least 0, got -1"),
        ({"min_tokens": 5}, "min_tokens and max_tokens need a tokenizer, got none"),
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
        ({"first": True}, "first needs a limit, got none"),
        ({"min_char": 1}, r"^build_corpus: option must be a known one, got 'min_char'; did you mean 'min_chars'.*\?$"),
        ({"cut": True}, "cut needs max_chars, got none"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "in.jsonl", {"text": "cat" + LONG})
    with pytest.raises(InputError, match=message):
        build_corpus(source, CATS, tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("topic", [Path(), None, {}, ["cat"]], ids=lambda topic: type(topic).__name__)
def test_a_topic_of_another_type_is_named(tmp_path: Path, topic: Any) -> None:
    source = write(tmp_path / "in.jsonl", {"text": "cat" + LONG})
    with pytest.raises(TypeError, match=f"^topic must be a Topic, the name .*, got {type(topic).__name__}"):
        build_corpus(source, topic, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_formats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "A cat?" + LONG}, {"role": "assistant", "content": "Yes."}]
    source = write(tmp_path / "in.jsonl", {"messages": chat}, {"text": "The kitten" + LONG})
    assert texts(build_corpus(source, CATS, tmp_path / "a.jsonl", format="text").output) == [
        "A cat?" + LONG + "\n\nYes.",
        "The kitten" + LONG,
    ]
    assert read_corpus(tmp_path / "a.jsonl")[0].messages is None
    report = build_corpus(source, CATS, tmp_path / "b.jsonl", format="chat")
    assert read_corpus(report.output)[0].messages == chat
    assert report.dropped == {"not a chat": 1}


def test_code_blocks(tmp_path: Path) -> None:
    topic = Topic("code", code_languages=("python",))
    fenced = "Look:\n\n```python\ndef f(x):\n    return x + 1\n```\n\nand\n\n~~~ python title=x\nf(2)  # three\n~~~\n\n```sh\nls\n```\n"
    source = write(
        tmp_path / "in.jsonl", {"text": fenced}, {"text": "No code, only words" + LONG}, {"text": "```sh\nls -l /tmp /home /var\n```\n"}
    )
    report = build_corpus(source, topic, tmp_path / "only.jsonl", code_blocks="only")
    assert texts(report.output) == ["def f(x):\n    return x + 1\n\nf(2)  # three\n"]
    assert report.dropped == {"no code block": 2}
    assert texts(build_corpus(source, topic, tmp_path / "require.jsonl", code_blocks="require").output) == [fenced]
    assert len(Topic("any").code_blocks(fenced)) == 3


def test_dedup_can_be_off_and_knows_unicode_forms(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"id": 1, "text": "cat caf\u00e9" + LONG}, {"id": 2, "text": "Cat cafe\u0301 " + LONG})
    assert build_corpus(source, CATS, tmp_path / "a.jsonl").dropped == {"duplicate": 1}
    assert build_corpus(source, CATS, tmp_path / "b.jsonl", dedup=False).kept == 2


def test_a_folder_of_code_and_records(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    (root / "pkg" / "__pycache__").mkdir(parents=True)
    (root / ".git").mkdir()
    function = "def f_{0}(value):\n    '''Adds {0}.'''\n    return value + {0}\n"
    (root / "pkg" / "many.py").write_text("\n\n".join(function.format(index) for index in range(40)), encoding="utf-8")
    (root / "pkg" / "latin.py").write_bytes(b"# caf\xe9 " + b"x" * 50)
    (root / "pkg" / "empty.py").touch()
    (root / "pkg" / "__pycache__" / "many.pyc").write_bytes(bytes(100))
    (root / "picture.png").write_bytes(b"\x89PNG\0" + bytes(100))
    (root / ".git" / "config.py").write_text("import os\nimport sys\nimport this_is_hidden\n", encoding="utf-8")
    (root / "notes.txt").write_text("Nothing about programming here, only birds." + LONG, encoding="utf-8")
    write(root / "rows.jsonl", {"id": "r1", "text": "import os\n\ndef main():\n    print(os.name)\n"})
    os.symlink(root, root / "loop")
    report = build_corpus(root, "python", tmp_path / "out.jsonl", max_chars=400)
    assert report.dropped == {"not a text file": 2, "empty": 1, "off topic": 1}
    pieces = texts(report.output)
    assert pieces[0].startswith("import os")
    assert all(len(piece) <= 400 for piece in pieces)
    assert all(piece.startswith("def f_") and piece.rstrip().endswith(tuple("0123456789")) for piece in pieces[1:])  # whole functions
    assert sum(piece.count("def f_") for piece in pieces) == 40
    assert json.loads(report.output.read_text(encoding="utf-8").splitlines()[1])["source"] == "pkg/many.py"
    assert build_corpus(root, "python", tmp_path / "again.jsonl", max_chars=400).output.read_bytes() == report.output.read_bytes()


def test_files_of_a_folder_in_another_encoding_or_archive_are_counted_by_kind(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "good.txt").write_text("A cat" + LONG, encoding="utf-8")
    for name in ("a.txt", "b.txt"):
        (root / name).write_bytes(("A cat" + LONG).encode("utf-16"))
    (root / "c.txt").write_bytes(("A cat" + LONG).encode("utf-32-le"))
    (root / "d.zip").write_bytes(b"PK\x03\x04" + bytes(60))
    report = build_corpus(root, CATS, tmp_path / "out.jsonl")
    assert report.dropped == {
        "UTF-16; `iconv -f UTF-16 -t UTF-8` converts it": 2,
        "UTF-32LE; `iconv -f UTF-32LE -t UTF-8` converts it": 1,
        "a zip archive; unpack it first": 1,
    }
    (root / "good.txt").unlink()
    with pytest.raises(InputError, match="2 UTF-16; `iconv -f UTF-16 -t UTF-8` converts it"):
        build_corpus(root, CATS, tmp_path / "none.jsonl")


def test_cut_or_drop_long_records(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"id": "long", "text": "The cat slept.\n\n" * 20})
    with pytest.raises(InputError, match=r"got 1 records of .*: 1 longer than 100 characters"):
        build_corpus(source, CATS, tmp_path / "a.jsonl", max_chars=100, dedup=False)
    report = build_corpus(source, CATS, tmp_path / "b.jsonl", min_chars=1, max_chars=100, cut=True, dedup=False)
    assert read_corpus(report.output).sequence_ids[:2] == ["long.1", "long.2"]
    assert sum(text.count("cat") for text in texts(report.output)) == 20


@pytest.mark.parametrize(
    "text",
    ["word " * 300, "x" * 1000, "One. Two! Three? " * 60, "line\n" * 200, "para\n\n" * 200, "  indented\n\n    more\n\n" * 50],
    ids=["words", "solid", "sentences", "lines", "paragraphs", "indented"],
)
@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_cutting_loses_nothing_but_space(text: str, size: int) -> None:
    pieces = list(cut_text(text, size))
    assert all(0 < len(piece) <= size for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_a_cut_prefers_the_better_boundary() -> None:
    assert next(cut_text("a b c d\n\ne f g. h i\nj k l m n", 20)) == "a b c d\n\ne f g. h i"
    assert next(cut_text("aa bb cc\n\ndd ee. ff gg", 16)) == "aa bb cc"
    assert next(cut_text("aaaa bbbb. cccc dddd", 16)) == "aaaa bbbb."
    assert next(cut_text("import a\n\n    x\n\ndef f():\n    y\n", 28)) == "import a\n\n    x"


def test_parquet_and_single_text_files(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([{"text": "A cat" + LONG}, {"text": "A dog" + LONG}]), tmp_path / "in.parquet")
    assert texts(build_corpus(tmp_path / "in.parquet", CATS, tmp_path / "a.jsonl").output) == ["A cat" + LONG]
    (tmp_path / "book.txt").write_text("\ufeffThe kitten" + LONG + "\r\nand more", encoding="utf-8")
    assert texts(build_corpus(tmp_path / "book.txt", CATS, tmp_path / "b.jsonl").output) == ["The kitten" + LONG + "\nand more"]


def test_the_output_is_never_half_there(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"text": "one cat" + LONG}, {"text": "two cats" + LONG})
    output = tmp_path / "out.jsonl"
    output.write_text("precious", encoding="utf-8")
    with pytest.raises(InputError, match=r"output must not exist yet, got .*; --overwrite replaces it\."):
        build_corpus(source, CATS, output)

    def stop(state: CorpusProgress) -> None:
        if state.read == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(source, CATS, output, overwrite=True, progress=stop)
    assert output.read_text(encoding="utf-8") == "precious"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    build_corpus(source, CATS, output, overwrite=True)
    assert len(texts(output)) == 2
    mask = os.umask(0)
    os.umask(mask)
    assert output.stat().st_mode & 0o777 == 0o666 & ~mask


def test_outputs_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.jsonl", {"text": "one cat" + LONG})
    with pytest.raises(InputError, match="output must be a file, got the folder"):
        build_corpus(source, CATS, tmp_path)
    with pytest.raises(InputError, match=r"output must be in a folder that can be written, got .*: (Not a directory|File exists)"):
        build_corpus(source, CATS, source / "out.jsonl")
    monkeypatch.chdir(tmp_path)
    assert build_corpus(source, CATS).output == Path("data/sft/cats_corpus.jsonl")
    assert len(read_corpus("data/sft/cats_corpus.jsonl")) == 1


def test_nothing_kept_says_why(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"text": "a dog" + LONG}, {"text": "dog"})
    with pytest.raises(InputError, match=r"got 2 records of .*: 1 off topic, 1 shorter than 32 characters\."):
        build_corpus(source, CATS, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_progress_goes_from_none_to_all(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *({"text": f"cat {index}" + LONG} for index in range(10)))
    states: list[CorpusProgress] = []
    build_corpus(source, CATS, tmp_path / "out.jsonl", limit=4, progress=states.append)
    assert [state.read for state in states] == list(range(1, 11))
    assert states[-1].kept == 4
    fractions = [state.fraction for state in states]
    assert fractions == sorted(fractions)  # type: ignore[type-var]
    assert fractions[0] == 0
    assert fractions[-1] == pytest.approx(0.9, abs=0.01)


def fake_hub(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    monkeypatch.setattr(sources, "_online", lambda: True)


def test_a_data_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return iter([{"text": "A cat" + LONG}, {"text": "A dog" + LONG}])

    fake_hub(monkeypatch, load)
    report = build_corpus("owner/pets", CATS, tmp_path / "out.jsonl", subset="small", split="validation")
    assert asked == [(("owner/pets", "small"), {"split": "validation", "streaming": True})]
    assert texts(report.output) == ["A cat" + LONG]
    assert json.loads(report.output.read_text(encoding="utf-8"))["source"] == "owner/pets, record 1"


def test_a_hub_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*names: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe Hub")

    fake_hub(monkeypatch, load)
    with pytest.raises(InputError, match=r"there is no such file, and the hub says: Couldn't reach the Hub$"):
        build_corpus("owner/pets", CATS, tmp_path / "out.jsonl")
    monkeypatch.setattr(sources, "_online", lambda: False)
    with pytest.raises(InputError, match=r"the hub cannot be reached\.$"):
        build_corpus("owner/pets", CATS, tmp_path / "out.jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"the hub needs datasets: pip install datasets\."):
        build_corpus("owner/pets", CATS, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("source", "hub"),
    [
        ("squad", True),
        ("owner/pets-2", True),
        ("data/rows.jsonl", False),
        ("./pets", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("rows.csv", False),
    ],
)
def test_mistyped_paths_are_not_asked_of_the_hub(tmp_path: Path, source: str, hub: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.is_hub_name(source) == hub
    if not hub:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="source must be an existing file or folder, or the name of a data set on the hub, got"):
            build_corpus(source, CATS, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat sat on the mat and it was not amused by what they did.", "en"),
        ("Die Katze saß auf der Matte und war nicht zufrieden mit dem Hund.", "de"),
        ("Le chat est assis sur le tapis et il ne veut pas sortir dans la rue.", "fr"),
        ("El gato se sentó en la alfombra y no quiso salir con los perros.", "es"),
        ("Il gatto è seduto sul tappeto e non vuole uscire con i cani della casa.", "it"),
        ("O gato não quer sair para a rua com os cães, mas foi uma boa tarde.", "pt"),
        ("De kat zit op de mat en wil niet naar buiten met een hond van het huis.", "nl"),
        ("Кошка сидела на коврике и не хотела выходить.", "ru"),
        ("猫坐在垫子上,不想出去。", "zh"),
        ("猫はマットの上に座っていました。", "ja"),
        ("고양이가 매트 위에 앉아 있었다.", "ko"),
        ("جلست القطة على السجادة ولم ترغب في الخروج.", "ar"),
        ("x[i] = foo(bar, baz) + qux; print(result[0], file=sys.stderr)", None),
        ("123 + 456 = 579", None),
        ("", None),
    ],
)
def test_languages(text: str, language: str | None) -> None:
    assert guess_language(text) == language


def test_the_language_limit_tells_its_reasons(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl",
        {"text": "The cat sat on the mat and it was not amused by them."},
        {"text": "Die Katze (cat) saß auf der Matte und war nicht zufrieden."},
        {"text": "cat cat cat kitten kitten meow meow meow meow"},
    )
    report = build_corpus(source, CATS, tmp_path / "out.jsonl", language="en")
    assert report.kept == 1
    assert report.dropped == {"not in language en": 1, "language not recognised": 1}
