"""The names of a study's files are those that its steps write, and no training is left beside what was made of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyonn.errors import InputError
from tinyonn.heads import study as _study
from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.heads.plasticity.measurement import measure
from tinyonn.heads.plasticity.summary import summarise
from tinyonn.heads.plasticity.training import train
from tinyonn.report import write_plasticity_page
from tinyonn.testing import save_tiny_model


@pytest.fixture
def study(tmp_path: Path) -> PlasticityConfig:
    rows = tmp_path / "rows.jsonl"
    records = [{"question": f"{'xyz'[n % 3] * 4} {n}", "passage": "ab", "answer": n % 3 == 0} for n in range(24)]
    rows.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    small = {"eval_size": 8, "max_length": 32, "batch_size": 8, "max_steps": 2, "learning_rate": 1e-3}
    model = save_tiny_model(tmp_path / "bert", "bert", initializer_range=0.1)
    return PlasticityConfig(str(model), "boolq", str(rows), str(tmp_path / "out"), device="cpu", **small)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_new_training_takes_away_is_all_that_later_steps_write(study):
    train(study)
    of_training = names(study.folder)
    measure(study)
    summarise(study)
    write_plasticity_page(study.folder)
    assert names(study.folder) - of_training == set(_study.LATER)
    assert len(_study.LATER) == len(set(_study.LATER))
    train(PlasticityConfig(**{**vars(study), "overwrite": True}))
    assert names(study.folder) == of_training


def test_every_step_names_the_same_command_where_the_record_of_training_is_damaged(study):
    train(study)
    measure(study)
    summarise(study)
    (study.folder / "train.json").write_text('{"options"')
    said = set()
    for step in (train, measure, summarise, lambda config: write_plasticity_page(config.folder)):
        with pytest.raises(InputError) as raised:
            step(study)
        said.add(str(raised.value))
    (only,) = said
    assert only.startswith(f"{study.folder / 'train.json'} must be valid JSON, got: ")
    assert only.endswith("; run tinyonn heads plasticity train --overwrite.")
