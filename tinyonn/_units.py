"""Numbers for people."""

from __future__ import annotations


def readable_bytes(count: float) -> str:
    """Bytes in powers of ten, as disks count: 512 B, 4.2 MB, 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
