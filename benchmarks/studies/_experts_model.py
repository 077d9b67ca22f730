"""Language models of the study of experts: one Llama, whose MLPs are dense or mixtures of many small experts.

N tokens, F features, E experts, I neurons of an expert, k experts per token
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from _study import stdlib_bytes
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tinyonn.nn import DynMoE
from tinyonn.ops import expert_mlp

DENSE, SWITCH, LOSS_FREE, RELU = "dense of equal active size", "top-k, balance loss", "top-k, loss-free balance", "ReLU routing"
QUANTILES, OURS, BLIND, LEARNED = "expert thresholds", "DynMoE", "DynMoE without surprise", "DynMoE, learned thresholds"
ARMS = (DENSE, SWITCH, LOSS_FREE, QUANTILES, RELU, OURS, BLIND, LEARNED)
BALANCE = 0.01  # weight of the balance loss, as in Switch Transformer
BIAS_STEP = 1e-3  # of loss-free balancing, as published
FIRST_L1, L1_FACTOR = 1e-8, 1.2  # of ReMoE, as published
DYN_MOE: dict[str, dict[str, Any]] = {
    QUANTILES: {"thresholds": "quantile", "combine": "sigmoid", "level": 0.0, "demand": 0.0},
    OURS: {},
    BLIND: {"demand": 0.0},
    LEARNED: {"thresholds": "learned"},
}
CONSTANTS = {"balance": BALANCE, "bias step": BIAS_STEP, "L1": [FIRST_L1, L1_FACTOR], "arms": {**dict.fromkeys(ARMS), **DYN_MOE}}


@dataclass(frozen=True)
class Settings:
    """Sizes of the study."""

    width: int = 384
    layers: int = 3
    experts: int = 64
    neurons: int = 64
    k: int = 4
    tokens: int = 128
    batch: int = 2
    steps: int = 1500
    rates: tuple[float, ...] = (2.5e-4, 3.5e-4, 5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3)
    first_rates: tuple[float, ...] = (7e-4, 1e-3)  # others are tried while the best has a neighbour that is not
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int = 384  # of the evaluation


class Mixture(nn.Module):
    """Experts that start like those of `DynMoE`, with routing of other methods. `loss` is of the last call."""

    def __init__(self, settings: Settings, kind: str) -> None:
        super().__init__()
        self.kind, self.k, self.slots = kind, settings.k, 4 * settings.k
        width, experts, neurons = settings.width, settings.experts, settings.neurons
        self.router = nn.Linear(width, experts, bias=False)
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.empty(experts, *shape)) for shape in ((2 * neurons, width), (width, neurons))
        )
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("counts", torch.zeros(experts, dtype=torch.int64))  # tokens of each expert in the evaluation
        self.l1, self.least = FIRST_L1, 0.0
        self.loss: Tensor = torch.zeros(())

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, 1)
        index, weights = self.choose(self.router(x))
        if not self.training:
            self.counts += torch.bincount(index.flatten(), minlength=len(self.bias) + 1)[:-1]
        return expert_mlp(x, self.gate_up_proj, self.down_proj, index, weights).view_as(hidden_states)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        experts = logits.shape[1]
        if self.kind == SWITCH:
            shares = logits.softmax(-1)
            weights, index = shares.topk(self.k, -1)
            load = torch.bincount(index.flatten(), minlength=experts) / index.numel()
            self.loss = BALANCE * experts * (load * shares.mean(0)).sum()
            return index, weights / weights.sum(-1, keepdim=True)
        if self.kind == LOSS_FREE:
            scores = logits.sigmoid()
            index = (scores + self.bias).topk(self.k, -1).indices
            if self.training:
                load = torch.bincount(index.flatten(), minlength=experts).float()
                self.bias += BIAS_STEP * (load.mean() - load).sign()
            weights = scores.gather(1, index)
            return index, weights / weights.sum(-1, keepdim=True)
        gates = logits.relu()
        top = gates.topk(self.slots, -1)
        load = (gates.detach() > 0).float().mean(0) * experts / self.k
        self.loss = self.l1 * (load * gates.mean(0)).sum()
        if self.training:
            self.l1 *= L1_FACTOR if (gates > 0).sum() > self.k * len(gates) else 1 / L1_FACTOR
        return torch.where(top.values > max(self.least, 0.0), top.indices, experts), top.values / self.k  # a weight of 0 is no expert


def new_model(settings: Settings, arm: str, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=settings.width, intermediate_size=settings.k * settings.neurons, num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 32, head_dim=32, max_position_embeddings=settings.tokens,
        initializer_range=settings.width**-0.5, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if arm != DENSE:
        for number, layer in enumerate(model.model.layers):
            layer.mlp = new_mixture(settings, arm, seed * settings.layers + number)
    return model


def new_mixture(settings: Settings, arm: str, seed: int) -> Mixture | DynMoE:
    """A mixture whose router and experts start from the same weights for a seed, whatever the arm."""
    mixture: Mixture | DynMoE
    if arm in DYN_MOE:
        mixture = DynMoE(settings.width, settings.neurons, settings.experts, target_k=settings.k, **DYN_MOE[arm])
        torch.manual_seed(seed)
        mixture.router.reset_parameters()
    else:
        mixture = Mixture(settings, arm)
        torch.manual_seed(seed)
        nn.init.normal_(mixture.router.weight, std=settings.width**-0.5)
    for weight in (mixture.gate_up_proj, mixture.down_proj):
        nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
    return mixture


class Texts:
    """Source of the standard library, byte by byte; a tenth of the files is for the choice of learning rates, one for the evaluation."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.training, self.choice, self.evaluation = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in stdlib_bytes())

    def draw(self, text: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        """(B, tokens + 1)."""
        starts = torch.randint(len(text) - self.tokens, (batch,), generator=generator)
        return torch.stack([text[start : start + self.tokens + 1] for start in starts]).long()


def row_losses(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean loss of each row, (B,)."""
    logits = model(input_ids=rows[:, :-1]).logits
    return functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(-1)
