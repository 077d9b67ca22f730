"""L2 norms of blocks of consecutive features.

    out[n, b] = scale[n] * sqrt(sum_f x[n, f]^2),  f in block b

N rows, F features, NB = ceil(F / BLOCK_SIZE) blocks. Reads x once and accumulates in float32. Squares of large and of small tiles
have separate sums, scaled by powers of two, so a norm is correct wherever it is a normal float32. The idea is that of Blue, "A portable
Fortran program to find the Euclidean norm of a vector", ACM TOMS 4(1), 1978, applied to tiles instead of elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = {2: 8192, 4: 2048}  # by bytes of an element; the fastest of an H200
SCATTERED_ELEMENTS = 1024  # for loads of single values, which each need an address and a mask in registers
MAX_WIDTH = 1024
MAX_ROWS = 32  # larger tiles would give small problems too few programs


@triton.jit
def add_squares(tile, large, medium, small):
    """Adds the sum of squares along axis 2 to one of three accumulators with different scales, and returns all three."""
    peak = tl.max(tl.abs(tile), axis=2)
    is_large = peak > 2.0**50  # below this, the sum of 2^24 squares does not overflow float32
    is_small = peak < 2.0**-50
    scale = tl.where(is_large, 2.0**-80, tl.where(is_small, 2.0**100, 1.0))
    scaled = tile * scale[:, :, None]
    total = tl.sum(scaled * scaled, axis=2)
    # The maximum ignores NaN. A tile with NaN goes to `medium`, which every result includes.
    is_small = is_small & (total == total)
    large += tl.where(is_large, total, 0.0)
    small += tl.where(is_small, total, 0.0)
    medium += tl.where(is_large | is_small, 0.0, total)
    return large, medium, small


@triton.jit
def root(large, medium, small):
    """Norm from the three accumulators of `add_squares`."""
    # float32 cannot represent 2^-160 and 2^-200, so two factors are used.
    high, middle = large + medium * 2.0**-80 * 2.0**-80, medium + small * 2.0**-100 * 2.0**-100
    is_large, is_small = large != 0.0, (large == 0.0) & (medium == 0.0)
    square = tl.where(is_large, high, tl.where(is_small, small, middle))
    return tl.sqrt_rn(square) * tl.where(is_large, 2.0**80, tl.where(is_small, 2.0**-100, 1.0))


@triton.jit
def norms_of_blocks(x_ptr, row, block, num_rows, num_features, stride_xn, stride_xf, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Norms (rows, blocks) for vectors of row and block indices. Each block is read in tiles of WIDTH features."""
    large = tl.zeros((row.shape[0], block.shape[0]), tl.float32)
    medium = tl.zeros((row.shape[0], block.shape[0]), tl.float32)
    small = tl.zeros((row.shape[0], block.shape[0]), tl.float32)
    row_ptr = x_ptr + row[:, None, None] * stride_xn
    for start in range(0, BLOCK_SIZE, WIDTH):
        within = start + tl.arange(0, WIDTH)
        feature = block[None, :, None] * BLOCK_SIZE + within[None, None, :]
        inside = (row < num_rows)[:, None, None] & (feature < num_features)
        if BLOCK_SIZE % WIDTH != 0:
            inside = inside & (within < BLOCK_SIZE)[None, None, :]
        tile = tl.load(row_ptr + feature.to(tl.int64) * stride_xf, mask=inside, other=0.0).to(tl.float32)
        large, medium, small = add_squares(tile, large, medium, small)
    return root(large, medium, small)


@triton.jit
def _block_norms_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    num_features,
    num_blocks,
    stride_xn,
    stride_xf,
    stride_sn,
    stride_on,
    stride_ob,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # One program owns ROWS rows and BLOCKS of their blocks.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    norms = norms_of_blocks(x_ptr, row, block, num_rows, num_features, stride_xn, stride_xf, BLOCK_SIZE, WIDTH)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + row * stride_sn, mask=row < num_rows, other=0.0).to(tl.float32)
        norms = norms * scale[:, None]
    target = out_ptr + row[:, None] * stride_on + block[None, :].to(tl.int64) * stride_ob
    tl.store(target, norms, mask=(row < num_rows)[:, None] & (block < num_blocks)[None, :])


def tile_shape(rows: Tensor, block_size: int, num_blocks: int) -> dict[str, int]:
    """ROWS, BLOCKS and WIDTH of one tile; it extends along blocks of one row first, so that loads are contiguous."""
    vectorised = rows.stride(1) == 1 and rows.stride(0) % 16 == 0 and rows.shape[1] % 16 == 0
    elements = TILE_ELEMENTS.get(rows.element_size(), 4096) if vectorised else SCATTERED_ELEMENTS
    width = min(triton.next_power_of_2(block_size), MAX_WIDTH)
    blocks = min(triton.next_power_of_2(num_blocks), elements // width)
    return {"ROWS": min(elements // (blocks * width), MAX_ROWS), "BLOCKS": blocks, "WIDTH": width}


def block_norms_fwd(x: Tensor, row_scale: Tensor | None, out: Tensor, block_size: int) -> None:
    """Writes `out (..., NB)` float32 for `x (..., F)`, launched over (rows / ROWS, blocks / BLOCKS).

    `out` may be a strided column slice. If no single stride addresses the rows of x, x is copied first; such an `out` is copied last.
    """
    num_features, num_blocks = x.shape[-1], out.shape[-1]
    if out.numel() == 0:
        return
    block_size = min(block_size, num_features)
    rows = x.reshape(-1, num_features)
    scale = None if row_scale is None else row_scale.reshape(-1)
    detour = None
    try:
        target = out.view(-1, num_blocks)
    except RuntimeError:  # no single stride addresses these rows
        target = detour = torch.empty((rows.shape[0], num_blocks), dtype=out.dtype, device=out.device)
    shape = tile_shape(rows, block_size, num_blocks)
    grid = (triton.cdiv(rows.shape[0], shape["ROWS"]), triton.cdiv(num_blocks, shape["BLOCKS"]))
    _block_norms_kernel[grid](
        rows,
        rows if scale is None else scale,
        target,
        rows.shape[0],
        num_features,
        num_blocks,
        rows.stride(0),
        rows.stride(1),
        0 if scale is None else scale.stride(0),
        target.stride(0),
        target.stride(1),
        HAS_SCALE=scale is not None,
        BLOCK_SIZE=block_size,
        **shape,
        num_warps=4,
    )
    if detour is not None:
        out.copy_(detour.view(out.shape))
