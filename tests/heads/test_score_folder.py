"""The folder of a run: one run in it at a time, results whole or not there, and nothing beside them that is of others."""

from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyonn.errors import InputError
from tinyonn.heads.progress import Progress

FILES = {
    "config.yaml", "run.log", "scores_combined.csv", "scores_norm.csv", "scores_raw.csv", "summary.json", "topk_global.json",
    "topk_per_layer.json",
}  # fmt: skip


@pytest.fixture
def run(score_run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(**options)`: of a ScoreConfig, with a tiny Llama and seven questions."""
    return score_run


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.log"}


def test_a_failed_run_leaves_the_results_of_an_earlier_one(run, tmp_path):
    run()
    before = everything(tmp_path / "out")
    with pytest.raises(InputError):
        run(max_samples=99)
    assert everything(tmp_path / "out") == before


def test_a_run_killed_while_it_computes_leaves_the_results_of_an_earlier_one(run, tmp_path):
    run()
    before = everything(tmp_path / "out")

    def interrupt(state: Progress) -> None:
        if state.stage == "scoring":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt, seed=1)
    assert everything(tmp_path / "out") == before
    assert (tmp_path / "out" / "run.log").read_text().splitlines()[-1].endswith("failed: KeyboardInterrupt: ")


@pytest.mark.parametrize("moved", range(7))
def test_results_moved_in_by_half_are_not_marked_as_complete(run, tmp_path, monkeypatch, moved):
    run()
    calls = []

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > moved:
            raise KeyboardInterrupt
        original(source, target)

    original = os.replace
    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        run(max_samples=3)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert not list((tmp_path / "out").glob(".unfinished-*"))
    monkeypatch.setattr("os.replace", original)
    run(max_samples=3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_a_folder_takes_one_run_at_a_time(run, tmp_path):
    refused = []

    def second() -> None:
        with pytest.raises(InputError, match=r"output_dir must be a folder that no other run is writing into, got .*out\.") as raised:
            run(max_samples=3)
        refused.append(raised.value)

    def meanwhile(state: Progress) -> None:
        if state.fraction == 1:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    assert run(progress=meanwhile).summary["samples"] == 7
    assert len(refused) == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["samples"] == 7
    assert (tmp_path / "out" / "run.log").read_text().count("started") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize("moved", [0, 3, 7], ids=["before", "by half", "all"])
def test_the_page_of_an_earlier_run_goes_before_its_scores(run, tmp_path, monkeypatch, moved):
    run()
    drawn = [tmp_path / "out" / name for name in ("index.html", "map_out.png", "map_peak.png")]
    for path in drawn:
        path.write_text("of the scores before")
    original, calls = os.replace, []

    def replace(source: Any, target: Any) -> None:
        assert not any(path.exists() for path in drawn)
        calls.append(target)
        if len(calls) > moved:
            raise KeyboardInterrupt
        original(source, target)

    with pytest.raises(InputError):
        run(max_samples=99)
    assert all(path.exists() for path in drawn)
    monkeypatch.setattr("os.replace", replace)
    if moved < 7:
        with pytest.raises(KeyboardInterrupt):
            run(max_samples=3)
    else:
        run(max_samples=3)
    assert calls
    assert not any(path.exists() for path in drawn)


def test_what_a_killed_run_left_unfinished_goes_with_the_next_results(run, tmp_path):
    out = tmp_path / "out"
    (out / ".unfinished-ab_12").mkdir(parents=True)
    for name in (".unfinished-ab_12/config.yaml", ".map_out.png-x_1.png", ".index.html-x_1.html", ".hidden", "map.png"):
        (out / name).touch()
    run()
    assert {path.name for path in out.iterdir()} == {*FILES, ".hidden", "map.png"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_its_folder(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.log").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"output_dir must be a folder that can be written, got .*/out: No space left on device\.$"):
        run()


def test_a_log_that_cannot_be_written_does_not_hide_why_a_run_failed(run, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(state: Progress) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # every write to a file fails from here on
        raise InputError("the reason")

    try:
        with pytest.raises(InputError, match="the reason"):
            run(progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "failed" not in (tmp_path / "out" / "run.log").read_text()


def test_a_folder_that_cannot_be_made_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir must be a folder that can be written, got .*file/out: Not a directory\."):
        run(output_dir=tmp_path / "file" / "out")


def test_scores_of_something_else_are_replaced_and_named(run, tmp_path):
    assert run().replaced is None
    assert run(batch_size=2).replaced is None  # the same scores
    before = (tmp_path / "out" / "config.yaml").read_text()
    assert f"data_path: {tmp_path / 'data.jsonl'}\n" in before
    (tmp_path / "other.jsonl").write_bytes((tmp_path / "data.jsonl").read_bytes())
    replaced = run(data_path=tmp_path / "other.jsonl", max_samples=5).replaced
    assert replaced.startswith("scores of ")
    assert replaced.endswith(f"tiny-llama over {tmp_path / 'data.jsonl'} (max_samples None)")
    log = (tmp_path / "out" / "run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in log if "replaces" in line] == [f"replaces {replaced}"]
    (tmp_path / "out" / "config.yaml").write_text("- damaged")
    assert run().replaced == "scores of unknown options"


def test_a_result_is_shown_in_one_line(run, tmp_path):
    assert repr(run()) == f"ScoreResult({tmp_path / 'out'}: 12 heads in 3 layers over 7 samples, scores out, ent, task)"


def test_scores_of_an_earlier_version_with_the_same_options_are_not_said_to_be_replaced(score_run, tmp_path):
    score_run()
    config = tmp_path / "out" / "config.yaml"
    assert "skip_unlabelled: false\n" in config.read_text()
    config.write_text(config.read_text().replace("skip_unlabelled: false\n", ""))
    assert score_run().replaced is None
    assert score_run(skip_unlabelled=False, top_k=3).replaced is not None
