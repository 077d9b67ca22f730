"""Dense, readable oracles of the ops. They run in float64, never import a kernel, and are judged by eye."""

from .attention_stats import attention_stats
from .block_norms import block_norms
from .dyn_nsa import (
    attention_tau,
    block_sparse_attention,
    compressed_attention,
    dyn_nsa,
    select_blocks,
    sliding_window_attention,
)
from .expert_mlp import expert_mlp, expert_surprise, scatter_surprise
from .integrate_sps import integrate_sps
from .routing import Routing, select_by_budget, threshold_route
from .surprise import sparse_diversity_loss, surprise_min_loss
from .token_grad_norms import token_grad_norms

__all__ = [
    "Routing",
    "attention_stats",
    "attention_tau",
    "block_norms",
    "block_sparse_attention",
    "compressed_attention",
    "dyn_nsa",
    "expert_mlp",
    "expert_surprise",
    "integrate_sps",
    "scatter_surprise",
    "select_blocks",
    "select_by_budget",
    "sliding_window_attention",
    "sparse_diversity_loss",
    "surprise_min_loss",
    "threshold_route",
    "token_grad_norms",
]
