"""∫SPS and moments of a sequence: as stored, or computed from its planes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import MscanError
from ...mscan import Integral, MscanReader
from .grid import BlockGrid, Floats


def file_integral(reader: MscanReader, grid: BlockGrid) -> Integral:
    """The file's stored total, or the sum over its sequences; sequences without integral and planes are skipped.

    Raises:
        MscanError: the file is damaged.
    """
    try:
        return reader.integral().widened(grid.num_blocks)
    except MscanError:
        # A sequence has no integral, or the file is damaged: reading each sequence shows which.
        total = Integral.zeros(grid.num_blocks)
        for ordinal in range(len(reader.sequences)):
            found = sequence_integral(reader, ordinal, grid)
            if found is not None:
                total = total + found
        return total


def sequence_integral(reader: MscanReader, ordinal: int, grid: BlockGrid) -> Integral | None:
    """Integral of one sequence, or None if it has neither integral nor planes."""
    stored = reader.sequence_integral(ordinal)
    if stored is not None:
        return stored.widened(grid.num_blocks)
    if not reader.sequences[ordinal].has_records:
        return None
    planes = reader.planes(ordinal)
    sps = token_sps(planes[0], planes[1], grid.layer_offsets)
    known = np.isfinite(sps)
    return Integral.from_planes(np.where(known, sps, 0.0).sum(axis=0), known, planes)


def token_sps(activation: npt.NDArray[np.float32], gradient: npt.NDArray[np.float32], layer_offsets: npt.NDArray[np.int64]) -> Floats:
    """SPS of each token and block, NaN = missing: two planes of (tokens, blocks) to (tokens, layer_offsets[-1]) float64."""
    # Imported here, because a report of integrals alone needs no torch.
    import torch

    from ...ops import integrate_sps

    planes = [torch.from_numpy(plane.astype(np.float64)) for plane in (activation, gradient)]
    _, per_token = integrate_sps(planes[0], planes[1], layer_offsets, return_per_token=True)
    found: Floats = per_token.numpy()
    return found
