"""Activation checkpointing that keeps what DynNSA computed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .. import ops  # noqa: F401  # registers the ops that are named here

KEPT = (torch.ops.tinyonn.dyn_nsa.default, torch.ops.tinyonn.select_blocks.default)


def keep_selection() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`: a checkpointed region is recomputed without its DynNSA and its selection.

        checkpoint(layer, hidden_states, use_reentrant=False, context_fn=keep_selection)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_selection})  # transformers

    Without it both are recomputed, and select the same blocks: they are deterministic. With it a layer keeps, beside its input, what the
    backward of `dyn_nsa` needs: its output, the selected branch and the lists; so memory grows and time falls.
    """

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
