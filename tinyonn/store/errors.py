"""Errors of a store; each is one line that names the file and what is still readable."""

from __future__ import annotations

from ..errors import InputError

CLOSED = "the store must be open, but close() was called."


class StoreError(InputError):
    """A store cannot be read, written or continued; the message names the file or tensor and the remedy."""


class DamagedStoreError(StoreError):
    """A file of a store does not have the content that was written."""
