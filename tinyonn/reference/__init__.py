"""Dense, readable oracles of the ops. They compute in float64 and import no kernel."""

from .experts.expert_linear import expert_linear, linear_surprise
from .experts.expert_mlp import expert_mlp, expert_surprise, scatter_surprise
from .experts.routing import Routing, select_by_budget, threshold_route
from .experts.surprise import sparse_diversity_loss, surprise_min_loss
from .nsa.dyn_nsa import (
    BlockSelection,
    DynNSAOutput,
    attention_tau,
    block_sparse_attention,
    compressed_attention,
    dyn_nsa,
    select_blocks,
    sliding_window_attention,
)
from .statistics.attention_stats import AttentionStats, attention_stats
from .statistics.block_norms import block_norms
from .statistics.integrate_sps import integrate_sps
from .statistics.token_grad_norms import token_grad_norms

__all__ = [
    "AttentionStats",
    "BlockSelection",
    "DynNSAOutput",
    "Routing",
    "attention_stats",
    "attention_tau",
    "block_norms",
    "block_sparse_attention",
    "compressed_attention",
    "dyn_nsa",
    "expert_linear",
    "expert_mlp",
    "expert_surprise",
    "integrate_sps",
    "linear_surprise",
    "scatter_surprise",
    "select_blocks",
    "select_by_budget",
    "sliding_window_attention",
    "sparse_diversity_loss",
    "surprise_min_loss",
    "threshold_route",
    "token_grad_norms",
]
