"""Oracles of a scan that share no code with it: a weight of its own for every token, and a decoding loop with a detached cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.integrations.moe import ExpertsInterface
from transformers.pytorch_utils import Conv1D

from tinyonn.mscan import MscanReader
from tinyonn.testing import save_tiny_model

BLOCK = 64


def _blocks(x: torch.Tensor) -> np.ndarray:
    """(..., F) -> (..., ceil(F / 64)) norms in float64, one slice at a time."""
    return torch.stack([part.double().pow(2).sum(-1).sqrt() for part in x.detach().split(BLOCK, -1)], -1).numpy()


def _weight_blocks(grad: torch.Tensor, out_dim: int) -> np.ndarray:
    """Norms of 64-row blocks of weight gradients (..., out, in) or (..., in, out): (..., blocks)."""
    rows = grad.double().pow(2).sum(-1 if out_dim == -2 else -2)
    return torch.stack([part.sum(-1).sqrt() for part in rows.split(BLOCK, -1)], -1).numpy()


def _is_experts(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "down_proj", None), torch.nn.Parameter)


def _linears(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(f"{name}.weight", module) for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]


@contextmanager
def own_weights(model: torch.nn.Module) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, dict[int, Any]]]]:
    """Within the block, every token multiplies by its own copy of each weight.

    Yields the copies (T, out, in) by weight name, the outputs (T, out), and for experts the copies and outputs of each token,
    by expert's weight name.
    """
    copies: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    routed: dict[str, dict[int, Any]] = {}
    names = {module: name for name, module in model.named_modules()}

    def hook_for(name: str) -> Callable[..., torch.Tensor]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            x = args[0].reshape(-1, args[0].shape[-1]).clone()  # the model may change it afterwards
            weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
            copies[name] = weight.expand(len(x), *weight.shape).clone().requires_grad_()
            y = torch.einsum("toi,ti->to", copies[name], x)
            if module.bias is not None:
                y = y + module.bias
            outputs[name] = y
            return y.view(output.shape)

        return hook

    def experts(module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = []
        for token in range(len(x)):
            total = torch.zeros_like(x[token])
            for slot, expert in enumerate(index[token].tolist()):
                hidden = x[token]
                for weight_name in ("gate_up_proj", "down_proj"):
                    weight = getattr(module, weight_name)[expert].detach()
                    own = (weight.T if module.is_transposed else weight).clone().requires_grad_()
                    y = own @ hidden
                    if module.has_bias:
                        y = y + getattr(module, f"{weight_name}_bias")[expert]
                    routed.setdefault(f"{names[module]}.{weight_name}.{expert}", {})[token] = (own, y)
                    hidden = module._apply_gate(y) if weight_name == "gate_up_proj" else y
                total = total + weights[token, slot] * hidden
            rows.append(total)
        return torch.stack(rows)

    ExpertsInterface.register("one_weight_per_token", experts)
    handles = [module.register_forward_hook(hook_for(name)) for name, module in _linears(model)]
    before = model.config._experts_implementation
    model.config._experts_implementation = "one_weight_per_token"
    try:
        yield copies, outputs, routed
    finally:
        model.config._experts_implementation = before
        for handle in handles:
            handle.remove()


def full_credit(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, Any]:
    """Per-token norms of one sequence (T,) by weight name -> (T, blocks), with each token's weights its own."""
    with own_weights(model) as (copies, outputs, routed):
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        loss = functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        leaves = [*copies.values(), *(own for pairs in routed.values() for own, _ in pairs.values())]
        grads = iter(torch.autograd.grad(loss.sum(), leaves))
    activation = {name: _blocks(y) for name, y in outputs.items()}
    grad_norm = {name: _weight_blocks(next(grads), -2) for name in copies}
    for name, pairs in routed.items():
        width = -(-next(iter(pairs.values()))[1].shape[-1] // BLOCK)
        activation[name] = np.full((len(tokens), width), np.nan)
        grad_norm[name] = np.full((len(tokens), width), np.nan)
        for token, (_, y) in pairs.items():
            activation[name][token] = _blocks(y)
            grad_norm[name][token] = _weight_blocks(next(grads), -2)
    return {"activation": activation, "grad_norm": grad_norm, "loss": loss.detach().numpy()}


def local_credit(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, Any]:
    """The same by decoding: one token at a time over a cache cut from the graph, its own loss, the weights' ordinary gradient.

    The blocks of an expert that a token was not routed to are 0 here.
    """
    from transformers import DynamicCache

    model.requires_grad_(True)
    cache = DynamicCache(config=model.config)
    grad_norm: dict[str, list[np.ndarray]] = {}
    losses = []
    for t in range(len(tokens) - 1):
        logits = model(input_ids=tokens[None, t : t + 1], past_key_values=cache, use_cache=True).logits[0, -1]
        loss = functional.cross_entropy(logits, tokens[t + 1])
        model.zero_grad(set_to_none=True)
        loss.backward()
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        losses.append(loss.item())
        for name, module in _linears(model):
            grad_norm.setdefault(name, []).append(_weight_blocks(module.weight.grad, -1 if isinstance(module, Conv1D) else -2))
        for name, module in model.named_modules():
            if _is_experts(module):
                for weight in ("gate_up_proj", "down_proj"):
                    for expert, grad in enumerate(getattr(module, weight).grad):
                        norms = _weight_blocks(grad, -1 if module.is_transposed else -2)
                        grad_norm.setdefault(f"{name}.{weight}.{expert}", []).append(norms)
    model.zero_grad(set_to_none=True)
    return {"grad_norm": {name: np.stack(rows) for name, rows in grad_norm.items()}, "loss": np.array(losses)}


@pytest.fixture
def full_credit_oracle() -> Callable[..., dict[str, Any]]:
    return full_credit


@pytest.fixture
def local_credit_oracle() -> Callable[..., dict[str, Any]]:
    return local_credit


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with a tokenizer of one token a character."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """`write_corpus([text or record, …], name="abc_corpus.jsonl")`: a text gets the id of its place, t0, t1, …"""

    def write(records: list[Any], name: str = "abc_corpus.jsonl") -> Path:
        lines = [{"id": f"t{i}", "text": record} if isinstance(record, str) else record for i, record in enumerate(records)]
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def contents() -> Callable[[Path], dict[str, tuple[Any, ...]]]:
    """`contents(path)`: everything a `.mscan` file (or set) holds of each sequence, by id, as bytes and numbers that compare."""

    def read(path: Path) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {}
        with MscanReader(path) as reader:
            for index, sequence in enumerate(reader.sequences):
                assert sequence.sequence_id not in found, f"{sequence.sequence_id} is there twice"
                integral = reader.sequence_integral(index)
                planes = [plane.tobytes() for plane in reader.planes(index)] if sequence.has_records else None
                found[sequence.sequence_id] = (
                    sequence.token_ids.tolist(),
                    sequence.loss.tobytes(),
                    sequence.mask.tolist(),
                    sequence.text,
                    planes,
                    [plane.tobytes() for plane in integral.planes()],
                )
        return found

    return read
