"""The API reference shows the names, types and texts that docstrings have, read as griffe reads them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

griffe = pytest.importorskip("griffe")
SPACE = "\N{NO-BREAK SPACE}"


def sections(docstring: str) -> list:
    spec = importlib.util.spec_from_file_location("griffe_options", Path(__file__).parents[1] / "docs/griffe_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readable = module.readable("Summary.\n\n" + docstring)
    return griffe.Docstring(readable).parse("google", warnings=False)[1:]


def entries(docstring: str) -> list[tuple[str, str]]:
    (section,) = sections(docstring)
    return [(entry.name, entry.description) for entry in section.value]


def returned(docstring: str) -> str:
    (section,) = sections(docstring)
    return "\n".join(entry.description for entry in section.value).strip()


def test_names_that_share_a_line_stay_together():
    found = entries("Args:\n    query, key: (B, T).\n    a … z: letters.\n    *args, **kwargs: others.")
    assert found == [
        (f"query,{SPACE}key", "(B, T)."), (f"a{SPACE}…{SPACE}z", "letters."), (f"*args,{SPACE}**kwargs", "others."),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a", ["a"]),
        ("a, b", ["a", "b"]),
        ("a … z", [f"a{SPACE}…{SPACE}z"]),
        ("a, b … z", ["a", f"b{SPACE}…{SPACE}z"]),
    ],
)
def test_attributes_that_share_a_line_have_one_each(names, expected):
    found = entries(f"Attributes:\n    first: one: two.\n    {names}: letters,\n        of a word.\n    last: text.")
    assert [name for name, _ in found] == ["first", *expected, "last"]
    assert [" ".join(text.split()) for _, text in found] == ["one: two.", *["letters, of a word."] * len(expected), "text."]


def test_one_result_is_no_list():
    assert "- " not in returned("Returns:\n    count: the number: at most 3.")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("out: (B, T).\n    lse: (B, H).", "- `out`: (B, T).\n- `lse`: (B, H)."),
        ("dict: over lines: keys.\n    lse: (B, H).", "- `dict`: over lines: keys.\n- `lse`: (B, H)."),
        ("a, b: x.\n    c: y.", "- `a`, `b`: x.\n- `c`: y."),
        ("c: y.\n    a, b: x.\n    d … f: z.", "- `c`: y.\n- `a`, `b`: x.\n- `d` … `f`: z."),
    ],
    ids=["plain", "two colons", "shared first", "shared later"],
)
def test_several_results_are_a_list(lines, expected):
    assert returned(f"Returns:\n    {lines}").removeprefix("A tuple of").strip() == expected
