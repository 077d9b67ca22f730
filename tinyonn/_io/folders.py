"""Files in the folder of a model, and their hashes; shared by all commands."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import InputError, reason
from .files import digest

# All files that determine the tokens of a text, chat templates included. Their order is part of the hash.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Files with a vocabulary. A folder without any of them has no tokenizer.
VOCABULARY_FILES = TOKENIZER_FILES[:4]
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG_FILES = ("config.json", "generation_config.json")


def file_hash(*files: Path) -> str:
    """SHA-256 over the names and contents of files, in the order given, in hexadecimal."""
    return hashlib.sha256(b"".join(file.name.encode() + bytes.fromhex(digest(file)) for file in files)).hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """`file_hash` of the tokenizer files in a folder; `tokenizer_sha256` in the metadata of a scan."""
    return file_hash(*_present(folder, TOKENIZER_FILES))


def model_config_hash(folder: Path) -> str:
    """`file_hash` of the configuration files in a folder; `model_config_sha256` in the metadata of a scan."""
    return file_hash(*_present(folder, CONFIG_FILES))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary."""
    return bool(_present(folder, VOCABULARY_FILES))


def tokenizer_fault(folder: Path, error: Exception) -> str:
    """Reason why transformers cannot load the tokenizer of a folder, from the error that it raised."""
    return reason(error) if has_tokenizer(folder) else f"it has none of {', '.join(VOCABULARY_FILES)}."


def check_vocabulary(known: int, largest: int, model: str, place: str = "") -> None:
    """Raises an error for token ids without an embedding in the model.

    Args:
        known: number of embeddings of the model.
        largest: largest token id in the texts.
        model: folder or name of the model, for the message.
        place: text with this token id, for the message.

    Raises:
        InputError: `largest` has no embedding.
    """
    if largest >= known:
        wanted = f"model_path must hold a tokenizer of the model's {known} tokens"
        where = f" for {place}" if place else ""
        raise InputError(f"{wanted}, got {model}, whose tokenizer has the token id {largest}{where}.")


def cache_folder() -> Path:
    """The folder for converted models: `TINYONN_CACHE`, else `XDG_CACHE_HOME/tinyonn`, else `~/.cache/tinyonn`."""
    if path := os.environ.get("TINYONN_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tinyonn"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter. Like transformers, checks for this file before config.json."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_files(folder: Path) -> list[Path]:
    """Weight file of an adapter: safetensors if it exists, else PyTorch's format."""
    return _present(folder, _ADAPTER_WEIGHTS)[:1]


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Settings of an adapter.

    Raises:
        InputError: the file is not a JSON object.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"model_path must hold a valid {ADAPTER_CONFIG}, got a damaged one in {folder}.") from error
    if not isinstance(config, dict):
        raise InputError(f"model_path must hold a valid {ADAPTER_CONFIG}, got no object in {folder}.")
    return config


def _present(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]
