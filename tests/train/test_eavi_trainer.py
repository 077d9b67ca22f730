"""EaviMixin: a transformers Trainer and an OnnTrainer take the steps that `eavi_step` takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from tinyonn.train import Eavi, EaviMixin, OnnTrainer, Ramp, alignment, eavi_batch, eavi_step
from tinyonn.train.eavi_trainer import PROMPTS

from .test_eavi import END, IDS, PAD, ended, llama, rows, tiny_onn

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*pin_memory")
PROMPT_ROWS, ANSWERS = rows(3, 5, 4, 6), ended(rows(3, 2, 4, 1, seed=1))


class Rows(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index % len(PROMPT_ROWS)


def collate(indices: list[int]) -> dict[str, Tensor]:
    prompts, answers = [PROMPT_ROWS[index] for index in indices], [ANSWERS[index] for index in indices]
    return alignment(prompts, answers, answers, **IDS) | {PROMPTS: torch.tensor([len(prompt) for prompt in prompts])}


class Plain(EaviMixin, Trainer):
    pass


class Onn(EaviMixin, OnnTrainer):
    pass


def trained(
    folder: Path, model: Any, kind: type, eavi: Eavi | None, steps: int = 3, per_device_train_batch_size: int = 4,
    gradient_accumulation_steps: int = 1, seed: int = 7, **options: Any,
) -> Any:  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps, learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=0.0, optim="sgd", report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
        remove_unused_columns=False, seed=seed,
    )  # fmt: skip
    options = {"data_collator": collate} | options
    trainer = kind(model=model, args=arguments, train_dataset=Rows(4 * steps), eval_dataset=Rows(4), eavi=eavi, **options)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(Rows(4 * steps))
    trainer.train()
    return trainer


def no_dropout() -> LlamaForCausalLM:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return model


@pytest.mark.parametrize("mode", ["own", "super_batch"])
def test_steps_are_those_of_eavi_step(tmp_path: Path, mode: str) -> None:
    one, two = no_dropout(), no_dropout()
    trainer = trained(tmp_path, one, Plain, Eavi(END, PAD, mode=mode))
    optimizer = torch.optim.SGD(two.parameters(), lr=1e-2)
    two.train()
    results = [eavi_step(two, optimizer, PROMPT_ROWS, ANSWERS, mode=mode, **IDS) for _ in range(3)]
    for name, value in two.named_parameters():
        torch.testing.assert_close(dict(one.named_parameters())[name], value, rtol=1e-5, atol=1e-6)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["own_share"] for line in lines] == [1, 1, 1]
    assert lines[-1]["generated_tokens"] == sum(result.batch.generated_tokens for result in results)
    assert lines[-1]["trained_tokens"] == sum(result.batch.trained_tokens for result in results)
    for line, result in zip(lines, results, strict=True):
        assert line["loss"] == pytest.approx(float(result.loss), abs=1e-3)


def test_without_excursions_it_is_teacher_forcing(tmp_path: Path) -> None:
    models = [no_dropout() for _ in range(3)]
    trained(tmp_path, models[0], Plain, None)
    trained(tmp_path, models[1], Plain, Eavi(END, PAD, share=Ramp(0.0, 1.0, 5, 9)))  # no step of these has a share
    models[2].train()
    optimizer = torch.optim.SGD(models[2].parameters(), lr=1e-2)
    for _ in range(3):
        models[2](**alignment(PROMPT_ROWS, ANSWERS, ANSWERS, **IDS)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in models[2].named_parameters():
        for model in models[:2]:
            torch.testing.assert_close(dict(model.named_parameters())[name], value, rtol=1e-5, atol=1e-6)


def test_an_onn_trainer_learns_along_its_own_answers_and_evaluates(tmp_path: Path) -> None:
    model = tiny_onn()
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = trained(tmp_path, model, Onn, Eavi(END, PAD, temperature=1.0), freeze_idle=False)
    assert any("router" in name and not torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert trainer.lifecycle is not None
    assert all("pi" in line for line in trainer.state.log_history if "loss" in line)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_run_draws_the_same_answers_again(tmp_path: Path) -> None:
    found = []
    for seed in (7, 7, 8):
        model = no_dropout()
        eavi = Eavi(END, PAD, temperature=2.0, share=0.5)
        trainer = trained(tmp_path, model, Plain, eavi, seed=seed)
        assert 0 < sum(line["own_share"] for line in trainer.state.log_history if "loss" in line) < 3
        found.append(torch.cat([value.detach().flatten() for value in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("mode", ["own", "super_batch"])
def test_labels_within_prompts_count_once(tmp_path: Path, mode: str) -> None:
    """The second row of the same prompt, with the true answer, has none."""
    seen: list[dict[str, Tensor]] = []

    class Looking(Plain):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    def with_labels(indices: list[int]) -> dict[str, Tensor]:
        batch = collate(indices)
        batch["labels"][:, 1] = batch["input_ids"][:, 1]
        return batch

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    Looking(model=no_dropout(), args=arguments, train_dataset=Rows(4), data_collator=with_labels, eavi=Eavi(END, PAD, mode=mode)).train()
    assert len(seen[0]["labels"]) == (8 if mode == "super_batch" else 4)
    assert torch.equal(seen[0]["labels"][:4, 1], seen[0]["input_ids"][:4, 1])
    assert (seen[0]["labels"][4:, 1] == -100).all()
    assert (seen[0]["labels"][:, 0] == -100).all()


def test_batches_without_prompt_lengths_are_refused(tmp_path: Path) -> None:
    def bare(indices: list[int]) -> dict[str, Tensor]:
        return {name: value for name, value in collate(indices).items() if name != PROMPTS}

    with pytest.raises(ValueError, match=r"inputs must have prompt_lengths, got attention_mask, input_ids, labels: .*unused"):
        trained(tmp_path, no_dropout(), Plain, Eavi(END, PAD), steps=1, data_collator=bare)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({PROMPTS: torch.tensor([3, 5, 4, -1])}, "prompt_lengths must leave a prompt and an answer in the 8 tokens of row 3, got -1"),
        ({PROMPTS: torch.tensor([3, 0, 4, 6])}, "prompt_lengths must leave a prompt and an answer in the 8 tokens of row 1, got 0"),
        ({PROMPTS: torch.tensor([7, 5, 4, 6])}, "prompt_lengths must leave a prompt and an answer in the 7 tokens of row 0, got 7"),
        ({PROMPTS: torch.tensor([3, 5])}, r"prompt_lengths must be 4 whole numbers, one a row, got torch.int64 of shape \(2,\)"),
        ({"attention_mask": collate([0, 1, 2, 3])["attention_mask"].flip(1)}, "attention_mask must be .* padding on the right alone"),
        ({"attention_mask": None}, "inputs must have input_ids, .* and prompt_lengths, got none of attention_mask"),
        ({"labels": None}, "inputs must have input_ids, .* and prompt_lengths, got none of labels"),
    ],
    ids=["negative", "zero", "beyond", "fewer", "left", "no mask", "no labels"],
)
def test_batches_that_are_no_prompts_and_answers_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    def changed(indices: list[int]) -> dict[str, Any]:
        return {name: value for name, value in (collate(indices) | change).items() if value is not None}

    with pytest.raises(ValueError, match=message):
        trained(tmp_path, no_dropout(), Plain, Eavi(END, PAD), steps=1, data_collator=changed)


def mean_over_all(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """A loss of the user's own, as Trainer's documentation writes one."""
    total = F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


@pytest.mark.parametrize("compute_loss_func", [None, mean_over_all], ids=["loss of the model", "loss of the user"])
def test_targets_of_accumulated_batches_have_equal_weight(tmp_path: Path, compute_loss_func: Any) -> None:
    one, two = no_dropout(), no_dropout()
    trained(
        tmp_path, one, Plain, Eavi(END, PAD), steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        compute_loss_func=compute_loss_func,
    )  # fmt: skip
    batches = [eavi_batch(two, PROMPT_ROWS[place : place + 2], ANSWERS[place : place + 2], **IDS).inputs for place in (0, 2)]
    numbers = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert numbers[0] != numbers[1]
    two.train()
    optimizer = torch.optim.SGD(two.parameters(), lr=1e-2)
    for batch, number in zip(batches, numbers, strict=True):
        (two(**batch).loss * number / sum(numbers)).backward()
    optimizer.step()
    for name, value in two.named_parameters():
        torch.testing.assert_close(dict(one.named_parameters())[name], value, rtol=1e-5, atol=1e-6)


def test_two_processes_take_the_step_of_one_on_all_rows(tmp_path: Path, two_ranks: Callable[[Callable[[int], None]], None]) -> None:
    most = max(map(len, ANSWERS))  # of all rows, as a process knows its own only

    def work(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was copied
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        model = no_dropout()
        trainer = trained(tmp_path / str(rank), model, Plain, Eavi(END, PAD, max_new_tokens=most), steps=2, per_device_train_batch_size=2)
        assert type(trainer.model_wrapped) is DistributedDataParallel
        assert trainer._seed(0) == 7 * 1_000_003 + 2 * 2 + rank  # its own in each process
        torch.save(model.state_dict(), tmp_path / f"{rank}.pt")

    two_ranks(work)
    expected = no_dropout().train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=1e-2)
    for _ in range(2):
        eavi_step(expected, optimizer, PROMPT_ROWS, ANSWERS, max_new_tokens=most, **IDS)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in expected.state_dict().items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"), [({"mode": "x"}, "mode must be"), ({"share": 2}, "share must be"), ({"temperature": -1}, "temperature must be")]
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eavi(END, PAD, **options)


@pytest.mark.parametrize("ids", [(None, PAD), ([END], PAD), (END, None)])
def test_ids_of_a_tokenizer_or_checkpoint_that_are_not_one_id_are_refused(ids: Any) -> None:
    with pytest.raises(TypeError, match="_token_id must be an int, got"):
        Eavi(*ids)
