"""Full fine-tuning of a classifier, from the weights before it (theta_0) to those after (theta_1).

Weights and optimiser stay in float32; autocast runs matrix products in half precision if the device supports it. A killed run continues
from its last checkpoint, and ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from ..._io.config import dtype_name
from ..._io.files import replacing, write_atomically
from ..._io.folders import check_vocabulary
from ...errors import InputError
from ...hf.loading import DTYPES, load_model, load_tokenizer, quiet_transformers, resolve_device, resolve_model, usable_positions
from ...hf.memory import is_out_of_memory
from ..capture.layers import attention_layers
from ..progress import Progress
from ..study import ADDED_OPTIONS, FINAL, INIT, OPTIONS, STATE, TRAINED
from ..versions import package_versions
from ..vocabulary import num_embeddings
from .classification import Example, batches, load_task
from .config import PlasticityConfig
from .records import StepResult, read_trained
from .train_folder import (
    alone_in,
    check_same,
    clear,
    has_weights,
    is_complete,
    no_room,
    save_model,
    training_options,
    weights_record,
)

# Modules of a classifier above the transformer, which checkpoints of other models lack.
_NEW = r"^(\w+\.)?(classifier|pre_classifier|classification_head|score|pooler|sequence_summary|logits_proj)\.|^head\."
# Attributes of a training in its checkpoints: as they are, and by their state_dict.
_KEPT, _STATEFUL = ("step", "losses", "left_out", "checkpoints"), ("model", "optimizer", "scheduler", "scaler")
_LOWEST_SCALE = 2.0**-4  # minimum loss scale in fp16: below it, gradients are not too large but NaN


def train(config: PlasticityConfig, progress: Callable[[Progress], None] | None = None) -> StepResult:
    """Fine-tunes all weights on the task. Continues an interrupted training, and keeps a complete one.

    Writes ckpt_init and ckpt_final (safetensors, configuration, tokenizer), train_config.yaml (options) and, last, train.json (losses of
    all steps, loss and accuracy on the evaluation rows, precision, versions, seconds) into `config.folder`.

    Args:
        config: options of the study.
        progress: function called at every stage and step.

    Raises:
        InputError: data, model or options are invalid; the folder has a training of another configuration (without `overwrite`); another
            run uses the folder; the model's heads are not known; a loss is not finite; or memory or disk ran out.
    """
    training = _Training(config, progress or (lambda state: None))
    with alone_in(config.folder):
        return training.go()


def check_options(config: PlasticityConfig) -> None:
    """Checks that the folder has no training of other options, unless `overwrite` is set.

    Raises:
        InputError: options differ; the message names them.
    """
    if not config.overwrite:
        check_same(config.folder, training_options(config, resolve_precision(config.dtype, resolve_device(config.device))), trains=True)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Precision of matrix products. "auto" is bfloat16 on GPUs that support it, float16 on other GPUs, float32 on a CPU."""
    if (known := dtype_name(name)) != "auto":
        return DTYPES[known]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_classifier(folder: Path, labels: Sequence[str], device: torch.device) -> nn.Module:
    """Sequence classifier in float32 for training. Weights above the transformer that its checkpoint lacks are initialised at random.

    Raises:
        InputError: the model has no classifier, weights of the transformer are missing, or its training does not fit in memory.
    """
    names = dict(enumerate(labels))
    return load_model(
        folder,
        torch.float32,
        device,
        "AutoModelForSequenceClassification",
        (_NEW,),
        training=True,
        remedy="a smaller model",  # weights are float32, whatever the precision of products
        id2label=names,
        label2id={label: number for number, label in names.items()},
        problem_type="single_label_classification",
        ignore_mismatched_sizes=True,
    )


