"""Rates of GPUs for `kernel_report.py`, and what it says of a kernel.

What a GPU reaches was read off the kernels' times on an H200, whose multiprocessors are those of an H100. Other rates are experience.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU: what kernels reach, not what a data sheet says.

    Attributes:
        units: multiprocessors.
        clock: in GHz.
        wgmma, mma: bfloat16 operations per clock and multiprocessor of warpgroup instructions (tcgen05 on sm_100), and of mma.sync.
        dram, cache: TB/s from memory and from L2.
    """

    name: str
    units: int
    clock: float
    wgmma: float
    mma: float
    dram: float
    cache: float


MACHINES = {
    80: Machine("A100", 108, 1.41, 0, 2048, 1.7, 4.0),
    90: Machine("H100", 132, 1.755, 4096, 2600, 3.0, 5.5),
    100: Machine("B200", 148, 1.85, 8192, 2600, 6.8, 10.0),
}
REACHED = 0.5  # of the rate of matrix instructions, in a loop with other work
ISSUE_OF_A_WARP, MOST_ISSUE = 0.2, 0.85  # instructions per clock and scheduler: with one warp, and at most
SCHEDULERS, REGISTERS, WARPS, PROGRAMS = 4, 65536, 64, 32  # of a multiprocessor
LAUNCH = 2e-6  # seconds between kernels


@dataclass
class Row:
    """One kernel of an op, over all of its launches."""

    op: str
    kernel: str
    arch: int
    launches: int
    config: str
    registers: int
    spilled: int
    shared: int
    programs: int
    warps: int
    matrix: dict[str, int]
    instructions: int
    duplicated: float | None
    masked: float | None
    loads: dict[str, int]
    barriers: int
    gflop: float
    dram_gb: float
    cache_gb: float
    bound_ms: float
    predicted_ms: float
    limit: str
    source: str  # hash of all that decides the machine code
    text_ms: float = 0.0  # predicted, where neighbouring queries share as many key blocks as in text
