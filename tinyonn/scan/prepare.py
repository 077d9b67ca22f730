"""Preparation of a scan before the weights are read: model folder, tokenizer, corpus, precision, length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._io.streams import is_stdin
from ..errors import InputError
from ..hf.loading import (
    load_config,
    load_tokenizer,
    padding_token,
    position_limit,
    resolve_device,
    resolve_dtype,
    resolve_model,
    weights_of,
)
from .config import ScanConfig
from .corpus.corpus import Corpus, CorpusItem, read_corpus
from .distributed import World
from .tokens import Encoder


@dataclass(frozen=True)
class Prepared:
    """Result of `prepare`.

    Attributes:
        config, world: as given.
        folder: folder of the model.
        model_config, tokenizer: objects of transformers.
        weights: number of values of all weights.
        device, dtype: device and precision, with "auto" resolved.
        max_length: tokens kept of a text, the model's position limit applied.
        padding: token id that fills batches.
        corpus: the checked data set.
    """

    config: ScanConfig
    world: World
    folder: Path
    model_config: Any
    tokenizer: Any
    weights: int
    device: torch.device
    dtype: torch.dtype
    max_length: int
    padding: int
    corpus: Corpus

    def encoder(self, vocabulary: int | None = None) -> Encoder:
        """Tokenises this scan's texts; refuses token ids that a model of so many embeddings lacks."""
        config = self.config
        return Encoder(self.tokenizer, self.max_length, config.generate > 0, config.skip_bad, vocabulary, config.model_path)

    def own_items(self) -> Iterator[CorpusItem]:
        """This process's share of the corpus."""
        return self.world.share(self.corpus)


def prepare(config: ScanConfig, world: World) -> Prepared:
    """Resolves and checks everything except the weights, cheapest first.

    Raises:
        InputError: what is wrong with the corpus, the model's folder, the tokenizer or the device.
    """
    if is_stdin(config.dataset_path) and world.size > 1:
        raise InputError(f"dataset_path must be a file where {world.size} processes share it, got standard input.")
    corpus = read_corpus(config.dataset_path, text_field=config.text_field, limit=config.limit, skip_bad=config.skip_bad)
    folder = resolve_model(config.model_path)
    model_config = load_config(folder)
    device = resolve_device(config.device, world.local_rank)
    tokenizer = load_tokenizer(folder)
    return Prepared(
        config=config,
        world=world,
        folder=folder,
        model_config=model_config,
        tokenizer=tokenizer,
        weights=weights_of(folder),
        device=device,
        dtype=resolve_dtype(config.dtype, device, model_config),
        max_length=_max_length(config, model_config),
        padding=padding_token(tokenizer, config.batch_size),
        corpus=corpus,
    )


def _max_length(config: ScanConfig, model_config: Any) -> int:
    limit = position_limit(model_config)
    if limit is None:
        return config.max_length
    if limit - config.generate < 2:
        raise InputError(f"generate must leave room within the model's {limit} positions, got {config.generate}.")
    return min(config.max_length, limit - config.generate)
