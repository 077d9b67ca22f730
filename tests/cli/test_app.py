"""The command as a whole: help, start-up, spellings, endings."""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tinyonn
from tinyonn.cli import app, errors
from tinyonn.errors import InputError, MissingPackageError, MscanError
from tinyonn.mscan import LayoutEntry, MscanWriter, SequenceRecord

from .conftest import Cli, one_line, shell

WANTED = {
    "demo",
    "life-demo",
    "arc-demo",
    "train",
    "eval",
    "life",
    "doctor",
    "corpus",
    "scan",
    "report",
    "compare",
    "heads",
    "info",
    "verify",
    "recover",
    "convert",
    "tune",
}
INSIDE = (
    *(f"life {one}" for one in ("show", "log", "restore", "fork", "compact", "verify")),
    "eval arc",
    "train arc",
    "heads score",
    "heads demo",
    "heads plasticity",
    *(f"heads plasticity {step}" for step in ("train", "measure", "report", "run")),
)


KNOWN = {word for command in (*WANTED, *INSIDE) for word in command.split()}


def test_every_command_is_there(cli: Cli) -> None:
    ran = cli("--help")
    assert ran.code == 0
    assert set(re.findall(r"^  ([a-z-]+) ", ran.out.split("Commands:")[1], re.MULTILINE)) == WANTED == set(app.COMMANDS)
    assert cli() == ran


@pytest.mark.parametrize("command", ["", *app.COMMANDS, *INSIDE])
def test_help_fits_80_columns(cli: Cli, command: str) -> None:
    ran = cli(*command.split(), "-h")
    assert ran.code == 0
    assert ran.err == ""
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "[default: (" not in ran.out  # a default that Typer could not spell
    assert "None" not in ran.out
    described = ran.out.split("Options:")[1].split("Commands:")[0]
    for option in re.findall(r"^  (?:-\w, )?(--[\w-]+)(?: [^ ]+)?\n(?!  {4})", described, re.MULTILINE):
        pytest.fail(f"{command} {option} says nothing of itself")


@pytest.mark.parametrize("group", ["heads", "heads plasticity"])
def test_a_group_without_a_command_is_its_help(cli: Cli, group: str) -> None:
    ran = cli(*group.split())
    assert ran == cli(*group.split(), "--help")
    assert "Commands:\n" in ran.out


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"tinyonn {tinyonn.__version__}\n"
    assert shell("--version").stdout == f"tinyonn {tinyonn.__version__}\n"


def test_help_waits_for_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "yaml", "matplotlib", "pyarrow")
    code = (
        "import sys; from tinyonn.cli.app import run; run(['scan', '--help']); run(['heads', 'plasticity', 'run', '--help']); "
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["scn"], ["No such command 'scn'"]),
        (["scan", "--modell-path", "x"], ["No such option: --modell-path", "--model-path"]),
        (["scan", "--limit"], ["--limit", "requires an argument"]),
        (["scan", "--limit", "many"], ["'--limit': 'many' is not a valid integer."]),
        (["scan", "--temperature", "hot"], ["'--temperature': 'hot' is not a valid number."]),
        (["demo", "--limit", "3"], ["'--limit': '3' is not greater than or equal to 8."]),
        (["scan", "--store", "all"], ["'--store': 'all' is not one of 'records', 'integral'."]),
        (["scan", "--credit", "ful"], ["'--credit': 'ful' is not one of 'full', 'local'; did you mean 'full'?"]),
        (["heads", "score", "--score-query-mode", "last"], ["'last' is not one of 'last_token', 'all_tokens'"]),
        (["scan", "extra"], ["unexpected extra argument", "extra"]),
        (["corpus"], ["Missing argument 'source'"]),
        (["corpus", "x.jsonl"], ["Missing option", "--topic"]),
        (["convert", "x.mscan"], ["Missing option", "--output-path"]),
        (["heads", "scores"], ["No such command 'scores'"]),
        (["heads", "score", "--top-q", "3"], ["No such option: --top-q"]),
        (["heads", "plasticity", "run", "--seed", "one"], ["'--seed': 'one' is not a valid integer."]),
    ],
)  # fmt: skip
def test_usage_errors_are_one_line(cli: Cli, arguments: list[str], parts: list[str]) -> None:
    named = [word for word in itertools.takewhile(lambda word: not word.startswith("-"), arguments) if word in KNOWN]
    command = " ".join(["tinyonn", *named])
    one_line(cli(*arguments), *parts, f"See `{command} --help`.", command=command)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("limit must be at least 1,\n got 0."), 2, "tinyonn x: limit must be at least 1, got 0."),
        (MscanError("a.mscan", "crc must match, got 1", 64), 2, "tinyonn x: a.mscan, byte 64: crc must match, got 1"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.mscan"), 2, "tinyonn x: a.mscan: No such file or directory."),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "tinyonn x: a: Permission denied."),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "tinyonn x: No space left on device."),
        (MemoryError(), 2, "tinyonn x: memory ran out."),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "tinyonn x: memory ran out."),
        (MissingPackageError("Parquet needs pyarrow: pip install pyarrow"), 2, "tinyonn x: Parquet needs pyarrow: pip install pyarrow"),
        (KeyboardInterrupt(), 130, "tinyonn x: interrupted."),
        (KeyboardInterrupt("interrupted: a is readable; run again."), 130, "tinyonn x: interrupted: a is readable; run again."),
    ],
    ids=["input", "mscan", "missing", "forbidden", "full", "memory", "torch-memory", "package", "ctrl-c", "ctrl-c-in-a-scan"],
)  # fmt: skip
def test_what_a_person_can_mend_is_one_line(error: BaseException, code: int, line: str) -> None:
    ending = errors.explain(error, "tinyonn x")
    assert ending is not None
    assert ending.code == code
    assert ending.line.startswith(line)
    assert "\n" not in ending.line


