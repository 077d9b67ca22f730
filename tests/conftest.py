"""What every test shares. The interpreter must be chosen before the first import of triton, so this comes before all else."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules:
        raise RuntimeError("triton must not be imported before tests/conftest.py sets TRITON_INTERPRET, got it in sys.modules.")
    os.environ["TRITON_INTERPRET"] = "1"
    sys.modules["fla"] = None  # type: ignore[assignment]  # transformers calls its kernels wherever it is installed, GPU or not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
