"""Whether a tokenizer is its model's."""

from __future__ import annotations

from typing import Any

from ..errors import InputError


def check_vocabulary(model: Any, largest: int) -> None:
    """Refuses token ids that the model has no embedding for.

    Args:
        model: a transformers model.
        largest: token id in the texts.

    Raises:
        InputError: naming it and the number of embeddings.
    """
    known = model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise InputError(f"model_path must hold a tokenizer of the model's {known} tokens, got one that gives the token id {largest}.")
