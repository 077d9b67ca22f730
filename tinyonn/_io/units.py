"""Readable numbers, and explanations of numbers that are not finite."""

from __future__ import annotations


def readable_bytes(count: float) -> str:
    """Bytes in powers of ten: 512 B, 4.2 MB, 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(count: int, name: str) -> str:
    """1 sequence, 12,345 sequences."""
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3:05, 2:01:07."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def not_finite_cause(dtype: object) -> str:
    """`not_finite_parts` as one sentence."""
    return ": ".join(not_finite_parts(dtype))


def not_finite_parts(dtype: object) -> tuple[str, ...]:
    """Reason why losses or norms of a scan are NaN or infinite, and a remedy if the precision is the cause.

    Args:
        dtype: precision of the scan as in its metadata, such as "float16"; None if unknown.
    """
    if dtype == "float16":
        return "float16 ends at 65,504", "scan with --dtype bf16 or fp32, or repair weights that hold NaN."
    return (f"The weights hold NaN or infinity, or values too large for {dtype if isinstance(dtype, str) else 'the precision'}.",)
