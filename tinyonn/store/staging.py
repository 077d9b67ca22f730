"""What of a state changed since the last save, found by checksums and copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor
from torch.optim import Optimizer

from .errors import CLOSED, StoreError
from .layout import Digest, Layout
from .segment import bytes_of


class Part(NamedTuple):
    """A chunk within this process's tensor: its number in the layout, its first row and its end; end is -1 for all of the tensor."""

    number: int
    begin: int
    end: int


class Staged(NamedTuple):
    """Chunks that changed on this process.

    Attributes:
        tensors: copies by the chunks' names.
        digests: of them.
        aliases: chunks with the content of another one in `tensors`.
        values: checksums of all by their numbers.
    """

    tensors: dict[str, Tensor]
    digests: dict[str, Digest]
    aliases: dict[str, str]
    values: dict[int, int]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def with_(self, other: Staged) -> Staged:
        """Both."""
        return Staged(self.tensors | other.tensors, self.digests | other.digests, self.aliases | other.aliases, self.values | other.values)


class Changes:
    """Finds the chunks that differ from those of the last save.

    Args:
        layout: of the state.
        parts: of this process's tensors, by name.
        known: checksum of each chunk of the layout in the last save; None for one that was never saved.
    """

    def __init__(self, layout: Layout, parts: Mapping[str, list[Part]], known: list[int | None]) -> None:
        self.parts = parts
        self._names = layout.names
        self._known = known

    def find(self, tensors: Mapping[str, Tensor]) -> Staged:
        """Copies the chunks that changed.

        Args:
            tensors: all or some, contiguous and on the CPU.
        """
        found = Staged({}, {}, {}, {})
        seen: dict[tuple[int, int], str] = {}
        for name, data in tensors.items():
            view = bytes_of(data)
            row = len(view) // max(1, data.shape[0]) if data.dim() else 0
            for number, begin, end in self.parts[name]:
                piece = view if end < 0 else view[begin * row : end * row]
                value = xxhash.xxh3_128_intdigest(piece)
                if value == self._known[number]:
                    continue
                found.values[number] = value
                key, title = (value, len(piece)), self._names[number]
                if len(piece) and key in seen:
                    found.aliases[title] = seen[key]
                    continue
                seen[key] = title
                found.tensors[title] = (data if end < 0 else data[begin:end]).detach().clone()
                found.digests[title] = value >> 64, value & 0xFFFFFFFFFFFFFFFF
        return found

    def accept(self, staged: Staged) -> None:
        """From now on these chunks count as saved. Not before they are handed on: what an interrupt drops must be found again."""
        for number, value in staged.values.items():
            self._known[number] = value


class HostCopies:
    """Copies of tensors of accelerators in host memory, made again at the same place by each save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous tensors on the CPU; those of a GPU are copied to pinned memory, all at once."""
        found: dict[str, Tensor] = {}
        devices = set()
        for name, tensor in tensors.items():
            if tensor.device.type == "cpu":
                found[name] = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
                continue
            pinned = tensor.device.type == "cuda"
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            found[name] = buffer.copy_(tensor.detach(), non_blocking=pinned)
            if pinned:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.synchronize(device)
        return found


class Overlap:
    """Reads a state in a thread while the caller goes on; optimisers wait for it before they change what it reads.

    Args:
        optimizers: whose `step` waits.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._pool = ThreadPoolExecutor(1, "tinyonn-store-copy")
        self._job: Future[None] | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._hooks = [optimizer.register_step_pre_hook(lambda *_: self.wait_until_read()) for optimizer in optimizers]

    def start(self, read: Callable[[], Staged], then: Callable[[Staged | Exception], None]) -> None:
        """Calls `read`, during which optimisers wait, and then `then` with what it returned or raised.

        Raises:
            StoreError: after `close`.
        """

        def job() -> None:
            found: Staged | Exception
            try:
                found = read()
            except Exception as error:
                found = error
            finally:
                self._idle.set()
            then(found)

        self._idle.clear()
        try:
            self._job = self._pool.submit(job)
        except RuntimeError:
            self._idle.set()
            raise StoreError(CLOSED) from None

    def wait_until_read(self) -> None:
        """Waits until `read` returned."""
        self._idle.wait()

    def wait(self) -> None:
        """Waits until `then` returned, and raises its error, once."""
        job = self._job
        if job is not None:
            wait((job,))  # an interrupt leaves the job to the next call
            self._job = None
            job.result()

    def close(self) -> None:
        """Ends the thread, and has optimisers wait no longer."""
        self._pool.shutdown(wait=True)
        for hook in self._hooks:
            hook.remove()


class Versions:
    """Notices whether tensors are changed while they are read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._found = [(name, tensor, tensor._version) for name, tensor in tensors.items()]

    def check(self) -> None:
        """StoreError if one was changed."""
        for name, tensor, version in self._found:
            if tensor._version != version:
                raise StoreError(f"{name} must not change between save() and the optimiser's next step; make the store without overlap.")
