"""Block norms: how close to reading the tensor once, which is all they have to do."""

from __future__ import annotations

import pytest
import torch

from tinyonn import reference
from tinyonn.ops import block_norms
from tinyonn.testing import assert_close_rms


def _check(x: torch.Tensor):
    expected = reference.block_norms(x[:64].cpu())

    def check(outputs: dict[str, torch.Tensor]) -> None:
        for name, norms in outputs.items():
            if name != "copy":
                assert_close_rms(norms[:64], expected, 1e-2 if name == "norm in the input's dtype" else 1e-5, name)

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_block_norms_against_copy_bandwidth(compare, dtype):
    x = torch.randn(65536, 8192, device="cuda", dtype=dtype)
    target = torch.empty_like(x)
    result = compare(
        f"block norms, 65536 x 8192, {str(dtype).removeprefix('torch.')}, GPU",
        {"tinyonn": lambda: block_norms(x), "copy": lambda: target.copy_(x)},
        _check(x),
        info={"goal": "read bandwidth >= 0.85 of copy's", "bytes_read": x.nbytes},
    )
    # A copy moves every byte twice. Norms move it once and write a 64th as much, in float32.
    moved = x.nbytes + x.numel() // 64 * 4
    share = (moved / result.median("tinyonn")) / (2 * x.nbytes / result.median("copy"))
    result.info["share_of_copy_bandwidth"] = round(share, 3)
