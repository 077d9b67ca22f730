"""The second use of a tied output head: its rows are looked up as the input embeddings.

Token t's gradient of the shared weight W (V, F) is the sum of both uses at t,

    G_t = δ_t ⊗ x_t + e_r ⊗ s·λ_t        r = id_t

δ_t (V,) the gradient of the head's output, x_t (F,) its input, λ_t (F,) the gradient of the embedding module's output, and s the
factor by which that module scales what it looks up (1 where it does not; Gemma 3 scales by √F). The look-up changes one row, so
one block of 64 rows, whose norm is

    ‖G_t[block]‖² = ‖δ_t[block without r]‖²·‖x_t‖² + ‖δ_tr·x_t + s·λ_t‖²
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from .targets import BLOCK_SIZE, Target


@dataclass(frozen=True)
class LookupPart:
    """Values that the head's backward stores for that of the look-up, per row of the batch.

    Attributes:
        others: (rows,) ‖δ[block without r]‖·‖x‖ of the block that holds r, float32 or wider.
        own: (rows, F) δ_r·x, the gradient of row r by the head.
    """

    others: Tensor
    own: Tensor

    @classmethod
    def of(cls, grad: Tensor, inputs: Tensor, input_norm: Tensor, ids: Tensor) -> LookupPart:
        """From the head's output gradient (rows, V), its input (rows, F), that one's norms (rows,), and the token ids (rows,)."""
        dtype = torch.promote_types(grad.dtype, torch.float32)
        first = ids // BLOCK_SIZE * BLOCK_SIZE
        columns = first[:, None] + torch.arange(BLOCK_SIZE, device=ids.device)
        outside = (columns >= grad.shape[-1]) | (columns == ids[:, None])
        block = grad.gather(1, columns.clamp(max=grad.shape[-1] - 1)).to(dtype).masked_fill_(outside, 0)
        others = torch.linalg.vector_norm(block, dim=-1) * input_norm.to(dtype)
        return cls(others, grad.gather(1, ids[:, None]).to(dtype) * inputs.to(dtype))


@dataclass(frozen=True)
class TiedLookup:
    """A target whose weight is also the input embeddings.

    Attributes:
        target: output head.
        scale: factor s.
        padding_idx: row that gets no gradient from the look-up; None if there is none.
    """

    target: Target
    scale: float
    padding_idx: int | None

    def gradient(self, embedding_grad: Tensor, ids: Tensor) -> Tensor:
        """(rows, F): each token's gradient of the row it looked up, from that of the embedding module's output."""
        rows = embedding_grad.to(torch.promote_types(embedding_grad.dtype, torch.float32)) * self.scale
        return rows if self.padding_idx is None else rows.masked_fill(ids[:, None] == self.padding_idx, 0)

    def add(self, part: LookupPart, embedding_grad: Tensor, ids: Tensor, norms: Tensor) -> None:
        """Writes the block of each token's own row into the head's norms (rows, blocks)."""
        row = torch.linalg.vector_norm(part.own + self.gradient(embedding_grad, ids), dim=-1)
        norms.scatter_(1, ids[:, None] // BLOCK_SIZE, torch.hypot(part.others, row).to(norms.dtype)[:, None])


def tied_lookup(model: PreTrainedModel, target: Target, probe: Tensor) -> TiedLookup | None:
    """The look-up of a target's weight, if that is also the weight of the input embeddings.

    Args:
        probe: token ids whose look-ups show the module's scale.

    Returns:
        The look-up, or None if the weights differ or the embedding module does more than look up and scale. In the latter case the
        proof of the weight's gradient fails, as it must.
    """
    embedding = model.get_input_embeddings()
    weight = getattr(target.module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight is not embedding.weight:
        return None
    with torch.no_grad():
        rows, found = functional.embedding(probe, weight).double(), embedding(probe).double()
    if rows.shape != found.shape:
        return None
    size = rows.square().sum()
    scale = 1.0 if torch.equal(rows, found) or size == 0 else float((rows * found).sum() / size)
    if not torch.allclose(found, scale * rows, rtol=2e-2, atol=1e-6):
        return None
    return TiedLookup(target, scale, getattr(embedding, "padding_idx", None))
