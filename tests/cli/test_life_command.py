"""`tinyonn life`: each command on stores that were made through PerpetualStore."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tinyonn.cli.app import run
from tinyonn.store import PerpetualStore, compaction, read_life_log, verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def lived(folder: Path, steps: int = 6) -> nn.Linear:
    model = nn.Linear(40, 40)
    with PerpetualStore(folder, model, keep="all") as store:
        store.restore()
        store.record("stretch", 0, data="texts", data_hash="ab" * 16, objective="next token", device="cpu")
        for step in range(1, steps + 1):
            with torch.no_grad():
                model.weight.fill_(step)
            store.record("metrics", step, loss=10.0 / step, pi=0.5, live_experts=4)
            store.save(step)
        store.wait()
        store.record("stop", steps, reason="finished")
    return model


def value_at(folder: Path, step: int | None = None) -> tuple[int | None, float]:
    model = nn.Linear(40, 40)
    with PerpetualStore(folder, model, keep="all") as store:
        return store.restore(step), float(model.weight.detach()[0, 0])


def test_show_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lived(tmp_path / "run" / "store")
    assert run(["life", "show", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "kept       1, 2, 3, 4, 5, 6" in out
    assert "loss       1.667 at step 6" in out
    assert "stretches  1, 1 stop" in out
    page = (tmp_path / "run" / "timeline.html").read_text()
    assert "next token" in page
    assert run(["life", "show", str(tmp_path / "run"), "--page", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()


def test_log_prints_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lived(tmp_path)
    assert run(["life", "log", str(tmp_path), "--event", "metrics", "--last", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "step 6" in lines[1]
    assert "loss 1.667" in lines[1]
    assert run(["life", "log", str(tmp_path), "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["number"] for record in records] == list(range(1, len(records) + 1))
    assert records == read_life_log(tmp_path / "life.jsonl").records
    assert run(["life", "log", str(tmp_path), "--event", "nothing"]) == 2
    assert "--event must be one of begin, metrics" in capsys.readouterr().err


def test_log_prints_all_that_a_fork_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {"data_path": ["/" + "a" * 50, "/" + "b" * 50], "schedule": ["constant", "linear"]}
    with PerpetualStore(tmp_path, nn.Linear(4, 4)) as store:
        store.record("stretch", 0, changed=changed)
        store.record("stretch", 0, changed={})
        store.save(1)
    assert run(["life", "log", str(tmp_path), "--event", "stretch"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"changed data_path /{'a' * 50} → /{'b' * 50}, schedule constant → linear")
    assert second.endswith("changed nothing")


def test_restore_goes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lived(tmp_path)
    assert run(["life", "restore", str(tmp_path), "--step", "4"]) == 0
    assert capsys.readouterr().out == "step 4 is the newest now\n"
    assert value_at(tmp_path) == (4, 4.0)
    assert run(["life", "restore", str(tmp_path), "--step", "5"]) == 2
    assert "kept one, 1, 2, 3, 4, got 5" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["damaged", "missing"])
def test_restore_brings_back_the_manifest_before(tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    lived(tmp_path)
    manifest = tmp_path / "manifest.json"
    if fault == "missing":
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(ValueError, match="tinyonn life restore"):
        value_at(tmp_path)
    assert run(["life", "restore", str(tmp_path)]) == 0
    assert value_at(tmp_path) == (5, 5.0)
    assert verify(tmp_path).faults == []


def test_fork_makes_another_life(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lived(tmp_path / "one")
    assert run(["life", "fork", str(tmp_path / "one"), str(tmp_path / "two"), "--step", "2"]) == 0
    shown = capsys.readouterr()
    assert "step 2" in shown.out
    assert "shared" in shown.err
    assert value_at(tmp_path / "two") == (2, 2.0)
    assert [record["event"] for record in read_life_log(tmp_path / "one" / "life.jsonl").records][-1] == "fork"
    assert run(["life", "fork", str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert "new or empty folder" in capsys.readouterr().err
    assert run(["life", "show", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "Family" in (tmp_path / "one" / "timeline.html").read_text()


def test_compact_merges_segments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lived(tmp_path)
    assert run(["life", "compact", str(tmp_path)]) == 0
    assert "in 6 files before" in capsys.readouterr().out
    assert value_at(tmp_path, 3) == (3, 3.0)


def compacting(folder: Path, codes: list[int]) -> threading.Thread:
    """The command in a thread, once it waits for the training; `codes` gets its exit code."""
    command = threading.Thread(target=lambda: codes.append(run(["life", "compact", str(folder)])), daemon=True)
    command.start()
    end = time.monotonic() + 30
    while not (folder / "compact.request").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return command


def save_eight(store: PerpetualStore, model: nn.Linear) -> None:
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.fill_(step)
        store.save(step, wait=True)


@pytest.mark.parametrize("room", [True, False], ids=["room", "no room"])
@pytest.mark.filterwarnings("ignore:the store was not compacted")
def test_a_running_training_compacts_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    model = nn.Linear(40, 40)
    codes: list[int] = []
    with PerpetualStore(tmp_path, model, keep="last:1") as store:
        save_eight(store, model)
        command = compacting(tmp_path, codes)
        if not room:
            monkeypatch.setattr(compaction, "free_bytes", lambda folder: 0)
        store.save(9, wait=True)
        command.join(30)
    out, err = capsys.readouterr()
    assert ("the training compacted the store" in out) == room
    assert ("the training could not compact the store: " in err) == (not room)
    assert codes == [0 if room else 2]
    assert (len(list((tmp_path / "segments").iterdir())) == 1) == room


def test_a_store_whose_training_ended_meanwhile_is_compacted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(40, 40)
    codes: list[int] = []
    with PerpetualStore(tmp_path, model, keep="last:1") as store:
        save_eight(store, model)
        command = compacting(tmp_path, codes)
    command.join(10)
    assert codes == [0]
    assert "in 1 after" in capsys.readouterr().out
    assert not (tmp_path / "compact.request").exists()
    assert len(list((tmp_path / "segments").iterdir())) == 1
    assert value_at(tmp_path) == (8, 8.0)


def test_verify_tells_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lived(tmp_path)
    assert run(["life", "verify", str(tmp_path)]) == 0
    assert "6 segments" in capsys.readouterr().out
    newest = sorted((tmp_path / "segments").iterdir())[-1]
    data = bytearray(newest.read_bytes())
    data[-2000] ^= 1
    newest.write_bytes(data)
    assert run(["life", "verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "model.weight is damaged" in out
    assert "readable: 1, 2, 3, 4, 5; lost: 6" in out
    assert "--step 5` goes back" in out


@pytest.mark.parametrize("command", ["show", "log", "restore", "compact", "verify"])
def test_folders_without_a_store(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["life", command, str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err == f"tinyonn life {command}: DIR must be a store or a folder with one, got {tmp_path}, which has no manifest.json.\n"
