"""Two runs in one folder, checkpoints that are not those of their training, a full disk, and models that cannot be measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import T5Config, T5ForSequenceClassification

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.heads.plasticity.measurement import measure
from tinyonn.heads.plasticity.summary import summarise
from tinyonn.heads.plasticity.training import train
from tinyonn.testing import save_tiny_model

DEEP = "[" * 100_000
WEIGHTS = "model.safetensors"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


def kill_at_step(number: int) -> Callable[..., None]:
    def progress(now: Any) -> None:
        if now.text.startswith(f"step {number}/"):
            raise Killed

    return progress


# ---- one run at a time, one training in a folder


def test_a_second_run_in_the_folder_of_a_seed_is_refused(config):
    run = config(max_steps=1)
    train(run)
    measure(run)
    program = f"""
from tinyonn._io.locks import locked
with locked({str(run.folder)!r}):
    print("in", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        for step in (train, measure, summarise):
            with pytest.raises(InputError, match=r"output_dir must be a folder that no other run is writing into, got .*seed42\.$"):
                step(run)
        other.communicate("\n")
    assert train(run).kept


def test_a_refused_training_leaves_no_folder(config):
    with pytest.raises(InputError, match="eval_size"):
        train(config(eval_size=1000))
    assert not config().folder.exists()


def test_a_record_of_other_options_than_the_folders_is_refused(config):
    run, other = config(max_steps=1), config(max_steps=1, learning_rate=5e-4, output_dir=f"{config().output_dir}-other")
    train(run)
    train(other)
    shutil.copy(other.folder / "train_config.yaml", run.folder)
    as_other = config(max_steps=1, learning_rate=5e-4)
    for step in (train, measure):
        with pytest.raises(InputError) as raised:
            step(as_other)
        assert str(raised.value) == (
            f"{run.folder / 'train.json'} must be of the options in train_config.yaml, got other ones (learning_rate float 0.001); "
            "run tinyonn heads plasticity train --overwrite."
        )


# ---- checkpoints


def replace_final(folder: Path, other: Path) -> None:
    shutil.copy(other / "ckpt_final" / WEIGHTS, folder / "ckpt_final")


def swap(folder: Path, other: Path) -> None:
    (folder / "ckpt_init").rename(folder / "aside")
    (folder / "ckpt_final").rename(folder / "ckpt_init")
    (folder / "aside").rename(folder / "ckpt_final")


def cut(folder: Path, other: Path) -> None:
    path = folder / "ckpt_final" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def lose(folder: Path, other: Path) -> None:
    (folder / "ckpt_init" / WEIGHTS).unlink()


@pytest.mark.parametrize(("spoil", "named"), [(replace_final, "ckpt_final"), (swap, "ckpt_init"), (cut, "ckpt_final"), (lose, "ckpt_init")])
def test_checkpoints_that_are_not_those_of_the_training_are_not_measured(config, spoil, named):
    run, other = config(max_steps=2), config(max_steps=2, seed=1)
    train(run)
    train(other)
    spoil(run.folder, other.folder)
    with pytest.raises(InputError) as raised:
        measure(run)
    assert str(raised.value) == (
        f"{run.folder / named} must hold the weights that its training saved, got others; run tinyonn heads plasticity train --overwrite."
    )
    assert "importance_pre.jsonl" not in left(run.folder)


@pytest.mark.parametrize("spoil", [cut, lose])
def test_a_training_whose_weights_are_short_or_gone_is_done_again(config, spoil):
    run = config(max_steps=2)
    train(run)
    expected = {name: load((run.folder / name / WEIGHTS).read_bytes()) for name in ("ckpt_init", "ckpt_final")}
    spoil(run.folder, run.folder)
    assert not train(run).kept
    for name, tensors in expected.items():
        found = load_file(run.folder / name / WEIGHTS)
        assert all(torch.equal(found[key], value) for key, value in tensors.items())
    assert train(run).kept


def test_the_record_holds_sizes_and_checksums_of_both_checkpoints(config):
    summary = train(config(max_steps=1)).summary
    for name in ("ckpt_init", "ckpt_final"):
        path = config().folder / name / WEIGHTS
        said = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
        assert summary["checkpoints"][name] == {WEIGHTS: {"bytes": path.stat().st_size, "sha256": said}}


def test_a_state_of_another_training_is_not_gone_on_from(config):
    run, other = config(), config(learning_rate=5e-4, output_dir=f"{config().output_dir}-other")
    for each in (run, other):
        with pytest.raises(Killed):
            train(each, kill_at_step(3))
    kept = (run.folder / "train_state.pt").read_bytes()
    shutil.copy(other.folder / "train_state.pt", run.folder)
    with pytest.raises(InputError, match=r"train_state\.pt must be of the training in train_config\.yaml, got one of other options"):
        train(run)
    (run.folder / "train_state.pt").write_bytes(kept)
    path = run.folder / "ckpt_init" / WEIGHTS
    tensors = load_file(path)
    tensors["classifier.bias"] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="ckpt_init must hold the initial weights of the training, got others; --overwrite starts again"):
        train(run)


