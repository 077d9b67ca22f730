"""Options of a conversion of MLPs, checked before a model is changed, and the construction of one mixture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...errors import InputError, reason
from ...nn import DynMoE
from ...nn.dyn_moe import GatingLoss, RoutingKind
from ...ops._checks import check_number, check_size
from ...ops.experts.expert_mlp import SurpriseKind
from .._converted import check_fields


@dataclass
class DynMoEOptions:
    """Options that all layers of a converted model share.

    Attributes:
        num_experts: E, number of experts per layer.
        target_k: number of experts per token that `sparse_diversity_loss` aims at.
        min_experts, max_experts: bounds of the number of experts per token.
        scale: scale of the routers' sigmoids.
        gating_loss, surprise_kind, checkpoint: see `nn.DynMoE`.
        routing, surprise_budget: see `nn.DynMoE`; None becomes a budget of 1, with which a token uses all experts.
    """

    num_experts: int
    target_k: float
    min_experts: int
    max_experts: int
    scale: float = 1.0
    gating_loss: GatingLoss = "both"
    surprise_kind: SurpriseKind = "down_proj"
    checkpoint: bool = False
    routing: RoutingKind = "threshold"
    surprise_budget: float | None = None

    def __post_init__(self) -> None:
        if self.routing == "budget" and self.surprise_budget is None:
            self.surprise_budget = 1.0
        check_size("num_experts", self.num_experts)
        check_number("target_k", self.target_k)
        check_number("scale", self.scale, above=0, at_most=10)  # beyond, float32 sigmoids of large cosines are one number
        check_size("max_experts", self.max_experts, 0)
        if self.max_experts > self.num_experts:
            raise ValueError(
                f"max_experts must be 1 … {self.num_experts} and at least min_experts, got {self.max_experts} and {self.min_experts}."
            )
        # A mixture without memory checks the rest.
        build(self, LayerSizes(1, 1, "silu", False, False, False, 0.0), device=torch.device("meta"), dtype=torch.float32)


@dataclass
class LayerSizes:
    """Options of `nn.DynMoE` in which layers may differ.

    Attributes:
        intermediate_size: of one expert.
        target_k: the layer's part of the budget; None for that of all layers.
    """

    hidden_size: int
    intermediate_size: int
    activation: str
    gated: bool
    bias: bool
    output_bias: bool
    dropout: float
    target_k: float | None = None


def of_mapping(kind: type, given: Any, source: str) -> Any:
    """An instance of one of the classes above. Raises InputError, which names an unknown or missing field."""
    check_fields(kind, given, source)
    try:
        return kind(**given)
    except TypeError as error:
        raise InputError(f"{source} must have all fields of {kind.__name__}: {reason(error)}") from None


def build(options: DynMoEOptions, sizes: LayerSizes, *, device: torch.device, dtype: torch.dtype) -> DynMoE:
    """A mixture with uninitialised expert weights. Its parameters are ordinary tensors also within inference mode."""
    with torch.inference_mode(False):
        own = {name: value for name, value in asdict(sizes).items() if value is not None}
        kwargs = {**asdict(options), **own}
        return DynMoE(**kwargs, combine="unit", thresholds="learned", form="sigmoid_cosine", device=device, dtype=dtype)
