"""What the tests of the head laboratory share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tinyonn.testing import tiny_causal_lm, tiny_encoder

ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "deberta-v2")


@pytest.fixture
def tiny_classifier() -> Callable[..., PreTrainedModel]:
    """`tiny_classifier(arch, dtype=torch.float32, labels=3, **overrides)`: a random classifier of sequences, in eval mode."""

    def make(arch: str, *, dtype: torch.dtype = torch.float32, labels: int = 3, **overrides: Any) -> PreTrainedModel:
        if arch in ENCODERS:
            return tiny_encoder(arch, dtype=dtype, num_labels=labels, **overrides)
        causal = tiny_causal_lm(arch, dtype=dtype, num_labels=labels, pad_token_id=95, **overrides)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_config(causal.config).to(dtype).eval()
        model.base_model.load_state_dict(causal.base_model.state_dict())
        return model

    return make


@pytest.fixture
def labelled_batches() -> Callable[..., list[dict[str, Tensor]]]:
    """`labelled_batches(sizes=(3, 2), length=11)`: batches of padded sequences of unlike length with labels 0 … 2."""

    def make(sizes: tuple[int, ...] = (3, 2), length: int = 11) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(5)
        batches = []
        for size in sizes:
            ids = torch.randint(0, 93, (size, length), generator=generator)
            mask = torch.ones(size, length, dtype=torch.long)
            for row in range(1, size):
                ids[row, length - 2 * row :], mask[row, length - 2 * row :] = 95, 0
            labels = torch.randint(0, 3, (size,), generator=generator)
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        return batches

    return make
