"""Scans whose numbers left the range of their precision: `scan`, the page and `compare` say what happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyonn.cli.app import run
from tinyonn.mscan import MscanReader
from tinyonn.testing import save_tiny_model

Weights = dict[str, torch.Tensor]


def nan_weight(weights: Weights) -> None:
    weights["model.layers.1.mlp.down_proj.weight"].fill_(float("nan"))


def forward_overflow(weights: Weights) -> None:
    weights["model.layers.1.mlp.up_proj.weight"].mul_(1e5)


def backward_overflow(weights: Weights) -> None:
    """Tiny hidden states under a norm, and a large head: logits fit float16, the gradient before the norm does not."""
    weights["lm_head.weight"].mul_(1000)
    for name, weight in weights.items():
        if "embed_tokens" in name or "o_proj" in name or "down_proj" in name:
            weight.mul_(1e-4)


def broken_model(folder: Path, change: Callable[[Weights], None] | None) -> Path:
    model = save_tiny_model(folder)
    if change is not None:
        weights = load_file(model / "model.safetensors")
        change(weights)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def scan(tmp_path: Path, model: Path, topic: str, dtype: str) -> Path:
    corpus = tmp_path / f"{topic}_corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": f"t{i}", "text": f"The {topic} number {i} sat down."}) + "\n" for i in range(9)))
    assert run(["scan", "-m", str(model), "-d", str(corpus), "-o", str(tmp_path / f"{topic}.mscan"), "--dtype", dtype]) == 0
    return tmp_path / f"{topic}.mscan"


LOSS, NORMS = "loss and gradients in 9 of 9 sequences", "norms of some tokens, left out of all sums, in 9 of 9 sequences"
HALF = "float16 ends at 65,504: scan with --dtype bf16 or fp32"
CASES = {
    "NaN weight": (nan_weight, "fp32", LOSS, "The weights hold NaN or infinity, or values too large for float32."),
    "NaN weight in half": (nan_weight, "fp16", LOSS, HALF),
    "forward overflow": (forward_overflow, "fp16", LOSS, HALF),
    "backward overflow": (backward_overflow, "fp16", NORMS, HALF),
}


@pytest.mark.parametrize("case", CASES)
def test_every_command_says_what_happened(
    case: str, tmp_path: Path, parse: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    change, dtype, said, cause = CASES[case]
    model = broken_model(tmp_path / "model", change)
    a = scan(tmp_path, model, "cat", dtype)
    screen = " ".join(capsys.readouterr().out.split())
    assert f"not finite {said}" in screen
    assert cause.replace(": ", " ") in screen
    b = scan(tmp_path, model, "dog", dtype)

    assert run(["report", str(a), "-o", str(tmp_path / "r.html"), "--no-figures"]) == 0
    page = parse(tmp_path / "r.html").text
    assert cause in page
    about = "The loss of 9 of 9 sequences is not finite" if said == LOSS else "tokens are not finite. The maps and sums leave them out"
    assert about in page
    for wrong in ("its writer measured none", "experts without a token", "No token of this file has a loss"):
        assert wrong not in page

    capsys.readouterr()
    assert run(["compare", str(a), str(b), "-o", str(tmp_path / "c.html"), "--no-figures"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tinyonn compare: cat.mscan must hold at least 8 sequences with SPS, got 0 of 9: the ")
    assert cause in error
    assert "scan more" not in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c.html").exists()


def test_a_scan_within_range_says_nothing(tmp_path: Path, parse: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]) -> None:
    a = scan(tmp_path, broken_model(tmp_path / "model", backward_overflow), "cat", "fp32")
    assert "not finite" not in capsys.readouterr().out
    assert run(["report", str(a), "-o", str(tmp_path / "r.html"), "--no-figures"]) == 0
    assert "not finite" not in parse(tmp_path / "r.html").text


def test_one_bad_sequence_does_not_spoil_the_file(tmp_path: Path, parse: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]) -> None:
    def one_character(weights: Weights) -> None:  # "~" alone overflows
        weights["model.embed_tokens.weight"][ord("~") - 32] = float("inf")

    model = broken_model(tmp_path / "model", one_character)
    corpora = {}
    for topic in ("cat", "dog"):
        texts = [f"The {topic} number {i} sat down." for i in range(9)] + [f"The {topic} is ~ bad."]
        corpora[topic] = tmp_path / f"{topic}_corpus.jsonl"
        corpora[topic].write_text("".join(json.dumps({"id": f"t{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
        output = str(tmp_path / f"{topic}.mscan")
        assert run(["scan", "-m", str(model), "-d", str(corpora[topic]), "-o", output, "--batch-size", "1"]) == 0
    assert "loss and gradients in 1 of 10 sequences" in capsys.readouterr().out
    assert run(["report", str(tmp_path / "cat.mscan"), "-o", str(tmp_path / "r.html"), "--no-figures"]) == 0
    page = parse(tmp_path / "r.html")
    assert "The loss of 1 of 10 sequences is not finite" in page.text
    maps = {found["key"]: np.array(found["values"], dtype=float) for found in page.data["maps-data"]}
    inside = maps["sps"][:3, :-1]
    assert np.isfinite(inside).all()
    with MscanReader(tmp_path / "cat.mscan") as reader:
        bad = reader.find("t9")
        assert bad is not None
        good = [i for i in range(10) if i != bad]
        tokens = sum(reader.sequences[i].num_tokens - 1 for i in good)
        assert reader.integral().count.min() >= tokens
    assert run(["compare", *(str(tmp_path / f"{t}.mscan") for t in corpora), "-o", str(tmp_path / "c.html"), "--no-figures"]) == 0
    assert "cat.mscan: 1 of 10 sequences have a loss that is not finite; they are left out." in parse(tmp_path / "c.html").text


def test_the_replay_names_a_loss_that_is_not_finite(tmp_path: Path, browser: Any) -> None:
    a = scan(tmp_path, broken_model(tmp_path / "model", nan_weight), "cat", "fp32")
    assert run(["report", str(a), "-o", str(tmp_path / "r.html"), "--no-figures"]) == 0
    browser.open(tmp_path / "r.html")
    browser.run("document.querySelector('[data-replay=tokens]').focus()")
    facts = "return [...document.querySelectorAll('[data-replay=facts] dd')].map(d => d.textContent).slice(2)"
    assert browser.run(facts) == ["the first token is not predicted", "not finite"]
    browser.press("ArrowRight")
    assert browser.run(facts) == ["not finite", "not finite"]
    browser.press("End")
    assert browser.run(facts) == ["not finite", "nothing to predict"]
    assert "loss not finite" in browser.run("return document.querySelector('[data-replay=sequence]').textContent")
    assert browser.console() == []