def test_another_error_that_names_pip_is_a_bug() -> None:
    assert errors.explain(RuntimeError("kernel failed; pip install other"), "tinyonn x") is None


@pytest.mark.parametrize("command", ["heads demo", *(f"heads plasticity {step}" for step in ("train", "measure", "run"))])
def test_an_interrupted_study_says_how_it_goes_on(command: str) -> None:
    ending = errors.explain(KeyboardInterrupt(), f"tinyonn {command}")
    assert ending is not None
    assert ending.line == f"tinyonn {command}: interrupted; the same command, without --overwrite, continues from the saved state."


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RuntimeError("x"), AssertionError(), OSError("no errno")])
def test_a_bug_keeps_its_traceback(cli: Cli, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tinyonn.scan.corpus.corpus.build_corpus", broken)
    with pytest.raises(type(error)):
        cli("corpus", "x", "--topic", "python")


def test_memory_in_a_scan_names_the_options_to_lower() -> None:
    ending = errors.explain(MemoryError(), "tinyonn scan")
    assert ending is not None
    for option in ("--batch-size", "--max-length", "--dtype bf16", "--store integral"):
        assert option in ending.line


@pytest.mark.parametrize("command", ["tinyonn heads score", "tinyonn heads plasticity measure"])
def test_memory_in_the_head_laboratory_names_the_options_to_lower(command: str) -> None:
    ending = errors.explain(MemoryError(), command)
    assert ending is not None
    for option in ("--batch-size", "--max-length", "--dtype bf16"):
        assert option in ending.line


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    quiet = shell("info", tmp_path / "none.mscan")
    assert quiet.returncode == 2
    assert quiet.stderr.count("\n") == 1
    loud = shell("info", tmp_path / "none.mscan", TINYONN_DEBUG="1")
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr


def test_a_terminal_of_few_signs_gets_no_traceback(tmp_path: Path) -> None:
    ran = shell("info", tmp_path / "ж\udcff.mscan", PYTHONIOENCODING="ascii")
    assert ran.returncode == 2
    assert ran.stderr == f"tinyonn info: {tmp_path}/??.mscan: No such file or directory.\n"


def test_an_error_cannot_move_the_cursor(tmp_path: Path) -> None:
    ran = shell("info", tmp_path / "a\x1b[2Jb.mscan")
    assert ran.returncode == 2
    assert ran.stderr == f"tinyonn info: {tmp_path}/a\ufffd[2Jb.mscan: No such file or directory.\n"


def test_a_reader_that_goes_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyonn", "scan", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141


def test_closed_streams_are_no_error() -> None:
    command = f"exec {sys.executable} -m tinyonn --version <&- >&-"
    ran = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, env={**os.environ, "PYTHONSAFEPATH": "1"}, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    ran = subprocess.run(["sh", "-c", command.replace("--version", "scan --help")], stderr=subprocess.PIPE, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_ctrl_c_leaves_no_half_written_corpus(tmp_path: Path) -> None:
    source = tmp_path / "big.jsonl"
    with open(source, "w") as file:
        for index in range(60_000):
            file.write(f'{{"text": "{index} the stock exchange and a dividend {"of the shareholders " * 20}"}}\n')
    output = tmp_path / "out" / "c.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyonn", "corpus", str(source), "--topic", "finance", "-o", str(output)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a suite in the background ignores it
    )
    deadline = time.monotonic() + 60
    while not (output.parent.exists() and os.listdir(output.parent)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "tinyonn corpus: interrupted.\n"
    assert os.listdir(output.parent) == []


def test_recovery_is_offered_where_it_keeps_something(tmp_path: Path) -> None:
    whole, hollow = tmp_path / "a.mscan", tmp_path / "b.mscan"
    layout = [LayoutEntry("lm_head.weight", 64, 1, 0)]
    with MscanWriter(whole, {}, layout) as writer:
        writer.append(SequenceRecord("s", np.arange(2), np.ones(2, np.float32)))
    with MscanWriter(hollow, {}, layout):
        pass
    for path, offset, offered in (
        (whole, None, False),
        (whole, 0, False),
        (whole, 64, True),
        (hollow, 64, False),
        (tmp_path / "c", 64, False),
    ):
        ending = errors.explain(MscanError(path, "crc must match.", offset), "tinyonn report")
        assert ending is not None
        assert ("tinyonn recover" in ending.line and "keeps what can be read." in ending.line) == offered
