"""Local credit against the equivalent decoding loops.

The model is SmolLM2-135M. The loop that keeps its graph is measured on four layers of the same sizes, because its cost grows quickly.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tinyonn.cli.demo.smollm2 import prepare_smollm2
from tinyonn.errors import InputError
from tinyonn.ops import block_norms
from tinyonn.scan.engine.engine import ScanEngine, SequenceScan

TOKENS = 256


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        folder = prepare_smollm2()
    except InputError as error:
        pytest.skip(str(error))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def four_layers() -> PreTrainedModel:
    """SmolLM2's sizes, four layers, a small vocabulary, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tokens_of(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def detached_loop(model: PreTrainedModel, tokens: Tensor) -> np.ndarray:
    """(T−1, blocks) gradient norms, token by token over a detached cache. The best form of the loop: hooks compute the norms, as in
    the scan, and no weight gradient is formed."""
    rows = []
    cache = DynamicCache(config=model.config)
    for t in range(tokens.shape[1] - 1):
        norms = _step(model, tokens[:, t : t + 1], tokens[:, t + 1], cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        rows.append(norms)
    return torch.cat(rows).numpy()


def weight_gradient_loop(model: PreTrainedModel, tokens: Tensor) -> np.ndarray:
    """The usual detached loop: backward into the weights, then norms of blocks of their gradients."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    rows = []
    cache = DynamicCache(config=model.config)
    model.requires_grad_(True)
    try:
        for t in range(tokens.shape[1] - 1):
            logits = model(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits[:, -1]
            functional.cross_entropy(logits.float(), tokens[:, t + 1]).backward()
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            rows.append(torch.cat([part.norm()[None] for module in linears for part in module.weight.grad.split(64)]))
            model.zero_grad(set_to_none=True)
    finally:
        model.requires_grad_(False)
    return torch.stack(rows).numpy()


def kept_graph_loop(model: PreTrainedModel, tokens: Tensor) -> None:
    """The same loop with the cache in the graph: backward of each token runs through all earlier tokens."""
    cache = DynamicCache(config=model.config)
    for t in range(tokens.shape[1] - 1):
        _step(model, tokens[:, t : t + 1], tokens[:, t + 1], cache, retain_graph=True)


def _step(model: PreTrainedModel, token: Tensor, label: Tensor, cache: DynamicCache, retain_graph: bool = False) -> Tensor:
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    norms: dict[int, Tensor] = {}

    def hook(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        scale = args[0].detach()[0].norm(dim=-1)
        place = id(module)
        output.register_hook(lambda grad: norms.__setitem__(place, block_norms(grad[0], row_scale=scale)))

    handles = [module.register_forward_hook(hook) for module in linears]
    embeddings = model.get_input_embeddings()(token).requires_grad_()
    logits = model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).logits[:, -1]
    for handle in handles:
        handle.remove()
    torch.autograd.grad(functional.cross_entropy(logits.float(), label), embeddings, retain_graph=retain_graph)
    return torch.cat([norms[id(module)] for module in linears], 1)


def norms_agree(scan: list[SequenceScan], loop: np.ndarray) -> None:
    error = np.linalg.norm(scan[0].grad_norm[:-1] - loop) / np.linalg.norm(loop)
    assert error < 1e-3, error


def test_local_credit_against_detached_loop(compare, smollm2):
    tokens = tokens_of(smollm2, 1, TOKENS)
    peer = copy.deepcopy(smollm2)  # without the engine's hooks
    with ScanEngine(smollm2, credit="local") as engine:
        result = compare(
            f"local credit of SmolLM2-135M, {TOKENS} tokens",
            {"scan, credit=local": lambda: engine.scan(tokens), "loop, detached cache": lambda: detached_loop(peer, tokens)},
            lambda out: norms_agree(out["scan, credit=local"], out["loop, detached cache"]),
            rounds=3,
            info={"goal": "loop >= 20x"},
        )
    result.info["tokens a second"] = {name: round(TOKENS / result.median(name)) for name in result.samples}


@pytest.mark.parametrize("length", [16, 32, 64, 128])
def test_local_credit_against_other_loops(compare, four_layers, length):
    tokens = tokens_of(four_layers, 1, length)
    peer = copy.deepcopy(four_layers)
    with ScanEngine(four_layers, credit="local") as engine:
        compare(
            f"local credit, four layers, {length} tokens",
            {
                "scan, credit=local": lambda: engine.scan(tokens),
                "loop, detached cache": lambda: detached_loop(peer, tokens),
                "loop, detached cache, weight gradients": lambda: weight_gradient_loop(peer, tokens),
                "loop, kept graph": lambda: kept_graph_loop(peer, tokens),
            },
            lambda out: [norms_agree(out["scan, credit=local"], out[name]) for name in out if "detached" in name],
            rounds=3,
            info={"goal": "the kept graph's time a token grows with length"},
        )
