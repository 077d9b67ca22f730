"""`OnnTrainer`: predictive integrity in the log, steps that are skipped, births and recyclings, and training that goes on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments

from tinyonn.hf import TinyOnnConfig, TinyOnnForCausalLM
from tinyonn.nn import DynMoE
from tinyonn.nn.expert_life import ExpertLife
from tinyonn.nn.surprise_capture import CapturedCall
from tinyonn.train import CapturedSurprise, capture_surprise, lifecycle
from tinyonn.train.onn_trainer import OnnTrainer


class Rows(Dataset):
    """Rows of tokens that repeat, of which the last two are no labels."""

    def __init__(self, number: int = 64, length: int = 24) -> None:
        torch.manual_seed(5)
        self.rows = (torch.randint(48, (number, 1)) + torch.arange(length)) % 48

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        labels = self.rows[place].clone()
        labels[-2:] = -100
        return {"input_ids": self.rows[place], "labels": labels}


def model(**options: Any) -> TinyOnnForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2, "init_num_experts": 6, "max_num_experts": 8}
    return TinyOnnForCausalLM(TinyOnnConfig(**({"attention": "full"} | sizes | options)))


def trainer_of(folder: Path, one: TinyOnnForCausalLM | None = None, *, steps: int = 4, options: Any = None, **given: Any) -> OnnTrainer:
    arguments = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3,
    }  # fmt: skip
    args = TrainingArguments(**(arguments | given))
    return OnnTrainer(model=one or model(), args=args, train_dataset=Rows(), **(options or {}))


def lines_of(trainer: OnnTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def test_predictive_integrity_of_the_log_is_that_of_the_formula(tmp_path):
    """One step, written out: mean loss, mean entropy, and the mean surprise of single tokens' losses."""
    one = model()
    batches: list[dict[str, Tensor]] = []

    class Watching(OnnTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append({name: x.clone() for name, x in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = trainer_of(tmp_path, model(), steps=1, max_grad_norm=0.0).args
    trainer = Watching(model=one, args=args, train_dataset=Rows(), alpha=0.7, gamma=0.3)
    trainer.train()
    (line,) = lines_of(trainer)
    other = model().train()
    (batch,) = batches
    with capture_surprise(other) as surprise:
        out = other(**batch)
        out.loss.backward()
    kept = batch["labels"][:, 1:] != -100
    probabilities = out.logits.double().softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1)[:, :-1][kept].mean()
    matrices = [matrix.double() for matrix in surprise.values()]
    mean = torch.stack([matrix[matrix.isfinite()].mean() for matrix in matrices]).mean() * kept.sum()
    accuracy, complexity = 0.7 * 0.7 * out.loss.double() / entropy, 0.7 * 0.3 * mean
    assert line["tau"] == pytest.approx(entropy.item(), rel=1e-5)
    assert line["surprise"] == pytest.approx(mean.item(), rel=1e-5)
    assert line["pi_accuracy"] == pytest.approx(accuracy.item(), rel=1e-5)
    assert line["pi_complexity"] == pytest.approx(complexity.item(), rel=1e-5)
    assert line["free_energy"] == pytest.approx((accuracy + complexity).item(), rel=1e-5)
    assert line["pi"] == pytest.approx(math.exp(-(accuracy + complexity).item()), rel=1e-5)
    assert trainer.lifecycle.integrity == pytest.approx(line["pi"], rel=1e-6)


def test_routing_accuracy_counts_tokens_with_several_experts():
    """The best-scored expert comes first. Tokens: least surprise first; least second; one expert only; none; a tie."""
    index = torch.tensor([[2, 0, 4], [1, 3, 4], [0, 4, 4], [4, 4, 4], [3, 1, 2]])
    slots = torch.tensor([[0.1, 0.5, 0.0], [0.9, 0.2, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0], [0.4, 0.4, 0.7]])
    one, other = CapturedCall(index, 4, slots=slots), CapturedCall(index[1:2], 4, slots=slots[1:2])
    assert CapturedSurprise({"a": [one], "b": [other, CapturedCall(index, 4)]}).first_choice_accuracy() == 2 / 4
    assert CapturedSurprise({"a": []}).first_choice_accuracy() is None


def test_integrity_does_not_depend_on_accumulation(tmp_path):
    found = []
    for size, accumulated in ((8, 1), (4, 2)):
        trainer = trainer_of(tmp_path, steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
        trainer.train()
        found.append(lines_of(trainer)[0])
    for name in ("loss", "pi", "tau", "surprise"):
        # Thresholds move between two forwards, so a few tokens have other experts.
        assert found[0][name] == pytest.approx(found[1][name], rel=2e-2), name


@pytest.mark.parametrize("attention", ["dyn_nsa", "dyn_smha", "full"])
def test_each_line_says_what_the_model_used(attention, tmp_path):
    trainer = trainer_of(tmp_path, model(attention=attention), steps=2)
    trainer.train()
    line = lines_of(trainer)[-1]
    pools = 2 if attention == "dyn_smha" else 1
    assert line["live_experts"] == 12 * pools
    assert 0.5 < line["experts_per_token"] < 6
    assert ("heads_per_token" in line) == (attention == "dyn_smha")
    assert ("blocks_per_query" in line) == (attention == "dyn_nsa")
    assert line["births"] == line["recyclings"] == line["skipped_steps"] == 0
    assert "gating_loss" not in line


class Broken(OnnTrainer):
    """Its loss is NaN in some steps."""

    bad: frozenset[int] = frozenset()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * torch.nan if self.state.global_step in self.bad else loss


def test_a_loss_of_nan_skips_the_step_and_keeps_weights_and_optimiser(tmp_path):
    trainer = Broken(model=model(), args=trainer_of(tmp_path, steps=4).args, train_dataset=Rows(), max_bad_steps=3)
    trainer.bad = frozenset({1, 2})
    seen = []
    step = trainer._end_step

    def watched(bad: bool) -> None:
        weights = torch.cat([parameter.detach().flatten().clone() for parameter in trainer.model.parameters()])
        moments = [value.clone() for state in trainer.optimizer.state.values() for value in state.values()]
        seen.append((bad, weights, moments))
        step(bad)

    trainer._end_step = watched
    trainer.train()
    assert [bad for bad, _, _ in seen] == [False, True, True, False]
    for after in (1, 2):
        assert torch.equal(seen[0][1], seen[after][1])
        assert all(torch.equal(a, b) for a, b in zip(seen[0][2], seen[after][2], strict=True))
    assert not torch.equal(seen[2][1], seen[3][1])
    assert trainer.skipped == 2
    assert trainer.stopped is None
    assert [line["skipped_steps"] for line in lines_of(trainer)] == [0, 1, 1, 0]
    assert "pi" not in lines_of(trainer)[1]
    assert math.isnan(lines_of(trainer)[1]["loss"])
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_after_some_bad_steps_in_a_row_training_stops_and_says_so(tmp_path):
    trainer = Broken(model=model(), args=trainer_of(tmp_path, steps=50).args, train_dataset=Rows(), max_bad_steps=3)
    trainer.bad = frozenset({2, 4, 5, 6, 7})
    trainer.train()
    assert trainer.state.global_step == 7
    assert trainer.stopped == "3 steps in a row had a loss or gradients that were not finite"
    assert trainer.skipped == 4


def test_births_and_recyclings_are_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(lifecycle, "WINDOW", 2)
    trainer = trainer_of(tmp_path, steps=6, options={"pruning_threshold": 1.0})
    trainer.train()
    recycled = [event for event in trainer.events if event.kind == "recycling"]
    assert recycled
    assert sum(line["recyclings"] for line in lines_of(trainer)) == len(recycled)
    assert {event.layer for event in recycled} == {"model.layers.0.experts", "model.layers.1.experts"}


def test_routers_learn_from_surprise_where_the_configuration_says_so(tmp_path):
    trainer = trainer_of(tmp_path, model(w_ce=0.5), steps=2, options={"drive_weights": True})
    trainer.train()
    assert lines_of(trainer)[0]["gating_loss"] > 0
    assert trainer.lifecycle.w_ce
    assert trainer.surprise_loss.w_ce == pytest.approx(0.5 * trainer.lifecycle.rate)
    assert trainer.surprise_loss.w_kl == 0


@pytest.mark.parametrize("attention", ["dyn_smha", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one(attention, tmp_path, monkeypatch):
    monkeypatch.setattr(lifecycle, "WINDOW", 3)
    options = {"pruning_threshold": 0.9}
    whole = trainer_of(tmp_path / "whole", model(attention=attention), steps=8, options=options)
    whole.train()
    parts = trainer_of(tmp_path / "parts", model(attention=attention), steps=4, options=options, save_strategy="steps", save_steps=4)
    parts.train()
    torch.manual_seed(99)
    again = trainer_of(tmp_path / "parts", model(attention=attention), steps=8, options=options)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert [*parts.events, *again.events] == whole.events
    assert whole.events
    for (name, one), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="alpha must be at least 0, got -1"):
        trainer_of(tmp_path, options={"alpha": -1})
    with pytest.raises(ValueError, match="gamma must be"):
        trainer_of(tmp_path, options={"gamma": 2.0})
    with pytest.raises(ValueError, match="max_bad_steps must be"):
        trainer_of(tmp_path, options={"max_bad_steps": 0})
    full = trainer_of(tmp_path, model(max_num_experts=6), options={"growth_threshold": 0.1})
    with pytest.raises(ValueError, match="growth_threshold"):
        full.train()


class Bare(torch.nn.Module):
    """A mixture without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mixture, self.head = torch.nn.Embedding(48, 16), DynMoE(16, 8, 4, gating_loss="surprise"), torch.nn.Linear(16, 48)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.mixture(self.embed(input_ids)))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def test_a_module_without_a_configuration_trains_and_its_routers_do_not_learn_from_surprise(tmp_path):
    trainer = OnnTrainer(model=Bare(), args=trainer_of(tmp_path, steps=2).args, train_dataset=Rows())
    before = trainer.model.mixture.router.thresholds.detach().clone()
    trainer.train()
    assert "gating_loss" not in lines_of(trainer)[0]
    assert trainer.gating_weight == 0
    assert not torch.equal(before, trainer.model.mixture.router.thresholds)  # the main loss moves them


@pytest.mark.parametrize("accumulated", [1, 2])
def test_surprise_is_that_of_a_tokens_own_loss_whatever_scales_the_batchs(accumulated, tmp_path):
    """A module whose loss takes no number of tokens, so that Trainer divides it by the accumulated batches."""
    found = []
    for size, times in ((8, 1), (8 // accumulated, accumulated)):
        args = trainer_of(tmp_path, steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=times).args
        trainer = OnnTrainer(model=Bare(), args=args, train_dataset=Rows())
        trainer.train()
        found.append(lines_of(trainer)[0])
    assert found[0]["surprise"] == pytest.approx(found[1]["surprise"], rel=2e-2)
    assert found[0]["pi"] == pytest.approx(found[1]["pi"], rel=2e-2)


def test_a_scaled_loss_does_not_scale_the_surprise(tmp_path):
    found = []
    for scale in (None, 1024.0):
        trainer = trainer_of(tmp_path, steps=1)
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        found.append(lines_of(trainer)[0])
    assert found[0]["surprise"] == pytest.approx(found[1]["surprise"], rel=1e-4)
    assert found[0]["pi"] == pytest.approx(found[1]["pi"], rel=1e-4)


def test_the_life_of_experts_comes_back_with_the_model(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(lifecycle, "WINDOW", 2)
    trainer = trainer_of(tmp_path, steps=4, options={"pruning_threshold": 0.9})
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    again, loaded = TinyOnnForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loaded["unexpected_keys"]
    assert not loaded["missing_keys"]
    for one, other in zip(trainer.model.modules(), again.modules(), strict=True):
        if isinstance(one, ExpertLife):
            assert torch.equal(one.activations, other.activations)
            assert torch.equal(one.birth_step, other.birth_step)
            assert one.activations.sum() > 0


def test_batches_without_labels_do_not_weigh_in_the_means(tmp_path):
    """Of two accumulated rows, the second predicts nothing."""

    class Half(Rows):
        def __getitem__(self, place: int) -> dict[str, Tensor]:
            row = super().__getitem__(place)
            return row if place % 2 == 0 else row | {"labels": torch.full_like(row["labels"], -100)}

    class InOrder(OnnTrainer):
        def _get_train_sampler(self, *given: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    found = []
    for accumulated in (1, 2):
        args = trainer_of(tmp_path, steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=accumulated).args
        trainer = InOrder(model=model(), args=args, train_dataset=Half())
        trainer.train()
        found.append(lines_of(trainer)[0])
    for name in ("loss", "tau", "surprise", "pi"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


SHARDED = """
import json, os, sys
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

sys.path.insert(0, sys.argv[1])
from test_onn_trainer import OnnTrainer, Rows, lifecycle, lines_of, model

lifecycle.WINDOW = 2
config = {"version": 2, "transformer_layer_cls_to_wrap": ["DynONNBlock"]}
args = TrainingArguments(
    sys.argv[2], max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, lr_scheduler_type="constant",
    report_to=[], use_cpu=True, save_strategy="no", seed=3, fsdp=True, fsdp_config=config,
)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # Accelerate shards on GPUs only
trainer = OnnTrainer(model=model(), args=args, train_dataset=Rows(), pruning_threshold=0.9)
assert trainer.is_fsdp_enabled
trainer.train()
assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
found = {"events": trainer.events, "integrity": trainer.lifecycle.integrity, "losses": [line["loss"] for line in lines_of(trainer)]}
with open(f"{sys.argv[2]}/{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_it_trains_under_fsdp2_and_decides_alike_on_both_processes(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "sharded.py")]
    done = subprocess.run([*run, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["events"]
    alone = trainer_of(tmp_path / "alone", steps=4, per_device_train_batch_size=4)
    alone.train()
    # The first two steps come before the first recycling; the rows of a batch are the same.
    assert first["losses"][:2] == pytest.approx([line["loss"] for line in lines_of(alone)][:2], rel=1e-3)
