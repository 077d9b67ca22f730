"""What the kernels' trials of configurations find, for the layers above."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


def noted_choices() -> AbstractContextManager[Any]:
    """See `tinyonn_kernels._tune.choices`."""
    from tinyonn_kernels._tune import choices

    return choices()
