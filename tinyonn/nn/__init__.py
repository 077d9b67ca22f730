"""Modules over the ops."""

from .block_compression import BlockCompression
from .dyn_nsa import OPEN, DynNSAAttention, DynNSAAttentionOutput, DynNSACache, DynNSACore, DynNSAOptions, budget_loss, normalised_entropy

__all__ = [
    "OPEN",
    "BlockCompression",
    "DynNSAAttention",
    "DynNSAAttentionOutput",
    "DynNSACache",
    "DynNSACore",
    "DynNSAOptions",
    "budget_loss",
    "normalised_entropy",
]
