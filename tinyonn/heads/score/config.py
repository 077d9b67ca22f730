"""Options of scoring heads, checked once, in one frozen object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..._io.config import MAX_SEED, Options, check_bool, check_choice, check_device, check_dtype, check_int, check_number, check_text
from ...errors import InputError, shown
from ..study import NORM_COLUMNS

QUERY_MODES = ("last_token", "all_tokens")
NORM_MODES = tuple(NORM_COLUMNS)
MAX_WEIGHT = 1e6  # beyond it one score alone would order the heads


@dataclass(frozen=True)
class ScoreConfig(Options):
    """Options of `score_heads`.

    Args:
        model_path: folder of a transformer, or a hub id.
        data_path: multiple-choice questions: JSONL, a JSON list or Parquet.
        output_dir: folder of the results; made if it is not there.
        max_samples: rows drawn, no more than there are; None for all of up to 1,024.
        batch_size: prompts in one forward pass.
        max_length: tokens of a prompt; the model's own limit where that is lower.
        device: "auto" (the first GPU, else the CPU) or a torch device.
        dtype: of the model; "auto" is fp16 on a GPU and fp32 on a CPU.
        seed: of the draw of rows.
        skip_unlabelled: leave out rows whose answer is not given (missing, null, blank, NaN, "-" or -1); no score needs it.
        score_query_mode: "last_token" scores what each prompt's last token attends to and outputs; "all_tokens" the mean over its tokens.
        norm_mode: of scores_norm.csv: "zscore" or "percentile", within each layer.
        lambda_ent, lambda_task: weights of the ranks of `ent` and `task` beside that of `out`, which is 1; from 0 to 1,000,000.
        top_k: heads listed in topk_global.json, and of each layer in topk_per_layer.json.
        prompt_template: file with `{question}`, `{choices}` and `{context}`; None for the default prompt.
        field_map: name of one of the package's or a YAML file; None finds it from the first record.
        out_projection: take output norms after each head's slice of the output projection rather than before it.
        extra_weights: names of further registered scores, with the weights of their ranks.

    Raises:
        InputError: a value outside its range, naming the field.
    """

    model_path: str
    data_path: str
    output_dir: str
    max_samples: int | None = None
    batch_size: int = 4
    max_length: int = 512
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 42
    skip_unlabelled: bool = False
    score_query_mode: str = "last_token"
    norm_mode: str = "zscore"
    lambda_ent: float = 0.5
    lambda_task: float = 1.0
    top_k: int = 20
    prompt_template: str | None = None
    field_map: str | None = None
    out_projection: bool = False
    extra_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model_path", "data_path", "output_dir"):
            check_text(self, name)
        for name in ("prompt_template", "field_map"):
            check_text(self, name, optional=True)
        if self.max_samples is not None:
            check_int(self, "max_samples", 1)
        for name in ("batch_size", "max_length", "top_k"):
            check_int(self, name, 1)
        check_int(self, "seed", 0, MAX_SEED)
        for name in ("lambda_ent", "lambda_task"):
            check_number(self, name, minimum=0, maximum=MAX_WEIGHT)
        check_device(self)
        check_dtype(self)
        check_choice(self, "score_query_mode", QUERY_MODES)
        check_choice(self, "norm_mode", NORM_MODES)
        for name in ("out_projection", "skip_unlabelled"):
            check_bool(self, name)
        weights = self.extra_weights
        if not isinstance(weights, Mapping) or not all(isinstance(name, str) and _is_weight(value) for name, value in weights.items()):
            raise InputError(f"extra_weights must map names of scores to numbers from 0 to {MAX_WEIGHT:,.0f}, got {shown(weights)}.")
        object.__setattr__(self, "extra_weights", dict(weights))


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_WEIGHT
