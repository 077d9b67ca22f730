"""Dense, readable oracles of the ops. They run in float64, never import a kernel, and are judged by eye."""

from .block_norms import block_norms
from .dyn_nsa import (
    attention_tau,
    block_sparse_attention,
    compressed_attention,
    dyn_nsa,
    select_blocks,
    sliding_window_attention,
)
from .integrate_sps import integrate_sps
from .token_grad_norms import token_grad_norms

__all__ = [
    "attention_tau",
    "block_norms",
    "block_sparse_attention",
    "compressed_attention",
    "dyn_nsa",
    "integrate_sps",
    "select_blocks",
    "sliding_window_attention",
    "token_grad_norms",
]
