"""Available memory, and recognition of errors for lack of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int:
    """Free bytes: of a GPU, or of the machine within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limit = _container_free()
    machine = _machine_available()
    return machine if limit is None else min(machine, limit)


def _machine_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: use the physical size
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_free() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    # Cached file pages count as used but are reclaimed on demand.
    return max(int(limit) - used + int(cached.get("inactive_file", 0)) + int(cached.get("active_file", 0)), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a CPU or GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(r"can't allocate memory|out of memory|bad_alloc", str(error)))
