"""One run in a folder at a time, whoever asks; and no trace of it afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tinyonn._io.locks import locked
from tinyonn.errors import InputError

HOLDER = """
import signal, sys, time
from tinyonn._io.locks import locked
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
with locked(sys.argv[1]):
    print("in", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_folder_is_one_processs_until_that_ends_in_any_way(tmp_path, end):
    process = holder(tmp_path / "out")
    try:
        with (
            pytest.raises(InputError, match=r"^output_dir must be a folder that no other run is writing into, got .*out\.$"),
            locked(tmp_path / "out"),
        ):
            pass
        with locked(tmp_path / "other"):
            pass
    finally:
        process.send_signal(end)
        process.communicate()
    assert process.returncode  # it was ended, and did not wait to its end
    with locked(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_thread_may_take_its_folder_again_and_another_thread_may_not(tmp_path):
    refused = []

    def other() -> None:
        try:
            with locked(tmp_path):
                pass
        except InputError as error:
            refused.append(str(error))

    with locked(tmp_path):
        with locked(tmp_path / "." / ".." / tmp_path.name):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / ".lock").exists()
    assert len(refused) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failure_gives_the_folder_back(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        pass


def test_a_lock_file_that_goes_while_it_is_opened_is_not_taken_for_the_folders(tmp_path, monkeypatch):
    """Who opens the file just before its holder removes it holds nothing that the next one would see."""
    import fcntl

    path, opened, original = tmp_path / ".lock", [], fcntl.flock

    def flock(file: object, how: int) -> None:
        opened.append(path.stat().st_ino)
        if len(opened) == 1:
            path.rename(tmp_path / "gone")
        original(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path):
        assert len(opened) == 2
        assert path.stat().st_ino == opened[1]


def test_a_folder_that_cannot_be_made_is_refused_by_its_option(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"^scores must be a folder that can be written, got .*file/out: Not a directory\.$"),
        locked(tmp_path / "file" / "out", "scores"),
    ):
        pass
