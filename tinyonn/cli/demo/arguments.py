"""Types of arguments for the `argparse` of a script, whose errors are one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ...errors import InputError


def model_folder(name: str) -> Path:
    """The folder of a model, given the folder or a hub name. The model of a hub name is downloaded.

    Raises:
        argparse.ArgumentTypeError: there is no such model.
    """
    from ...hf.loading import resolve_model

    try:
        return resolve_model(name)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("model_path ")) from None


def at_least(least: int) -> Callable[[str], int]:
    """A type for whole numbers from `least`; any other text is an argparse.ArgumentTypeError."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}.")
        return number

    return whole_number
