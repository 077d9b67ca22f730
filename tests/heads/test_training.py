"""Fine-tuning: the weights before and after, what an interruption leaves, and one line where training cannot go on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from tinyonn.errors import InputError
from tinyonn.heads import training
from tinyonn.heads.plasticity_config import PlasticityConfig
from tinyonn.heads.progress import Progress
from tinyonn.heads.training import resolve_precision, train
from tinyonn.hf import loading
from tinyonn.testing import save_tiny_model

ROWS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-bert", "bert", initializer_range=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions out of three are answered by their first letter; all texts are different and of unlike length."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(ROWS):
            record = {"question": f"{'xyz'[n % 3] * 4} {n}", "passage": "ab" * (n % 5), "answer": n % 3 == 0}
            file.write(f"{json.dumps(record)}\n")
    return folder / "rows.jsonl"


@pytest.fixture
def config(model: Path, data: Path, tmp_path: Path) -> Callable[..., PlasticityConfig]:
    def make(**options: Any) -> PlasticityConfig:
        given = {"model_path": str(model), "task": "boolq", "data_path": str(data), "output_dir": str(tmp_path / "out"), "device": "cpu"}
        small = {"eval_size": 20, "max_length": 32, "batch_size": 8, "epochs": 2, "learning_rate": 1e-3, "checkpoint_steps": 2}
        return PlasticityConfig(**{**given, **small, **options})

    return make


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


def test_the_first_checkpoint_is_the_model_with_a_new_classifier(config, model):
    train(config(max_steps=1))
    before, source = weights(config().folder / "ckpt_init"), weights(model)
    # The pretrained model is saved without the prefix that it has inside a classifier.
    assert same({name.removeprefix("bert."): value for name, value in before.items() if not name.startswith("classifier")}, source)
    loaded = AutoModelForSequenceClassification.from_pretrained(config().folder / "ckpt_init")
    assert loaded.config.id2label == {0: "false", 1: "true"}
    assert before["classifier.weight"].shape == (2, 48)


def test_the_new_classifier_follows_the_seed(config):
    train(config(max_steps=1, seed=1))
    train(config(max_steps=1, seed=2))
    train(config(max_steps=1, seed=1, output_dir=f"{config().output_dir}-again"))
    again = Path(f"{config().output_dir}-again") / "boolq" / "seed1" / "ckpt_init"
    first, second = (weights(config(seed=seed).folder / "ckpt_init")["classifier.weight"] for seed in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, weights(again)["classifier.weight"])


def test_one_step_moves_every_weight_against_its_gradient_by_the_learning_rate(config, tmp_path):
    # Adam's first step is the sign of the gradient times the learning rate, wherever the gradient is far above its epsilon.
    still = save_tiny_model(tmp_path / "still", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    step = config(model_path=str(still), max_steps=1, batch_size=ROWS, warmup_ratio=0, weight_decay=0.5)
    train(step)
    oracle = AutoModelForSequenceClassification.from_pretrained(step.folder / "ckpt_init")
    tokenizer = AutoTokenizer.from_pretrained(step.folder / "ckpt_init")
    rows = [json.loads(line) for line in Path(step.data_path).read_text().splitlines()]
    held = training.load_task(step).evaluation
    rows = [row for number, row in enumerate(rows) if number not in {example.row for example in held}]
    encoded = tokenizer([row["question"] for row in rows], [row["passage"] for row in rows], padding=True, return_tensors="pt")
    oracle(**encoded, labels=torch.tensor([int(row["answer"]) for row in rows])).loss.backward()
    norm = torch.cat([value.grad.flatten() for value in oracle.parameters()]).norm().item()
    after = weights(step.folder / "ckpt_final")
    for name, value in oracle.named_parameters():
        decayed = value.detach() * (1 - 1e-3 * 0.5) if value.ndim == 2 else value.detach()
        clear = value.grad.abs() > 1e-4 * max(norm, 1)
        moved = (after[name] - decayed)[clear]
        torch.testing.assert_close(moved, -1e-3 * value.grad.sign()[clear], rtol=2e-3, atol=2e-6)


def test_training_learns_and_its_accuracy_is_that_of_the_last_checkpoint(config, data):
    run = config(epochs=12, max_steps=60)
    result = train(run)
    assert result.summary == json.loads((run.folder / "train.json").read_text())
    assert (result.kept, result.folder, result.summary["steps"]) == (False, run.folder, 60)
    assert len(result.summary["losses"]) == 60
    assert sum(result.summary["losses"][-5:]) < 0.5 * sum(result.summary["losses"][:5])
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "ckpt_final")
    judge = AutoModelForSequenceClassification.from_pretrained(run.folder / "ckpt_final").eval()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    right, loss = [], []
    for example in training.load_task(run).evaluation:
        row = rows[example.row]
        with torch.no_grad():
            logits = judge(**tokenizer([row["question"]], [row["passage"]], return_tensors="pt")).logits[0].double()
        right.append(bool(logits.argmax()) == row["answer"])
        loss.append(-logits.log_softmax(0)[int(row["answer"])].item())
    assert result.summary["accuracy"] == sum(right) / 20 > 0.9
    assert result.summary["evaluation_loss"] == pytest.approx(sum(loss) / 20, rel=1e-4)
    assert left(run.folder) == ["ckpt_final", "ckpt_init", "train.json", "train_config.yaml"]


def test_training_writes_nothing_on_the_terminal_and_leaves_the_settings_of_transformers(config, capfd):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    train(config(epochs=1))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_seed_gives_the_same_weights_and_leaves_the_callers_generator_alone(config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(config())
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    train(config(output_dir=f"{config().output_dir}-again"))
    again = Path(f"{config().output_dir}-again") / "boolq" / "seed42" / "ckpt_final"
    assert same(weights(config().folder / "ckpt_final"), weights(again))
    train(config(seed=7))
    assert not same(weights(config(seed=7).folder / "ckpt_final"), weights(again))


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


def test_a_killed_process_is_gone_on_from(config, uninterrupted):
    program = f"""