# ---- a full disk


@pytest.mark.parametrize(("share", "what"), [(0.5, "ckpt_init"), (1.5, "train_state.pt")], ids=["of the checkpoint", "of the saved state"])
def test_a_disk_that_is_full_is_told_with_the_folder(config, bert_folder, files_of_at_most, share, what):
    run = config()
    size = int(share * (bert_folder / WEIGHTS).stat().st_size)
    with pytest.raises(InputError) as raised, files_of_at_most(size):
        train(run)
    assert str(raised.value).startswith(f"output_dir must have room for {what}, got a write that failed in {run.folder}: ")
    assert "\n" not in str(raised.value)
    assert [name for name in left(run.folder) if name.startswith(".")] == []
    assert not (run.folder / "train.json").exists()
    assert train(run).summary["steps"] == 10


# ---- models


def save_t5(folder: Path) -> Path:
    save_tiny_model(folder, "bert")
    (folder / WEIGHTS).unlink()
    t5 = T5Config(vocab_size=97, d_model=48, d_kv=12, d_ff=64, num_layers=1, num_heads=4, pad_token_id=95, eos_token_id=94)
    T5ForSequenceClassification(t5).save_pretrained(folder)
    return folder


def test_a_model_that_cannot_be_measured_is_not_trained(config, tmp_path):
    run = config(model_path=str(save_t5(tmp_path / "t5")))
    steps = []
    with pytest.raises(InputError, match="must be an encoder or a decoder, got t5, which is both"):
        train(run, lambda now: steps.append(now.stage))
    assert "training" not in steps
    assert not run.folder.exists()


def test_tokens_that_the_model_has_no_embedding_for_are_found_before_training(config, tmp_path):
    folder = save_tiny_model(tmp_path / "gpt2", "gpt2")
    tensors = load_file(folder / WEIGHTS)
    name = next(key for key in tensors if key.endswith("wte.weight"))
    tensors[name] = tensors[name][:96].clone()
    save_file({key: value for key, value in tensors.items() if "lm_head" not in key}, folder / WEIGHTS, {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"vocab_size": 96}))
    rows = tmp_path / "rows.jsonl"
    records = [{"question": f"is {n} é" if n == 7 else f"is {n}", "passage": "ab", "answer": n % 3 == 0} for n in range(40)]
    rows.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    run = config(model_path=str(folder), data_path=str(rows), max_steps=1)
    with pytest.raises(InputError) as raised:
        train(run)
    wanted = f"model_path must hold a tokenizer of the model's 96 tokens, got {folder}, whose tokenizer has the token id 96."
    assert str(raised.value) == wanted
    assert not run.folder.exists()
    rows.write_text(rows.read_text().replace("\\u00e9", "e"))
    assert train(run).summary["steps"] == 1  # a token that no text has does no harm


