"""Error messages that the docs quote are messages of the library."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tinyonn.heads import study

ROOT = Path(__file__).parents[1]
FAQ, HEADS = ROOT / "docs/faq.md", ROOT / "docs/heads.md"
# Messages of other libraries.
OTHERS = {"Failed to load CPU gemm_4bit_forward from kernels-community"}
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")

pytestmark = pytest.mark.skipif(not FAQ.is_file(), reason="needs the checkout")


@cache
def literals() -> str:
    """The texts of the library, one a line; a value within an f-string is {}. Adjacent literals are one."""
    texts = []
    for path in sorted((ROOT / "tinyonn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def as_written(part: str) -> Iterator[str]:
    """The part itself, and the part with up to three words as a value of an f-string; two words at least stay."""
    words = part.split()
    yield part
    for length in range(1, min(3, len(words) - 2) + 1):
        for start in range(len(words) - length + 1):
            yield " ".join([*words[:start], "{}", *words[start + length :]])


def is_a_message(quoted: str, texts: str) -> bool:
    """Each part between dots of omission is a text of the library."""
    for step in (study.TRAIN_STEP, study.MEASURE_STEP, study.REPORT_STEP):  # messages name a step by a constant
        quoted = quoted.replace(step, "{}")
    parts = [part.strip(" ;") for part in quoted.split("…")]
    return all(any(form in texts for form in as_written(part)) for part in parts if part)


def quoted() -> list[str]:
    """Code with a space in it: of the bold leads of the FAQ, and of the first column of the head laboratory's table."""
    leads = re.findall(r"^\*\*(.+?)\*\*", FAQ.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    table = HEADS.read_text(encoding="utf-8").partition("## Troubleshooting")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    found = [match[2].strip() for text in leads + cells for match in CODE.finditer(text)]
    return [text for text in found if " " in text and "(" not in text and text not in OTHERS]


@pytest.mark.parametrize("message", quoted() if FAQ.is_file() else [])
def test_a_quoted_message_is_one_of_the_library(message):
    assert is_a_message(message, literals()), f"{message!r} is on a page, and no text of the library"


def test_messages_are_found_in_the_pages_and_a_wrong_one_is_noticed():
    assert len(quoted()) >= 15
    assert is_a_message("… must hold, got …", "{} must hold, got {}.")
    assert is_a_message("size must be at most …", "{} must be at most {}")
    assert not is_a_message("size must be at least …", "{} must be at most {}")
    assert not is_a_message("run the other command", "run {} now")
