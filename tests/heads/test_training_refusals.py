"""One line where training cannot begin or go on, and nothing left that looks complete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinyonn.errors import InputError
from tinyonn.heads.plasticity import training
from tinyonn.heads.plasticity.training import train
from tinyonn.hf import loading
from tinyonn.testing import save_tiny_model


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def left(folder: Path) -> list[str]:
    """Everything that is there, hidden files too."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


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
        "gradient must stay finite, got nan in step 21 of 25: lower --learning-rate (now 0.001), or use --dtype fp32."
    )


def test_memory_that_runs_out_names_the_options_to_lower(config, monkeypatch):
    def full(*args: Any) -> Iterator[dict[str, Tensor]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "batches", full)
    with pytest.raises(InputError) as raised:
        train(config())
    assert str(raised.value) == (
        "memory ran out after step 0: lower --batch-size (now 8) or --max-length (now 32), or use --dtype bf16; with --overwrite, since "
        "other options are another training."
    )


def test_a_model_that_does_not_fit_with_its_optimiser_is_refused_before_it_is_loaded(config, bert_folder, monkeypatch):
    free = 3 * (bert_folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(loading, "available_memory", lambda device: free)
    with pytest.raises(InputError, match=r"^model_path must fit in memory: to train it takes .* in float32 .*; use a smaller model\.$"):
        train(config())
    assert left(config().folder) == []


def test_weights_that_the_transformer_lacks_are_not_made_up(config, tmp_path):
    broken = save_tiny_model(tmp_path / "broken", "bert")
    tensors = weights(broken)
    del tensors["encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"must hold all weights .* without bert\.encoder\.layer\.1\.attention\.self\.query\.weight\."):
        train(config(model_path=str(broken)))
    assert left(config().folder) == []


def test_more_tokens_than_the_model_takes_are_refused(config):
    with pytest.raises(InputError) as raised:
        train(config(max_length=129))
    assert str(raised.value) == "max_length must be at most the model's limit of 128 tokens, got 129."
    assert left(config().folder) == []


def test_positions_that_a_roberta_keeps_for_padding_are_not_used(config, boolq_rows, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(boolq_rows.read_text().replace('"passage": "', f'"passage": "{"c" * 40}'))
    run = config(model_path=str(save_tiny_model(tmp_path / "roberta", "roberta")), data_path=str(long), max_steps=1)
    assert train(run).summary["steps"] == 1  # 128 positions, of which 96 are of the padding token, 95, and those before it
    with pytest.raises(InputError, match=r"max_length must be at most the model's limit of 32 tokens, got 33\."):
        train(config(model_path=run.model_path, data_path=str(long), max_length=33, seed=1))


def test_a_tokenizer_that_cannot_pad_is_refused(config, tmp_path):
    run = config(model_path=str(save_tiny_model(tmp_path / "gpt2", "gpt2", end_token=False)))
    with pytest.raises(InputError) as raised:
        train(run)
    assert str(raised.value) == "model_path must hold a tokenizer with a padding or end-of-text token, got gpt2 with neither."
