"""Named tuples of the registered op `expert_linear`. They define the order of its arguments.

N tokens, F features, E experts, O outputs, K slots of a token
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearInputs(NamedTuple):
    """Tensors of a call; see `expert_linear`. Rows are those of tokens, or of slots only if there are weights."""

    hidden_states: Tensor
    weight: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor | None
    bias: Tensor | None


class LinearOrder(NamedTuple):
    """The fields of a `SlotOrder`; None if the call sorts its slots itself."""

    slots: Tensor | None = None
    offsets: Tensor | None = None
    tile_expert: Tensor | None = None
    tile_row: Tensor | None = None


class LinearProbe(NamedTuple):
    surprise: Tensor | None


class LinearSaved(NamedTuple):
    grad_out: Tensor


class LinearWanted(NamedTuple):
    """Results that backward computes: gradients of hidden_states, of weight and bias, of top_k_weights, and the surprise."""

    grad_hidden: bool
    grad_weight: bool
    grad_weights: bool
    grad_probe: bool


class LinearGradients(NamedTuple):
    """Gradients, and the surprise (N, K); None for what is not wanted."""

    hidden_states: Tensor | None
    weight: Tensor | None
    top_k_weights: Tensor | None
    bias: Tensor | None
    surprise: Tensor | None
