"""Scores of all attention heads of a model over a multiple-choice data set, and their files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ... import __version__
from ..._io.config import read_yaml
from ..._io.folders import check_vocabulary
from ..._io.locks import locked
from ...errors import InputError, listed, shown
from ...hf.loading import (
    display_name,
    load_config,
    load_model,
    load_tokenizer,
    padding_token,
    resolve_device,
    resolve_dtype,
    resolve_model,
    usable_positions,
)
from ..capture.attention import capture_attention_stats
from ..capture.layers import AttentionLayer, attention_layers, on_head_outputs
from ..progress import Progress
from ..step_files import csv_text
from ..study import ADDED_OPTIONS, NORM_COLUMNS
from ..versions import package_versions
from ..vocabulary import num_embeddings
from .config import ScoreConfig
from .fusion import fuse, normalise, top_heads
from .prompts import EncodedPrompt, PromptBatch, PromptEncoder, PromptTemplate, render_all
from .questions import load_questions
from .scores import BASE_SCORES, Observation, Score, chosen_scores, gram_matrices

# Weights that a model without a task's head may lack: a pooler, which is no input of an attention head.
MAY_LACK = (r"(^|\.)pooler\.",)
# Options that do not affect the scores.
WHERE = ("output_dir", "device", "batch_size")
# Files that a killed run may leave: temporary files, an incomplete page and maps.
UNFINISHED = (".unfinished-*", ".index.html-*.html", ".map_*.png-*.png")


@dataclass(frozen=True)
class ScoreResult:
    """Result of `score_heads`.

    Attributes:
        folder: folder of the files.
        raw: score -> list with one array (H,) for each layer; means over samples.
        normalised: the same, normalised within each layer.
        combined: rank fusion, one array (H,) for each layer.
        summary: content of summary.json.
        replaced: description of replaced scores of another model, data or options; None if there were none.
    """

    folder: Path
    raw: Mapping[str, list[NDArray[np.float64]]]
    normalised: Mapping[str, list[NDArray[np.float64]]]
    combined: list[NDArray[np.float64]]
    summary: Mapping[str, Any]
    replaced: str | None = None

    def __repr__(self) -> str:
        counts = f"{self.summary['heads']} heads in {self.summary['layers']} layers over {self.summary['samples']} samples"
        return f"ScoreResult({self.folder}: {counts}, scores {', '.join(self.raw)})"


def score_heads(config: ScoreConfig, progress: Callable[[Progress], None] | None = None) -> ScoreResult:
    """Scores all attention heads of a model, and writes the scores into `config.output_dir`.

    Each prompt is run once, in eval mode, as plain text (no chat template). The files are config.yaml, scores_raw.csv, scores_norm.csv,
    scores_combined.csv, topk_global.json, topk_per_layer.json and, last, summary.json, which marks them as complete. They replace those
    of an earlier run when all scores are computed; the earlier page and maps (index.html, map_*.png) are then deleted. Each run appends
    to run.log.

    Args:
        config: options of the run.
        progress: function called before the model is loaded and after each batch.

    Raises:
        InputError: an input is invalid, truncation removed every question, scores are not finite, or another run uses the folder.
        torch.OutOfMemoryError, MemoryError, RuntimeError: memory ran out; lower batch_size or max_length.
    """
    folder = Path(config.output_dir)
    with locked(folder), _run_log(folder) as log:
        return _score(config, folder, log, progress or (lambda state: None))


def score_prompts(
    model: nn.Module,
    prompts: Sequence[EncodedPrompt],
    scores: Mapping[str, Score],
    *,
    batch_size: int = 4,
    query_mode: str = "last_token",
    out_projection: bool = False,
    padding: int = 0,
    after_batch: Callable[[int], None] | None = None,
) -> dict[str, list[NDArray[np.float64]]]:
    """Scores of each prompt: name -> (N, H) float64 for each layer, in the order of the prompts.

    Args:
        model: transformer in eval mode.
        prompts: tokens of the prompts. Batches have prompts of similar length, the longest first.
        scores: scores to compute.
        batch_size: prompts in one forward pass.
        query_mode: "last_token" or "all_tokens".
        out_projection: whether to compute `Observation.gram`.
        padding: token id for padding.
        after_batch: function called with the number of prompts done.
    """
    layers = attention_layers(model)
    device = next(model.parameters()).device
    grams = [gram_matrices(layer) if out_projection else None for layer in layers]
    values = {name: [np.full((len(prompts), layer.num_heads), np.nan) for layer in layers] for name in scores}
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].token_ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = PromptBatch.of([prompts[row] for row in rows], padding, device)
        for seen in observe(model, layers, batch, query_mode, grams):
            for name, score in scores.items():
                found = score.function(seen)
                expected = (len(rows), seen.layer.num_heads)
                if found.shape != expected:
                    raise ValueError(f"score {name} must have a value for each sample and head, {expected}, got {tuple(found.shape)}.")
                values[name][seen.layer.index][rows] = found.double().cpu().numpy()
        if after_batch is not None:
            after_batch(start + len(rows))
    return values


@torch.inference_mode()
def observe(
    model: nn.Module, layers: Sequence[AttentionLayer], batch: PromptBatch, query_mode: str, grams: Sequence[Tensor | None]
) -> list[Observation]:
    """One forward pass, as an Observation of each layer."""
    mask = batch.attention_mask.bool()
    last = mask.sum(1) - 1 if query_mode == "last_token" else None
    with (
        capture_attention_stats(model, span_mask=batch.span_mask, key_mask=mask, queries=last) as stats,
        _head_outputs(layers, batch, last) as outputs,
    ):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    counted = mask if last is None else mask.new_ones(len(mask), 1)
    seen = []
    for layer, found, gram in zip(layers, stats, grams, strict=True):
        if layer.index not in outputs:
            raise InputError(f"model did not run the output projection of {layer.name}, which the scores need.")
        assert found.span_mass is not None  # because the batch has a span mask
        seen.append(Observation(layer, outputs[layer.index], found.entropy, found.span_mass, counted, gram))
    return seen


@contextmanager
def _head_outputs(layers: Sequence[AttentionLayer], batch: PromptBatch, last: Tensor | None) -> Iterator[dict[int, Tensor]]:
    """Captures the inputs of the output projections within the block, as heads: (B, Tq, H, D) by layer."""
    rows, tokens = batch.input_ids.shape
    found: dict[int, Tensor] = {}

    def keep(layer: AttentionLayer, x: Tensor) -> None:
        heads = x.detach().reshape(rows, tokens, layer.num_heads, layer.head_dim)
        found[layer.index] = heads if last is None else heads[torch.arange(rows, device=heads.device), last, None]

    with on_head_outputs(layers, keep):
        yield found


def _score(config: ScoreConfig, folder: Path, log: Callable[[str], None], report: Callable[[Progress], None]) -> ScoreResult:
    started = time.perf_counter()
    scores = chosen_scores(config.extra_weights)
    template = None if config.prompt_template is None else PromptTemplate.from_file(config.prompt_template)
    data = load_questions(
        config.data_path,
        field_map=config.field_map,
        max_samples=config.max_samples,
        seed=config.seed,
        skip_unlabelled=config.skip_unlabelled,
    )
    without = f", {data.unlabelled} without an answer left out" if data.unlabelled else ""
    log(f"data: {config.data_path}, {len(data.questions)} of {data.rows} rows{without}, field map {data.field_map}")

    device = resolve_device(config.device)
    model_folder = resolve_model(config.model_path)
    model_config = load_config(model_folder)
    automatic = "fp32" if device.type == "cpu" else "fp16"
    dtype = resolve_dtype(automatic if config.dtype == "auto" else config.dtype, device, model_config)
    tokenizer = load_tokenizer(model_folder)
    report(Progress("loading", None, display_name(config.model_path, model_folder)))
    model = load_model(model_folder, dtype, device, auto_class="AutoModel", may_lack=MAY_LACK)
    layers = attention_layers(model)
    known_tokens = num_embeddings(model)
    limits = (config.max_length, usable_positions(model), tokenizer.model_max_length)
    max_length = min(limit for limit in limits if limit is not None)
    encoder = PromptEncoder(tokenizer, max_length)
    prompts = [encoder.encode(prompt) for prompt in render_all(data.questions, template)]
    kept = np.array([prompt.span is not None for prompt in prompts])
    truncated, lost = sum(prompt.truncated for prompt in prompts), int((~kept).sum())
    log(f"prompts: at most {max_length} tokens; {truncated} truncated, {lost} without their whole question")
    if not kept.any():
        got, remedy = str(max_length), "raise it, or begin the prompt with the question"
        if max_length < config.max_length:
            got, remedy = f"{config.max_length}, of which the model takes no more than {max_length}", "begin the prompt with the question"
        raise InputError(f"max_length must leave at least one question whole, got {got}, which leaves none of {lost}; {remedy}.")

    check_vocabulary(known_tokens, max(max(prompt.token_ids) for prompt in prompts), config.model_path)
    model.config.use_cache = False  # keys and values are read once
    heads = sum(layer.num_heads for layer in layers)
    log(f"model: {config.model_path}, {len(layers)} layers, {heads} heads, {_plain(dtype)} on {device}")

    values = score_prompts(
        model,
        prompts,
        scores,
        batch_size=config.batch_size,
        query_mode=config.score_query_mode,
        out_projection=config.out_projection,
        padding=padding_token(tokenizer, config.batch_size),
        after_batch=lambda done: report(Progress("scoring", done / len(prompts), f"{done:,}/{len(prompts):,} samples")),
    )
    raw = {name: [layer[kept if score.needs_span else slice(None)].mean(0) for layer in values[name]] for name, score in scores.items()}
    _check_finite(raw, dtype)
    weights = dict(zip(BASE_SCORES, (1.0, config.lambda_ent, config.lambda_task), strict=True)) | dict(config.extra_weights)
    normalised = {name: [normalise(layer, config.norm_mode) for layer in table] for name, table in raw.items()}
    combined = fuse(raw, weights)
    summary = {
        "model": display_name(config.model_path, model_folder),
        "data": config.data_path,
        "field_map": data.field_map,
        "rows": data.rows,
        "unlabelled": data.unlabelled,
        "samples": len(prompts),
        "answered": sum(question.answer is not None for question in data.questions),
        "tokens": sum(len(prompt.token_ids) for prompt in prompts),
        "truncated": truncated,
        "spans_lost": lost,
        "layers": len(layers),
        "heads": heads,
        "max_length": max_length,
        "dtype": _plain(dtype),
        "device": str(device),
        "seconds": round(time.perf_counter() - started, 3),
        "versions": package_versions(),
    }
    result = ScoreResult(folder, raw, normalised, combined, summary, _other_scores(config))
    _publish(folder, _files(config, result))
    if result.replaced is not None:
        log(f"replaces {result.replaced}")
    log(f"done: {len(prompts)} samples, {summary['tokens']} tokens in {summary['seconds']} s")
    return result


def _check_finite(raw: Mapping[str, Sequence[NDArray[np.float64]]], dtype: torch.dtype) -> None:
    for name, table in raw.items():
        for layer, row in enumerate(table):
            bad = np.flatnonzero(~np.isfinite(row))
            if bad.size:
                remedy = "; use dtype bf16 or fp32, which have a larger range" if dtype == torch.float16 else ""
                raise InputError(
                    f"score {name} must be finite, got {row[bad[0]]} for head {bad[0]} of layer {layer} in {_plain(dtype)}{remedy}."
                )


def _files(config: ScoreConfig, result: ScoreResult) -> dict[str, str]:
    import yaml

    sizes = [len(row) for row in result.combined]
    numbers = {"layer": np.repeat(np.arange(len(sizes)), sizes), "head": np.concatenate([np.arange(size) for size in sizes])}

    def table(columns: Mapping[str, Sequence[NDArray[np.float64]]]) -> str:
        return csv_text({**numbers, **{name: np.concatenate(layers) for name, layers in columns.items()}})

    best = [head._asdict() for head in top_heads(result.combined, config.top_k)]
    of_layers = {
        str(layer): [{"rank": head.rank, "head": head.head, "combined": head.combined} for head in top_heads([row], config.top_k)]
        for layer, row in enumerate(result.combined)
    }
    return {
        "config.yaml": yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True),
        "scores_raw.csv": table({f"{name}_raw": rows for name, rows in result.raw.items()}),
        "scores_norm.csv": table({f"{name}_{NORM_COLUMNS[config.norm_mode]}": rows for name, rows in result.normalised.items()}),
        "scores_combined.csv": table({"combined": result.combined}),
        "topk_global.json": json.dumps(best, indent=1) + "\n",
        "topk_per_layer.json": json.dumps(of_layers, indent=1) + "\n",
        "summary.json": json.dumps(result.summary, indent=1) + "\n",
    }


def _other_scores(config: ScoreConfig) -> str | None:
    """Description of scores of another model, data or options in the folder: "scores of MODEL over DATA"."""
    folder = Path(config.output_dir)
    if not (folder / "summary.json").is_file():
        return None
    try:
        before = read_yaml(folder / "config.yaml")
    except InputError:
        return "scores of unknown options"
    now = dataclasses.asdict(config)
    before = {**ADDED_OPTIONS, **before}
    differing = [name for name in now if name not in WHERE and before.get(name) != now[name]]
    if not differing:
        return None
    options = [f"{name} {shown(before.get(name))}" for name in differing if name not in ("model_path", "data_path")]
    more = f" ({listed(options, 8, width=80)})" if options else ""
    return f"scores of {before.get('model_path')} over {before.get('data_path')}{more}"


def _publish(folder: Path, files: Mapping[str, str]) -> None:
    """Writes all files to temporary names, then renames them. summary.json marks them as complete: it is deleted first and written last.

    Also deletes the page of an earlier run, and incomplete files of a killed run.
    """
    mark = list(files)[-1]
    with _writing(folder):
        for pattern in UNFINISHED:
            for left in folder.glob(pattern):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as aside:
            for name, content in files.items():
                (Path(aside) / name).write_text(content, encoding="utf-8")
            for old in (folder / mark, folder / "index.html", *folder.glob("map_*.png")):
                old.unlink(missing_ok=True)
            for name in files:
                os.replace(Path(aside) / name, folder / name)


@contextmanager
def _run_log(folder: Path) -> Iterator[Callable[[str], None]]:
    """run.log: one line for each step with its time, and one for an error."""
    with ExitStack() as stack:
        with _writing(folder):
            file = stack.enter_context(open(folder / "run.log", "ab", buffering=0))  # unbuffered, so that errors appear early

        def log(line: str) -> None:
            with _writing(folder):
                file.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}\n".encode(errors="replace"))

        log(f"started: tinyonn {__version__}")
        try:
            yield log
        except BaseException as error:
            with suppress(InputError):  # the original error is raised
                log(f"failed: {type(error).__name__}: {' '.join(str(error).split())}")
            raise


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"output_dir must be a folder that can be written, got {folder}: {error.strerror}.") from error


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
