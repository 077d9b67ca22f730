"""`tinyonn corpus`: its options reach the library, and its screen says what was kept and why not."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tinyonn.scan.corpus.build import build_corpus
from tinyonn.scan.corpus.config import CorpusConfig
from tinyonn.scan.corpus.corpus import read_corpus
from tinyonn.scan.corpus.topic import load_topic
from tinyonn.testing import save_tiny_model

from .conftest import Cli, one_line

MARKETS = "The stock exchange fell and shareholders lost their dividend"


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class Stop(Exception):
    pass


@pytest.fixture
def built(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the library is asked for by a command line."""
    signature = inspect.signature(build_corpus)

    def capture(*arguments: Any, **options: Any) -> None:
        bound = signature.bind(*arguments, **options).arguments
        raise Stop({**bound.pop("options", {}), **bound})

    monkeypatch.setattr("tinyonn.scan.corpus.corpus.build_corpus", capture)

    def parse(*arguments: object) -> dict[str, Any]:
        with pytest.raises(Stop) as caught:
            cli("corpus", *arguments)
        asked = caught.value.args[0]
        assert isinstance(asked, dict)
        return asked

    return parse


@pytest.mark.parametrize("spelling", ["-", "_"], ids=["hyphens", "underscores"])
def test_every_option_reaches_the_library(built: Any, tmp_path: Path, spelling: str) -> None:
    tokenizer = save_tiny_model(tmp_path / "model")
    values: dict[str, Any] = {
        "text_field": "body_1", "format": "text", "code_blocks": "require", "min_chars": 1, "max_chars": 99, "cut": False,
        "min_tokens": 2, "max_tokens": 88, "language": "de", "dedup": False, "limit": 7, "first": True, "seed": 5,
        "subset": "sub", "split": "test_1", "skip_bad": True, "overwrite": True,
    }  # fmt: skip
    assert set(values) == {field.name for field in dataclasses.fields(CorpusConfig)}
    words = []
    for name, value in values.items():
        option = name.replace("_", spelling)
        words += [f"--{option}" if value else f"--no{spelling}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    asked = built("some_source", "--topic", "math", f"--output{spelling}path", "o_1.jsonl", "--tokenizer", tokenizer, *words)
    assert {name: asked[name] for name in values} == values
    assert asked["source"] == "some_source"
    assert asked["output"] == Path("o_1.jsonl")
    assert asked["tokenizer"]("ab")["input_ids"] == [65, 66]
    assert set(asked) == {*values, "source", "topic", "output", "tokenizer", "progress"}


def test_topics_are_named_extended_or_new(built: Any) -> None:
    assert built("s", "--topic", "finance")["topic"] == load_topic("finance")
    more = built(
        "s", "--topic", "finance", "--keyword", "tulip", "--pattern", "x+", "--exclude", "spam", "--min-matches", 3, "--min-density", 0.5
    )["topic"]
    assert more.keywords == (*load_topic("finance").keywords, "tulip")
    assert more.patterns[-1] == "x+"
    assert (more.exclude, more.min_matches, more.min_density) == (("spam",), 3, 0.5)
    new = built("s", "--topic", "birds", "--keyword", "heron", "--keyword", "stork")["topic"]
    assert (new.name, new.keywords) == ("birds", ("heron", "stork"))
    whole = built("s", "--topic", "python", "--everything", "--exclude", "spam")["topic"]
    assert whole.reject("nothing of the kind") is None
    assert whole.reject("spam") == "excluded by a pattern"
    assert whole.code_languages == load_topic("python").code_languages


def test_the_screen_says_what_was_kept_and_why_not(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write(source, {"text": MARKETS}, {"text": MARKETS.upper()}, {"text": "Nothing of that sort at all, only birds"}, {"text": "short"})
    with source.open("a") as file:
        file.write("{broken\n")
    output = tmp_path / "out.jsonl"
    ran = cli("corpus", source, "--topic", "finance", "--output_path", output, "--skip_bad")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert re.findall(r"^(\w+) ", ran.out, re.MULTILINE) == ["read", "kept", "dropped", "malformed", "written"]
    for words in (
        "1 sequence,",
        "1  duplicate",
        "1  off topic",
        "1  shorter than 32 characters",
        "1  malformed",
        f"{source}, line 5: must be one",
    ):
        assert words in ran.out
    assert [item.text for item in read_corpus(output)] == [MARKETS]


def test_the_default_output(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("corpus", write(tmp_path / "in.jsonl", {"text": MARKETS}), "-t", "finance").code == 0
    assert len(read_corpus(tmp_path / "data/sft/finance_corpus.jsonl")) == 1
    one_line(cli("corpus", "in.jsonl", "-t", "finance"), "output must not exist yet", "--overwrite", command="tinyonn corpus")
    one_line(cli("corpus", "./typo.jsonl", "-t", "finance"), "source must be an existing file", command="tinyonn corpus")


def test_bad_input_is_one_line(cli: Cli, tmp_path: Path) -> None:
    good = write(tmp_path / "in.jsonl", {"text": MARKETS})
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"text": x}\n')
    (tmp_path / "empty").mkdir()
    out = ("-o", tmp_path / "out.jsonl")
    for arguments, parts in (
        ((tmp_path / "none.jsonl", "-t", "finance"), ("source must be an existing file or folder", "none.jsonl")),
        ((tmp_path / "empty", "-t", "finance"), ("source must hold files",)),
        ((bad, "-t", "finance"), (f"{bad}, line 2", "malformed JSON")),
        ((good, "-t", "cooking"), ("topic must be one of finance, math, python", "'cooking'.")),
        ((good, "-t", "pyton"), ("got 'pyton'; did you mean 'python'?",)),
        ((good, "-t", "finance", "--format", "Chat"), ("'--format': 'Chat' is not one of 'auto', 'text', 'chat'; did you mean 'chat'?",)),
        ((good, "-t", "x", "--pattern", "("), ("patterns must be regular expressions, got '('",)),
        ((good, "-t", "x", "--keyword", "heron"), ("at least one record that fits", "1 off topic")),
        ((good, "-t", "x", "--everything", "--keyword", "a"), ("--everything cannot be combined with --keyword",)),
        ((good, "-t", "finance", "--text-field", "body"), ("line 1: must have the field 'body', its fields are text",)),
        ((good, "-t", "finance", "--language", "xx"), ("'--language': 'xx' is not one of 'ar', 'de'",)),
        ((good, "-t", "finance", "--max-tokens", 5), ("need a tokenizer",)),
        ((good, "-t", "finance", "--tokenizer", tmp_path / "empty", "--max-tokens", 5), ("tokenizer must be a folder with a tokenizer",)),
    ):
        one_line(cli("corpus", *arguments, *out), *parts, command="tinyonn corpus")
    assert not (tmp_path / "out.jsonl").exists()
