"""What the screen is made of: units, tables, and a progress that suits what it is shown on."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinyonn._io.units import readable_bytes
from tinyonn.cli import screen

DRAW = """
import time
from tinyonn.cli.screen import Progress
with Progress("loading") as bar:
    for step in range(30):
        bar.update(step / 30, label="scanning questions", text=f"{step * 60:,}/12,345 texts, 1,234 tokens/s, loss 2.87")
        time.sleep(0.02)
print("result")
"""


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_400, "99.4 kB"),
        (99_500, "100 kB"),
        (999_600, "1.0 MB"),
        (4.2e9, "4.2 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (185, "3:05"),
        (3599.6, "1:00:00"),
        (7267, "2:01:07"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert screen.duration(seconds) == text


def test_counts() -> None:
    assert [screen.counted(count, "token") for count in (0, 1, 12345)] == ["0 tokens", "1 token", "12,345 tokens"]


def test_tables_line_up() -> None:
    assert screen.rows([("a", 1), ("long", "x\ny")]) == "a     1\nlong  x\n      y"
    assert screen.columns(("name", "n"), [("a", 1), ("b", 1000)]) == "name     n\na        1\nb     1000"
    assert screen.columns(("name", "n", "text"), [("a", 1, "x")], right=(1,)) == "name  n  text\na     1  x"


def draw(width: int, **environment: str) -> str:
    """What the progress bar sends to a terminal."""
    leader, follower = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-c", DRAW],
        stderr=follower,
        stdout=subprocess.DEVNULL,
        env={**env, "TERM": "xterm-256color", "COLUMNS": str(width), **environment},
    )
    os.close(follower)
    drawn = b""
    try:
        while chunk := os.read(leader, 65536):
            drawn += chunk
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait(30) == 0
    return drawn.decode()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_gets_one_line(width: int) -> None:
    drawn = draw(width)
    assert "━" in drawn
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    frames = [frame for frame in re.split(r"[\r\n]+", plain) if frame.strip()]
    assert len(frames) > 2
    assert all(frame.strip().startswith(tuple("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")) for frame in frames)  # none was wrapped into a second line
    assert max(map(len, frames)) <= width
    assert any(re.search(r"scanning question.*\d s left", frame) for frame in frames)


def test_no_color_is_honoured() -> None:
    assert re.search(r"\x1b\[[\d;]*3[0-9;]*m", draw(100))
    assert not re.search(r"\x1b\[(?:3\d|38;|9\d)[\d;]*m", draw(100, NO_COLOR="1"))


def test_a_dumb_terminal_gets_no_bar() -> None:
    assert "\x1b" not in draw(80, TERM="dumb")


def test_elsewhere_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    with screen.Progress("reading") as bar:
        for step in range(25):
            now[0] += 1
            bar.update(step / 25, f"{step} read")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["reading: 36 %, 9 read, 10 s, 16 s left", "reading: 76 %, 19 read, 20 s, 6.0 s left"]


def test_times_are_those_of_the_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(screen, "PLAIN_EVERY", 0.0)
    with screen.Progress("loading") as bar:
        for fraction, label in ((None, "loading"), (0.0, "scanning a"), (0.5, "scanning a"), (0.6, "scanning a"), (0.6, "scanning b")):
            now[0] += 10
            bar.update(fraction, "x", label=label)
    assert capsys.readouterr().err.splitlines() == [
        "loading: x, 10 s", "scanning a: 0 %, x, 0.0 s", "scanning a: 50 %, x, 10 s", "scanning a: 60 %, x, 20 s, 40 s left",
        "scanning b: 60 %, x, 0.0 s",
    ]  # fmt: skip


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "PLAIN_EVERY", 0.0)
    with screen.Progress("scanning", enabled=False) as bar:
        bar.update(0.5, "half")
    assert capsys.readouterr().err == ""


def test_results_alone_stand_on_stdout(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "result\n"
    assert ran.stderr == ""


def test_names_cannot_move_the_cursor() -> None:
    assert screen.rows([("model", "a\x1b[31m\x9bb\rc\u202ed")]) == "model  a\ufffd[31m\ufffdb\ufffdc\ufffdd"
    assert screen.rows([("model", "ж\n猫 é\ud800")]) == "model  ж\n       猫 é\ud800"
