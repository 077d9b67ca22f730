"""A life: prepares texts, vocabulary and model in a folder, trains there, and goes on where an earlier run stopped.

FOLDER/options.yaml   options that the life began with, or that the first run of a fork chose
FOLDER/parent.yaml    of a fork: step and options of its parent
FOLDER/tokenizer/     the vocabulary
FOLDER/tokens.npy     the texts as tokens
FOLDER/store/         a PerpetualStore: every kept step, and the log of the life
FOLDER/log/           metrics.jsonl, events.jsonl, experts.json, choices.jsonl, and TensorBoard's files in runs/
FOLDER/model/         the model and its vocabulary
FOLDER/life.html      the page, and two figures beside it
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoTokenizer, PrinterCallback, set_seed

from .._io.files import digest, replacing, write_atomically
from .._io.locks import locked
from ..errors import InputError
from ..hf.loading import resolve_device
from ..hf.tiny_onn import TinyOnnConfig, TinyOnnForCausalLM
from ..store.overview import newest_step
from .config import LifeConfig
from .forking import DATA, FORKABLE, FREE, OPTIONS, STORE, TOKENIZER, TOKENS, Origin, is_fresh, read_options, read_origin
from .log import TrainingLog
from .log_files import ended_step
from .running import EARLIER, ProgressCall, StopSignals, TrainingResult, arguments, quiet
from .texts import documents, encoded, learn_tokenizer, split
from .trainer import LifeTrainer, Schedule, Sizes

SAMPLE_TOKENS = 80


@dataclass(frozen=True, kw_only=True)
class LifeResult(TrainingResult):
    """What a run of a life ended with.

    Attributes:
        eval_loss: last loss on held-out text, in nats a token; None if there was no evaluation.
        births, recyclings, skipped: over the whole life.
        sample: generated text.
        others: see `TrainingResult`.
    """

    eval_loss: float | None
    births: int
    recyclings: int
    skipped: int
    sample: str


def train(config: LifeConfig, progress: ProgressCall | None = None, note: Callable[[str], None] | None = None) -> LifeResult:
    """Trains a model on texts in `config.output_dir`, or goes on there.

    Args:
        config: the options.
        progress: called with the share of the steps that are done, in [0, 1], None before the first step, and a few words.
        note: called before the first step with a line on what saves will write.

    Returns:
        What the run ended with; also after a signal, and where an earlier run did all steps.

    Raises:
        InputError: an option is impossible together with others or with the texts; the folder has a life with other options, or another
            run writes into it.
    """
    begin = time.monotonic()
    folder = Path(config.output_dir)
    tell = progress or (lambda share, words: None)
    first = int(os.environ.get("RANK", "0")) == 0
    if config.fsdp and resolve_device(config.device).type == "cpu":
        raise InputError("fsdp must be false on a CPU, where Accelerate does not shard a model; got true.")
    with locked(folder) if first else contextlib.nullcontext(), quiet():
        origin = read_origin(folder)
        _check_same_life(folder, config, origin)
        _model_config(config, None)  # before the texts are read
        tokenizer, tokens = _prepared(folder, config, tell, first)
        training, held_out = split(tokens, config.context, config.eval_size, config.data_path)
        set_seed(config.seed % 2**32)
        model = TinyOnnForCausalLM(_model_config(config, tokenizer))
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        log, signals = TrainingLog(folder, tell, config.steps), StopSignals()
        trainer = LifeTrainer(
            schedule=Schedule(config, 0 if origin is None else origin.schedule_now(_kept(config))),
            model=model,
            args=arguments(config, folder),
            train_dataset=training,
            eval_dataset=held_out,
            callbacks=[log, signals],
            drive_weights=config.drive_weights,
            max_bad_steps=config.max_bad_steps,
            freeze_idle=config.freeze_idle,
            store=folder / STORE,
            keep=config.keep,
            overlap=True,
            stretch=_stretch(config, folder, origin) if first else None,  # others record nothing, and need not read all tokens
        )
        trainer.remove_callback(PrinterCallback)
        if first and note is not None:
            trainer.add_callback(Sizes(trainer, note))
        log.begin(trainer)
        signals.trainer = trainer
        done = newest_step(folder / STORE) or 0
        written = ended_step(folder / "log") == done  # after a kill or `tinyonn life restore`, the model is of another step
        if first:
            log.resume(done)
        if done >= config.steps and written and (folder / "model" / "config.json").is_file():
            return _done_before(folder, model, log, done, begin, first)
        with signals:
            trainer.train()
        stopped = trainer.stopped
        trainer.save_model(str(folder / "model"))
        if first:
            tokenizer.save_pretrained(folder / "model")
        sample = _sample(model, tokenizer) if first and not config.fsdp else ""  # one process has a part of a sharded model
        log.end(sample, stopped)
        trained = sum(parameter.numel() for parameter in model.parameters())
    return LifeResult(
        folder=folder,
        model=folder / "model",
        page=folder / "life.html",
        steps=trainer.state.global_step,
        parameters=trained,
        metrics=log.last,
        eval_loss=log.eval_loss,
        births=log.births,
        recyclings=log.recyclings,
        skipped=trainer.skipped,
        sample=sample,
        stopped=stopped,
        seconds=time.monotonic() - begin,
        first=first,
    )


def _done_before(folder: Path, model: TinyOnnForCausalLM, log: TrainingLog, done: int, begin: float, first: bool) -> LifeResult:
    """Of a life that has its steps already; nothing is changed."""
    return LifeResult(
        folder=folder,
        model=folder / "model",
        page=folder / "life.html",
        steps=done,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        metrics=log.last,
        eval_loss=log.eval_loss,
        births=log.births,
        recyclings=log.recyclings,
        skipped=0,
        sample="",
        stopped=EARLIER,
        seconds=time.monotonic() - begin,
        first=first,
    )


def _check_same_life(folder: Path, config: LifeConfig, origin: Origin | None) -> None:
    """InputError if the folder has a life with other options, except for those that a fork may change."""
    if not (folder / OPTIONS).is_file():
        if (folder / STORE).is_dir():
            raise InputError(f"output_dir must have the options.yaml of its life, got {folder}, where it is missing.")
        return
    before, now = read_options(folder), _kept(config)
    if "data" in before:
        raise InputError(f"output_dir must be the folder of a training on texts, got {folder}, which has a training on ARC.")
    other = sorted(name for name in now if before.get(name) != now[name])
    fresh = is_fresh(folder, origin)
    refused = [name for name in other if not (fresh and name in FORKABLE)]
    if not refused:
        return
    name = refused[0]
    remedy = "give that, or another --output-dir"
    if name in FORKABLE:
        remedy = "give that, or fork the life with `tinyonn life fork`, and change it there"
    elif fresh:
        remedy = "a fork cannot change it"
    raise InputError(f"{name} must be {before.get(name)!r}, as in the life in {folder}, got {now[name]!r}: {remedy}.")


def _kept(config: LifeConfig) -> dict[str, Any]:
    """Options that all runs of a life share."""
    shared = {name: value for name, value in asdict(config).items() if name not in FREE}
    return shared | {"data_path": str(Path(config.data_path).expanduser().resolve())}


def _prepared(folder: Path, config: LifeConfig, tell: ProgressCall, first: bool) -> tuple[Any, np.ndarray]:
    """Tokenizer and tokens, made by the first process and read by all."""
    done = folder / TOKENS
    now = _kept(config)

    def is_ready() -> bool:
        return done.is_file() and (folder / OPTIONS).is_file() and read_options(folder) == now

    if first and not is_ready():
        before = read_options(folder) if (folder / OPTIONS).is_file() else {}
        same_texts = done.is_file() and all(before.get(name) == now[name] for name in DATA)
        tokens = None
        if not same_texts:
            tell(None, "learning the vocabulary")
            read = partial(documents, config.data_path, suffix=config.suffix, text_field=config.text_field, without=folder)
            if next(read(), None) is None:
                ending = f" in files that end in {config.suffix}" if config.suffix else ""
                raise InputError(f"data_path must have a text{ending}, got {config.data_path}, which has none.")
            size = config.vocab_size or TinyOnnConfig.bonsai(config.size).vocab_size
            known = bool(before) and (folder / TOKENIZER).is_dir()  # a life keeps its vocabulary
            tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER) if known else learn_tokenizer(read(), size)
            folder.mkdir(parents=True, exist_ok=True)
            tell(None, "reading texts")
            tokens = encoded(read(), tokenizer)
            split(tokens, config.context, config.eval_size, config.data_path)  # before anything is kept
            done.unlink(missing_ok=True)  # after a kill, tokens never belong to other options
            tokenizer.save_pretrained(folder / TOKENIZER)
        else:
            split(_read_tokens(done), config.context, config.eval_size, config.data_path)
        write_atomically(folder / OPTIONS, yaml.safe_dump(now, sort_keys=False))
        if tokens is not None:
            with replacing(done) as unfinished, unfinished.open("wb") as file:
                np.save(file, tokens)
    elif not first:
        _wait_until(is_ready, done)
    tokens = _read_tokens(done)
    try:
        return AutoTokenizer.from_pretrained(folder / TOKENIZER), tokens
    except (OSError, ValueError):
        raise InputError(f"{folder / TOKENIZER} must be the vocabulary of this life; it is damaged or missing.") from None


def _read_tokens(file: Path) -> np.ndarray:
    try:
        tokens: np.ndarray = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        raise InputError(f"{file} must be whole; remove it to read the texts again.") from None
    return tokens


def _stretch(config: LifeConfig, folder: Path, origin: Origin | None) -> dict[str, Any]:
    """What the log of the life tells about this run; of a fork, also what differs from its parent."""
    fields = {"data": str(Path(config.data_path).expanduser().resolve()), "data_hash": digest(folder / TOKENS)}
    changed = {} if origin is None else {"changed": origin.changes(_kept(config))}
    return fields | {"objective": "next token", "options": asdict(config)} | changed


def _wait_until(ready: Callable[[], bool], file: Path, seconds: float = 3600.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise InputError(f"{file} must be written by the first process within an hour; it was not.")
        time.sleep(0.2)


def _model_config(config: LifeConfig, tokenizer: Any | None) -> TinyOnnConfig:
    """Configuration of the model; without a tokenizer, only to check the numbers."""
    sizes = {name: getattr(config, name) for name in ("hidden_size", "head_dim", "init_num_experts", "max_num_experts")}
    numbers = {name: getattr(config, name) for name in ("alpha", "gamma", "pruning_threshold", "growth_threshold", "w_ce", "w_kl")}
    most, live = config.max_num_experts, config.init_num_experts
    if most is None and live is not None:
        of_size = TinyOnnConfig.bonsai(config.size, attention=config.attention).max_num_experts
        sizes["max_num_experts"] = max(live, of_size or live)
    elif live is None and most is not None:
        sizes["init_num_experts"] = most - most // 8
    try:
        return TinyOnnConfig.bonsai(
            config.size,
            attention=config.attention,
            **({} if tokenizer is None else {"vocab_size": len(tokenizer)}),
            **{name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id") if tokenizer is not None},
            **{name: value for name, value in sizes.items() if value is not None},
            **numbers,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


@torch.no_grad()
def _sample(model: TinyOnnForCausalLM, tokenizer: Any) -> str:
    """Text that is sampled from the model after the end token, always with the same random numbers."""
    model.eval()
    device = next(model.parameters()).device
    begin = torch.tensor([[tokenizer.eos_token_id]], device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        found: Any = model.generate(  # type: ignore[misc]
            begin, max_new_tokens=SAMPLE_TOKENS, do_sample=True, temperature=0.8, eos_token_id=None
        )
    return str(tokenizer.decode(found[0, 1:], skip_special_tokens=True))
