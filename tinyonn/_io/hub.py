"""Folders of repositories on the Hugging Face hub: cached if possible, else downloaded; a failure is explained in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import InputError, reason

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer


def is_hub_id(name: str) -> bool:
    """Whether a text can be `name` or `owner/name` on the hub, rather than a path."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not name.startswith(".")


def hub_folder(name: str, rule: str, patterns: Sequence[str], complete: Callable[[Path], bool]) -> Path | None:
    """Snapshot of a repository: the cached one if it is complete, else a downloaded one.

    Args:
        name: name on the hub, for which `is_hub_id` is true.
        rule: beginning of the message, "model_path must be ...".
        patterns: glob patterns of the files to download.
        complete: function that checks whether a folder holds all required files.

    Returns:
        The folder; None if the repository on the hub is incomplete.

    Raises:
        InputError: the repository is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    for cached in (True, False):
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=cached))
        except Exception as error:  # the hub raises a dozen types, by version and transport
            if cached:
                continue
            raise InputError(f"{rule}, got {name}: {_why(error)}") from error
        if complete(folder):
            return folder
    return None


def _why(error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    explained: dict[tuple[type[BaseException], ...], str] = {
        (OfflineModeIsEnabled,): "not in the hub's cache, and HF_HUB_OFFLINE forbids downloads; give a folder.",
        (GatedRepoError,): "access requires accepting its terms on the hub; run `hf auth login`, or give a folder.",
        (RepositoryNotFoundError,): "no such folder, and none of that name on the hub (a private one needs `hf auth login`).",
        (LocalEntryNotFoundError, ConnectionError, TimeoutError): "not in the hub's cache, and the hub cannot be reached; give a folder.",
    }
    causes = list(_causes(error))
    return next((why for types, why in explained.items() if any(isinstance(cause, types) for cause in causes)), None) or reason(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
