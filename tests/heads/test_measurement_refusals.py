"""One line where heads cannot be measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyonn.errors import InputError
from tinyonn.heads.plasticity import measurement
from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.heads.plasticity.measurement import measure


def test_a_folder_without_a_complete_training_names_the_step(study):
    config = study()
    (config.folder / "train.json").unlink()
    with pytest.raises(InputError, match=r"train\.json must exist, got no such file; run tinyonn heads plasticity train"):
        measure(config)
    assert not (config.folder / "eval_subset.json").exists()


@pytest.mark.parametrize(
    "options", [{"eval_size": 10}, {"eval_seed": 7}, {"max_length": 16}, {"learning_rate": 1e-5}], ids=lambda o: next(iter(o))
)
def test_options_other_than_those_of_the_training_are_refused_by_name(study, options):
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=rf"options must be those of the training in .*, got {name} {value} \(there "):
        measure(study(**options))


def test_rows_that_have_changed_since_the_training_are_refused(study, study_rows):
    config = study()
    text = study_rows.read_text()
    try:
        study_rows.write_text(text.replace("xxxx", "xxxy"))
        with pytest.raises(
            InputError, match=r"rows\.jsonl must hold the rows that the training in .* used, got others; run .* train --overwrite"
        ):
            measure(config)
    finally:
        study_rows.write_text(text)


def edit(config: PlasticityConfig, checkpoint: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes a checkpoint as if its training had ended there."""
    path = config.folder / checkpoint / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    record = json.loads((config.folder / "train.json").read_text())
    record["checkpoints"][checkpoint][path.name] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (config.folder / "train.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("checkpoint", "change", "message"),
    [
        (
            "ckpt_final",
            lambda w: w["classifier.bias"].fill_(torch.nan),
            "the loss of the evaluation samples is nan with all heads on, which is not finite",
        ),
        (
            "ckpt_init",
            lambda w: w["classifier.bias"].fill_(torch.nan),
            "the loss of the evaluation samples is nan with all heads on, which is not finite",
        ),
        ("ckpt_final", lambda w: w.pop("classifier.bias"), "got classifier.bias in only one of them"),
        (
            "ckpt_init",
            lambda w: w["classifier.weight"].zero_(),
            "the model's output does not change when all heads",
        ),
    ],
    ids=["nan after", "nan before", "tensor missing", "gates do nothing"],
)
def test_models_that_cannot_be_measured_end_in_one_line(study, checkpoint, change, message):
    config = study()
    edit(config, checkpoint, change)
    with pytest.raises(InputError, match=message) as caught:
        measure(config)
    assert "\n" not in str(caught.value)
    assert not (config.folder / "measure.json").exists()


def test_memory_that_runs_out_names_the_option_to_lower(study, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measurement, "ablate_heads", full)
    with pytest.raises(InputError, match=r"memory ran out while measuring: lower --batch-size \(now 5\); existing measurements are kept"):
        measure(study())


def test_other_errors_pass(study, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(measurement, "ablate_heads", broken)
    with pytest.raises(RuntimeError, match="something else"):
        measure(study())
