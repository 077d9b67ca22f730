"""Text of token ids.

A `.mscan` file holds its model's name, the hash of its tokenizer, token ids and texts, but no vocabulary. The tokenizer is searched
on this machine only, without downloads: at the caller's path, at the scan's model path, at the model's name as a path, in the cache
of converted models and in the Hugging Face cache. A tokenizer with a different hash is never used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..._io.folders import VOCABULARY_FILES, cache_folder, has_tokenizer, tokenizer_hash
from ...errors import InputError, reason

_REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """Methods of `tokenizers.Tokenizer` in use."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


def find_tokenizer(metadata: Mapping[str, Any], tokenizer: str | os.PathLike[str] | None = None) -> Decoder | None:
    """Tokenizer of the scan, or None if this machine does not have it.

    Args:
        metadata: metadata of the file with `model_path`, `model` and `tokenizer_sha256`.
        tokenizer: folder of the model, or its tokenizer.json.

    Raises:
        InputError: `tokenizer` holds no tokenizer, or a different one from the scan's.
    """
    wanted = metadata.get("tokenizer_sha256")
    if tokenizer is not None:
        path = Path(tokenizer).expanduser()
        folder = path.parent if path.is_file() else path
        if not has_tokenizer(folder):
            raise InputError(f"tokenizer must be a folder with a tokenizer, such as tokenizer.json, got {os.fspath(tokenizer)}.")
        if isinstance(wanted, str) and tokenizer_hash(folder) != wanted:
            raise InputError(f"tokenizer must be the one that the scan used (sha256 {wanted[:12]}…), got {os.fspath(tokenizer)}.")
        return _load(folder)
    for folder in _candidates(metadata):
        # A name alone is not enough: the folder may hold any tokenizer.
        if has_tokenizer(folder) and isinstance(wanted, str) and tokenizer_hash(folder) == wanted:
            return _load(folder)
    return None


def token_pieces(decoder: Decoder, token_ids: Sequence[int]) -> list[str]:
    """Text that each token adds to the tokens before it.

    A character of several tokens is the text of the last; the others are empty. The joined pieces equal the decoded text.
    """
    pieces = []
    start = end = 0  # ids[start:end] decode to whole characters
    for position in range(len(token_ids)):
        before = decoder.decode(list(token_ids[start:end]), skip_special_tokens=False)
        now = decoder.decode(list(token_ids[start : position + 1]), skip_special_tokens=False)
        # A byte-level character has at most four bytes; more waiting tokens are invalid text, shown unchanged.
        if now.endswith(_REPLACEMENT) and position - end < 3 and position + 1 < len(token_ids):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        start, end = end, position + 1
    return pieces


def _candidates(metadata: Mapping[str, Any]) -> Iterator[Path]:
    if isinstance(path := metadata.get("model_path"), str) and path:
        yield Path(path).expanduser()
    # The tokenizer of an adapter's scan may be its base model's.
    for model in (metadata.get("model"), metadata.get("base_model")):
        if isinstance(model, str) and model:
            yield Path(model).expanduser()
            yield cache_folder() / Path(model).name
            yield from _hub_cache(model)


def _hub_cache(model: str) -> Iterator[Path]:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return
    for name in VOCABULARY_FILES:
        try:
            found = try_to_load_from_cache(model, name)
        except HFValidationError:
            return
        if isinstance(found, str):
            yield Path(found).parent
            return


def _load(folder: Path) -> Decoder:
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            loaded: Decoder = Tokenizer.from_file(os.fspath(file))
        except Exception as error:  # the Rust side raises bare Exception
            raise InputError(f"tokenizer must be a readable tokenizer.json, got {file}: {reason(error, 100)}") from error
        return loaded
    # For vocab.json with merges.txt, vocab.txt or tokenizer.model, transformers builds the tokenizer, as in the scan.
    from transformers import AutoTokenizer

    try:
        built: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # errors of transformers on damaged files have no common type
        raise InputError(f"tokenizer must be one that transformers reads, got {folder}: {reason(error, 100)}") from error
    decoder: Decoder = getattr(built, "backend_tokenizer", built)
    return decoder
