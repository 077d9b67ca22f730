"""Hashes, versions and options that determine a scan's content. They are stored in the file and compared on resuming."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._io.folders import file_hash, is_adapter, model_config_hash, tokenizer_hash
from .._io.streams import place
from ..hf.adapters import settings_hash
from ..hf.loading import base_folder, base_name, display_name, tokenizer_folder, weight_files
from .config import RUN_ONLY
from .engine.targets import BLOCK_SIZE
from .prepare import Prepared

# In the metadata, and not part of the identity: a scan may be continued by a newer version, or a renamed copy of the model.
DESCRIPTIVE = (
    "tinyonn",
    "torch",
    "transformers",
    "model",
    "model_path",
    "base_model",
    "architecture",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "parameters",
    "tokenizer",
    "corpus",
    "config_hash",
    "not_measured",
    "unproven",
)


def scan_metadata(prepared: Prepared) -> dict[str, Any]:
    """The metadata of a scan's file: model, corpus, options, versions. Reads all weights once, to hash them.

    It holds names and hashes. The only paths are the model's, as given, and that of an adapter's base model, where a report looks for the
    tokenizer.
    """
    import transformers

    from .. import __version__

    config, folder, model_config = prepared.config, prepared.folder, prepared.model_config
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in RUN_ONLY}
    metadata = {
        "tinyonn": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": display_name(config.model_path, folder),
        "model_path": config.model_path,
        "architecture": type(model_config).__name__.removesuffix("Config"),
        **_heads(model_config.get_text_config()),
        "parameters": prepared.weights,
        "model_weights_sha256": file_hash(*weight_files(folder)),
        "model_config_sha256": model_config_hash(base_folder(folder)),
        **({"base_model": base_name(folder), "adapter_config_sha256": settings_hash(folder)} if is_adapter(folder) else {}),
        "tokenizer": type(prepared.tokenizer).__name__,
        "tokenizer_sha256": tokenizer_hash(tokenizer_folder(folder)),
        "corpus": Path(place(config.dataset_path)).name,
        "corpus_sha256": prepared.corpus.content_hash(),
        **options,
        "topic": config.topic_name,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "max_length": prepared.max_length,
        "reduction": "sum",
        "block_size": BLOCK_SIZE,
    }
    if getattr(model_config.get_text_config(), "tie_word_embeddings", False):
        metadata["tied_head"] = "product and look-up"  # earlier versions recorded the product alone
    return metadata | {"config_hash": identity_hash(metadata)}


def _heads(model_config: Any) -> dict[str, int]:
    """Metadata that assigns blocks of a projection to attention heads, as far as the configuration gives it."""
    heads = getattr(model_config, "num_attention_heads", None)
    hidden = getattr(model_config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return {}
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(model_config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(model_config, "head_dim", None) or hidden // heads,
    }


def identity(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the metadata on which stored values depend."""
    return {key: value for key, value in metadata.items() if key not in DESCRIPTIVE}


def identity_hash(metadata: Mapping[str, Any]) -> str:
    """Hash of that part. One scan may continue another exactly if their hashes are equal."""
    return hashlib.sha256(json.dumps(identity(metadata), sort_keys=True).encode()).hexdigest()


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Fields in which two scans differ, as "name (stored → wanted)"; hashes by name alone."""
    old, new = identity(stored), identity(wanted)
    return [
        name if name.endswith("_sha256") else f"{name} ({old.get(name)} → {new.get(name)})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
