"""Live experts that get no token: found from running counts, with one warning for each layer.

E experts
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import listed

if TYPE_CHECKING:
    from .routed import Routed

TOKENS = 1000  # that each expert would have had, if all got the same number, before one without a token counts as dead


class Watch:
    """Tokens of each expert of one mixture over a window of counted tokens, on the host.

    Attributes:
        warned: whether its dead experts were told.
        last: the mixture's counts and their tokens at the last call; None after they were reset.
    """

    def __init__(self) -> None:
        self.warned = False
        self.last: tuple[Tensor, int] | None = None
        self._restart()

    def _restart(self) -> None:
        self._window: Tensor | None = None
        self._seen = 0

    def dead(self, module: Routed) -> tuple[int, int] | None:
        """Number of live experts without a token in a window that ends now, and its tokens; None while the window is too short.

        Reads the counts of the module. Tokens that were counted between the last call and a `reset_statistics` are left out.
        """
        counts, seen = module.expert_counts.cpu().clone(), int(module.tokens_seen)
        before, of_before = (torch.zeros_like(counts), 0) if self.last is None else self.last
        self.last = counts, seen
        self._window = counts - before if self._window is None else self._window + counts - before
        self._seen += seen - of_before
        live = module.router.expert_mask.cpu()
        if self._seen < TOKENS * int(live.sum()) / module.router.target_k:
            return None
        found = int((live & (self._window == 0)).sum()), self._seen
        self._restart()
        return found


def warn_of_dead_experts(layers: Mapping[str, Routed], stacklevel: int = 3) -> None:
    """Warns in one line of mixtures whose live experts get no token, each once."""
    found = []
    tokens = 0
    learned = False
    for name, module in layers.items():
        if module.watch.warned or (dead := module.watch.dead(module)) is None or not dead[0]:
            continue
        module.watch.warned = True
        found.append(f"{dead[0]} of {int(module.router.expert_mask.sum())}" + (f" of {name}" if name else ""))
        tokens = max(tokens, dead[1])
        router = module.router
        learned = learned or (module.routing_kind == "threshold" and router.price is None and router.combine != "unit")
    if found:
        remedy = "; thresholds='balanced' gives every expert tokens" if learned else ""
        warnings.warn(f"live experts got none of the last {tokens:,} tokens: {listed(found, 5, width=200)}{remedy}.", stacklevel=stacklevel)