def test_a_training_that_diverged_is_named_where_its_heads_do_nothing(config):
    run = config(learning_rate=1.0, epochs=4)
    train(run)
    summary = json.loads((run.folder / "train.json").read_text())
    assert sum(summary["losses"][-3:]) > sum(summary["losses"][:3])
    with pytest.raises(InputError) as raised:
        measure(run)
    said = str(raised.value)
    assert said.startswith(f"{run.folder / 'ckpt_final'}: the model's output does not change when all heads")
    assert "The loss of the training did not fall (" in said
    assert said.endswith("run tinyonn heads plasticity train --overwrite with a lower --learning-rate (now 1.0).")


# ---- records between steps


@pytest.mark.parametrize("content", ["{}", "[]", DEEP, '{"options": null}', "null"], ids=["empty", "list", "deep", "options", "null"])
def test_a_damaged_record_of_training_is_one_line_for_every_step(config, content):
    run = config(max_steps=1)
    train(run)
    (run.folder / "train.json").write_text(content)
    for step in (train, measure):
        with pytest.raises(InputError) as raised:
            step(run)
        assert str(raised.value).startswith(f"{run.folder / 'train.json'} must ")
        assert str(raised.value).endswith("; run tinyonn heads plasticity train --overwrite.")
    assert not train(PlasticityConfig(**{**vars(run), "overwrite": True})).kept


def test_a_training_of_no_step_is_not_complete(config):
    run = config(max_steps=1)
    train(run)
    path = run.folder / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 0}))
    with pytest.raises(InputError, match=r"must be of a training of at least one step, got 0; run tinyonn heads plasticity train --over"):
        train(run)


def without_facts(path: Path) -> None:
    record = json.loads(path.read_text())
    for part in record["parts"].values():
        del part["facts"]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("measure_parts.json", without_facts),
        ("measure_parts.json", lambda path: path.write_text(DEEP)),
        ("measure_parts.json", lambda path: path.write_text('{"parts": 1}')),
        ("measure.json", lambda path: path.write_text(DEEP)),
        ("measure.json", lambda path: path.write_text(json.dumps(dict.fromkeys(("training_sha256", "subset_sha256"), "0")))),
        (
            "measure.json",
            lambda path: path.write_text(
                json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k in ("training_sha256", "subset_sha256")})
            ),
        ),
        ("measure.json", lambda path: path.write_text(path.read_text().replace('"heads": 12', '"heads": "12"'))),
    ],
    ids=["no facts", "parts deep", "parts of another kind", "deep", "other checksums", "checksums alone", "text for a number"],
)
def test_a_damaged_record_of_measuring_is_made_again(study, name, spoil):
    run = study()
    whole = measure(run).summary
    spoil(run.folder / name)
    again = measure(run)
    assert not again.kept
    numbers = [key for key in whole if key.startswith(("base_", "layers", "heads", "samples"))]
    assert {key: again.summary[key] for key in numbers} == {key: whole[key] for key in numbers}
    assert summarise(run).stats["counts"]["heads"] == 12
    assert measure(run).kept


# ---- options


def test_a_long_name_of_a_task_is_refused_at_once():
    started = time.perf_counter()
    for name in ("a" * 100_000 + "!", "." * 100_000, "a" * 100_000):
        with pytest.raises(InputError, match=r"task must be a name or a YAML file whose name is .* got ") as raised:
            PlasticityConfig("model", name)
        assert len(str(raised.value)) < 400
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("name", ["boolq", "my-task_2.b", "é", "folder/own.yaml"])
def test_names_of_tasks_are_words_with_points_and_hyphens(name):
    assert PlasticityConfig("model", name).task == name


@pytest.mark.parametrize(
    "options", [{"epochs": 10**400}, {"batch_size": 10**400}, {"max_grad_norm": 10**400}, {"max_length": 10**20}], ids=list
)
def test_numbers_beyond_all_bounds_are_refused(options):
    ((name, _),) = options.items()
    with pytest.raises(InputError, match=rf"^{name} must be "):
        PlasticityConfig("model", "boolq", **options)
