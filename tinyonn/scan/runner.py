"""A whole scan: corpus in, `.mscan` out; resumed, bounded in memory, interrupted cleanly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .._io.streams import is_stdin
from ..errors import InputError
from ..hf.loading import check_fits, load_model
from ..hf.memory import is_out_of_memory
from ..mscan import MscanWriter, SequenceRecord
from ..mscan.not_measured import by_reason, without_value
from .config import ScanConfig
from .distributed import World
from .engine.engine import ScanEngine, SequenceScan
from .engine.forward import vocabulary_size
from .engine.integral import lost_tokens
from .generation import Generator
from .identity import scan_metadata
from .output import NOTHING, Existing, OutputCompleteError, check_writable, find_existing, member_path, open_writer, refuse_existing
from .prepare import Prepared, prepare
from .tokens import TokenCounts, TokenSequence, padded, plan_batches


@dataclass(frozen=True)
class ScanProgress:
    """Progress of a scan.

    Attributes:
        stage: "loading" (model) or "scanning".
        done, total: number of this process's records, including those of earlier runs and those left out.
        tokens: number of tokens scanned by this run.
        tokens_per_second: speed of this run so far.
        loss: mean loss of this run's tokens in nats, NaN before the first.
    """

    stage: str
    done: int
    total: int
    tokens: int = 0
    tokens_per_second: float = 0.0
    loss: float = float("nan")


@dataclass(frozen=True)
class ScanResult:
    """Result of a scan.

    Attributes:
        path: file that this process wrote.
        sequences, tokens: number written by this run.
        resumed: number of this process's sequences that earlier runs wrote.
        skipped: reason -> number of records left out, malformed ones included.
        truncated: number of sequences cut at max_length.
        not_finite: number of this run's sequences whose loss is NaN or infinite; their gradients are missing or infinite.
        overflowed: number of other sequences with tokens whose norms are not finite; no sum includes those tokens.
        not_measured: reason -> names of requested weights without a value in this run: their gradient cannot be recorded, or no token was
            routed to the expert.
        unproven: reason -> names of recorded weights whose own gradient could not be compared, such as quantised weights.
        seconds: duration of this run, loading included.
        tokens_per_second: speed of scanning alone.
        loss: mean loss of this run's tokens in nats.
        dtype: precision of the model, such as "float32".
        rank, world_size: rank of this process, and number of processes that share the corpus.
    """

    path: Path
    sequences: int
    tokens: int
    resumed: int
    skipped: Mapping[str, int]
    truncated: int
    not_finite: int
    overflowed: int
    not_measured: Mapping[str, list[str]]
    unproven: Mapping[str, list[str]]
    seconds: float
    tokens_per_second: float
    loss: float
    dtype: str
    rank: int
    world_size: int


class ScanInterrupted(KeyboardInterrupt):
    """Ctrl-C during a scan. The file is closed and readable; the message says how to continue."""


def run_scan(config: ScanConfig, *, progress: Callable[[ScanProgress], None] | None = None) -> ScanResult:
    """Scans a corpus with a model and writes the activation and gradient norm of every weight block for every token.

    A scan continues the output of an earlier run with the same configuration. Finished sequences are not scanned again, and the result
    equals that of an uninterrupted run. Under torchrun (RANK, WORLD_SIZE) each process scans its share and writes
    `name.rankI-of-N.mscan`.

    Args:
        config: options of the scan.
        progress: function called before the model is loaded and after each batch.

    Raises:
        InputError: an input is invalid; the output is complete, or has another configuration; memory ran out.
        MscanError: an existing output is damaged.
        ScanInterrupted: Ctrl-C was pressed. The file holds what was scanned.
    """
    world = World.from_environment()
    report = progress or (lambda state: None)
    started = time.perf_counter()
    check_writable(config.output, None if is_stdin(config.dataset_path) else Path(config.dataset_path))
    if not config.overwrite:
        if is_stdin(config.dataset_path):
            refuse_existing(config.output, "when dataset_path is standard input, which cannot be resumed")
        elif not config.resume:
            refuse_existing(config.output, "when resuming is off")
    prepared = prepare(config, world)
    check_fits(prepared.folder, prepared.dtype, prepared.device)  # before every byte of the weights is read for their hash
    metadata = scan_metadata(prepared)
    existing = NOTHING if config.overwrite else find_existing(config.output, metadata)
    _refuse_complete(prepared, existing)
    scan = _Scan(prepared, existing, report)
    with _explained(config, scan):
        report(scan.state("loading"))
        model = load_model(prepared.folder, prepared.dtype, prepared.device)
        with ScanEngine(model, credit=config.credit, targets=config.targets) as engine:
            sampling = (config.generate, config.temperature, config.top_p, config.seed)
            generator = Generator(model, prepared.tokenizer, prepared.padding, *sampling) if config.generate else None
            gaps = {"not_measured": by_reason(engine.not_measured), "unproven": by_reason(engine.unproven)}
            metadata |= {name: reasons for name, reasons in gaps.items() if reasons}
            writer, scan.path = open_writer(config, world, existing, metadata, engine.layout)
            with writer:
                scan.run(engine, generator, writer)
    return scan.result(time.perf_counter() - started)


class _Scan:
    """The loop over batches and its running totals."""

    def __init__(self, prepared: Prepared, existing: Existing, report: Callable[[ScanProgress], None]) -> None:
        self.path = member_path(prepared.config.output, prepared.world.rank, max(existing.set_size, prepared.world.size))
        self.written = 0
        self._prepared = prepared
        self._done = existing.sequence_ids
        self._report = report
        self._counts = TokenCounts()
        self._total = sum(1 for _ in prepared.world.share(range(len(prepared.corpus))))
        self._resumed = self._tokens = self._labelled = 0
        self._loss_sum = 0.0
        self._not_finite = self._overflowed = 0
        self._seconds = 0.0
        self._not_measured: dict[str, list[str]] = {}
        self._unproven: dict[str, list[str]] = {}

    def run(self, engine: ScanEngine, generator: Generator | None, writer: MscanWriter) -> None:
        """Scans each planned batch that is not in the file. A batch of which a part is in the file is scanned whole, so that rounding
        does not depend on where an earlier run stopped, and only the rest is written.
        """
        prepared = self._prepared
        encoder = prepared.encoder(vocabulary_size(engine.model))
        sequences = encoder.encode_all(prepared.own_items(), self._counts)
        self._report(self.state("scanning"))
        self._unproven = by_reason(engine.unproven)
        counted = np.zeros(engine.blocks, dtype=bool)
        for batch in plan_batches(sequences, prepared.config.batch_size):
            missing = [sequence.sequence_id not in self._done for sequence in batch]
            self._resumed += len(batch) - sum(missing)
            if not any(missing):
                continue
            started = time.perf_counter()
            scanned = generator.answer(batch) if generator else batch
            results = engine.scan(*padded(scanned, prepared.padding))
            for sequence, result, wanted in zip(scanned, results, missing, strict=True):
                if wanted:
                    self._append(writer, sequence, result)
                    counted |= result.integral.count > 0
            self._seconds += time.perf_counter() - started
            self._report(self.state("scanning"))
        # If no value is finite at all, `not_finite` reports that.
        silent = [entry.name for entry in engine.layout if counted.any() and not counted[entry.base : entry.base + entry.blocks].any()]
        self._not_measured = {**by_reason(engine.not_measured), **without_value(silent)}

    def _append(self, writer: MscanWriter, sequence: TokenSequence, result: SequenceScan) -> None:
        planes = self._prepared.config.store == "records"
        writer.append(
            SequenceRecord(
                sequence_id=sequence.sequence_id,
                token_ids=sequence.token_ids,
                loss=result.loss,
                activation=result.activation if planes else None,
                grad_norm=result.grad_norm if planes else None,
                mask=sequence.answer_mask,
                text=sequence.text if self._prepared.config.store_text else None,
                integral=result.integral,
            )
        )
        labelled = result.loss[~np.isnan(result.loss)]
        self.written += 1
        if not np.isfinite(result.loss[:-1]).all():
            self._not_finite += 1
        else:
            planes_of_tokens = (torch.from_numpy(plane) for plane in (result.activation, result.grad_norm))
            self._overflowed += bool(lost_tokens(*planes_of_tokens).any())
        self._tokens += len(sequence.token_ids)
        self._labelled += len(labelled)
        self._loss_sum += float(labelled.sum(dtype=np.float64))

    def state(self, stage: str) -> ScanProgress:
        done = self.written + self._resumed + self._counts.skipped.total()
        return ScanProgress(stage, done, self._total, self._tokens, self._rate, self._loss)

    def result(self, seconds: float) -> ScanResult:
        prepared = self._prepared
        skipped = dict(self._counts.skipped)
        if prepared.corpus.skipped and prepared.world.rank == 0:
            skipped["malformed record"] = prepared.corpus.skipped
        return ScanResult(
            path=self.path,
            sequences=self.written,
            tokens=self._tokens,
            resumed=self._resumed,
            skipped=skipped,
            truncated=self._counts.truncated,
            not_finite=self._not_finite,
            overflowed=self._overflowed,
            not_measured=self._not_measured,
            unproven=self._unproven,
            seconds=seconds,
            tokens_per_second=self._rate,
            loss=self._loss,
            dtype=str(prepared.dtype).removeprefix("torch."),
            rank=prepared.world.rank,
            world_size=prepared.world.size,
        )

    @property
    def _rate(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def _loss(self) -> float:
        return self._loss_sum / self._labelled if self._labelled else float("nan")


def _refuse_complete(prepared: Prepared, existing: Existing) -> None:
    """Raises InputError if nothing is left to scan in the whole corpus, not only in this process's share."""
    encoder, counts = prepared.encoder(), TokenCounts()
    for sequence_id, item in zip(prepared.corpus.sequence_ids, prepared.corpus, strict=True):
        if sequence_id not in existing.sequence_ids and encoder.encode(item, counts) is not None:
            return
    if existing.members:
        if not existing.is_whole(prepared.config.output):
            return  # all is scanned, but a process without sequences has not written its file of the set yet
        raise OutputCompleteError(
            f"{prepared.config.output} is complete with {len(existing.sequence_ids)} sequences; use --overwrite to scan it again."
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.skipped.items())
    raise InputError(f"dataset_path must hold a text to scan, got none in {prepared.config.dataset_path} ({reasons}).")


@contextmanager
def _explained(config: ScanConfig, scan: _Scan) -> Iterator[None]:
    """Adds what to do next to the errors for lack of memory and for Ctrl-C. The writer is closed by then."""
    try:
        yield
    except KeyboardInterrupt as error:
        rest = "" if is_stdin(config.dataset_path) else "; the same command continues from there"
        raise ScanInterrupted(
            f"interrupted: {scan.path} is closed and readable, with {scan.written} sequences of this run{rest}."
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        again = f"the same command with a lower --batch-size (now {config.batch_size}) continues from there; or start again with"
        if is_stdin(config.dataset_path):
            again = f"start again with a lower --batch-size (now {config.batch_size}),"
        raise InputError(
            f"memory ran out after {scan.written} sequences, which are kept: {again} a lower --max-length (now {config.max_length}), "
            "--dtype bf16, or --store integral."
        ) from error
