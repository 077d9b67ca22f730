"""A Trainer with a store, through `OnnTrainer(store=...)` and through the mixin with a plain Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tinyonn.errors import InputError
from tinyonn.hf import TinyOnnConfig, TinyOnnForCausalLM
from tinyonn.store import LifeLog, closing, read_life_log, verify
from tinyonn.store.overview import newest_step
from tinyonn.train import OnnTrainer, PerpetualMixin

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class PerpetualTrainer(PerpetualMixin, Trainer):
    pass


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = torch.randint(3, 60, (12,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": row, "labels": row.clone()}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, attention_dropout=0.2)
    )


def tiny_onn() -> TinyOnnForCausalLM:
    torch.manual_seed(0)
    config = TinyOnnConfig.bonsai("1m", hidden_size=32, head_dim=16, init_num_experts=4, max_num_experts=6, vocab_size=64, attention="full")
    return TinyOnnForCausalLM(config)


def trainer_of(kind: str, folder: Path, stop: int = 99, **options: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=12, per_device_train_batch_size=2, logging_steps=3, save_strategy="steps", save_steps=1,
        gradient_accumulation_steps=2, report_to=[], use_cpu=True, seed=3, learning_rate=1e-2, disable_tqdm=True, eval_strategy="steps",
        eval_steps=6,
    )  # fmt: skip
    made = OnnTrainer if kind == "onn" else PerpetualTrainer
    model = tiny_onn() if kind == "onn" else llama()
    return made(
        model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[StopAt(stop)], store=folder / "store", **options
    )


@pytest.mark.parametrize("kind", ["plain", "onn"])
def test_a_trainer_that_stopped_twice_ends_with_the_bits_of_one_that_did_not(tmp_path: Path, kind: str) -> None:
    whole = trainer_of(kind, tmp_path / "whole")
    whole.train()
    for stop in (4, 7, 99):
        parts = trainer_of(kind, tmp_path / "parts", stop, stretch={"data": "rows"})
        parts.train()
        assert parts.state.global_step == min(stop, 12)
    expected = whole.model.state_dict()
    for name, value in parts.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for one, two in zip(whole.optimizer.optimizer.state.values(), parts.optimizer.optimizer.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert parts.lr_scheduler.last_epoch == whole.lr_scheduler.last_epoch
    assert not list((tmp_path / "parts" / "out").glob("checkpoint-*"))
    assert verify(tmp_path / "parts" / "store").readable == [10, 11, 12]
    records = read_life_log(tmp_path / "parts" / "store" / "life.jsonl").effective()
    assert [record["reason"] for record in records if record["event"] == "stop"] == [
        "the trainer stopped", "the trainer stopped", "all steps were done",
    ]  # fmt: skip
    assert [record["step"] for record in records if record["event"] == "stretch"] == [0, 4, 7]
    assert {record["data"] for record in records if record["event"] == "stretch"} == {"rows"}
    told = [(line["step"], "eval_loss" in line) for line in parts.state.log_history if "train_runtime" not in line]
    assert told == [(line["step"], "eval_loss" in line) for line in whole.state.log_history if "train_runtime" not in line]
    evaluated = [[line["eval_loss"] for line in one.state.log_history if "eval_loss" in line] for one in (whole, parts)]
    assert evaluated[0] == evaluated[1]


def test_without_a_store_checkpoints_are_transformers_own(tmp_path: Path) -> None:
    trainer = trainer_of("plain", tmp_path, 2)
    trainer._store_folder = None
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").exists()
    assert newest_step(tmp_path / "store") is None


def test_an_error_within_training_is_the_reason_of_the_stop(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("no more\nlines")

    trainer = trainer_of("plain", tmp_path)
    trainer.add_callback(Fails())
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    assert newest_step(tmp_path / "store") == 2
    assert read_life_log(tmp_path / "store" / "life.jsonl").records[-1]["reason"] == "RuntimeError: no more"


def test_what_a_killed_run_logged_after_its_last_save_is_told_once(tmp_path: Path) -> None:
    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                raise KeyboardInterrupt

    def made() -> Any:
        trainer = trainer_of("plain", tmp_path)
        trainer.args.save_steps, trainer.args.logging_steps = 5, 1
        return trainer

    killed = made()
    killed.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert newest_step(tmp_path / "store") == 5
    trainer = made()
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [*range(1, 13)]


@pytest.mark.parametrize("fault", ["damaged", "missing"])
@pytest.mark.parametrize("checked", [2**16, 0], ids=["short", "long"])
@pytest.mark.filterwarnings("ignore:.*a new log begins")
def test_training_goes_on_without_its_log(tmp_path: Path, fault: str, checked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is so long that an opening checks its end alone, and the damage is further back."""
    monkeypatch.setattr(closing, "CHECKED", checked)
    trainer_of("plain", tmp_path, 3).train()
    log = tmp_path / "store" / "life.jsonl"
    text = log.read_text()
    log.unlink()
    if fault == "damaged":
        log.write_text(text.replace("begin", "begun"))
    trainer = trainer_of("plain", tmp_path, 6)
    trainer.train()
    assert newest_step(tmp_path / "store") == 6
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [6]
    assert (tmp_path / "store" / "life.damaged-1.jsonl").exists() == (fault == "damaged")
    assert verify(tmp_path / "store").faults == []


def test_a_run_whose_end_cannot_be_logged_frees_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = LifeLog.append

    def full(log: LifeLog, event: str, *args: Any, **kwargs: Any) -> Any:
        if event == "stop":
            raise InputError("the disk is full")
        return append(log, event, *args, **kwargs)

    trainer = trainer_of("plain", tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(LifeLog, "append", full)
        with pytest.raises(InputError, match="the disk is full"):
            trainer.train()
    trainer = trainer_of("plain", tmp_path, 3)
    trainer.train()
    assert newest_step(tmp_path / "store") == 3


def test_rejects(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be a text such as"):
        trainer_of("plain", tmp_path, keep="newest")
    with pytest.raises(ValueError, match="resume_from_checkpoint must be None with a store"):
        trainer_of("plain", tmp_path).train(resume_from_checkpoint=True)
    trainer = trainer_of("plain", tmp_path)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="load_best_model_at_end must be False with a store, got True"):
        trainer.train()
