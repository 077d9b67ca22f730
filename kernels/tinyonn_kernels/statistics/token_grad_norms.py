"""Per-token gradient norms of the feature blocks of a linear layer's weight.

    out[n, b] = ||delta[n, block b]|| * ||x[n, :]||

This is the Frobenius norm of the outer product delta[n, block b] x[n, :]^T, the gradient contribution of token n. N tokens, I input
features, F output features, NB = ceil(F / BLOCK_SIZE) blocks. Reads x and delta once.

Source: Goodfellow, "Efficient per-example gradient computations", arXiv:1510.01799.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tinyonn_kernels.statistics.block_norms import norms_of_blocks, tile_shape


@triton.jit
def _token_grad_norms_kernel(
    inputs_ptr,
    grad_ptr,
    out_ptr,
    num_rows,
    num_features,
    num_blocks,
    stride_in,
    stride_if,
    stride_gn,
    stride_gf,
    IN_FEATURES: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # One program owns ROWS tokens: the norm of their inputs, then the norms of all blocks.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    whole = tl.arange(0, 1)  # the inputs form one block
    input_norm = norms_of_blocks(inputs_ptr, row, whole, num_rows, IN_FEATURES, stride_in, stride_if, IN_FEATURES, IN_WIDTH)
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        norms = norms_of_blocks(grad_ptr, row, block, num_rows, num_features, stride_gn, stride_gf, BLOCK_SIZE, WIDTH)
        target = out_ptr + row[:, None] * num_blocks + block[None, :]
        tl.store(target, norms * input_norm, mask=(row < num_rows)[:, None] & (block < num_blocks)[None, :])


def token_grad_norms_fwd(inputs: Tensor, grad_output: Tensor, out: Tensor, block_size: int) -> None:
    """Writes the contiguous `out (..., NB)` float32, launched over (tokens / ROWS,)."""
    in_features, num_features, num_blocks = inputs.shape[-1], grad_output.shape[-1], out.shape[-1]
    if out.numel() == 0 or in_features == 0:
        out.zero_()
        return
    block_size = min(block_size, num_features)
    rows, grads = inputs.reshape(-1, in_features), grad_output.reshape(-1, num_features)
    shape = tile_shape(grads, block_size, num_blocks)
    _token_grad_norms_kernel[(triton.cdiv(rows.shape[0], shape["ROWS"]),)](
        rows,
        grads,
        out,
        rows.shape[0],
        num_features,
        num_blocks,
        rows.stride(0),
        rows.stride(1),
        grads.stride(0),
        grads.stride(1),
        IN_FEATURES=in_features,
        IN_WIDTH=min(triton.next_power_of_2(in_features), shape["BLOCKS"] * shape["WIDTH"]),
        BLOCK_SIZE=block_size,
        **shape,
        num_warps=4,
    )
