"""Options of scoring heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..._io.config import DTYPE, dtype_name
from ..._io.options import MAX_SEED, REQUIRED, Options, device_name, integer, non_empty, number, one_of, option, true_or_false
from ...errors import InputError, shown
from ..study import NORM_COLUMNS

MAX_WEIGHT = 1e6  # beyond it one score alone would order the heads


def _weights(value: Any, name: str) -> dict[str, float]:
    """A check: names of scores -> their weights."""
    if not isinstance(value, Mapping) or not all(isinstance(score, str) and _is_weight(weight) for score, weight in value.items()):
        raise InputError(f"{name} must map names of scores to numbers from 0 to {MAX_WEIGHT:,.0f}, got {shown(value)}.")
    return dict(value)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_WEIGHT


@dataclass(frozen=True)
class ScoreConfig(Options):
    """Options of `score_heads`.

    Args:
        model_path: folder of a transformer, or its name on the hub.
        data_path: multiple-choice questions: JSONL, a JSON list or Parquet.
        output_dir: folder of the results; created if missing.
        max_samples: number of rows sampled, at most as many as there are.
        batch_size: prompts in one forward pass.
        max_length: tokens kept of each prompt, at most the model's own limit.
        device: device of the model: auto (the first GPU, else the CPU), cpu, cuda or cuda:N.
        dtype: precision of the model: auto (fp16 on a GPU, fp32 on a CPU), fp32, bf16 or fp16.
        seed: seed of the row sampler.
        skip_unlabelled: leave out rows without an answer (missing, null, blank, NaN, "-" or -1); no score needs one.
        score_query_mode: query tokens that are scored: the last token of each prompt, or the mean over all of its tokens.
        norm_mode: normalisation of scores_norm.csv, within each layer.
        lambda_ent: weight of the concentration rank, from 0 to 1,000,000; the output norm's rank has weight 1.
        lambda_task: weight of the rank of attention to the question, from 0 to 1,000,000.
        top_k: number of heads listed, of the model (topk_global.json) and of each layer (topk_per_layer.json).
        prompt_template: file with {question}, {choices} and {context}.
        field_map: layout of the rows: standard, options, commonsenseqa, piqa, siqa, boolq, hellaswag, openbookqa, commonsense_170k, or
            a YAML file.
        out_projection: measure output norms after each head's slice of the output projection, instead of before it.
        extra_weights: mapping of the names of scores, which Python code registers, to the weights of their ranks.

    Raises:
        InputError: a value is invalid; the message names the field.
    """

    model_path: str = option(REQUIRED, non_empty, "PATH", "-m", section="Paths")
    data_path: str = option(REQUIRED, non_empty, "PATH", "-d")
    output_dir: str = option(REQUIRED, non_empty, "DIR", "-o", "--output")
    max_samples: int | None = option(None, integer(1), "N", unset="all, up to 1024", section="Rows and model")
    batch_size: int = option(4, integer(1), "N")
    max_length: int = option(512, integer(1), "N")
    device: str = option("auto", device_name, "NAME")
    dtype: str = option("auto", dtype_name, DTYPE)
    seed: int = option(42, integer(0, MAX_SEED), "N")
    skip_unlabelled: bool = option(False, true_or_false)
    score_query_mode: str = option("last_token", one_of("last_token", "all_tokens"), section="Scores")
    norm_mode: str = option("zscore", one_of(*NORM_COLUMNS))
    lambda_ent: float = option(0.5, number(minimum=0, maximum=MAX_WEIGHT), "X")
    lambda_task: float = option(1.0, number(minimum=0, maximum=MAX_WEIGHT), "X")
    top_k: int = option(20, integer(1), "N")
    prompt_template: str | None = option(None, non_empty, "FILE", unset="built in", section="Prompts")
    field_map: str | None = option(None, non_empty, "NAME|FILE", unset="found")
    out_projection: bool = option(False, true_or_false, section="Further")
    extra_weights: Mapping[str, float] = option({}, _weights, on_command_line=False)
