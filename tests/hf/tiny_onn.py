"""Tiny TinyOnn models for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tinyonn.hf import TinyOnnConfig

KINDS = ["dyn_nsa", "full", "dyn_smha"]
SPARSE = [kind for kind in KINDS if kind != "full"]
VOCABULARY = 50


def config(attention: str = "dyn_nsa", **options: Any) -> TinyOnnConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2, "init_num_experts": 6}
    return TinyOnnConfig(**{**sizes, "max_num_experts": 8, "attention": attention, **options})


def model(attention: str = "dyn_nsa", **options: Any) -> Any:
    """In evaluation mode. Weights are larger than at first, so that attention is not uniform."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(attention, **{"initializer_range": 0.2, **options})).eval()


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids (B, T), 0 in front of shorter rows, and their mask."""
    ids = token_ids(len(lengths), max(lengths), seed=seed)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()
