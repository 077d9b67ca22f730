"""The end of a command that ran in several processes."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def end(run: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with the exit code that it returns.

    gloo's threads hold the tensors of a collective until after it returned, and need the interpreter's lock to release them. A thread that
    waits for the lock when the interpreter ends aborts the process ("terminate called without an active exception"), and torchrun then
    ends the other processes while they write. So a process in a group ends without the interpreter's end, as those of multiprocessing do.
    """
    try:
        code = run()
    except (Exception, KeyboardInterrupt) as error:
        if not _in_group():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    if not _in_group():
        sys.exit(code)
    if not code:  # after an error, a collective may have begun that others never reach; destroying its group would wait for it
        from torch import distributed

        # DistributedDataParallel, in a cycle with the trainer, must not hold the group last: it would wait for the group's threads with the
        # interpreter's lock, for which they may wait.
        gc.collect()
        distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None or closed
            stream.flush()
    os._exit(code)


def _in_group() -> bool:
    """Whether this process is in a process group; does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