class _Training:
    """One training, from its start or its last checkpoint to its end."""

    def __init__(self, config: PlasticityConfig, report: Callable[[Progress], None]) -> None:
        self.config, self.report, self.folder = config, report, config.folder
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.dtype, self.device)
        self.options = training_options(config, self.precision)
        self.step = self.left_out = 0
        self.losses: list[float] = []
        self.checkpoints: dict[str, Any] = {}

    def go(self) -> StepResult:
        if not self.config.overwrite:
            check_same(self.folder, self.options, trains=True)
            if is_complete(self.folder):
                (self.folder / STATE).unlink(missing_ok=True)  # the run was killed between its last file and this point
                self.report(Progress("training", 1.0, f"kept: {self.folder} holds a complete training of these options"))
                return StepResult(self.folder, True, read_trained(self.folder))
        self.report(Progress("loading", None, "data"))
        self.data = load_task(self.config)
        source = resolve_model(self.config.model_path)
        steps = self.config.epochs * -(-len(self.data.train) // self.config.batch_size)
        self.steps = steps if self.config.max_steps is None else min(steps, self.config.max_steps)
        self.report(Progress("loading", None, "model"))
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), quiet_transformers():
                return StepResult(self.folder, False, self._train(source))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"memory ran out after step {self.step}: lower --batch-size (now {self.config.batch_size}) or --max-length (now "
                f"{self.config.max_length}), or use --dtype bf16; with --overwrite, since other options are another training."
            ) from error

    def _train(self, source: Path) -> dict[str, Any]:
        """Trains and returns the content of train.json."""
        state = None if self.config.overwrite else self._saved_state()
        started = time.monotonic() - (state["seconds"] if state else 0.0)
        torch.manual_seed(self.config.seed)
        self._load(self.folder / INIT if state else source)
        if state is None:
            self._begin()
        else:
            self._resume(state)
        for examples in islice(self._plan(), self.step, self.steps):
            loss = self._advance(examples)
            if self.step % self.config.checkpoint_steps == 0 and self.step < self.steps:
                self._save_state(time.monotonic() - started)
            self.report(Progress("training", self.step / self.steps, f"step {self.step:,}/{self.steps:,}, loss {loss:.3f}"))
        self.report(Progress("evaluating", None, f"{len(self.data.evaluation):,} rows"))
        loss, accuracy = self._evaluate()
        self._save(FINAL)
        summary = self._summary(loss, accuracy, time.monotonic() - started)
        write_atomically(self.folder / TRAINED, json.dumps(summary, indent=1) + "\n")
        (self.folder / STATE).unlink(missing_ok=True)
        return summary

    def _load(self, source: Path) -> None:
        self.tokenizer = load_tokenizer(source)
        self.model = load_classifier(source, self.data.labels, self.device)
        attention_layers(self.model)  # no training of a model that cannot be measured
        _set_padding(self.tokenizer, self.model, source)
        limits = (usable_positions(self.model), self.tokenizer.model_max_length)
        longest = min(limit for limit in limits if limit is not None)
        if self.config.max_length > longest:
            raise InputError(f"max_length must be at most the model's limit of {longest} tokens, got {self.config.max_length}.")
        self._check_tokens()
        decayed = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate)
        warmup = int(self.config.warmup_ratio * self.steps)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup, self.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)

    def _check_tokens(self) -> None:
        """Checks all rows before the first step, if the tokenizer has more tokens than the model."""
        known = num_embeddings(self.model)
        if max(self.tokenizer.get_vocab().values()) >= known:
            rows = (*self.data.train, *self.data.evaluation)
            check_vocabulary(known, max(int(batch["input_ids"].max()) for batch in self._batches(rows)), self.config.model_path)

    def _begin(self) -> None:
        clear(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / OPTIONS, yaml.safe_dump(self.options, sort_keys=False, allow_unicode=True))
        self._save(INIT)
        torch.manual_seed(self.config.seed)  # so that dropout does not depend on random numbers drawn before

    def _save(self, name: str) -> None:
        save_model(self.model, self.tokenizer, self.folder / name)
        self.checkpoints[name] = weights_record(self.folder / name)

    def _plan(self) -> Iterator[list[Example]]:
        """Rows of each step, in an order that depends only on the seed and the epoch."""
        rows, size = self.data.train, self.config.batch_size
        generator = torch.Generator().manual_seed(self.config.seed)
        while True:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(rows), size):
                yield [rows[index] for index in order[start : start + size]]

    def _batches(self, examples: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
        return batches(examples, self.tokenizer, self.config.batch_size, self.config.max_length, self.device)

    def _half(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not torch.float32)

    def _advance(self, examples: list[Example]) -> float:
        self.model.train()
        (batch,) = self._batches(examples)
        with self._half():
            loss = self.model(**batch).loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged("loss", value)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if not self.scaler.is_enabled() and not math.isfinite(norm):
            raise self._diverged("gradient", norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)  # in fp16, skips a step whose gradients overflowed, and halves the scale
        self.scaler.update()
        if self.scaler.get_scale() < _LOWEST_SCALE:
            raise self._diverged("gradient", norm)
        if self.scaler.get_scale() < scale:
            self.left_out += 1
        else:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(value)
        return value

    def _diverged(self, what: str, value: float) -> InputError:
        """Error to raise. Deletes the files of this training, so that other options can use the same folder."""
        clear(self.folder)
        half = ", or use --dtype fp32" if self.precision is not torch.float32 else ""
        return InputError(
            f"{what} must stay finite, got {value} in step {self.step + 1:,} of {self.steps:,}: "
            f"lower --learning-rate (now {self.config.learning_rate:g}){half}."
        )

    def _evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the evaluation rows."""
        self.model.eval()
        loss = right = 0.0
        for batch in self._batches(self.data.evaluation):
            labels = batch["labels"]
            with torch.no_grad(), self._half():
                logits = self.model(**batch).logits.float()
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
        rows = len(self.data.evaluation)
        if not math.isfinite(loss):  # the last step diverged
            self.step -= 1
            raise self._diverged("loss", loss)
        return loss / rows, right / rows

    def _save_state(self, seconds: float) -> None:
        state = {
            **{name: getattr(self, name) for name in _KEPT},
            **{name: getattr(self, name).state_dict() for name in _STATEFUL},
            "seconds": seconds,
            "data": self.data.digest(),
            "options": self._options_digest(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        try:
            with replacing(self.folder / STATE) as partial:
                torch.save(state, partial)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # an error of torch's archive, without a reason
                raise
            raise no_room(self.folder / STATE, "is the disk full?") from error

    def _options_digest(self) -> str:
        counted = {name: value for name, value in self.options.items() if name not in ADDED_OPTIONS or value != ADDED_OPTIONS[name]}
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()

    def _saved_state(self) -> dict[str, Any] | None:
        """Last checkpoint of an interrupted run; None if there is none."""
        path = self.folder / STATE
        for partial in self.folder.glob(f".{STATE}-*"):  # from a run that was killed while writing
            partial.unlink()
        if not path.is_file() or not (self.folder / INIT).is_dir():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            data, options, before = state["data"], state["options"], state["checkpoints"][INIT]
        except Exception as error:  # from zip, pickle or torch, depending on the damage
            raise InputError(f"{path} must be a complete training state, got a damaged file; --overwrite starts again.") from error
        if options != self._options_digest():
            raise InputError(f"{path} must be of the training in {OPTIONS}, got one of other options; --overwrite starts again.")
        if not has_weights(self.folder / INIT, before, thorough=True):
            raise InputError(f"{self.folder / INIT} must hold the initial weights of the training, got others; --overwrite starts again.")
        if data != self.data.digest():
            raise InputError(f"data_path must hold the rows with which the training in {self.folder} began; --overwrite starts again.")
        return state

    def _resume(self, state: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, state[name])
        for name in _STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def _summary(self, loss: float, accuracy: float, seconds: float) -> dict[str, Any]:
        return {
            "options": self.options,
            "checkpoints": self.checkpoints,
            "labels": list(self.data.labels),
            "source": self.data.source,
            "data": self.data.digest(),
            "train_rows": len(self.data.train),
            "evaluation_rows": len(self.data.evaluation),
            "repeated_rows": self.data.repeated,
            "unlabelled_rows": self.data.unlabelled,
            "steps": self.step,
            "left_out_steps": self.left_out,
            "losses": self.losses,
            "evaluation_loss": loss,
            "accuracy": accuracy,
            "seconds": seconds,
            "dtype": self.options["dtype"],
            "device": str(self.device),
            "versions": package_versions(),
        }


def _set_padding(tokenizer: Any, model: Any, source: Path) -> None:
    """Sets a padding token in tokenizer and configuration, which decoder-only classifiers need to find the last token of a row."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"model_path must hold a tokenizer with a padding or end-of-text token, got {source.name} with neither.")
        tokenizer.pad_token = tokenizer.eos_token
    rows = num_embeddings(model)
    if tokenizer.pad_token_id >= rows:
        raise InputError(f"model_path must hold an embedding for padding, got token {tokenizer.pad_token_id} of {rows} in {source.name}.")
    model.config.pad_token_id = tokenizer.pad_token_id
