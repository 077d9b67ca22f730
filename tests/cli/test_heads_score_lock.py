"""`tinyonn heads score` twice in one folder: the second is told so, and the page is of the scores beside it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tinyonn._io.locks import locked
from tinyonn.errors import InputError
from tinyonn.testing import save_tiny_model

from .conftest import Cli, one_line

pytest.importorskip("matplotlib")


@pytest.fixture
def arguments(tmp_path: Path) -> list[object]:
    rows = [{"question": f"{n} cats?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}} for n in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["-m", save_tiny_model(tmp_path / "model"), "-d", tmp_path / "data.jsonl", "-o", tmp_path / "out"]


def elsewhere(call: Any) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_a_second_run_in_a_folder_is_one_line(cli: Cli, arguments: list[object], tmp_path: Path) -> None:
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path / "out"):
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        entered.wait(60)
        one_line(cli("heads", "score", *arguments), "output_dir", "no other run", str(tmp_path / "out"), command="tinyonn heads score")
    finally:
        done.set()
        thread.join()
    assert cli("heads", "score", *arguments).code == 0


def test_a_folder_is_not_given_back_between_the_scores_and_their_page(
    cli: Cli, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tinyonn.report

    refused = []

    def other() -> None:
        with pytest.raises(InputError), locked(tmp_path / "out"):
            pass
        refused.append(True)

    draw = tinyonn.report.write_scores_page

    def watched(folder: Path) -> Any:
        elsewhere(other)
        return draw(folder)

    monkeypatch.setattr("tinyonn.report.write_scores_page", watched)
    ran = cli("heads", "score", *arguments)
    assert ran.code == 0, ran.err
    assert refused
    assert not (tmp_path / "out" / ".lock").exists()
