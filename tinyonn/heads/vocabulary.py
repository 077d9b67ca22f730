"""Whether a tokenizer is its model's."""

from __future__ import annotations

from torch import nn

from ..errors import InputError


def num_embeddings(model: nn.Module) -> int:
    """Tokens that a transformers model has embeddings of.

    Raises:
        InputError: it has none.
    """
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        embeddings = None
    known = getattr(embeddings, "num_embeddings", None)
    if not isinstance(known, int):
        raise InputError(f"model_path must hold a model that reads tokens, got {type(model).__name__}, which has no embeddings of tokens.")
    return known


def check_vocabulary(known: int, largest: int, model: str) -> None:
    """Refuses token ids that a model has no embedding for.

    Args:
        known: `num_embeddings` of the model.
        largest: token id in the texts.
        model: its folder or name, for the message.

    Raises:
        InputError: naming all three.
    """
    if largest >= known:
        wanted = f"model_path must hold a tokenizer of the model's {known} tokens"
        raise InputError(f"{wanted}, got {model}, whose tokenizer gives the token id {largest}.")
