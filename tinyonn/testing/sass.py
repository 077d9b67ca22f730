"""What compiled kernels consist of: their machine code (SASS), read loop by loop.

A matrix instruction names its shape: HGMMA.64x64x16 (wgmma) is of one warpgroup of four warps, HMMA.16816 (mma.sync) of one warp. Those of
sm_100 (UTCHMMA) keep their shape in a register, so only their number is known.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

WARPGROUP = 4  # warps
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_WGMMA = re.compile(r"[HIQB]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")
_MMA = re.compile(r"HMMA\.(16816|1688|1684)\b")
_WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8|ENL2\.256)\b")
_DEEP = {"16816": 16, "1688": 8, "1684": 4}  # products of a sum; the tile is 16 x 8


@dataclass(frozen=True)
class Part:
    """Instructions of a loop without those of the loops in it, or of what is outside all loops.

    Attributes:
        opcodes: instructions in order, with modifiers.
        depth: number of loops around; 0 outside all loops.
    """

    opcodes: tuple[str, ...]
    depth: int

    def __len__(self) -> int:
        return len(self.opcodes)

    @cached_property
    def matrix(self) -> Counter[str]:
        """Matrix instructions, by name and shape."""
        return Counter(name for name in map(matrix_name, self.opcodes) if name)

    def flops(self, warps: int) -> int:
        """Floating-point operations of the matrix instructions, of all warps of a program together."""
        return sum(number * flops_of(name, warps) for name, number in self.matrix.items())

    @property
    def barriers(self) -> int:
        """Barriers of all warps of a program."""
        return sum(opcode.startswith("BAR.") and not opcode.startswith("BAR.ARV") for opcode in self.opcodes)

    @cached_property
    def loads(self) -> Counter[str]:
        """Loads from global memory by kind and bits: "LDG 128", "cp.async 128", "TMA"."""
        return Counter(kind for kind in map(load_name, self.opcodes) if kind)


class Assembly(NamedTuple):
    """Machine code of one kernel: what is outside all loops, and the loops in order of their first instruction."""

    outside: Part
    loops: tuple[Part, ...]

    @property
    def spilling(self) -> int:
        """Instructions in loops that read or write spilled registers."""
        return sum(opcode.startswith(("LDL", "STL")) for loop in self.loops for opcode in loop.opcodes)

    @property
    def loads(self) -> Counter[str]:
        return sum((part.loads for part in (self.outside, *self.loops)), Counter())


def matrix_name(opcode: str) -> str | None:
    """ "wgmma 64x64x16", "mma.sync 16x8x16", "tcgen05", or None for other instructions."""
    if found := _WGMMA.match(opcode):
        return f"wgmma {'x'.join(found.groups())}"
    if found := _MMA.match(opcode):
        return f"mma.sync 16x8x{_DEEP[found[1]]}"
    return "tcgen05" if opcode.startswith("UTC") and "MMA" in opcode else None


def flops_of(name: str, warps: int) -> int:
    """Floating-point operations of a matrix instruction that all `warps` issue; 0 if its shape is not known."""
    if name == "tcgen05":
        return 0
    kind, shape = name.split()
    rows, columns, depth = map(int, shape.split("x"))
    return 2 * rows * columns * depth * (warps // WARPGROUP if kind == "wgmma" else warps)


def load_name(opcode: str) -> str | None:
    if opcode.startswith("UTMALDG"):
        return "TMA"
    kind = "cp.async" if opcode.startswith("LDGSTS") else "LDG" if re.match(r"LDG\b", opcode) else None
    if kind is None:
        return None
    width = _WIDTH.search(opcode)
    return f"{kind} {32 if width is None else width[1].removeprefix('ENL2.').lstrip('US')}"


def read(text: str) -> Assembly:
    """Reads nvdisasm's output for one kernel."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(opcodes)
        elif found := _LINE.search(line):
            opcodes.append(found[1])
            target = _TARGET.search(found[2])
            if found[1].startswith("BRA") and target:
                jumps.append((len(opcodes), target[1]))
    # The last instruction of a kernel jumps to itself.
    spans = sorted({(labels[target], end) for end, target in jumps if labels[target] < end - 1}, key=lambda span: (span[0], -span[1]))
    owner = [-1] * len(opcodes)
    for number, (begin, end) in enumerate(spans):  # a loop comes after those around it
        owner[begin:end] = [number] * (end - begin)
    parts = [
        Part(
            tuple(opcode for opcode, own in zip(opcodes, owner, strict=True) if own == number and opcode != "NOP"),
            sum(begin <= spans[number][0] and spans[number][1] <= end for begin, end in spans) if number >= 0 else 0,
        )
        for number in range(-1, len(spans))
    ]
    return Assembly(parts[0], tuple(parts[1:]))


def disassemble(cubin: bytes) -> Assembly:
    """Machine code of the one kernel in a cubin, read by Triton's own nvdisasm."""
    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return read(subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout)
