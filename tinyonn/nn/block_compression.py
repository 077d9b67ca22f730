"""One key (or value) for every `compress_size` positions: their mean, or a learned map of them.

    x'_i = x_i + position_i        c = mean_i x'_i + down · mean_i silu(up · x'_i)

`position` is an embedding of the position within a block. `down` and `position` start at 0, so the map starts as the exact mean, and both
have a gradient. Each head has its own map.

B batch, T positions, K heads, D head dim, M = T // compress_size blocks
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BlockCompression(nn.Module):
    """Compresses whole blocks of positions.

    Args:
        num_heads: K.
        head_dim: D.
        compress_size: positions per block.
        learnable: whether to learn a map; False for the mean, without parameters.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        compress_size: int = 64,
        *,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.compress_size = compress_size
        self.learnable = learnable
        if learnable:
            self.position = nn.Parameter(torch.empty(compress_size, num_heads, head_dim, device=device, dtype=dtype))
            self.up = nn.Parameter(torch.empty(num_heads, head_dim, head_dim, device=device, dtype=dtype))
            self.down = nn.Parameter(torch.empty(num_heads, head_dim, head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the map to the mean of a block."""
        if self.learnable:
            nn.init.zeros_(self.position)
            nn.init.normal_(self.up, std=self.up.shape[1] ** -0.5)
            nn.init.zeros_(self.down)

    def forward(self, x: Tensor, starts: Tensor | None = None) -> Tensor:
        """Compresses a row of positions.

        Args:
            x: (B, T, K, D).
            starts: (B, M) first position of each block, if rows do not all begin at 0; a block that would pass the end of its row is
                filled with the last position. See `block_starts`.

        Returns:
            (B, T // compress_size, K, D), or (B, M, K, D) with `starts`.
        """
        blocks = blocks_of(x, self.compress_size, starts)
        if not self.learnable:
            return blocks.mean(2)
        blocks = blocks + self.position
        hidden = nn.functional.silu(torch.einsum("bmikd,kde->bmike", blocks, self.up)).mean(2)
        return (blocks.mean(2) + torch.einsum("bmke,ked->bmkd", hidden, self.down)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"compress_size={self.compress_size}, learnable={self.learnable}"


def block_starts(num_keys: int, compress_size: int, key_start: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """First position of each compressed key, in the layout of the ops.

    Args:
        num_keys: T.
        key_start: (B,) first position that is not padding.
        cu_seqlens: (sequences + 1,); compressed key c of sequence i lies at row cu[i] // compress_size + c.

    Returns:
        (B, T // compress_size), or None if every row begins at 0. Entries that no query reads are undefined.
    """
    whole = num_keys // compress_size
    if cu_seqlens is not None:
        row = torch.arange(whole, device=cu_seqlens.device)
        first = cu_seqlens // compress_size
        sequence = torch.searchsorted(first.long(), row, right=True) - 1
        return (cu_seqlens[sequence] + (row - first[sequence]) * compress_size)[None]
    if key_start is None:
        return None
    return key_start[:, None] + torch.arange(whole, device=key_start.device) * compress_size


def blocks_of(x: Tensor, compress_size: int, starts: Tensor | None = None) -> Tensor:
    """(B, T, K, D) -> (B, M, compress_size, K, D): whole blocks from position 0, or blocks that begin at `starts`, (B, M)."""
    if starts is None:
        whole = x.shape[1] // compress_size
        return x[:, : whole * compress_size].unflatten(1, (whole, compress_size))
    place = starts[..., None] + torch.arange(compress_size, device=x.device)
    place = place.clamp(max=max(x.shape[1] - 1, 0)).long()
    row = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[row, place]
