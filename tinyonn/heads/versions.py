"""Versions of the packages that a run used."""

from __future__ import annotations

import platform

import numpy as np
import torch
import transformers

from .. import __version__


def package_versions() -> dict[str, str]:
    """Package -> version, for the packages that affect the numbers of a run."""
    return {
        "tinyonn": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
