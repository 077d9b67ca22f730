"""What an interrupted training leaves and goes on from, what a complete one keeps, and what other options or rows make of both."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.heads.plasticity.training import train
from tinyonn.heads.progress import Progress


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(value, second[name]) for name, value in first.items())


def left(folder: Path) -> list[str]:
    """Everything that is there, hidden files too."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


def killed_at(stage: str, text: str) -> Callable[[Progress], None]:
    def progress(now: Progress) -> None:
        if now.stage == stage and now.text.startswith(text):
            raise Killed

    return progress


@pytest.fixture
def uninterrupted(config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    whole = config(output_dir=f"{config().output_dir}-whole")
    return weights((result := train(whole)).folder / "ckpt_final"), result.summary


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ("loading", "model"),
        ("training", "step 1/"),  # before the first saved state
        ("training", "step 4/"),  # right after one
        ("training", "step 7/"),  # in the second epoch, after another
        ("evaluating", ""),
    ],
    ids=["loading", "step 1", "step 4", "step 7", "evaluating"],
)
def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(config, uninterrupted, stage, text):
    with pytest.raises(Killed):
        train(config(), killed_at(stage, text))
    assert "train.json" not in left(config().folder)
    assert "ckpt_final" not in left(config().folder)
    steps = []
    result = train(config(), lambda now: steps.append(now.text))
    assert same(weights(config().folder / "ckpt_final"), uninterrupted[0])
    for key in ("losses", "accuracy", "evaluation_loss", "steps"):
        assert result.summary[key] == uninterrupted[1][key]
    done = 8 if stage == "evaluating" else int(text.split()[1].strip("/")) // 2 * 2 if stage == "training" else 0
    assert sum(step.startswith("step ") for step in steps) == 10 - done
    assert left(config().folder) == ["ckpt_final", "ckpt_init", "train.json", "train_config.yaml"]


@pytest.mark.parametrize("name", ["ckpt_init", "ckpt_final"])
def test_a_checkpoint_that_was_half_written_is_not_taken_for_one(config, uninterrupted, monkeypatch, name):
    def half(model: PreTrainedModel, folder: Path) -> None:
        if name not in folder.name:
            return whole(model, folder)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise Killed

    whole = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", half)
    with pytest.raises(Killed):
        train(config())
    assert name not in left(config().folder)
    monkeypatch.undo()
    train(config())
    assert same(weights(config().folder / "ckpt_final"), uninterrupted[0])
    assert left(config().folder) == ["ckpt_final", "ckpt_init", "train.json", "train_config.yaml"]


def test_a_killed_process_is_gone_on_from(config, uninterrupted, forked):
    def progress(now):
        if now.text.startswith("step 5/"):
            os.kill(os.getpid(), signal.SIGKILL)

    process = forked(lambda: train(config(), progress))
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert left(config().folder) == [".lock", "ckpt_init", "train_config.yaml", "train_state.pt"]  # the lock died with its process
    train(config())
    torch.testing.assert_close(weights(config().folder / "ckpt_final"), uninterrupted[0])


@pytest.mark.gpu
def test_a_gpu_trains_in_half_precision_and_goes_on_from_a_saved_state(config):
    run = config(device="cuda")
    whole = train(config(device="cuda", output_dir=f"{run.output_dir}-whole")).summary
    with pytest.raises(Killed):
        train(run, killed_at("training", "step 7/"))
    resumed = train(run).summary
    assert resumed["dtype"] in ("bf16", "fp16")
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=0.02)
    assert {value.dtype for value in weights(run.folder / "ckpt_final").values()} == {torch.float32}


def test_a_complete_training_is_kept(config):
    first = train(config())
    (config().folder / "train_state.pt").write_text("of a run that was killed after its last file")
    times = {path: path.stat().st_mtime_ns for path in config().folder.rglob("*") if path.name != "train_state.pt"}
    said = []
    again = train(config(top_k=5, checkpoint_steps=7), said.append)
    assert again.kept
    assert again.summary == first.summary
    assert said == [Progress("training", 1.0, f"kept: {config().folder} holds a complete training of these options")]
    assert {path: path.stat().st_mtime_ns for path in config().folder.rglob("*")} == times


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "interrupted"])
def test_other_options_in_the_same_folder_are_refused_by_name(config, complete):
    if complete:
        train(config())
    else:
        with pytest.raises(Killed):
            train(config(), killed_at("training", "step 3/"))
    before = left(config().folder)
    with pytest.raises(InputError) as raised:
        train(config(batch_size=4, epochs=1))
    assert str(raised.value) == (
        "output_dir must be another one, or --overwrite be given: seed42 was trained with other options, "
        "got batch_size 4 (there 8), epochs 1 (there 2)."
    )
    assert left(config().folder) == before


def test_overwrite_replaces_a_training_and_what_was_measured_of_it_alone(config):
    train(config())
    for name in ("measure.json", "heads.csv", "notes.txt"):
        (config().folder / name).write_text("old")
    result = train(config(epochs=1, overwrite=True))
    assert (result.kept, result.summary["steps"]) == (False, 5)
    assert left(config().folder) == ["ckpt_final", "ckpt_init", "notes.txt", "train.json", "train_config.yaml"]


def test_what_is_there_stays_where_the_new_training_cannot_begin(config):
    train(config())
    before = left(config().folder)
    with pytest.raises(InputError, match="max_length must be at most"):
        train(config(max_length=500, overwrite=True))
    assert left(config().folder) == before


def test_a_training_whose_checkpoint_is_gone_is_done_again(config):
    train(config())
    expected = weights(config().folder / "ckpt_final")
    shutil.rmtree(config().folder / "ckpt_final")
    assert not train(config()).kept
    assert same(weights(config().folder / "ckpt_final"), expected)


def test_the_tasks_own_number_of_rows_is_the_same_option_as_that_number(config, tmp_path):
    task = tmp_path / "own.yaml"
    task.write_text('text: question\nlabel: answer\nlabels: ["false", "true"]\neval_size: 20\n')
    train(config(task=str(task), eval_size=None))
    assert train(config(task=str(task), eval_size=20)).kept


def test_the_record_of_options_is_a_configuration_of_the_same_training(config):
    train(config(max_steps=1))
    again = PlasticityConfig.from_yaml(config().folder / "train_config.yaml", output_dir=config().output_dir)
    assert train(again).kept


def test_a_damaged_state_and_changed_data_are_named(config, boolq_rows, tmp_path):
    copy = tmp_path / "rows.jsonl"
    copy.write_text(boolq_rows.read_text())
    run = config(data_path=str(copy))
    with pytest.raises(Killed):
        train(run, killed_at("training", "step 3/"))
    copy.write_text(boolq_rows.read_text().replace("yyyy 1", "yyyy one", 1))
    with pytest.raises(InputError, match=r"data_path must hold the rows with which the training in .* began; --overwrite starts again\."):
        train(run)
    copy.write_text(boolq_rows.read_text())
    state = run.folder / "train_state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(
        InputError, match=r"train_state\.pt must be a complete training state, got a damaged file; --overwrite starts again"
    ):
        train(run)
