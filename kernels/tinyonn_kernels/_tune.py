"""Autotuning: each kernel has several configurations, and trials find the fastest once for each kind and size of input.

A table lists the configurations for the constants of a launch and for ARCH, the compute capability, with the best guess first. A launch
waits for the GPU only in a trial. Size classes differ by factors of four, because the best tiles for a short prompt are not the best for
64k tokens. A table with one configuration needs no trial.

In the interpreter and under `torch.use_deterministic_algorithms(True)`, the first configuration runs without a trial: tiles of different
sizes sum in different orders, so another configuration may change the last bits. `forced` selects a configuration by number.
Results are kept in Triton's cache folder for later processes. A trial of a kernel that adds to a tensor adds to an empty one of its size.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from . import INTERPRETED

Table = Callable[..., list[triton.Config]]
SMALL_BITS = 21  # inputs of up to 2^21 values (2k tokens of 16 heads of 64) are one size class

DEFAULT_ARCH = 90  # where there is no GPU


class Choice(NamedTuple):
    """What a launch settled on.

    Attributes:
        kernel: its name.
        configuration: the fastest one.
        tried: configurations that were tried, with those that did not compile; 0 if an earlier process tried them.
    """

    kernel: str
    configuration: str
    tried: int


class Choices(list[Choice]):
    """What launches settle on for the first time in this process, and how many launches there were, of all tuned kernels."""

    launches = 0


_forced: int | None = None
_choices: Choices | None = None
_arch: int | None = None
_launched: dict[str, list[str]] = {}


def config(num_warps: int, num_stages: int, maxnreg: int | None = None, **tile: int) -> triton.Config:
    """A configuration. ptxas sometimes targets fewer registers than are available, and spills; `maxnreg` sets the number available."""
    return triton.Config(tile, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)


def size_class(first: Tensor) -> int:
    """0 for up to 2^21 values, plus one for every factor of four. `first` is a kernel's main input."""
    return max(0, (max(first.numel() - 1, 0).bit_length() - SMALL_BITS + 1) // 2)


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(first: Tensor) -> int:
    """Compute capability that a launch on this input compiles for: 90 for H100."""
    if _arch is not None:
        return _arch
    return _capability(first.device) if first.is_cuda else DEFAULT_ARCH


def compiled_for(arch: int, launches: Mapping[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """The same launches, with the tables of an architecture whatever GPU is there."""

    def run(launch: Callable[[], None]) -> None:
        global _arch
        before, _arch = _arch, arch
        try:
            launch()
        finally:
            _arch = before

    return {name: partial(run, launch) for name, launch in launches.items()}


class TunedKernel(Autotuner):
    """A kernel with its table. Triton's key contains only names of arguments, so this class keeps the results of trials apart.

    Attributes:
        caches: results of trials, by size class, length of block lists, softcap and architecture.
    """

    def __init__(self, fn: Any, table: Table, key: list[str], changed: tuple[str, ...]) -> None:
        # The table replaces these placeholders. With fewer than two, Triton would not call it.
        placeholders = [triton.Config({}), triton.Config({})]
        pruned = {"early_config_prune": self._pruned}
        super().__init__(fn, fn.arg_names, placeholders, key, None, None, prune_configs_by=pruned, cache_results=True)
        self.table, self.changed = table, [fn.arg_names.index(name) for name in changed]
        self.slots = fn.arg_names.index("num_slots") if "num_slots" in fn.arg_names else None
        self.caches: defaultdict[tuple[int, ...], dict[Any, triton.Config]] = defaultdict(dict)
        self.kind, self.arch, self.tried = (0, 0, False), DEFAULT_ARCH, 0
        self._offered: dict[tuple[tuple[str, Any], ...], list[triton.Config]] = {}

    def offered(self, constants: dict[str, Any], arch: int) -> list[triton.Config]:
        """Configurations for these constants, without duplicates."""
        key = (("ARCH", arch), *constants.items())
        found = self._offered.get(key)
        if found is None:
            found = self._offered[key] = list({str(one): one for one in self.table(ARCH=arch, **constants)}.values())
        return found

    def _pruned(self, configs: list[triton.Config], named: dict[str, Any], **constants: Any) -> list[triton.Config]:
        return self.offered({name: value for name, value in constants.items() if name in self.arg_names}, self.arch)  # without the grid

    def run(self, *args: Any, **kwargs: Any) -> Any:
        # Triton's key has no sizes. Lists of many blocks want other tiles than short ones, and a softcap takes registers.
        slots = args[self.slots] if self.slots is not None else 0
        self.kind = size_class(args[0]), slots.bit_length(), kwargs.get("CAP", 0.0) > 0
        self.arch = architecture(args[0])
        self.cache = self.caches[*self.kind, self.arch]
        known, self.tried = len(self.cache), 0
        result = super().run(*args, **kwargs)
        if _choices is not None and len(self.cache) > known:
            name = self.base_fn.__name__.strip("_").removesuffix("_kernel")
            _choices.append(Choice(name, str(self.best_config), self.tried))
        return result

    def warmup(self, *args: Any, **kwargs: Any) -> Any:
        self.arch = architecture(args[0])
        return super().warmup(*args, **kwargs)

    def _bench(self, *args: Any, config: triton.Config, **meta: Any) -> Any:
        self.tried += 1
        given = list(args)
        for place in self.changed:
            if given[place] is not None:
                given[place] = torch.empty_strided(
                    given[place].size(), given[place].stride(), dtype=given[place].dtype, device=given[place].device
                )
        return super()._bench(*given, config=config, **meta)

    def check_disk_cache(self, tuning_key: Any, configs: list[triton.Config], bench_fn: Callable[[], None]) -> bool:
        key = (*tuning_key, f"kind {self.kind}")
        try:
            hit = bool(super().check_disk_cache(key, configs, bench_fn))
        except (OSError, ValueError, KeyError, TypeError) as error:  # a folder that cannot be written, or a damaged file
            warnings.warn(f"results of trials are not kept: {type(error).__name__}: {error}", stacklevel=2)
            if tuning_key not in self.cache:
                bench_fn()
            return False
        if hit:
            self.cache[tuning_key] = self.cache.pop(key)
        return hit


def tuned(table: Table, key: list[str], changed: tuple[str, ...] = ()) -> Callable[[Any], TunedKernel]:
    """Decorates a `@triton.jit` kernel. `changed` names tensors that the kernel adds to."""
    return lambda fn: TunedKernel(fn, table, key, changed)


@contextmanager
def choices() -> Iterator[Choices]:
    """Within this context, launches are noted in what it yields."""
    global _choices
    before, found = _choices, Choices()
    _choices = found
    try:
        yield found
    finally:
        _choices = before


@contextmanager
def forced(number: int) -> Iterator[dict[str, list[str]]]:
    """Within this context, every launch uses configuration `number` of its table, or the last one of a shorter table.

    Yields:
        name of each kernel launched -> all configurations of its launches. Numbers below the longest list cover all of them.
    """
    global _forced, _launched
    before, seen = (_forced, _launched), {}
    _forced, _launched = number, seen
    try:
        yield seen
    finally:
        _forced, _launched = before


def launch(kernel: TunedKernel, grid: Callable[[dict[str, Any]], tuple[int, ...]], *args: Any, **constants: Any) -> None:
    """Runs a `tuned` kernel. For tensors without data, compiles every configuration instead, or the one that `forced` selects."""
    if _choices is not None:
        _choices.launches += 1
    run: Any = kernel.fn[grid]
    if args[0].is_meta:
        if _forced is None:
            kernel.warmup(*args, grid=grid, **constants)
            return
        run = partial(kernel.fn.warmup, grid=grid)
    offered = kernel.offered(constants, architecture(args[0]))
    if _forced is not None:
        name = kernel.base_fn.__name__
        known = _launched.setdefault(name, [])
        if len(offered) > len(known):
            known[:] = map(str, offered)
        chosen = offered[min(_forced, len(offered) - 1)]
    elif len(offered) == 1 or INTERPRETED or torch.are_deterministic_algorithms_enabled():
        chosen = offered[0]
    else:
        kernel[grid](*args, **constants)
        return
    run(*args, **constants, **chosen.all_kwargs())
