"""What a scan will take, before it is run: bytes on disk, peak memory, tokens.

    disk   = tokens · (2·blocks·code + 9) + sequences · (48·blocks + 640) + text        code: 2 bytes (log2u16) or 4 (f32)
    memory = process + weights + batch tokens · (a·O + b·V) · 4 + batch tokens · 8·blocks

O is the sum of the output features of all linear layers that a token passes, the output head apart; V the vocabulary. With
`store="integral"` the planes term of the disk is gone. a = ACTIVATION_COPIES and b = LOGIT_COPIES were fitted to measured peaks.
Compressed files are smaller than this says.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..mscan.layout import layout_blocks
from .config import ScanConfig
from .corpus import CorpusItem
from .distributed import World
from .memory import available_memory
from .prepare import Prepared, prepare
from .tokens import TokenCounts, TokenSequence, plan_batches

CODE_BYTES = {"log2u16": 2, "f32": 4}
TOKEN_BYTES = 9  # id, loss, mask
SEQUENCE_BYTES = 640  # chunk headers, alignment and index entries
INTEGRAL_BYTES = 48  # six float64 a block

ACTIVATION_COPIES = 2.5
LOGIT_COPIES = 3.0
PROCESS_BYTES = 450_000_000  # interpreter, torch, transformers

# Larger corpora are judged by an even sample of so many records.
SAMPLED_RECORDS = 5000


@dataclass(frozen=True)
class ScanEstimate:
    """What a scan will take.

    Attributes:
        sequences, tokens: to be scanned, generated tokens included at their most.
        truncated: sequences cut at max_length.
        skipped: reason → records left out.
        sampled: the counts are scaled up from an even sample of the corpus.
        blocks: feature blocks recorded for each token.
        bytes_per_token, bytes_per_sequence: on disk.
        total_bytes: size of the output (of all processes together).
        disk_free_bytes: free where the output goes.
        weight_bytes, activation_bytes, plane_bytes, process_bytes: the parts of the peak.
        available_bytes: memory free on the device now.
        device, dtype: as resolved.
    """

    sequences: int
    tokens: int
    truncated: int
    skipped: Mapping[str, int]
    sampled: bool
    blocks: int
    bytes_per_token: int
    bytes_per_sequence: int
    total_bytes: int
    disk_free_bytes: int
    weight_bytes: int
    activation_bytes: int
    plane_bytes: int
    process_bytes: int
    available_bytes: int
    device: str
    dtype: str

    @property
    def peak_memory_bytes(self) -> int:
        """Largest memory of the scanning process (of its GPU, if it has one)."""
        return self.weight_bytes + self.activation_bytes + self.plane_bytes + self.process_bytes

    @property
    def fits_memory(self) -> bool:
        """Whether the peak is within the memory free now."""
        return self.peak_memory_bytes <= self.available_bytes

    @property
    def fits_disk(self) -> bool:
        """Whether the output is within the space free now."""
        return self.total_bytes <= self.disk_free_bytes


def estimate_scan(config: ScanConfig) -> ScanEstimate:
    """Reads headers, tokenizer and corpus, not the weights.

    Raises:
        InputError: as `run_scan` would for the same options.
    """
    return estimate(prepare(config, World.from_environment()))


def estimate(prepared: Prepared) -> ScanEstimate:
    """The same for a scan already prepared."""
    from .targets import find_targets, layout_of

    config = prepared.config
    model = skeleton(prepared.model_config)
    blocks = layout_blocks(layout_of(find_targets(model, config.targets)))
    counts, text_bytes, widest, scale = _count_tokens(prepared)
    sequences = round(counts.sequences * scale)
    tokens = round((counts.tokens + counts.sequences * config.generate) * scale)
    planes = 2 * blocks * CODE_BYTES[config.codec] if config.store == "records" else 0
    per_sequence = INTEGRAL_BYTES * blocks + SEQUENCE_BYTES
    outputs, vocabulary = features(model, prepared.model_config)
    on_cpu = prepared.device.type == "cpu"
    return ScanEstimate(
        sequences=sequences,
        tokens=tokens,
        truncated=round(counts.truncated * scale),
        skipped={reason: round(count * scale) for reason, count in counts.skipped.items()},
        sampled=scale != 1,
        blocks=blocks,
        bytes_per_token=planes + TOKEN_BYTES,
        bytes_per_sequence=per_sequence,
        total_bytes=tokens * (planes + TOKEN_BYTES) + sequences * per_sequence + round(text_bytes * scale) * config.store_text,
        disk_free_bytes=_disk_free(config),
        weight_bytes=sum(parameter.numel() for parameter in model.parameters()) * prepared.dtype.itemsize,
        activation_bytes=int(widest * (ACTIVATION_COPIES * outputs + LOGIT_COPIES * vocabulary) * 4),
        plane_bytes=widest * blocks * 8,
        process_bytes=PROCESS_BYTES if on_cpu else 0,
        available_bytes=available_memory(prepared.device),
        device=str(prepared.device),
        dtype=str(prepared.dtype).removeprefix("torch."),
    )


def skeleton(model_config: Any) -> PreTrainedModel:
    """The model without its weights: every parameter on the meta device.

    Raises:
        InputError: not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model_path must hold a causal language model, got {type(model_config).__name__}: {reason}") from error


def features(model: PreTrainedModel, model_config: Any) -> tuple[int, int]:
    """Output features of all linear layers that one token passes, and of the output head.

    Of the experts of a layer, only as many count as a token is sent to.
    """
    from transformers.pytorch_utils import Conv1D

    text = model_config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    head = model.get_output_embeddings()
    outputs = 0
    for module in model.modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            outputs += module.out_features
        elif isinstance(module, Conv1D):
            outputs += module.nf
        else:
            outputs += sum(chosen * max(p.shape[1:]) for p in module.parameters(recurse=False) if p.dim() == 3)
    return outputs, int(text.vocab_size)


def _count_tokens(prepared: Prepared) -> tuple[TokenCounts, int, int, float]:
    """Counts, bytes of text, largest padded batch in tokens, and the factor from the sample to the corpus."""
    config, encoder, counts = prepared.config, prepared.encoder(), TokenCounts()
    items, scale = _sample(prepared)
    text_bytes = widest = 0

    def measured() -> Iterator[TokenSequence]:
        nonlocal text_bytes
        for sequence in encoder.encode_all(items, counts):
            text_bytes += len(sequence.text.encode()) + len(sequence.sequence_id)
            yield sequence

    for batch in plan_batches(measured(), config.batch_size):
        widest = max(widest, len(batch) * (len(batch[0].token_ids) + config.generate))
    if scale != 1:  # the longest of the corpus may not be in the sample
        widest = max(widest, config.batch_size * (prepared.max_length + config.generate))
    return counts, text_bytes, widest, scale


def _sample(prepared: Prepared) -> tuple[Iterator[CorpusItem], float]:
    corpus = prepared.corpus
    if len(corpus) <= SAMPLED_RECORDS:
        return iter(corpus), 1.0
    step = len(corpus) // SAMPLED_RECORDS
    sampled = itertools.islice(corpus, 0, step * SAMPLED_RECORDS, step)
    return sampled, len(corpus) / SAMPLED_RECORDS


def _disk_free(config: ScanConfig) -> int:
    folder = config.output.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free
