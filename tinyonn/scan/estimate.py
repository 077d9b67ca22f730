"""An estimate of a scan before it runs: bytes on disk, peak memory, tokens.

    disk   = tokens · (2·blocks·code + 9) + sequences · (48·blocks + 640) + text          code: 2 bytes (log2u16) or 4 (f32)
    memory = process + weights + MARGIN · (saved activations + logits + 8·blocks·tokens)  of the batch with most tokens

With `store="integral"` the first term of the disk is 9 bytes a token. Compressed files are smaller than the estimate. The saved
activations are counted in the model's own graph (`activations.py`). MARGIN covers backward and the allocator; it was fitted on a CPU to
the measured peaks of six architectures.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from ..hf.memory import available_memory
from ..mscan.layout import layout_blocks
from .config import ScanConfig
from .distributed import World
from .engine.activations import saved_bytes, skeleton
from .prepare import Prepared, prepare
from .tokens import TokenCounts, TokenSequence, plan_batches

CODE_BYTES = {"log2u16": 2, "f32": 4}
TOKEN_BYTES = 9  # id, loss, mask
SEQUENCE_BYTES = 640  # chunk headers, alignment and index entries
INTEGRAL_BYTES = 48  # six float64 a block

MARGIN = 1.4
UNTRACED_COPIES = 3
PROCESS_BYTES = 480_000_000  # interpreter, torch, transformers

# Number of evenly spaced records that stand for a larger corpus.
SAMPLED_RECORDS = 5000


@dataclass(frozen=True)
class ScanEstimate:
    """An estimate of a scan.

    Attributes:
        sequences, tokens: number to scan, including the largest number of generated tokens.
        truncated: number of sequences cut at max_length.
        skipped: reason -> number of records left out.
        sampled: whether the counts are extrapolated from a sample of the corpus.
        blocks: feature blocks recorded for each token.
        bytes_per_token, bytes_per_sequence: size on disk.
        total_bytes: size of the output (of all processes together).
        disk_free_bytes: free space at the output's place.
        weight_bytes, activation_bytes, plane_bytes, process_bytes: the parts of the peak.
        traced: whether activation_bytes come from the model's own graph. If it could not be traced, they are three times the
            outputs of its linear layers.
        available_bytes: free memory of the device now.
        device, dtype: device and precision, with "auto" resolved.
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
    traced: bool
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
    """Estimates a scan from file headers, tokenizer and corpus, without reading the weights.

    Raises:
        InputError: the same errors as `run_scan` for these options.
    """
    return estimate(prepare(config, World.from_environment()))


def estimate(prepared: Prepared) -> ScanEstimate:
    """Estimates a prepared scan."""
    from .engine.targets import find_targets, layout_of

    config = prepared.config
    with torch.device("meta"):
        model = skeleton(prepared.model_config, prepared.dtype)
    blocks = layout_blocks(layout_of(find_targets(model, config.targets).targets))
    counts, text_bytes, widest, scale = _count_tokens(prepared)
    sequences = round(counts.sequences * scale)
    tokens = round((counts.tokens + counts.sequences * config.generate) * scale)
    planes = 2 * blocks * CODE_BYTES[config.codec] if config.store == "records" else 0
    per_sequence = INTEGRAL_BYTES * blocks + SEQUENCE_BYTES
    folder = next(folder for folder in config.output.absolute().parents if folder.is_dir())
    activation_bytes, traced = _activation_bytes(prepared, model, widest)
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
        disk_free_bytes=shutil.disk_usage(folder).free,
        weight_bytes=sum(parameter.numel() for parameter in model.parameters()) * prepared.dtype.itemsize,
        activation_bytes=int(MARGIN * activation_bytes),
        plane_bytes=int(MARGIN * math.prod(widest) * blocks * 8),
        process_bytes=PROCESS_BYTES if prepared.device.type == "cpu" else 0,
        traced=traced,
        available_bytes=available_memory(prepared.device),
        device=str(prepared.device),
        dtype=str(prepared.dtype).removeprefix("torch."),
    )


def _activation_bytes(prepared: Prepared, model: PreTrainedModel, widest: tuple[int, int]) -> tuple[int, bool]:
    """Bytes that a batch of (sequences, tokens) keeps until backward, logits included, and whether the model could be traced."""
    tokens = math.prod(widest)
    logits = tokens * prepared.model_config.get_text_config().vocab_size * prepared.dtype.itemsize
    try:
        return saved_bytes(prepared.model_config, prepared.dtype, *widest) + logits, True
    except InputError:
        raise
    except Exception:  # a model's own code, on tensors without data: whatever it raises, the scan itself may well run
        outputs = linear_outputs(model, getattr(prepared.model_config.get_text_config(), "num_experts_per_tok", None) or 1)
        return UNTRACED_COPIES * outputs * tokens * prepared.dtype.itemsize + logits, False


def linear_outputs(model: PreTrainedModel, experts_per_token: int) -> int:
    """Output features of all linear layers that one token passes, the output head apart."""
    head = model.get_output_embeddings()
    outputs = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            outputs += 0 if module is head else module.out_features
        elif isinstance(module, Conv1D):
            outputs += module.nf
        else:
            outputs += sum(experts_per_token * max(weight.shape[1:]) for weight in module.parameters(recurse=False) if weight.dim() == 3)
    return outputs


def _count_tokens(prepared: Prepared) -> tuple[TokenCounts, int, tuple[int, int], float]:
    """Counts, bytes of text, the padded batch with most tokens, and the factor from the sample to the corpus."""
    config, encoder, counts = prepared.config, prepared.encoder(), TokenCounts()
    step = max(1, len(prepared.corpus) // SAMPLED_RECORDS)
    items = itertools.islice(prepared.corpus, 0, step * SAMPLED_RECORDS, step)
    scale = max(1.0, len(prepared.corpus) / SAMPLED_RECORDS)
    text_bytes, widest = 0, (0, 0)

    def measured() -> Iterator[TokenSequence]:
        nonlocal text_bytes
        for sequence in encoder.encode_all(items, counts):
            text_bytes += len(sequence.text.encode()) + len(sequence.sequence_id)
            yield sequence

    for batch in plan_batches(measured(), config.batch_size):
        widest = max(widest, (len(batch), len(batch[0].token_ids) + config.generate), key=math.prod)
    if scale != 1:  # the longest of the corpus may not be in the sample
        widest = (config.batch_size, prepared.max_length + config.generate)
    return counts, text_bytes, widest, scale
