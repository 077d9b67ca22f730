"""The scripts in examples/ run as they are, on a tiny model in the place of the demo's, and print what they computed."""

from __future__ import annotations

import importlib
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

from tinyonn.cli.demo.smollm2 import smollm2_folder
from tinyonn.mscan import MscanReader
from tinyonn.testing import save_tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
NOTEBOOK = EXAMPLES / "tour.ipynb"
Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which SmolLM2-135M is a model of three small layers whose tokens are characters."""
    cache = tmp_path_factory.mktemp("cache")
    save_tiny_model(smollm2_folder(cache), "llama", max_position_embeddings=1024)
    return cache


@pytest.fixture
def place(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("TINYONN_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words_of: Callable[[str], set[str]]) -> Run:
    """`run(name, *options)`: runs a script; what it leaves in its namespace, and what it printed, in the words that the README shows."""

    def run(name: str, *options: str) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", [name, *options])
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr().out
        (shown,) = re.findall(rf"^`{name}`\n\n```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
        assert words_of(printed) == words_of(shown)
        return names, printed

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


NUMBERS = re.compile(r'"(--\w+)", type=at_least\((\d+)\)')


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_bad_option_ends_in_one_line(script, place, monkeypatch, capsys):
    numbers = NUMBERS.findall(script.read_text(encoding="utf-8"))
    assert numbers
    (place / "empty").mkdir()
    bad = [("--model", value, f"must be .*, got {value}") for value in ("/nonexistent", "empty", "no model")]
    for option, least in numbers:
        message = f"must be a whole number of at least {least}, got "
        bad += [(option, value, f"{message}'{value}'") for value in (str(int(least) - 1), "-3", "many")]
    for option, value, message in bad:
        monkeypatch.setattr(sys, "argv", [script.name, f"{option}={value}"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        assert ended.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.match(rf"{script.name}: error: argument {option}: {message}", last), last
    assert [path.name for path in place.iterdir()] == ["empty"]


def test_convert_and_finetune(run):
    names, out = run("convert_and_finetune.py", "--steps", "6", "--tokens", "256")
    dense, converted, calibrated, tuned = numbers(r"(?m)^[a-z-]+ +loss (\d\.\d+)", out)
    assert dense == converted != calibrated
    assert numbers(r"calibrated .*, (\d\.\d) key blocks", out) == [8.0]
    first, last = numbers(r"'key_blocks': '([\d.]+)'", out)
    assert first == pytest.approx(8, abs=0.4)  # all of 1 … 16 are 8.5, on average
    assert last == pytest.approx(8, abs=0.4)
    held_out = names["held_out"][None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained("data/finetuned")
        assert loaded(held_out, labels=held_out).loss.item() == pytest.approx(tuned, abs=1e-3)
        torch.testing.assert_close(loaded(held_out).logits, names["model"].eval()(held_out).logits)
    assert tuned != dense


def test_train_experts(run):
    names, out = run("train_experts.py", "--steps", "3", "--tokens", "64")
    dense, converted, calibrated, trained = numbers(r"(?m)^[a-z]+ +loss (\d\.\d+)", out)
    assert dense == converted != calibrated
    assert trained == pytest.approx(calibrated, abs=0.05)  # three steps, of a model of random weights
    trained_parameters = names["step"].optimizers[0].state
    assert {id(router) for router in names["routers"]} <= {id(parameter) for parameter in trained_parameters}
    assert all(state["step"] == 3 for state in trained_parameters.values())
    first, *_ = numbers(r"experts a token (\d+\.\d+)", out)
    assert 8 < first < 16  # calibrated to 12 on another part of the text
    assert len(numbers(r"router loss (\d+\.\d+)", out)) == 3


def test_scan_while_training(run, cache):
    names, out = run("scan_while_training.py", "--steps", "4", "--tokens", "32", "--model", str(smollm2_folder(cache)))
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


def test_score_heads(run, place):
    rows = [
        {"question": f"Where do {who} sleep?", "choices": {"text": ["on mats", "in hats"], "label": ["A", "B"]}, "answerKey": "A"}
        for who in ("cats", "old dogs", "mice", "owls of the north")
    ]
    (place / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names, out = run("score_heads.py", "--questions", "own.jsonl", "--samples", "4")
    assert out.startswith("12 heads in 3 layers over 4 questions")
    scores = numbers(r"(?m)^ +\d+\.\d+ +([\d.]+)", out)
    assert len(scores) == 5
    assert scores == sorted((round(float(score), 2) for row in names["result"].combined for score in row), reverse=True)[:5]
    assert (place / "data/scores/index.html").stat().st_size


def test_new_attention(run):
    _, out = run("new_attention.py", "--tokens", "128")
    own_block = np.arange(128) // 16 + 1
    counts = numbers(r"query (\d+\.\d+)", out)
    assert counts[0] == round(own_block.mean(), 1)  # all past blocks
    assert counts[-1] == round(np.minimum(own_block, 3).mean(), 1)  # the first, the previous and the own alone
    assert counts == sorted(counts, reverse=True)
    assert len(set(numbers(r"loss (\d\.\d+)", out))) == 6


def test_the_notebook_runs_and_its_outputs_are_stored(place, capsys, words_of):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    names: dict[str, Any] = {"__name__": "__main__"}
    plt = importlib.import_module("matplotlib.pyplot")
    plt.close("all")  # figures of earlier tests
    pictures = 0
    for cell in cells:
        code = compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {cell['execution_count']}", "exec")
        exec(code, names)
        stored = ["".join(output.get("text", "")) for output in cell["outputs"]]
        printed, shown = (re.sub(r"""'.*?'|".*?\"""", "'…'", out) for out in (capsys.readouterr().out, "".join(stored)))  # tokens differ
        assert words_of(printed) == words_of(shown)
        pictures += sum("image/png" in output.get("data", {}) for output in cell["outputs"])
    assert pictures == len(names["plt"].get_fignums())
    names["plt"].close("all")
    assert names["scan"].grad_norm.shape == (256, names["engine"].blocks)
    assert [cost for _, cost in names["points"]] == pytest.approx([names["points"][0][1]] * 4, rel=0.05)
    assert NOTEBOOK.stat().st_size < 200_000
