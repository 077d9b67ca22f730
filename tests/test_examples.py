"""The scripts in examples/ run as they are, on a tiny model in the place of the demo's, and print what they computed."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tinyonn.hf.smollm2 import smollm2_folder
from tinyonn.mscan import MscanReader
from tinyonn.testing import save_tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which SmolLM2-135M is a model of three small layers whose tokens are characters."""
    cache = tmp_path_factory.mktemp("cache")
    save_tiny_model(smollm2_folder(cache), "llama", max_position_embeddings=1024)
    return cache


@pytest.fixture
def run(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(name, *options)`: runs a script in an empty folder; what it leaves in its namespace, and what it printed."""
    monkeypatch.setenv("TINYONN_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: str) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", [name, *options])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__"), capsys.readouterr().out

    return run


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def test_each_script_is_short_and_run_here():
    tests = Path(__file__).read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 50, script.name
        assert f'run("{script.name}"' in tests, script.name
    assert len(SCRIPTS) >= 5


def test_a_script_starts_from_any_folder(tmp_path):
    help_text = subprocess.run([sys.executable, EXAMPLES / "train_experts.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert help_text.returncode == 0, help_text.stderr
    assert "two minutes" in help_text.stdout


def test_convert_and_finetune(run):
    names, out = run("convert_and_finetune.py", "--steps", "4", "--tokens", "256")
    dense, converted, tuned = numbers(r"(?m)^[a-z-]+ +loss (\d\.\d+)", out)
    assert dense == converted
    open_blocks, budgeted = numbers(r"'key_blocks': '([\d.]+)'", out)
    assert open_blocks == 8.5  # all of 1 … 16, on average
    assert budgeted < 8.5
    held_out = names["held_out"][None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained("data/finetuned")
        assert loaded(held_out, labels=held_out).loss.item() == pytest.approx(tuned, abs=1e-3)
        torch.testing.assert_close(loaded(held_out).logits, names["model"].eval()(held_out).logits)
    assert tuned != dense


def test_train_experts(run):
    _, out = run("train_experts.py", "--steps", "3", "--tokens", "64")
    dense, converted, calibrated, trained = numbers(r"(?m)^[a-z]+ +loss (\d\.\d+)", out)
    assert dense == converted
    assert len({converted, calibrated, trained}) == 3
    first, *_ = numbers(r"experts a token (\d+\.\d+)", out)
    assert 8 < first < 16  # calibrated to 12 on another part of the text
    assert len(numbers(r"router loss (\d+\.\d+)", out)) == 3


def test_scan_while_training(run, cache):
    names, out = run("scan_while_training.py", "--steps", "4", "--tokens", "32")
    held_out = names["held_out"]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(smollm2_folder(cache))(held_out, labels=held_out).loss.item()
        after = names["model"].eval()(held_out, labels=held_out).loss.item()
    with MscanReader("data/training.mscan") as scans:
        assert [sequence.sequence_id for sequence in scans.sequences] == ["step 0", "step 3"]
        losses = [float(np.nanmean(sequence.loss)) for sequence in scans.sequences]
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert after < losses[1] < losses[0]  # one more step was taken since
    assert numbers(r"loss (\d\.\d+)", out) == [round(loss, 3) for loss in losses]


def test_score_heads(run, tmp_path):
    rows = [
        {"question": f"Where do {who} sleep?", "choices": {"text": ["on mats", "in hats"], "label": ["A", "B"]}, "answerKey": "A"}
        for who in ("cats", "old dogs", "mice", "owls of the north")
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names, out = run("score_heads.py", "--questions", "own.jsonl", "--samples", "4")
    assert out.startswith("12 heads in 3 layers over 4 questions")
    scores = numbers(r"(?m)^ +\d+\.\d+ +([\d.]+)", out)
    assert len(scores) == 5
    assert scores == sorted((round(float(score), 2) for row in names["result"].combined for score in row), reverse=True)[:5]
    assert (tmp_path / "data/scores/index.html").stat().st_size


def test_new_attention(run):
    _, out = run("new_attention.py", "--tokens", "128")
    own_block = np.arange(128) // 16 + 1
    counts = numbers(r"query (\d+\.\d+)", out)
    assert counts[0] == round(own_block.mean(), 1)  # all past blocks
    assert counts[-1] == round(np.minimum(own_block, 3).mean(), 1)  # the first, the previous and the own alone
    assert counts == sorted(counts, reverse=True)
    assert len(set(numbers(r"loss (\d\.\d+)", out))) == 6
