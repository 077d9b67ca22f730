"""Public functions: checks, dispatch, registration."""

from tinyonn.ops.block_norms import block_norms
from tinyonn.ops.integrate_sps import integrate_sps
from tinyonn.ops.token_grad_norms import token_grad_norms

__all__ = ["block_norms", "integrate_sps", "token_grad_norms"]
