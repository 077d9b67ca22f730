"""A file that is written is there whole, or as it was."""

from __future__ import annotations

import os
import subprocess

import pytest

from tinyonn._io.files import digest, replacing, write_atomically
from tinyonn.errors import InputError


def test_a_file_is_replaced_only_at_the_end(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with replacing(path) as partial:
        assert (partial.parent, partial.suffix) == (tmp_path, ".html")
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as partial:
        partial.write_text("half" + "\ud800" * 9, encoding="utf-8")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf_8_with_the_rights_of_any_other_file(tmp_path):
    write_atomically(tmp_path / "a.txt", "naïve")
    (tmp_path / "b.txt").touch()
    assert (tmp_path / "a.txt").read_bytes() == "naïve".encode()
    assert os.stat(tmp_path / "a.txt").st_mode == os.stat(tmp_path / "b.txt").st_mode


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"output must be in a folder that can be written, got .*/none/a\.txt: No such file or directory\."
    ):
        write_atomically(tmp_path / "none" / "a.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"output must be a file that can be written, got .*/folder: Is a directory\."):
        write_atomically(tmp_path / "folder", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_checksum_is_that_of_sha256sum(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 5000)
    assert digest(path) == subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]


def test_a_disk_without_room_is_told_with_the_file(tmp_path, files_of_at_most):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(InputError) as raised, files_of_at_most(1000):
        write_atomically(path, "x" * 9000)
    assert str(raised.value) == f"output {path} cannot be written: File too large."
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