import os, signal
from tinyonn.heads import training
from tinyonn.heads.plasticity_config import PlasticityConfig
from tinyonn.heads.training import train
def progress(now):
    if now.text.startswith("step 5/"):
        os.kill(os.getpid(), signal.SIGKILL)
train({config()!r}, progress)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert left(config().folder) == ["ckpt_init", "train_config.yaml", "train_state.pt"]
    train(config())
    torch.testing.assert_close(weights(config().folder / "ckpt_final"), uninterrupted[0])


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
        "output_dir must be another one, or --overwrite be given, where options differ from those of the training in "
        f"{config().folder}, got batch_size 4 (there 8), epochs 1 (there 2)."
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


@pytest.mark.parametrize(("call", "step"), [(0, 1), (6, 7), (10, 10)], ids=["first step", "after saved states", "evaluation"])
def test_a_loss_that_is_no_number_names_the_step_and_leaves_nothing(config, monkeypatch, call, step):
    calls = iter(range(100))
    whole = training.batches

    def poisoned(*args: Any) -> Iterator[dict[str, Tensor]]:
        for batch in whole(*args):
            if next(calls) == call:
                batch["inputs_embeds"] = torch.full((*batch.pop("input_ids").shape, 48), float("nan"))
            yield batch

    monkeypatch.setattr(training, "batches", poisoned)
    with pytest.raises(InputError) as raised:
        train(config())
    assert str(raised.value) == f"loss must stay finite, got nan in step {step} of 10: lower --learning-rate (now 0.001)."
    assert left(config().folder) == []
    monkeypatch.undo()
    assert train(config(learning_rate=1e-4)).summary["steps"] == 10  # other options may follow in the same folder


def test_a_gradient_that_overflows_is_found_before_the_weights_are_ruined(config, tmp_path):
    # Logits of 1e25 have a finite loss, and gradients whose squares are beyond float32.
    wild = save_tiny_model(tmp_path / "wild", "bert", num_labels=2)
    tensors = weights(wild)
    tensors["classifier.weight"] *= 1e25
    save_file(tensors, wild / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"^gradient must stay finite, got (inf|nan) in step 1 of 10: lower --learning-rate"):
        train(config(model_path=str(wild)))


def test_memory_that_runs_out_names_the_options_to_lower(config, monkeypatch):
    def full(*args: Any) -> Iterator[dict[str, Tensor]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "batches", full)
    with pytest.raises(InputError) as raised:
        train(config())
    assert str(raised.value) == (
        "memory ran out after step 0: lower --batch-size (now 8) or --max-length (now 32), or take --dtype bf16; with --overwrite, since "
        "other options are another training."
    )


def test_a_damaged_state_and_changed_data_are_named(config, data, tmp_path):
    copy = tmp_path / "rows.jsonl"
    copy.write_text(data.read_text())
    run = config(data_path=str(copy))
    with pytest.raises(Killed):
        train(run, killed_at("training", "step 3/"))
    copy.write_text(data.read_text().replace("yyyy 1", "yyyy one", 1))
    with pytest.raises(InputError, match=r"data_path must hold the rows that the training in .* began with; --overwrite begins again\."):
        train(run)
    copy.write_text(data.read_text())
    state = run.folder / "train_state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(
        InputError, match=r"train_state\.pt must be a whole state of training, got a damaged file; --overwrite begins again"
    ):
        train(run)


def test_the_record_of_options_is_a_configuration_of_the_same_training(config):
    train(config(max_steps=1))
    again = PlasticityConfig.from_yaml(config().folder / "train_config.yaml", output_dir=config().output_dir)
    assert train(again).kept


def test_a_classifier_of_other_classes_is_replaced(config, tmp_path):
    run = config(model_path=str(save_tiny_model(tmp_path / "five", "bert", num_labels=5)), max_steps=1)
    train(run)
    assert weights(run.folder / "ckpt_init")["classifier.weight"].shape == (2, 48)


