"""How often the matrix products of a compiled kernel are computed, read from Triton's GPU code (TTGIR)."""

from __future__ import annotations

import re
from math import prod

_LAYOUT = re.compile(r"^(#\w+) = #ttg\.nvidia_mma<\{.*warpsPerCTA = \[([\d, ]+)\], instrShape = \[([\d, ]+)\]", re.MULTILINE)
_PRODUCT = re.compile(r"(?:tt\.dot|ttng\.warp_group_dot) .*?(?:tensor|memdesc)<\d+x(\d+)x\w+,.*-> tensor<(\d+)x(\d+)x\w+, (#\w+)>")


def duplicated(ttgir: str) -> float:
    """Floating-point operations that matrix instructions are issued for, over those of the products; 1 where nothing is computed twice.

    Warps that are more than the tiles of a product repeat each other's work: eight warps on 64 rows, where a warp's instruction has 16.
    Products without such a layout count as computed once: those of scalars, and those of sm_100, which one thread issues.
    """
    layouts = {name: (_numbers(warps), _numbers(instruction)) for name, warps, instruction in _LAYOUT.findall(ttgir)}
    done = needed = 0.0
    for depth, *shape, layout in _PRODUCT.findall(ttgir):
        rows_and_columns = [int(size) for size in shape]
        operations = float(int(depth) * prod(rows_and_columns))
        needed += operations
        if layout in layouts:
            for size, warps, instruction in zip(rows_and_columns, *layouts[layout], strict=False):
                operations *= max(1, warps * instruction / size)
        done += operations
    if not needed and re.search(r"tt\.dot\b(?!_)|warp_group_dot\b(?!_wait)", ttgir):
        raise ValueError("the products of this code cannot be read: its form is not that of the Triton that this was written for.")
    return round(done / needed, 2) if needed else 1.0


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
