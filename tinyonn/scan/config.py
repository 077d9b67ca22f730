"""What a scan does: every option, checked once, in one frozen object."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean

CREDITS = ("full", "local")
DTYPES = ("auto", "fp32", "bf16", "fp16")
STORES = ("records", "integral")
CODECS = ("log2u16", "f32")
COMPRESSIONS = (None, "zstd")
SYNCS = ("none", "chunk", "close")

# The fields that say how a scan runs, not what it stores: a scan may be resumed with other values of these.
RUN_ONLY = ("model_path", "dataset_path", "output_path", "device", "batch_size", "limit", "skip_bad", "sync", "overwrite", "resume")


@dataclass(frozen=True)
class ScanConfig:
    """Options of one scan.

    Args:
        model_path: folder of a causal language model, or a hub id.
        dataset_path: JSONL corpus.
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
        for name in ("model_path", "dataset_path", "output_path", "topic", "targets", "text_field"):
            self._check_text(name)
        for name, choices in (
            ("credit", CREDITS),
            ("dtype", DTYPES),
            ("store", STORES),
            ("codec", CODECS),
            ("compression", COMPRESSIONS),
            ("sync", SYNCS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f"{name} must be one of {', '.join(str(c) for c in choices)}, got {value!r}{did_you_mean(value, choices)}")
        self._check_int("batch_size", 1)
        self._check_int("max_length", 2)
        self._check_int("generate", 0)
        self._check_int("seed", 0)
        if self.limit is not None:
            self._check_int("limit", 1)
        for name in ("skip_bad", "store_text", "overwrite", "resume"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        self._check_number("temperature")
        self._check_number("top_p")
        if not (self.temperature == 0 or 1e-3 <= self.temperature < float("inf")):
            raise InputError(f"temperature must be 0, or at least 0.001 and finite, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}.")
        if self.output_path is not None and not self.output_path.endswith(".mscan"):
            raise InputError(f"output_path must end in .mscan, got {self.output_path!r}.")
        if self.topic is not None and not re.fullmatch(r"[\w.-]+", self.topic):
            raise InputError(f"topic must be letters, digits, '.', '_' or '-', got {self.topic!r}.")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> ScanConfig:
        """Options from a YAML mapping; keys may have hyphens. `overrides` that are not None win over the file.

        Raises:
            InputError: the file is missing, not a mapping, or has a key that is no option (near names are given).
        """
        import yaml

        file = Path(path)
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"config must be a readable file, got {file}: {error.strerror}.") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # no YAML, no UTF-8, no such day, nesting without end
            reason = " ".join(str(error).split())
            raise InputError(f"config must be valid YAML, got {file}: {reason}.") from error
        if not isinstance(content, Mapping):
            raise InputError(f"config must be a YAML mapping of options, got {type(content).__name__} in {file}.")
        values = {str(key).replace("-", "_"): value for key, value in content.items()}
        return cls.from_mapping({**values, **{key: value for key, value in overrides.items() if value is not None}}, source=str(file))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str = "config") -> ScanConfig:
        """Options from a mapping whose keys are field names.

        Raises:
            InputError: an unknown key, or model_path or dataset_path is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise InputError(f"{source}: option must be one of ScanConfig's fields, got {key!r}{did_you_mean(key, sorted(known), 3)}")
        for required in ("model_path", "dataset_path"):
            if values.get(required) is None:
                raise InputError(f"{required} must be given, in {source} or as --{required.replace('_', '-')}.")
        return cls(**values)

    @property
    def topic_name(self) -> str:
        """The given topic, or the corpus file's name without `.jsonl` and `_corpus`."""
        if self.topic is not None:
            return self.topic
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

    def _check_text(self, name: str) -> None:
        value = getattr(self, name)
        optional = name in ("output_path", "topic", "text_field")
        if isinstance(value, os.PathLike):
            object.__setattr__(self, name, os.fspath(value))
        elif not (optional and value is None) and (not isinstance(value, str) or not value):
            raise InputError(f"{name} must be a non-empty string, got {value!r}.")
        text = getattr(self, name) or ""
        if "\0" in text or text != text.encode(errors="replace").decode():  # no file has such a name, and no metadata
            raise InputError(f"{name} must be Unicode text without NUL, got {text!r}.")

    def _check_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise InputError(f"{name} must be a whole number of at least {minimum}, got {value!r}.")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{name} must be a number, got {value!r}.")
