"""One thread that does jobs in their order, with a bound on the bytes that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .errors import CLOSED, StoreError

MOST_JOBS = 64  # a process that is killed loses what waits


class Background:
    """A thread that does jobs in their order.

    An error of a job is raised by the next call, and the jobs after it are not done. Jobs that wait are done before the interpreter ends.

    Args:
        max_bytes: bytes of the jobs that wait or run, at most; a larger job waits until it is alone. There are at most 64 such jobs.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self._pool = ThreadPoolExecutor(1, "tinyonn-store")
        self._changed = threading.Condition()
        self._bytes = self._jobs = 0
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None], size: int = 0) -> None:
        """Adds a job; waits for room.

        Raises:
            BaseException: that of an earlier job.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._jobs or self._has_room(size))
            self._raise()
            try:
                self._pool.submit(self._run, job, size)
            except RuntimeError:  # after close()
                raise StoreError(CLOSED) from None
            self._bytes += size
            self._jobs += 1

    def wait(self) -> None:
        """Waits until all jobs are done.

        Raises:
            BaseException: that of a job.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)
            self._raise()

    def check(self) -> None:
        """Raises the error of an earlier job, if there was one."""
        with self._changed:
            self._raise()

    def close(self) -> None:
        """Does what waits, and ends the thread; raises nothing."""
        self._pool.shutdown(wait=True)

    def _has_room(self, size: int) -> bool:
        return self._bytes + size <= self._max and self._jobs < MOST_JOBS

    def _run(self, job: Callable[[], None], size: int) -> None:
        error = None
        if self._error is None:
            try:
                job()
            except BaseException as found:
                error = found
        with self._changed:
            self._error = self._error or error
            self._bytes -= size
            self._jobs -= 1
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
