"""Fine-tuning: the weights before and after, by architecture and precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from tinyonn.heads.plasticity import training
from tinyonn.heads.plasticity.training import resolve_precision, train
from tinyonn.testing import save_tiny_model

ROWS = 60  # of `boolq_rows`


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(value, second[name]) for name, value in first.items())


def left(folder: Path) -> list[str]:
    """Everything that is there, hidden files too."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_first_checkpoint_is_the_model_with_a_new_classifier(config, bert_folder):
    train(config(max_steps=1))
    before, source = weights(config().folder / "ckpt_init"), weights(bert_folder)
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


def test_training_learns_and_its_accuracy_is_that_of_the_last_checkpoint(config, boolq_rows):
    run = config(epochs=12, max_steps=60)
    result = train(run)
    assert result.summary == json.loads((run.folder / "train.json").read_text())
    assert (result.kept, result.folder, result.summary["steps"]) == (False, run.folder, 60)
    assert len(result.summary["losses"]) == 60
    assert sum(result.summary["losses"][-5:]) < 0.5 * sum(result.summary["losses"][:5])
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "ckpt_final")
    judge = AutoModelForSequenceClassification.from_pretrained(run.folder / "ckpt_final").eval()
    rows = [json.loads(line) for line in boolq_rows.read_text().splitlines()]
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


def test_a_classifier_of_other_classes_is_replaced(config, tmp_path):
    run = config(model_path=str(save_tiny_model(tmp_path / "five", "bert", num_labels=5)), max_steps=1)
    train(run)
    base, begun = weights(tmp_path / "five"), weights(run.folder / "ckpt_init")
    assert base.pop("classifier.weight").shape == (5, 48)
    assert begun.pop("classifier.weight").shape == (2, 48)
    assert base.pop("classifier.bias").shape == (5,)
    assert (begun.pop("classifier.bias") == 0).all()
    assert same(begun, base)


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


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float16)], ids=["Ampere", "Volta"])
def test_a_gpu_trains_in_the_half_precision_it_has(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported or including_emulation)
    assert resolve_precision("auto", torch.device("cuda", 0)) is expected
    assert resolve_precision("auto", torch.device("cpu")) is torch.float32
    assert resolve_precision("fp32", torch.device("cuda", 0)) is torch.float32
