"""Value checks that cost a pass over the data and a host synchronisation, off unless asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_enabled: ContextVar[bool] = ContextVar("tinyonn_debug", default=False)


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Within this context the ops also check values: NaN and negative norms, index ranges on the device.

    Shapes, dtypes and devices are always checked. The setting belongs to the current thread or task; nested contexts restore
    the outer one.

    Args:
        enabled: False switches the checks off inside an outer `debug()`.
    """
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def debug_enabled() -> bool:
    """Whether the caller is inside `tinyonn.debug()`; not while `torch.compile` traces, which cannot look at values."""
    from torch.compiler import is_compiling  # here, so that importing tinyonn does not import torch

    return not is_compiling() and _enabled.get()