def test_weights_that_the_transformer_lacks_are_not_made_up(config, tmp_path):
    broken = save_tiny_model(tmp_path / "broken", "bert")
    tensors = weights(broken)
    del tensors["encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"must hold all weights .* without bert\.encoder\.layer\.1\.attention\.self\.query\.weight\."):
        train(config(model_path=str(broken)))
    assert left(config().folder) == []


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


def test_more_tokens_than_the_model_takes_are_refused(config):
    with pytest.raises(InputError) as raised:
        train(config(max_length=129))
    assert str(raised.value) == "max_length must be at most the 128 tokens that the model takes, got 129."
    assert left(config().folder) == []


def test_positions_that_a_roberta_keeps_for_padding_are_not_used(config, data, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(data.read_text().replace('"passage": "', f'"passage": "{"c" * 40}'))
    run = config(model_path=str(save_tiny_model(tmp_path / "roberta", "roberta")), data_path=str(long), max_steps=1)
    assert train(run).summary["steps"] == 1  # 128 positions, of which 96 are of the padding token, 95, and those before it
    with pytest.raises(InputError, match=r"max_length must be at most the 32 tokens that the model takes, got 33\."):
        train(config(model_path=run.model_path, data_path=str(long), max_length=33, seed=1))


def test_a_model_that_does_not_fit_with_its_optimiser_is_refused_before_it_is_loaded(config, model, monkeypatch):
    free = 3 * (model / "model.safetensors").stat().st_size
    monkeypatch.setattr(loading, "available_memory", lambda device: free)
    with pytest.raises(InputError, match=r"^model_path must fit in memory: to train it takes .* in float32 .*; use a smaller model\.$"):
        train(config())
    assert left(config().folder) == []


@pytest.mark.parametrize("arch", ["gpt2", "llama", "deberta-v2", "roberta", "distilbert", "modernbert"])
def test_other_architectures_are_trained_as_classifiers(config, tmp_path, arch):
    run = config(model_path=str(save_tiny_model(tmp_path / arch, arch)), epochs=1)
    assert train(run).summary["steps"] == 5
    loaded, info = AutoModelForSequenceClassification.from_pretrained(run.folder / "ckpt_final", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "ckpt_final")
    assert not info["missing_keys"]
    assert tokenizer.pad_token_id == loaded.config.pad_token_id == 95
    # A row's logits are the same alone and beside a longer one: the classifier reads its last token, not the padding.
    rows = ["xx", "yyyyyyyy"]
    with torch.no_grad():
        alone = loaded.eval()(**tokenizer(rows[:1], return_tensors="pt")).logits
        beside = loaded(**tokenizer(rows, padding=True, padding_side="right", return_tensors="pt")).logits[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_that_cannot_pad_is_refused(config, tmp_path):
    run = config(model_path=str(save_tiny_model(tmp_path / "gpt2", "gpt2", end_token=False)))
    with pytest.raises(InputError) as raised:
        train(run)
    assert str(raised.value) == "model_path must hold a tokenizer with a padding or end-of-text token, got gpt2 with neither."


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_trains_weights_of_full_precision(config, dtype):
    run = config(epochs=1, dtype=dtype)
    result = train(run)
    full = train(config(epochs=1, output_dir=f"{run.output_dir}-full"))
    assert result.summary["dtype"] == dtype
    assert full.summary["dtype"] == "fp32"
    assert {value.dtype for value in weights(run.folder / "ckpt_final").values()} == {torch.float32}
    assert result.summary["losses"] != full.summary["losses"]
    assert result.summary["losses"] == pytest.approx(full.summary["losses"], rel=0.05)


def test_a_step_whose_gradients_overflow_in_fp16_is_left_out_and_counted(config, tmp_path):
    # A classifier of 100 times its size has gradients of some hundreds: with the scaler's first factor, 65,536, beyond float16.
    steep = save_tiny_model(tmp_path / "steep", "bert", num_labels=2)
    tensors = weights(steep)
    tensors["classifier.weight"] *= 100
    save_file(tensors, steep / "model.safetensors", {"format": "pt"})
    run = config(model_path=str(steep), dtype="fp16", max_steps=1)
    assert train(run).summary["left_out_steps"] == 1
    assert same(weights(run.folder / "ckpt_init"), weights(run.folder / "ckpt_final"))


def test_gradients_that_are_no_numbers_end_a_training_in_fp16(config, monkeypatch):
    def broken(*args: Any) -> Any:
        model = whole(*args)
        model.classifier.bias.register_hook(lambda gradient: gradient * float("nan"))
        return model

    whole = training.load_classifier
    monkeypatch.setattr(training, "load_classifier", broken)
    with pytest.raises(InputError) as raised:
        train(config(dtype="fp16", epochs=5))
    # The scaler halves 2**16 at every step; after the 21st it is below 2**-4.
    assert str(raised.value) == (
        "gradient must stay finite, got nan in step 21 of 25: lower --learning-rate (now 0.001), or take --dtype fp32."
    )


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float16)], ids=["Ampere", "Volta"])
def test_a_gpu_trains_in_the_half_precision_it_has(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported or including_emulation)
    assert resolve_precision("auto", torch.device("cuda", 0)) is expected
    assert resolve_precision("auto", torch.device("cpu")) is torch.float32
    assert resolve_precision("fp32", torch.device("cuda", 0)) is torch.float32
