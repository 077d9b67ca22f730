"""A batch as the engine runs it: tokens first, padding last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError, reason


@dataclass(frozen=True)
class Batch:
    """Sequences moved to the left of their rows.

    With padding last, no token can attend to it and default positions are right, so the model runs without a mask, on its
    fastest attention, and a row's values do not depend on which side its padding was.

    Attributes:
        input_ids: (B, T) int64, T the longest sequence.
        labels: (B, T) int64, the next token; −1 at each sequence's last token and beyond.
        lengths: number of tokens of each row.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: list[int]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int, device: torch.device) -> Batch:
        """Checks and aligns (B, T) ids under a (B, T) mask of ones and zeros.

        Raises:
            InputError: shapes that differ, a mask of other values, a row without a token, padding between tokens, an id outside the
                vocabulary.
        """
        try:
            input_ids = torch.as_tensor(input_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"input_ids must be (sequences, tokens) integers, got {type(input_ids).__name__}: {reason(error)}") from error
        integers = not (input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool)
        if input_ids.dim() != 2 or input_ids.numel() == 0 or not integers:
            raise InputError(f"input_ids must be (sequences, tokens) integers, got {input_ids.dtype} of shape {tuple(input_ids.shape)}.")
        mask = torch.ones_like(input_ids) if attention_mask is None else torch.as_tensor(attention_mask).to(input_ids.device)
        if mask.shape != input_ids.shape:
            raise InputError(f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(mask.shape)}.")
        present = mask == 1
        if not bool((present | (mask == 0)).all()):
            raise InputError(f"attention_mask must hold 1 for tokens and 0 for padding, got {mask[~present & (mask != 0)][0].item()}.")
        lengths = present.sum(1)
        first = present.int().argmax(1)
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        if not bool((lengths > 0).all()):
            raise InputError(f"attention_mask must mark at least one token in each row, got none in row {int(lengths.argmin())}.")
        if not torch.equal(present, (position >= first[:, None]) & (position < (first + lengths)[:, None])):
            raise InputError("attention_mask must mark one unbroken run of tokens in each row, got padding between tokens.")
        # Padding's own ids may lie outside the vocabulary; it runs as token 0, and nothing sees it.
        length = int(lengths.max())
        columns = (first[:, None] + position[:length]).clamp(max=input_ids.shape[1] - 1)
        inside = position[:length] < lengths[:, None]
        aligned = input_ids.gather(1, columns).masked_fill(~inside, 0).long()
        if bool((aligned < 0).any()) or int(aligned.max()) >= vocabulary:
            raise InputError(f"input_ids must be 0 … {vocabulary - 1}, got {int(aligned.min())} … {int(aligned.max())}.")
        labels = torch.full_like(aligned, -1)
        labels[:, :-1] = aligned[:, 1:].masked_fill(~inside[:, 1:], -1)
        return cls(aligned.to(device), labels.to(device), lengths.tolist())

    def split(self, switches: set[int]) -> list[tuple[list[int], Batch]]:
        """Its rows in parts, none of which has lengths on both sides of a switch: each part's row numbers and the part."""
        parts: dict[int, list[int]] = {}
        for row, length in enumerate(self.lengths):
            parts.setdefault(sum(length > switch for switch in switches), []).append(row)
        if len(parts) == 1:
            return [(list(range(len(self.lengths))), self)]
        return [(rows, self._part(rows)) for rows in parts.values()]

    def _part(self, rows: list[int]) -> Batch:
        lengths = [self.lengths[row] for row in rows]
        return Batch(self.input_ids[rows, : max(lengths)], self.labels[rows, : max(lengths)], lengths)
