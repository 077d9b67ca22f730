"""Dense, readable oracles of the ops. They run in float64, never import a kernel, and are judged by eye."""

from tinyonn.reference.block_norms import block_norms
from tinyonn.reference.integrate_sps import integrate_sps
from tinyonn.reference.token_grad_norms import token_grad_norms

__all__ = ["block_norms", "integrate_sps", "token_grad_norms"]
