"""Messages in one line: names counted, libraries cut at sentences, long paths by their last parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tinyonn
from tinyonn.errors import LINE, listed, needs, one_line, path_tail, reason


def test_names_are_listed_up_to_a_number_and_the_rest_is_counted():
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(f"n{i}" for i in range(1206)) == "n0, n1, n2, n3, n4, n5 and 1,200 more"
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"
    assert listed(["a" * 30] * 9) == ", ".join(["a" * 30] * 3) + " and 6 more"
    assert listed([]) == "none"
    assert listed([], none="nothing") == "nothing"
    assert listed(["two\nlines", "x" * 99]) == f"two lines, {'x' * 37}..."


def test_a_library_is_quoted_in_whole_sentences_or_words():
    assert reason(OSError("It failed.\n  Look there.")) == "It failed. Look there."
    assert reason(OSError("It failed. Look at https://a.b/c. " + "And " * 300)) == "It failed. Look at https://a.b/c."
    assert reason(OSError("and " * 99), 12) == "and and ..."
    assert reason("one, two, three, four", 15) == "one, two ..."
    assert reason("x" * 300, 20) == "x" * 17 + "..."
    assert all(len(reason("word " * 99, most)) <= most for most in range(12, 160))


def test_a_long_path_is_told_by_its_last_parts():
    assert path_tail("/some/me/scores") == "/some/me/scores"
    assert path_tail("/some/me/some/long/folders/scores/out.csv", 24) == ".../scores/out.csv"
    assert path_tail(f"/home/{'x' * 99}", 24) == ".../" + "x" * 20
    assert path_tail("x" * 99, 24) == "x" * 99


@pytest.mark.parametrize(
    "text",
    [
        "data_path must be a file, got " + "/folder" * 40 + "/rows.jsonl; unpack it first.",
        "option must be one of " + "name, " * 100 + "got 'x'; did you mean 'y'?",
        "x" * 5000,
        "no file " + "/".join(["y" * 300] * 4),
        "broken\nlines " * 90,
    ],
    ids=["path", "names", "one word", "long folders", "lines"],
)
def test_a_line_fits_on_a_screen_and_keeps_both_ends(text):
    line = one_line(text)
    assert len(line) <= LINE
    assert "\n" not in line
    first, last = text.split()[0], text.split()[-1]
    assert line.startswith(first[:20])
    assert line.endswith(last[-12:])


def test_a_short_line_is_left_alone():
    text = f"output_dir must be writable, got {'/folder' * 20}: Permission denied."
    assert one_line(text) == text
    assert one_line("a\n  b") == "a b"
    assert one_line("data_path must exist, got " + "/folder" * 40 + "/rows.jsonl; unpack it first.").endswith(
        "/folder/folder/rows.jsonl; unpack it first."
    )


def test_a_hint_to_install_works_outside_a_checkout():
    """`pip install tinyonn[...]` would look for a package of this name on an index."""
    assert needs("this", "gguf", "accelerate") == "this needs gguf and accelerate: pip install gguf accelerate"
    sources = {path: path.read_text() for path in Path(tinyonn.__file__).parent.rglob("*.py")}
    assert len(sources) > 100
    assert [path.name for path, text in sources.items() if re.search(r"pip install ['\"]?tinyonn", text)] == []
