"""A transformers Trainer whose checkpoints go to a `PerpetualStore`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import InputError
from ..store.closing import take_note
from ..store.keep import Keep
from ..store.life_log import LOG, RESERVED, LifeLogError, environment, read_life_log
from ..store.overview import saved_values
from ..store.perpetual_store import PerpetualStore

_STATE = "trainer_state.json"


class PerpetualMixin:
    """Puts the checkpoints of a `transformers.Trainer` into a `PerpetualStore`: `class MyTrainer(PerpetualMixin, Trainer)`.

    `args.save_strategy` and `args.save_steps` say when it saves. `train()` continues from the newest step of the store, if there is one; a
    run that was stopped ends with the bits of one that was not, on a CPU. The log of the life gets each run (`stretch`), each line of the
    trainer's log (`metrics`, `evaluation`) and why the run ended (`stop`); `trainer.state.log_history` is restored from it.

    Args:
        args, others: see `transformers.Trainer`.
        store: folder of the store; None for checkpoints as the Trainer writes them.
        keep, overlap: see `PerpetualStore`. With `overlap`, no callback may change parameters between a save and the optimiser's next step.
        stretch: further fields of the record of this run, such as data and data_hash.

    Attributes:
        store: the `PerpetualStore` while `train` runs; None otherwise.

    Raises:
        InputError: keep is not understood; in `train`, what `PerpetualStore` raises.
        ValueError: in `train`, a store with resume_from_checkpoint or args.load_best_model_at_end, which read checkpoints.
    """

    def __init__(
        self,
        *args: Any,
        store: str | os.PathLike[str] | None = None,
        keep: Keep | str = "last:3",
        overlap: bool = False,
        stretch: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._store_folder = None if store is None else Path(store)
        self._keep = Keep.parse(keep)
        self._overlap = overlap
        self._stretch = dict(stretch or {})
        self.store: PerpetualStore | None = None
        super().__init__(*args, **kwargs)
        if self._store_folder is not None:
            trainer: Any = self
            trainer.add_callback(_Records(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        own: Any = self
        if self._store_folder is None:
            return trainer.train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint:
            raise ValueError(
                f"resume_from_checkpoint must be None with a store, which knows its newest step, got {resume_from_checkpoint}."
            )
        if own.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end must be False with a store, got True; keep='last:1,best:1' keeps the best step, which "
                "PerpetualStore.restore(step) reads."
            )
        values = saved_values(self._store_folder)
        if values is not None and "trainer" not in values:
            raise InputError(f"store must be one that a Trainer saved, got {self._store_folder}, which has no state of a Trainer.")
        reason = "error"
        try:
            with tempfile.TemporaryDirectory() as folder:
                if values is not None:
                    step = values["trainer"]["global_step"]
                    state = values["trainer"] | {"log_history": _history(self._store_folder / LOG, step)}
                    (Path(folder) / _STATE).write_text(json.dumps(state), encoding="utf-8")
                result = trainer.train(None if values is None else folder, *args, **kwargs)
            reason = self.stop_reason()
            return result
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise
        finally:
            self._close(reason)

    def stop_reason(self) -> str:
        """Why training ended, for the log."""
        trainer: Any = self
        done = trainer.state.global_step >= trainer.state.max_steps
        return getattr(self, "stopped", None) or ("all steps were done" if done else "the trainer stopped")

    def score(self) -> float | None:
        """Value by which `keep` chooses the best steps, the highest first; None for none."""
        return None

    def _close(self, reason: str) -> None:
        store, self.store = self.store, None
        if store is None:
            return
        trainer: Any = self
        with store:
            try:
                store.wait()
            finally:
                store.record("stop", trainer.state.global_step, durable=True, reason=reason)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        trainer: Any = super()
        if self._store_folder is None:
            return trainer._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        found = trainer._prepare_for_training(max_steps, train_dataloader, None)
        own: Any = self
        objects = {"scheduler": own.lr_scheduler}
        scaler = getattr(own.accelerator, "scaler", None)
        if scaler is not None:
            objects["scaler"] = scaler
        optimizer = getattr(own.optimizer, "optimizer", own.optimizer)
        self.store = PerpetualStore(self._store_folder, own.model, optimizer, objects=objects, keep=self._keep, overlap=self._overlap)
        self.store.restore()
        options = {name: value for name, value in own.args.to_sanitized_dict().items() if value is not None}
        data = {"data": type(own.train_dataset).__name__, "objective": type(own.model).__name__}
        fields = data | environment() | {"device": str(own.args.device), "processes": own.args.world_size, "options": options}
        self.store.record("stretch", own.state.global_step, durable=True, **(fields | self._stretch))
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        own: Any = self
        if self.store is not None and own.state.global_step >= own.state.max_steps:  # restored; Trainer would train one step more
            own.control.should_training_stop = True
            return None
        return trainer._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trainer: Any = super()
        if self._store_folder is None:
            trainer._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        trainer: Any = super()
        if self.store is None:
            trainer._load_rng_state(checkpoint)
        else:
            self.store.restore_random_state()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        trainer: Any = super()
        if self.store is None:
            trainer._save_checkpoint(model, trial)
            return
        own: Any = self
        if own.state.global_step == self.store.step:  # the end of an epoch, and a callback that saves
            return
        own.store_flos()
        state = own.state
        for callback in [*own.callback_handler.callbacks, own.control]:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()
        history, state.log_history = state.log_history, []
        try:
            with tempfile.TemporaryDirectory() as folder:
                state.save_to_json(os.path.join(folder, _STATE))
                text = (Path(folder) / _STATE).read_text(encoding="utf-8")
        finally:
            state.log_history = history
        self.store.save(state.global_step, score=self.score(), state={"trainer": json.loads(text)})


class _Records(TrainerCallback):
    """Writes the trainer's log into the log of the life."""

    def __init__(self, trainer: PerpetualMixin) -> None:
        self._trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        store = self._trainer.store
        if store is None or not logs or "train_runtime" in logs:
            return
        values: dict[str, Any] = {
            name: value for name, value in logs.items() if isinstance(value, bool | int | float | str) and name not in RESERVED
        }
        store.record("evaluation" if any(name.startswith("eval_") for name in values) else "metrics", state.global_step, **values)


def _history(log: Path, step: int) -> list[dict[str, Any]]:
    """`log_history` of the trainer up to a step, from the log of the life. What a run that was killed logged after it is trained again."""
    try:
        records = read_life_log(log).effective()
    except LifeLogError:
        take_note(log.parent)  # so the store checks all of the log, sets it aside with a warning, and begins a new one
        return []
    except InputError:  # it is missing, and the store begins a new one
        return []
    kept = [record for record in records if record["event"] in ("metrics", "evaluation") and record["step"] <= step]
    names = set(RESERVED) - {"step"}
    return [{name: value for name, value in record.items() if name not in names} for record in kept]
