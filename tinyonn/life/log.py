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
from ..train.onn_trainer import OnnTrainer

PAGE_EVERY = 5.0  # seconds between two updates of the page


class LifeLog(TrainerCallback):
    """Writes FOLDER/log and the page, on the first process.

    Attributes:
        last: the last line of metrics.
        eval_loss: the last loss on held-out text.
        births, recyclings: over the whole life.
    """

    def __init__(self, folder: Path, tell: Callable[[float | None, str], None], steps: int) -> None:
        self._folder, self._log, self._tell, self._steps = folder, folder / "log", tell, steps
        self._trainer: OnnTrainer | None = None
        self._written = 0.0
        self._events = 0
        self._counts: dict[str, list[int]] = {}
        self.last: dict[str, float] = {}
        self.eval_loss: float | None = None
        self.births = self.recyclings = 0

    def begin(self, trainer: OnnTrainer) -> None:
        self._trainer = trainer

    def resume(self, step: int) -> None:
        """Drops lines of steps after a checkpoint, which are trained again."""
        self._log.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "events.jsonl", "choices.jsonl"):
            file = self._log / name
            kept = [line for line in _lines(file) if line["step"] <= step]
            write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept))
            if name == "events.jsonl":
                self.births = sum(line["kind"] == "birth" for line in kept)
                self.recyclings = len(kept) - self.births
            if name == "metrics.jsonl":
                for line in kept:
                    self._keep(line)

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
        if time.monotonic() - self._written > PAGE_EVERY:
            self._write_page()

    def end(self, sample: str, stopped: str | None) -> None:
        """Writes what is left, and the page with its sample."""
        trainer = self._trainer
        assert trainer is not None
        if trainer.state.is_world_process_zero:
            self._write_events()
            write_atomically(self._log / "sample.json", json.dumps({"text": sample, "stopped": stopped}))
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

    def _write_choices(self, step: int) -> None:
        """How often each expert was chosen since the last line, and what each has lived through."""
        assert self._trainer is not None
        lives = {}
        for name, layer in self._trainer.model.named_modules():  # type: ignore[union-attr]
            if not isinstance(layer, Routed) or layer.life is None:
                continue
            life = layer.life
            total = [int(number) for number in life.activations.tolist()]
            before = self._counts.get(name, [0] * len(total))
            self._append(
                "choices.jsonl",
                {"step": step, "layer": name, "counts": [a - b if a >= b else a for a, b in zip(total, before, strict=True)]},
            )
            self._counts[name] = total
            lives[name] = {
                "birth_step": life.birth_step.tolist(),
                "lives": life.lives.tolist(),
                "activations": total,
                "surprise": [round(value, 6) for value in life.surprise.tolist()],
                "live": layer.router.expert_mask.tolist(),
            }
        write_atomically(self._log / "experts.json", json.dumps({"step": step, "layers": lives}))

    def _write_page(self) -> None:
        write_life_page(self._folder)
        self._written = time.monotonic()


def _lines(file: Path) -> list[dict[str, Any]]:
    """Whole lines of a file; one that a crash cut off is left out."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
