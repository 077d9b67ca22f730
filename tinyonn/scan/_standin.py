"""Stand-in until tinyonn.ops lands."""
import torch
from torch.nn.functional import pad
def block_norms(x, block_size=64, *, row_scale=None, out=None, impl="auto"):
    f = x.shape[-1]; n = -(-f // block_size)
    y = x.float() if x.dtype != torch.float64 else x
    y = pad(y, (0, n * block_size - f)).unflatten(-1, (n, block_size))
    r = torch.linalg.vector_norm(y, dim=-1)
    if row_scale is not None: r = r * row_scale[..., None]
    r = r.float()
    if out is not None:
        out.copy_(r); return out
    return r
def integrate_sps(a, g, offsets, *, token_mask=None, out=None, return_per_token=False, impl="auto"):
    total = torch.zeros(a.shape[1], dtype=torch.float64)
    def z(x):
        x = x.double(); m = x.nanmean(1, keepdim=True); s = (x - m).square().nanmean(1, keepdim=True).sqrt()
        return torch.where(s <= 1e-6 * m.abs(), 0 * x, (x - m) / s)
    for lo, hi in zip(offsets[:-1], offsets[1:]):
        total[lo:hi] = (z(a[:, lo:hi]) - z(g[:, lo:hi])).nansum(0)
    return total
