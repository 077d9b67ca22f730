"""Per-token gradient norms of a linear layer, against explicit gradients and against the two norms alone."""

from __future__ import annotations

import pytest
import torch

from tinyonn.ops import token_grad_norms
from tinyonn.testing import assert_close_rms

BLOCK = 64


def _agree(outputs: dict[str, torch.Tensor]) -> None:
    expected = outputs["tinyonn"].double()
    for name, norms in outputs.items():
        assert_close_rms(norms, expected, 1e-5, name)


def test_against_written_out_gradients(compare, device):
    inputs, grad_output = (torch.randn(512, 512, device=device) for _ in range(2))

    def einsum() -> torch.Tensor:
        per_token = torch.einsum("to,ti->toi", grad_output, inputs)
        return per_token.unflatten(1, (-1, BLOCK)).flatten(2).norm(dim=-1)

    compare(
        f"token grad norms, 512 tokens, 512 x 512, by block, {device}",
        {"tinyonn": lambda: token_grad_norms(inputs, grad_output), "einsum": einsum},
        _agree,
        info={"goal": "einsum >= 1000x", "bytes_of_the_gradients": 512**3 * 4},
    )


def test_against_per_sample_gradient_libraries(compare, device):
    inputs, grad_output, weight = (
        torch.randn(512, 512, device=device),
        torch.randn(512, 512, device=device),
        torch.randn(512, 512, device=device),
    )

    def opacus_style() -> torch.Tensor:  # per-sample gradients, then their norms, as a grad sampler computes them
        return torch.einsum("n...i,n...j->nij", grad_output, inputs).flatten(1).norm(dim=1)

    def functional() -> torch.Tensor:  # torch.func: vmap over the gradient of one token
        def loss(weight: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
            return (weight @ x * g).sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, inputs, grad_output).flatten(1).norm(dim=1)

    compare(
        f"token grad norms, 512 tokens, 512 x 512, whole layer, {device}",
        {
            "tinyonn": lambda: token_grad_norms(inputs, grad_output, None),
            "per-sample einsum": opacus_style,
            "torch.func vmap(grad)": functional,
        },
        _agree,
        info={"goal": "per-sample gradients >= 1000x"},
    )


@pytest.mark.parametrize("block_size", [None, BLOCK], ids=["whole-layer", "by-block"])
def test_against_the_two_norms(compare, device, block_size):
    inputs, grad_output = (torch.randn(4096, 4096, device=device) for _ in range(2))
    blocks = grad_output if block_size is None else grad_output.unflatten(-1, (-1, block_size))

    def two_norms() -> torch.Tensor:
        input_norm = inputs.norm(dim=-1)
        return blocks.norm(dim=-1) * (input_norm if block_size is None else input_norm.unsqueeze(-1))

    compare(
        f"token grad norms, 4096 tokens, 4096 x 4096, {'whole layer' if block_size is None else 'by block'}, {device}",
        {"tinyonn": lambda: token_grad_norms(inputs, grad_output, block_size), "two norm calls": two_norms},
        _agree,
        info={"goal": "two norm calls >= 0.83x (tinyonn at most 1.2x their time)", "bytes_read": inputs.nbytes + grad_output.nbytes},
    )
