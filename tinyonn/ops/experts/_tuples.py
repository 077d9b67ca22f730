"""Named tuples of the registered op `expert_mlp`: arguments, results, and tensors that backward takes. They define their order.

N tokens, F features, E experts, I neurons of an expert, K slots of a token
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Tensors of a call; see `expert_mlp`."""

    hidden_states: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


class Probe(NamedTuple):
    """Tensor whose gradient is the surprise, and the kind of surprise; see `expert_mlp`."""

    surprise: Tensor | None
    surprise_kind: str


class Layout(NamedTuple):
    """Layout of the weights, and the activation between the two products; see `expert_mlp`. `limit` is 0 for no clamp."""

    activation: str
    gated: bool
    interleaved: bool
    transposed: bool
    limit: float = 0.0


class Saved(NamedTuple):
    """Tensors that only backward takes.

    Attributes:
        pre: (N * K, 2I), inputs of the activation, sorted by expert; gate first with triton, in the order of the weights with torch.
        grad_out: (N, F), gradient of the output.
    """

    pre: Tensor
    grad_out: Tensor


class Wanted(NamedTuple):
    """Results that backward computes: the surprise (None for no surprise), and the gradients of hidden_states, of the first projection and
    its bias, and of the second projection and its bias.
    """

    surprise_kind: str | None = None
    grad_hidden: bool = True
    grad_gate_up: bool = True
    grad_down: bool = True


class Gradients(NamedTuple):
    """Gradients of the inputs, and the surprise (N, K). The registered op returns an empty tensor in place of None."""

    hidden_states: Tensor | None
    gate_up_proj: Tensor | None
    down_proj: Tensor | None
    top_k_weights: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    surprise: Tensor | None
