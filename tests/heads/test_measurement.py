"""The measure step: files of a trained classifier against weights cut by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tinyonn.heads.plasticity import ablation
from tinyonn.heads.plasticity.classification import load_task
from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.heads.plasticity.measurement import measure
from tinyonn.heads.plasticity.summary import summarise

KEYS = {
    "importance_pre.jsonl": ["layer", "head", "loss_increase", "accuracy_drop", "taylor", "taylor_abs"],
    "importance_post.jsonl": ["layer", "head", "loss_increase", "accuracy_drop", "taylor", "taylor_abs"],
    "gradfisher_pre.jsonl": ["layer", "head", "gradient_norm", "fisher"],
    "update.jsonl": ["layer", "head", "Uq", "Uk", "Uv", "Uo", "U", "Urel"],
}
MEASURED = 12  # rows of `study`


def lines(config: PlasticityConfig, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.folder / name).read_text().splitlines()]


def content(config: PlasticityConfig) -> dict[str, bytes]:
    return {name: (config.folder / name).read_bytes() for name in (*KEYS, "eval_subset.json")}


def by_hand(config: PlasticityConfig, checkpoint: str, cut: tuple[str, int] | None) -> tuple[float, float]:
    """Mean loss and accuracy over the measured rows, one by one; without a head's columns of an output projection."""
    model = AutoModelForSequenceClassification.from_pretrained(config.folder / checkpoint).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(config.folder / checkpoint)
    if cut is not None:
        name, head = cut
        model.get_parameter(name).data[:, 12 * head : 12 * head + 12] = 0
    rows = [json.loads(line) for line in Path(config.data_path).read_text().splitlines()]
    losses, right = [], []
    for index in json.loads((config.folder / "eval_subset.json").read_text())["indices"]:
        encoded = tokenizer([rows[index]["question"]], [rows[index]["passage"]], truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits
        label = int(rows[index]["answer"])
        losses.append(functional.cross_entropy(logits, torch.tensor([label])).item())
        right.append(logits.argmax().item() == label)
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize(
    ("arch", "output"),
    [("bert", "bert.encoder.layer.{}.attention.output.dense.weight"), ("llama", "model.layers.{}.self_attn.o_proj.weight")],
    ids=["bert", "llama"],
)
def test_importance_is_what_the_loss_rises_by_when_the_head_is_cut_out(study, arch, output):
    config = study(arch)
    summary = measure(config).summary
    for when, checkpoint in (("pre", "ckpt_init"), ("post", "ckpt_final")):
        base = by_hand(config, checkpoint, None)
        assert (summary[f"base_loss_{when}"], summary[f"base_accuracy_{when}"]) == pytest.approx(base, rel=1e-5)
        found = {(row["layer"], row["head"]): row for row in lines(config, f"importance_{when}.jsonl")}
        for layer, head in [(0, 0), (1, 3), (2, 1)]:
            loss, accuracy = by_hand(config, checkpoint, (output.format(layer), head))
            assert found[layer, head]["loss_increase"] == pytest.approx(loss - base[0], abs=2e-6)
            assert found[layer, head]["accuracy_drop"] == pytest.approx(base[1] - accuracy)
    assert summary["replayed_pre"]
    assert summary["replayed_post"]
    assert summary["gate_check_pre"] > 0


def test_every_file_has_a_line_for_every_head(study):
    config = study()
    result = measure(config)
    assert not result.kept
    for name, keys in KEYS.items():
        assert [list(row) for row in lines(config, name)] == [keys] * 12
        assert [(row["layer"], row["head"]) for row in lines(config, name)] == [(layer, head) for layer in range(3) for head in range(4)]
    summary = json.loads((config.folder / "measure.json").read_text())
    assert summary == result.summary
    expected = {"task": "boolq", "seed": 42, "samples": MEASURED, "layers": 3, "heads": 12, "dtype": "fp32", "device": "cpu"}
    assert expected.items() <= summary.items()
    labels = json.loads((config.folder / "eval_subset.json").read_text())["labels"]
    assert summary["commonest_class"] == max(labels.count(0), labels.count(1)) / MEASURED
    assert summary["seconds"] > 0


def test_a_deberta_of_four_layers_by_twelve_heads_gives_48_lines(study):
    config = study("deberta-v2", batch_size=MEASURED)
    measure(config)
    for name in KEYS:
        assert [(row["layer"], row["head"]) for row in lines(config, name)] == [(layer, head) for layer in range(4) for head in range(12)]
    before, after = (load_file(config.folder / name / "model.safetensors") for name in ("ckpt_init", "ckpt_final"))
    name = "deberta.encoder.layer.3.attention.self.value_proj.weight"
    moved = (after[name] - before[name])[4 * 5 : 4 * 6].double().norm().item()
    assert lines(config, "update.jsonl")[3 * 12 + 5]["Uv"] == pytest.approx(moved, rel=1e-6)
    assert all(row["gradient_norm"] > 0 and row["fisher"] >= row["gradient_norm"] ** 2 for row in lines(config, "gradfisher_pre.jsonl"))


def test_the_report_step_takes_what_measuring_writes(study):
    config = study()
    measure(config)
    summarise(config)
    header, *rows = (config.folder / "heads.csv").read_text().splitlines()
    assert len(rows) == 12
    first = dict(zip(header.split(","), rows[0].split(","), strict=True))
    assert float(first["I_pre"]) == pytest.approx(lines(config, "importance_pre.jsonl")[0]["loss_increase"], rel=1e-8)


def test_the_subset_names_the_rows_that_were_held_out(study):
    config = study()
    measure(config)
    subset = json.loads((config.folder / "eval_subset.json").read_text())
    held = load_task(config).evaluation
    assert subset == {
        "source": config.data_path,
        "seed": 999,
        "size": MEASURED,
        "indices": [example.row for example in held],
        "labels": [int(example.row % 3 == 0) for example in held],
    }


def test_two_measurements_write_the_same_bytes(study):
    first, second = study(name="a"), study(name="b")
    measure(first)
    measure(second)
    assert content(first) == content(second)


def test_batches_of_another_size_change_rounding_alone(study):
    first, second = study(name="a"), study(name="b", batch_size=3)
    measure(first)
    measure(second)
    for name in KEYS:
        for row, other in zip(lines(first, name), lines(second, name), strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-6)


def test_full_passes_in_place_of_replays_are_said(study, monkeypatch):
    monkeypatch.setattr(ablation, "_replay_error", lambda *args: (0.5, False))
    said = []
    summary = measure(study(), said.append).summary
    assert (summary["replayed_pre"], summary["replay_error_pre"]) == (False, 0.5)
    assert [now.stage for now in said if now.text == "every pass was full: replays did not agree"] == [
        "importance before training",
        "importance after training",
    ]


def test_progress_counts_samples(study):
    said = []
    measure(study(), said.append)
    texts = [now.text for now in said if now.stage == "importance before training"]
    assert texts == ["5/12 samples", "10/12 samples", "12/12 samples"]
    assert [now.fraction for now in said if now.stage == "gradients before training"] == pytest.approx([5 / 12, 10 / 12, 1])
