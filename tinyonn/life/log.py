"""The log of a life: lines of metrics, events and choices in files, from which the page is written."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .._io.files import write_atomically
from ..nn.routed import Routed
from ..report.life import write_life_page
from ..report.life.data import read_lines
from ..train.onn_trainer import OnnTrainer
from .log_files import SAMPLE, SNAPSHOT, cut_log

PAGE_EVERY = 5.0  # seconds between two updates of the page, at least
PAGE_SHARE = 0.05  # of the time, that writing it and its figures may take


class TrainingLog(TrainerCallback):
    """Writes FOLDER/log and the page, on the first process.

    Attributes:
        last: the last line of metrics.
        eval_loss: the last loss on held-out text.
        births, recyclings: over the whole life.
    """

    def __init__(self, folder: Path, tell: Callable[[float | None, str], None], steps: int) -> None:
        self._folder, self._log, self._tell, self._steps = folder, folder / "log", tell, steps
        self._trainer: OnnTrainer | None = None
        self._next_page = 0.0
        self._events = 0
        self._counts: dict[str, tuple[list[int], list[int]]] = {}  # lives and activations at the last line
        self.last: dict[str, float] = {}
        self.eval_loss: float | None = None
        self.births = self.recyclings = 0

    def begin(self, trainer: OnnTrainer) -> None:
        self._trainer = trainer

    def resume(self, step: int) -> None:
        """Drops lines of steps after a checkpoint, which are trained again; for the first process."""
        if step < self._steps:
            (self._log / SAMPLE).unlink(missing_ok=True)  # of the run before
        cut_log(self._log, self._log, step)
        kinds = [line["kind"] for line in read_lines(self._log / "events.jsonl")]
        self.births, self.recyclings = kinds.count("birth"), kinds.count("recycling")
        for line in read_lines(self._log / "metrics.jsonl"):
            self._keep(line)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._counts = {name: _lived(layer) for name, layer in self._layers()}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {name: value for name, value in logs.items() if isinstance(value, int | float) and math.isfinite(value)}
        line["step"], line["time"] = state.global_step, time.time()
        self._append("metrics.jsonl", line)
        self._keep(line)
        self._write_events()
        if "loss" in logs:
            self._write_choices(state.global_step)
            parts = [f"step {state.global_step}", f"loss {logs['loss']:.3f}"]
            parts += [f"{label} {logs[name]:.3g}" for name, label in (("pi", "PI"), ("live_experts", "experts")) if name in logs]
            self._tell(state.global_step / max(1, self._steps), ", ".join(parts))
        if time.monotonic() > self._next_page:
            self._write_page()

    def end(self, sample: str, stopped: str | None) -> None:
        """Writes what is left, and the page with its sample."""
        trainer = self._trainer
        assert trainer is not None
        if trainer.state.is_world_process_zero:
            self._write_events()
            end = {"text": sample, "stopped": stopped, "step": trainer.state.global_step}
            write_atomically(self._log / SAMPLE, json.dumps(end))
            self._write_page()

    def _keep(self, line: dict[str, Any]) -> None:
        if "eval_loss" in line:
            self.eval_loss = line["eval_loss"]
        if "loss" in line:
            self.last = line

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self._log / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _write_events(self) -> None:
        assert self._trainer is not None
        for event in self._trainer.events[self._events :]:
            self._append("events.jsonl", event._asdict())
            self.births += event.kind == "birth"
            self.recyclings += event.kind == "recycling"
        self._events = len(self._trainer.events)

    def _layers(self) -> list[tuple[str, Routed]]:
        assert self._trainer is not None
        modules: Any = self._trainer.model
        return [(name, layer) for name, layer in modules.named_modules() if isinstance(layer, Routed) and layer.life is not None]

    def _write_choices(self, step: int) -> None:
        """How often each expert was chosen since the last line, and what each has lived through."""
        snapshot = {}
        for name, layer in self._layers():
            life = layer.life
            assert life is not None
            lives, total = _lived(layer)
            lives_before, before = self._counts.get(name, (lives, [0] * len(total)))
            counts = [a - b if life == old else a for a, b, life, old in zip(total, before, lives, lives_before, strict=True)]
            self._append("choices.jsonl", {"step": step, "layer": name, "counts": counts})
            self._counts[name] = lives, total
            snapshot[name] = {
                "birth_step": life.birth_step.tolist(),
                "lives": lives,
                "activations": total,
                "surprise": [round(value, 6) for value in life.surprise.tolist()],
                "live": layer.router.expert_mask.tolist(),
            }
        write_atomically(self._log / SNAPSHOT, json.dumps({"step": step, "layers": snapshot}))

    def _write_page(self) -> None:
        begin = time.monotonic()
        write_life_page(self._folder)
        end = time.monotonic()
        self._next_page = end + max(PAGE_EVERY, (end - begin) / PAGE_SHARE)


def _lived(layer: Routed) -> tuple[list[int], list[int]]:
    """How many experts each slot has had, and the tokens of its present one."""
    assert layer.life is not None
    return layer.life.lives.tolist(), layer.life.activations.tolist()
