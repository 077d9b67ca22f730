"""What the processes of a run do together: on the first one, on all, and with the errors of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import InputError
from .errors import DamagedStoreError, StoreError
from .manifest import Manifest

_T = TypeVar("_T")


class Processes:
    """The processes of a run, with a group of their own; one without a group, if it is alone.

    Attributes:
        rank: of this process.
        number: of processes.
        group: None for one process, and after `close`.
    """

    def __init__(self) -> None:
        self.group: Any = None
        self.rank, self.number = 0, 1
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            self.group = distributed.new_group(backend="gloo")
            self.rank, self.number = distributed.get_rank(), distributed.get_world_size()

    def close(self) -> None:
        """Ends the group and its threads; afterwards this process is alone.

        Waits for no other process: each collective here has returned, so what others still read from it is sent already. One that begins
        another collective gets an error.
        """
        group, self.group = self.group, None
        if group is not None:
            with contextlib.suppress(ValueError):  # the program destroyed all groups before
                distributed.destroy_process_group(group)

    def for_dcp(self) -> dict[str, Any]:
        """Arguments of `dcp.save` and `dcp.load`."""
        return {"process_group": self.group, "no_dist": self.group is None}

    def on_first(self, run: Callable[[], Any]) -> Any:
        """Runs on the first process, and returns or raises the same on all."""
        if self.group is None:
            return run()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = run()
            except Exception as error:
                box[1] = sendable(error)
        distributed.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def together(self, run: Callable[[], _T]) -> _T:
        """Runs on all processes, and returns what this one found; an error of one is raised on all."""
        found: list[_T] = []
        error: Exception | None = None
        try:
            found.append(run())
        except Exception as caught:
            error = caught
        if self.group is not None:
            errors: list[Any] = [None] * self.number
            distributed.all_gather_object(errors, None if error is None else sendable(error), group=self.group)
            error = error or next((one for one in errors if one is not None), None)
        if error is not None:
            raise error
        return found[0]


def call(folder: Path, run: Callable[[], None]) -> None:
    """Runs, with the error of dcp as the one that caused it, and the newest step of the store that is intact."""
    try:
        run()
    except CheckpointException as error:
        causes = [one for one, _ in error.failures.values()]
        cause = next((one for one in causes if isinstance(one, StoreError)), causes[0])
        if isinstance(cause, StoreError) and not isinstance(cause, DamagedStoreError):
            cause = StoreError(f"{cause} {_intact(folder)}".strip())
        raise cause from error


def sendable(error: Exception) -> Exception:
    """An error for another process: ours as they are, others by their text, because not all can be pickled."""
    return error if isinstance(error, InputError) else RuntimeError(f"{type(error).__name__}: {error}")


def _intact(folder: Path) -> str:
    with contextlib.suppress(StoreError):
        newest = Manifest.read(folder).newest
        return "" if newest is None else f"Step {newest} is intact."
    return ""
