"""Block norms compared with the time to read the tensor once, which is their lower bound."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tinyonn import reference
from tinyonn.ops import block_norms
from tinyonn.testing import assert_close_rms
from tinyonn.testing.timing import Comparison


def _check(x: torch.Tensor):
    expected = reference.block_norms(x[:64].cpu())

    def check(outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        errors = {}
        for name, norms in outputs.items():
            if name != "copy":
                limit = 1e-2 if name == "norm in the input's dtype" else 1e-5
                errors[name] = assert_close_rms(norms[:64], expected, limit, name)
        return errors

    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_block_norms_on_the_cpu(compare, dtype):
    x = torch.randn(4096, 4096).to(dtype)
    blocks, target = x.unflatten(-1, (64, 64)), torch.empty_like(x)
    candidates = {
        "tinyonn": lambda: block_norms(x),
        "vector_norm": lambda: torch.linalg.vector_norm(blocks, dim=-1, dtype=torch.float32),
        "square, sum, sqrt": lambda: blocks.float().square().sum(-1).sqrt(),
        "copy": lambda: target.copy_(x),
    }
    if dtype == torch.bfloat16:
        candidates["norm in the input's dtype"] = lambda: torch.linalg.vector_norm(blocks, dim=-1)
    name = str(dtype).removeprefix("torch.")
    compare(f"block norms, 4096 x 4096, {name}, CPU", candidates, _check(x), info={"bytes_read": x.nbytes})


@pytest.mark.parametrize("features", [4160, 4100], ids=["whole-blocks", "ragged"])
def test_ragged_last_block_on_the_cpu(compare, features):
    x = torch.randn(4096, features)
    padding = -features % 64
    compare(
        f"block norms, 4096 x {features}, last block {features % 64 or 64} wide, CPU",
        {
            "tinyonn": lambda: block_norms(x),
            "pad, vector_norm": lambda: torch.linalg.vector_norm(torch.nn.functional.pad(x, (0, padding)).unflatten(-1, (-1, 64)), dim=-1),
        },
        _check(x),
        info={"bytes_read": x.nbytes},
    )


def against_copy_bandwidth(compare: Callable[..., Comparison], rows: int, features: int, dtype: str, device: str) -> None:
    x = torch.randn(rows, features, device=device).to(getattr(torch, dtype))
    target = torch.empty_like(x)
    result = compare(
        f"block norms, {rows} x {features}, {dtype}, {device}",
        {"tinyonn": lambda: block_norms(x), "copy": lambda: target.copy_(x)},
        _check(x),
        info={"goal": "read bandwidth >= 0.85 of copy's", "bytes_read": x.nbytes},
    )
    # A copy reads and writes every byte. Block norms read each byte once and write one float32 for every 64 values.
    moved = x.nbytes + x.numel() // 64 * 4
    result.info["copy, GB/s"] = round(2 * x.nbytes / result.median("copy") / 1e9, 1)
    result.info["share of copy's bandwidth"] = round((moved / result.median("tinyonn")) / (2 * x.nbytes / result.median("copy")), 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_block_norms_against_copy_bandwidth(compare, dtype):
    against_copy_bandwidth(compare, 65536, 8192, dtype, "cuda")
