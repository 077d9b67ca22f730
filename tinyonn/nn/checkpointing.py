"""Activation checkpointing that keeps the results of DynNSA."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .. import ops  # noqa: F401  # registers the ops used below

KEPT = (torch.ops.tinyonn.dyn_nsa.default, torch.ops.tinyonn.select_blocks.default)


def keep_selection() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` for `torch.utils.checkpoint.checkpoint` that keeps DynNSA and its selection instead of recomputing them.

        checkpoint(layer, hidden_states, use_reentrant=False, context_fn=keep_selection)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_selection})  # transformers

    Without it both are recomputed and select the same blocks, because they are deterministic. With it a layer keeps its input and what
    the backward of `dyn_nsa` needs: the output, the selected branch and the lists. This costs memory and saves time.
    """

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
