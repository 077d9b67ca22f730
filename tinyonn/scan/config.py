"""Options of a scan, checked once, in one frozen object."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .._io.config import MAX_SEED, Options, check_bool, check_choice, check_device, check_dtype, check_int, check_number, check_text
from .._io.streams import is_stdin
from ..errors import InputError

CREDITS = ("full", "local")
STORES = ("records", "integral")
CODECS = ("log2u16", "f32")
COMPRESSIONS = (None, "zstd")
SYNCS = ("none", "chunk", "close")

# The fields that say how a scan runs, not what it stores: a scan may be resumed with other values of these.
RUN_ONLY = ("model_path", "dataset_path", "output_path", "device", "batch_size", "limit", "skip_bad", "sync", "overwrite", "resume")


@dataclass(frozen=True)
class ScanConfig(Options):
    """Options of one scan.

    Args:
        model_path: folder of a causal language model, or a hub id.
        dataset_path: the corpus: JSONL or a JSON list, compressed or not, or Parquet; "-" for standard input.
        output_path: the `.mscan` file; None for `data/scans/MODEL_TOPIC.mscan`.
        topic: name of what the corpus is about; None takes it from the file name `TOPIC_corpus.jsonl`.
        credit: "full" (a token's gradient includes what it did for later tokens) or "local" (its own loss, its own position).
        targets: the modules recorded, as ScanEngine takes them.
        dtype: the model's precision; "auto" is the checkpoint's own on a GPU and fp32 on a CPU.
        device: "auto" (the first GPU, else the CPU) or a torch device.
        batch_size: sequences in one forward and backward.
        limit: at most so many records of the corpus; None for all.
        max_length: tokens kept of each text; the model's own limit where that is lower.
        store: "records" keeps both planes of each sequence; "integral" only its ∫SPS, moments, tokens and loss.
        generate: new tokens the model adds to each text before the scan; 0 scans the text as it is.
        temperature: of that generation; 0 is greedy.
        top_p: nucleus of that generation, where temperature > 0.
        text_field: field of the corpus that holds the text; None finds it.
        skip_bad: count malformed corpus lines and go on, rather than stop at the first.
        store_text: keep each sequence's text in the file, beside its tokens.
        codec: "log2u16" (two bytes a value) or "f32".
        compression: None or "zstd".
        sync: when written chunks are forced to the disk: "none", "chunk" or "close".
        seed: of sampled generation.
        overwrite: replace an existing output.
        resume: continue an existing output; False refuses it.

    Raises:
        InputError: a value outside its range, naming the field.
    """

    model_path: str
    dataset_path: str
    output_path: str | None = None
    topic: str | None = None
    credit: str = "full"
    targets: str = "all"
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 4
    limit: int | None = None
    max_length: int = 512
    store: str = "records"
    generate: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    text_field: str | None = None
    skip_bad: bool = False
    store_text: bool = True
    codec: str = "log2u16"
    compression: str | None = None
    sync: str = "close"
    seed: int = 0
    overwrite: bool = False
    resume: bool = True

    def __post_init__(self) -> None:
        for name in ("model_path", "dataset_path", "targets"):
            check_text(self, name)
        for name in ("output_path", "topic", "text_field"):
            check_text(self, name, optional=True)
        check_choice(self, "credit", CREDITS)
        check_dtype(self)
        check_choice(self, "store", STORES)
        check_choice(self, "codec", CODECS)
        check_choice(self, "compression", COMPRESSIONS)
        check_choice(self, "sync", SYNCS)
        check_int(self, "batch_size", 1)
        check_int(self, "max_length", 2)
        check_int(self, "generate", 0)
        check_int(self, "seed", 0, MAX_SEED)
        if self.limit is not None:
            check_int(self, "limit", 1)
        for name in ("skip_bad", "store_text", "overwrite", "resume"):
            check_bool(self, name)
        check_number(self, "temperature")
        check_number(self, "top_p", above=0, maximum=1)
        if not (self.temperature == 0 or 1e-3 <= self.temperature < float("inf")):
            raise InputError(f"temperature must be 0, or at least 0.001 and finite, got {self.temperature}.")
        check_device(self)
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
