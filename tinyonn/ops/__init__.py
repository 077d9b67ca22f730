"""Public functions: checks, dispatch, registration."""

from .experts.expert_linear import expert_linear
from .experts.expert_mlp import expert_mlp, scatter_surprise
from .experts.sort_slots import SlotOrder, sort_slots
from .experts.surprise import sparse_diversity_loss, surprise_min_loss
from .experts.threshold_route import Routing, select_by_budget, threshold_route
from .nsa.block_sparse_attention import block_sparse_attention
from .nsa.compressed_attention import compressed_attention
from .nsa.dyn_nsa import DynNSAOutput, dyn_nsa
from .nsa.select_blocks import BlockSelection, select_blocks
from .nsa.sliding_window_attention import sliding_window_attention
from .statistics.attention_stats import AttentionStats, attention_stats
from .statistics.block_norms import block_norms
from .statistics.integrate_sps import integrate_sps
from .statistics.token_grad_norms import token_grad_norms

__all__ = [
    "AttentionStats",
    "BlockSelection",
    "DynNSAOutput",
    "Routing",
    "SlotOrder",
    "attention_stats",
    "block_norms",
    "block_sparse_attention",
    "compressed_attention",
    "dyn_nsa",
    "expert_linear",
    "expert_mlp",
    "integrate_sps",
    "scatter_surprise",
    "select_blocks",
    "select_by_budget",
    "sliding_window_attention",
    "sort_slots",
    "sparse_diversity_loss",
    "surprise_min_loss",
    "threshold_route",
    "token_grad_norms",
]
