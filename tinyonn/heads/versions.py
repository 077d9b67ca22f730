"""Which packages a run used, for its summary."""

from __future__ import annotations

import platform

import numpy as np
import torch
import transformers

from .. import __version__


def package_versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, by name."""
    return {
        "tinyonn": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
