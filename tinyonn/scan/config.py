"""Options of a scan."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .._io.config import DTYPE, dtype_name
from .._io.options import MAX_SEED, REQUIRED, Options, device_name, integer, non_empty, number, one_of, option, true_or_false
from .._io.streams import is_stdin
from ..errors import InputError

CREDITS = ("full", "local")

# The fields that say how a scan runs, not what it stores: a scan may be resumed with other values of these.
RUN_ONLY = ("model_path", "dataset_path", "output_path", "device", "batch_size", "limit", "skip_bad", "sync", "overwrite", "resume")


@dataclass(frozen=True)
class ScanConfig(Options):
    """Options of one scan.

    Args:
        model_path: folder of a causal language model or a PEFT adapter, or its name on the hub.
        dataset_path: corpus: JSONL or a JSON list, also .gz or .zst; Parquet; - for standard input.
        output_path: `.mscan` file to write.
        topic: name of the topic of the corpus.
        credit: gradients to record; full includes the effect of a token on later ones, local only its own loss.
        targets: weights to record, separated by commas: all, attention, mlp, a name or its ending with `* ? [ab]` (`q_proj`,
            `layers.0.*`), or re:REGEX; ! before one excludes it (all,!lm_head).
        generate: number of tokens that the model adds to each text before the scan of both; 0 scans the text as it is.
        temperature: temperature of this generation; 0 takes the most likely token.
        top_p: nucleus (top-p) of this generation, for a temperature above 0.
        seed: seed of this generation.
        limit: maximum number of records.
        max_length: tokens kept of each text, at most the model's own limit.
        batch_size: sequences in one forward and backward pass.
        dtype: precision of the model: auto (fp32 on a CPU, the checkpoint's own on a GPU), fp32, bf16 or fp16.
        device: device of the model: auto (the first GPU, else the CPU), cpu, cuda or cuda:N.
        text_field: field of the corpus that holds the text.
        skip_bad: count malformed records and continue, instead of stopping at the first.
        store: values to write; records keeps every block of every token, integral only the sums of each sequence, far smaller.
        store_text: keep the texts in the file, beside their tokens.
        codec: encoding of the values; log2u16 takes 2 bytes a value, f32 takes 4 and is exact.
        compression: compression of the values.
        sync: when to force written data to the disk.
        resume: continue an incomplete output, instead of refusing it.
        overwrite: replace an existing output.

    Raises:
        InputError: a value is invalid; the message names the field.
    """

    model_path: str = option(REQUIRED, non_empty, "PATH", "-m")
    dataset_path: str = option(REQUIRED, non_empty, "PATH", "-d")
    output_path: str | None = option(None, non_empty, "PATH", "-o", unset="data/scans/MODEL_TOPIC.mscan")
    topic: str | None = option(None, non_empty, "NAME", unset="from the file name")
    credit: str = option("full", one_of(*CREDITS))
    targets: str = option("all", non_empty, "LIST")
    generate: int = option(0, integer(0), "N")
    temperature: float = option(0.0, number(), "X")
    top_p: float = option(1.0, number(above=0, maximum=1), "X")
    seed: int = option(0, integer(0, MAX_SEED), "N")
    limit: int | None = option(None, integer(1), "N", unset="all")
    max_length: int = option(512, integer(2), "N")
    batch_size: int = option(4, integer(1), "N")
    dtype: str = option("auto", dtype_name, DTYPE)
    device: str = option("auto", device_name, "NAME")
    text_field: str | None = option(None, non_empty, "NAME", unset="found")
    skip_bad: bool = option(False, true_or_false)
    store: str = option("records", one_of("records", "integral"))
    store_text: bool = option(True, true_or_false)
    codec: str = option("log2u16", one_of("log2u16", "f32"))
    compression: str | None = option(None, one_of(None, "zstd"), unset="no")
    sync: str = option("close", one_of("none", "chunk", "close"))
    resume: bool = option(True, true_or_false)
    overwrite: bool = option(False, true_or_false)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.temperature == 0 or 1e-3 <= self.temperature < float("inf")):
            raise InputError(f"temperature must be 0, or at least 0.001 and finite, got {self.temperature}.")
        if self.output_path is not None and not self.output_path.endswith(".mscan"):
            raise InputError(f"output_path must end in .mscan, got {self.output_path!r}.")
        if self.topic is not None and not re.fullmatch(r"[\w.-]+", self.topic):
            raise InputError(f"topic must be letters, digits, '.', '_' or '-', got {self.topic!r}.")

    @property
    def topic_name(self) -> str:
        """The given topic, or the corpus file's name without `.jsonl` and `_corpus`; "stdin" for standard input."""
        if self.topic is not None:
            return self.topic
        if is_stdin(self.dataset_path):
            return "stdin"
        stem = Path(self.dataset_path).name.split(".", 1)[0].removesuffix("_corpus")
        return re.sub(r"[^\w.-]+", "-", stem) or "corpus"

    @property
    def model_name(self) -> str:
        """Last part of the model's path or hub id, fit for a file name."""
        name = Path(os.path.abspath(self.model_path)).name if os.path.isdir(self.model_path) else self.model_path.rstrip("/").split("/")[-1]
        return re.sub(r"[^\w.-]+", "-", name) or "model"

    @property
    def output(self) -> Path:
        """Where the scan goes: `output_path`, or `data/scans/MODEL_TOPIC.mscan`."""
        if self.output_path is not None:
            return Path(self.output_path)
        return Path("data/scans") / f"{self.model_name}_{self.topic_name}.mscan"
