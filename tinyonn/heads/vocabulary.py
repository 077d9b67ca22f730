"""Vocabulary of a model."""

from __future__ import annotations

from torch import nn

from ..errors import InputError


def num_embeddings(model: nn.Module) -> int:
    """Number of tokens with an embedding in a transformers model.

    Raises:
        InputError: the model has no token embeddings.
    """
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        embeddings = None
    known = getattr(embeddings, "num_embeddings", None)
    if not isinstance(known, int):
        raise InputError(f"model_path must hold a model that reads tokens, got {type(model).__name__}, which has no embeddings of tokens.")
    return known
