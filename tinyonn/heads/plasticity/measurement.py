"""The measure step of a plasticity study: importance of each head before and after training, and change of its weights.

    eval_subset.json        evaluation rows, the same for every training seed
    importance_pre.jsonl    loss increase and accuracy drop without the head, and its Taylor estimate, before training
    importance_post.jsonl   the same after training
    gradfisher_pre.jsonl    norm of the gradient and empirical Fisher information before training
    update.jsonl            change of the head's weights
    measure_parts.json      checksum and sources of each of these files, from which an interrupted run continues
    measure.json            loss and accuracy of both models, share of the most common class, checks, times; written last

Each .jsonl has one line per head. All computations are in float32, whatever the precision of training, because the effect of a head on
the loss is often below the resolution of half precision.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._io.files import digest, write_atomically
from ..._io.locks import locked
from ...errors import InputError
from ...hf.loading import display_name, load_model, load_tokenizer, resolve_device
from ...hf.memory import is_out_of_memory
from ..capture.gates import check_gates
from ..progress import Progress
from ..step_files import check_fields, json_text, read_json
from ..study import (
    FINAL,
    GRADIENTS,
    IMPORTANCE_POST,
    IMPORTANCE_PRE,
    INIT,
    MEASURE_AGAIN,
    MEASURE_STEP,
    MEASURED,
    PARTS,
    SUBSET,
    TRAIN_AGAIN,
    TRAINED,
    UPDATE,
)
from ..versions import package_versions
from .ablation import ablate_heads, taylor_importance
from .classification import batches, load_task
from .config import PlasticityConfig
from .gradients import head_gradients
from .head_update import checkpoint_update
from .records import PART_FIELDS, StepResult, read_trained
from .train_folder import changed_checkpoint, check_same, training_options

# Options of training that may differ for a measurement: they change only rounding.
_FREE = ("batch_size", "dtype")
_CHECK_ROWS = 2  # number of samples of the first batch, for the check of the gates
# Fields of a part that go into the summary.
_FACTS = {
    name: {f"base_loss_{when}": "a number", f"base_accuracy_{when}": "a number"}
    for name, when in ((IMPORTANCE_PRE, "pre"), (IMPORTANCE_POST, "post"))
}

Report = Callable[[Progress], None]


def measure(config: PlasticityConfig, progress: Report | None = None) -> StepResult:
    """Measures every head of a trained classifier, before and after its training. Existing measurements are kept.

    Args:
        config: options of the training; batch_size and device may differ.
        progress: function called at every stage and batch.

    Raises:
        InputError: the folder has no complete training, or one of other options or rows; another run uses the folder; the checkpoints are
            not those of the training, or do not match; gates have no effect; a loss is not finite; or memory ran out.
    """
    read_trained(config.folder)  # before the lock, which would create the folder
    try:
        with locked(config.folder):
            return _Measurement(config, progress or (lambda state: None)).go()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"memory ran out while measuring: lower --batch-size (now {config.batch_size}); existing measurements are kept."
        ) from error


class _Measurement:
    """Measurement of one folder. Each file is a part: one row per head, and facts for measure.json."""

    def __init__(self, config: PlasticityConfig, report: Report) -> None:
        self.config, self.report, self.folder = config, report, config.folder
        self.device = resolve_device(config.device)
        self.train_summary = read_trained(self.folder)
        options = training_options(config, torch.float32)
        check_same(self.folder, {name: value for name, value in options.items() if name not in _FREE})
        self.parts: dict[str, Callable[[], tuple[list[dict[str, Any]], dict[str, Any]]]] = {
            UPDATE: self._update,  # fast, and detects checkpoints that do not match
            IMPORTANCE_PRE: partial(self._importance, INIT, "pre"),
            GRADIENTS: self._gradients,
            IMPORTANCE_POST: partial(self._importance, FINAL, "post"),
        }
        self.loaded: tuple[str, nn.Module] | None = None

    def go(self) -> StepResult:
        self.report(Progress("loading", None, "data"))
        self.data = load_task(self.config)
        if self.data.digest() != self.train_summary.get("data"):
            raise InputError(
                f"{self.config.data_path or self.config.task} must hold the rows that the training in {self.folder} used, got others; run "
                f"{TRAIN_AGAIN}."
            )
        self._write_subset()
        origin = {"training_sha256": digest(self.folder / TRAINED), "subset_sha256": digest(self.folder / SUBSET)}
        done = {} if self.config.overwrite else self._done(origin)
        if set(done) == set(self.parts) and (summary := self._complete(self._summary(origin, done))) is not None:
            self.report(Progress("measuring", 1.0, f"kept: {self.folder} holds a complete measurement of this training"))
            return StepResult(self.folder, True, summary)
        (self.folder / MEASURED).unlink(missing_ok=True)
        if len(done) < len(self.parts) and (other := changed_checkpoint(self.folder, self.train_summary, thorough=True)) is not None:
            raise InputError(f"{self.folder / other} must hold the weights that its training saved, got others; run {TRAIN_AGAIN}.")
        for name, make in self.parts.items():
            if name in done:
                continue
            started = time.monotonic()
            rows, facts = make()
            write_atomically(self.folder / name, "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows))
            sizes = {"layers": rows[-1]["layer"] + 1, "heads": len(rows), "seconds": time.monotonic() - started}
            done[name] = {"sha256": digest(self.folder / name), **sizes, "facts": facts}
            write_atomically(self.folder / PARTS, json_text({**origin, "parts": done}))
        summary = self._summary(origin, done)
        write_atomically(self.folder / MEASURED, json_text(summary))
        return StepResult(self.folder, False, summary)

    def _write_subset(self) -> None:
        rows = self.data.evaluation
        subset = {
            "source": self.data.source,
            "seed": self.config.eval_seed,
            "size": len(rows),
            "indices": [example.row for example in rows],
            "labels": [example.label for example in rows],
        }
        path = self.folder / SUBSET
        if path.is_file() and not self.config.overwrite:
            there = read_json(path, dict, MEASURE_AGAIN, MEASURE_AGAIN)
            if {**there, "source": None} == {**subset, "source": None}:  # a path can be written in several ways
                return
            raise InputError(
                f"{path} must name the rows that eval_seed {self.config.eval_seed} gives, got others; --overwrite measures again."
            )
        write_atomically(path, json.dumps(subset) + "\n")

    def _done(self, origin: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Records of the parts that exist, are complete, and belong to this training and these rows."""
        try:
            record = json.loads((self.folder / PARTS).read_text(encoding="utf-8"))
            parts = record["parts"] if all(record[name] == value for name, value in origin.items()) else {}
            return {name: parts[name] for name in self.parts if name in parts and self._is_done(name, parts[name])}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # missing or damaged: everything is measured again
            return {}

    def _is_done(self, name: str, part: dict[str, Any]) -> bool:
        check_fields(self.folder / PARTS, part, PART_FIELDS, MEASURE_STEP)
        check_fields(self.folder / PARTS, part["facts"], _FACTS.get(name, {}), MEASURE_STEP)
        return (self.folder / name).is_file() and digest(self.folder / name) == part["sha256"]

    def _complete(self, expected: Mapping[str, Any]) -> dict[str, Any] | None:
        """measure.json, if it agrees with the parts; it may be from another machine."""
        try:
            summary: dict[str, Any] = json.loads((self.folder / MEASURED).read_text(encoding="utf-8"))
            same = all(summary[name] == value for name, value in expected.items() if name not in ("model", "device", "versions"))
            return summary if same and isinstance(summary["model"], str) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _model(self, checkpoint: str) -> nn.Module:
        """Classifier of a checkpoint. Only the last one is kept in memory."""
        if self.loaded is None or self.loaded[0] != checkpoint:
            self.loaded = None
            self.report(Progress("loading", None, checkpoint))
            model = load_model(
                self.folder / checkpoint, torch.float32, self.device, "AutoModelForSequenceClassification", remedy="a smaller model"
            )
            self.loaded = checkpoint, model.requires_grad_(False)
        return self.loaded[1]

    def _batches(self) -> list[dict[str, Tensor]]:
        """Evaluation rows, longest first, so that there is little padding, and insufficient memory is detected at once."""
        rows = sorted(self.data.evaluation, key=lambda example: -len(example.text) - len(example.pair or ""))
        tokenizer = load_tokenizer(self.folder / INIT)
        return list(batches(rows, tokenizer, self.config.batch_size, self.config.max_length, self.device))

    def _on_samples(self, stage: str) -> Callable[[int], None]:
        total = len(self.data.evaluation)
        return lambda count: self.report(Progress(stage, count / total, f"{count:,}/{total:,} samples"))

    def _importance(self, checkpoint: str, when: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        name = {"pre": "before training", "post": "after training"}[when]
        model, data = self._model(checkpoint), self._batches()
        try:
            changes = check_gates(model, {key: tensor[:_CHECK_ROWS] for key, tensor in data[0].items()})
        except InputError as error:
            cause = self._cause() if checkpoint == FINAL else ""
            raise InputError(f"{self.folder / checkpoint}: {error}{cause}") from error
        exact = ablate_heads(model, data, on_samples=self._on_samples(f"importance {name}"))
        if not exact.replayed:
            self.report(Progress(f"importance {name}", 1.0, "every pass was full: replays did not agree"))
        first = taylor_importance(model, data, on_samples=self._on_samples(f"first-order importance {name}"))
        rows = _rows(loss_increase=exact.loss_increase, accuracy_drop=exact.accuracy_drop, **first._asdict())
        facts = {
            f"base_loss_{when}": exact.base_loss,
            f"base_accuracy_{when}": exact.base_accuracy,
            f"gate_check_{when}": min(changes),
            f"replayed_{when}": exact.replayed,
            f"replay_error_{when}": exact.replay_error,
        }
        return rows, facts

    def _cause(self) -> str:
        """Likely cause of trained weights for which no head has an effect."""
        losses = self.train_summary["losses"]
        part = max(1, len(losses) // 10)
        first, last = (math.fsum(some) / part for some in (losses[:part], losses[-part:]))
        if last < first:
            return ""
        rate = self.train_summary["options"].get("learning_rate")
        return (
            f" The loss of the training did not fall ({first:.3g} at its beginning, {last:.3g} at its end): run {TRAIN_AGAIN} with a lower "
            f"--learning-rate (now {rate})."
        )

    def _gradients(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        found = head_gradients(self._model(INIT), self._batches(), on_samples=self._on_samples("gradients before training"))
        return _rows(gradient_norm=found.gradient_norm, fisher=found.fisher), {}

    def _update(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        self.report(Progress("change of weights", None, f"{INIT} and {FINAL}"))
        found = checkpoint_update(self.folder / INIT, self.folder / FINAL)
        return _rows(**dict(zip(("Uq", "Uk", "Uv", "Uo", "U", "Urel"), found, strict=True))), {}

    def _summary(self, origin: Mapping[str, str], done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        rows = self.data.evaluation
        facts = {name: value for part in self.parts for name, value in done[part]["facts"].items()}
        return {
            "model": display_name(self.config.model_path, Path(self.config.model_path)),
            "task": self.config.task_name,
            "seed": self.config.seed,
            "samples": len(rows),
            "commonest_class": max(Counter(example.label for example in rows).values()) / len(rows),
            "layers": done[UPDATE]["layers"],
            "heads": done[UPDATE]["heads"],
            **facts,
            "seconds": math.fsum(record["seconds"] for record in done.values()),
            "dtype": "fp32",
            "device": str(self.device),
            **origin,
            "versions": package_versions(),
        }


def _rows(**columns: Tensor) -> list[dict[str, Any]]:
    """One mapping per head, in order of layer and head, from (L, H) columns."""
    values: dict[str, Sequence[Sequence[float]]] = {name: column.tolist() for name, column in columns.items()}
    layers, heads = next(iter(columns.values())).shape
    return [
        {"layer": layer, "head": head, **{name: value[layer][head] for name, value in values.items()}}
        for layer in range(layers)
        for head in range(heads)
    ]
