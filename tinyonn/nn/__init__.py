"""Modules over the ops."""

from .block_compression import BlockCompression
from .checkpointing import keep_selection
from .dyn_moe import DynMoE
from .dyn_nsa import OPEN, DynNSACore, DynNSAOptions, budget_loss, normalised_entropy
from .dyn_nsa_attention import DynNSAAttention, DynNSAAttentionOutput
from .dyn_nsa_cache import DynNSACache
from .dyn_onn_block import DynONNBlock
from .dyn_smha import DynSMHA
from .dyn_smha_cache import DynSMHACache
from .expert_statistics import token_mask_of
from .surprise_budget import carry_surprise_budget, surprise_budget_of
from .threshold_router import ThresholdRouter

__all__ = [
    "OPEN",
    "BlockCompression",
    "DynMoE",
    "DynNSAAttention",
    "DynNSAAttentionOutput",
    "DynNSACache",
    "DynNSACore",
    "DynNSAOptions",
    "DynONNBlock",
    "DynSMHA",
    "DynSMHACache",
    "ThresholdRouter",
    "budget_loss",
    "carry_surprise_budget",
    "keep_selection",
    "normalised_entropy",
    "surprise_budget_of",
    "token_mask_of",
]
