"""Public functions: checks, dispatch, registration."""

from .attention_stats import AttentionStats, attention_stats
from .block_norms import block_norms
from .block_sparse_attention import block_sparse_attention
from .compressed_attention import compressed_attention
from .dyn_nsa import DynNSAOutput, dyn_nsa
from .expert_mlp import expert_mlp, scatter_surprise
from .integrate_sps import integrate_sps
from .select_blocks import BlockSelection, select_blocks
from .sliding_window_attention import sliding_window_attention
from .surprise import sparse_diversity_loss, surprise_min_loss
from .threshold_route import Routing, select_by_budget, threshold_route
from .token_grad_norms import token_grad_norms

__all__ = [
    "AttentionStats",
    "BlockSelection",
    "DynNSAOutput",
    "Routing",
    "attention_stats",
    "block_norms",
    "block_sparse_attention",
    "compressed_attention",
    "dyn_nsa",
    "expert_mlp",
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
