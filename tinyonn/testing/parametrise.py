"""The implementations that a test is parametrised with. Needs pytest."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch


def _triton_skip_reason() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device, and TRITON_INTERPRET is not set"
    return None


IMPLS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(_triton_skip_reason() is not None, reason=_triton_skip_reason() or "")),
]
"""Parameters of a test over implementations: "torch" and "triton", which runs on the GPU, else in Triton's interpreter."""
