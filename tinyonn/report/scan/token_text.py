"""Token ids as the pieces of text they stand for.

A `.mscan` file names its model and the hash of its tokenizer, and holds token ids and whole texts, but no vocabulary. The
tokenizer is looked for on this machine alone (nothing is downloaded): where the caller says, where the scan found its model, in
the folder that the model's name spells, in the cache of converted models, in the Hugging Face cache. One whose hash differs is never used.
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
    """What is used of a `tokenizers.Tokenizer`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


def find_tokenizer(metadata: Mapping[str, Any], tokenizer: str | os.PathLike[str] | None = None) -> Decoder | None:
    """The scan's tokenizer, or None where this machine has none that fits.

    Args:
        metadata: of the file; `model_path`, `model` and `tokenizer_sha256` are read.
        tokenizer: folder of the model, or its tokenizer.json.

    Raises:
        InputError: `tokenizer` is given and holds no tokenizer, or another one than the scan used.
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
        # A name alone proves nothing: without the hash any tokenizer of that name might stand there.
        if has_tokenizer(folder) and isinstance(wanted, str) and tokenizer_hash(folder) == wanted:
            return _load(folder)
    return None


def token_pieces(decoder: Decoder, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    A character spread over several tokens stands at the last of them; the others are empty. Joined, the pieces are the decoded
    text.
    """
    pieces = []
    start = end = 0  # the text of ids[start:end] is known to be whole characters
    for position in range(len(token_ids)):
        before = decoder.decode(list(token_ids[start:end]), skip_special_tokens=False)
        now = decoder.decode(list(token_ids[start : position + 1]), skip_special_tokens=False)
        # A byte-level character has at most four bytes; more waiting tokens are broken text, shown as it is.
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
    # vocab.json with merges.txt, vocab.txt, tokenizer.model: transformers builds the tokenizer, as it did for the scan.
    from transformers import AutoTokenizer

    try:
        built: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # what a damaged file brings down in transformers has no common type
        raise InputError(f"tokenizer must be one that transformers reads, got {folder}: {reason(error, 100)}") from error
    decoder: Decoder = getattr(built, "backend_tokenizer", built)
    return decoder
