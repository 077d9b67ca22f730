"""Public functions: checks, dispatch, registration."""

from .block_norms import block_norms
from .block_sparse_attention import block_sparse_attention
from .compressed_attention import compressed_attention
from .dyn_nsa import DynNSAOutput, dyn_nsa
from .integrate_sps import integrate_sps
from .select_blocks import BlockSelection, select_blocks
from .sliding_window_attention import sliding_window_attention
from .token_grad_norms import token_grad_norms

__all__ = [
    "BlockSelection",
    "DynNSAOutput",
    "block_norms",
    "block_sparse_attention",
    "compressed_attention",
    "dyn_nsa",
    "integrate_sps",
    "select_blocks",
    "sliding_window_attention",
    "token_grad_norms",
]
