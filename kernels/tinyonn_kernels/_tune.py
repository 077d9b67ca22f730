"""Several configurations a kernel: the fastest is found when a kind of input is first seen, the only time that a launch waits for the GPU.

A table gives the configurations for the constants of a launch, the best guess first. That one alone runs under the interpreter, and under
`torch.use_deterministic_algorithms(True)`: tiles of another size add up in another order, so another choice may change the last bits.
`TRITON_CACHE_AUTOTUNING=1` keeps what was found for later processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from . import INTERPRETED

Table = Callable[..., list[triton.Config]]


def config(num_warps: int, num_stages: int, maxnreg: int | None = None, **tile: int) -> triton.Config:
    """Left alone, ptxas sometimes aims at fewer registers than there are, and spills to get there: `maxnreg` says how many there are."""
    return triton.Config(tile, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)


def tuned(table: Table, key: list[str], restore: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Decorates a `@triton.jit` kernel. `restore` names what it adds to, which a trial must leave as it was."""

    def prune(configs: list[triton.Config], named: dict[str, Any], **constants: Any) -> list[triton.Config]:
        offered = list({str(found): found for found in table(**constants)}.values())
        return offered[:1] if INTERPRETED else offered

    # The table has the last word; of fewer than two Triton would not ask.
    placeholders = [triton.Config({}), triton.Config({})]
    return triton.autotune(placeholders, key=key, restore_value=list(restore), prune_configs_by={"early_config_prune": prune})


def launch(kernel: Any, grid: Callable[[dict[str, Any]], tuple[int, ...]], *args: Any, **constants: Any) -> None:
    """Runs a `tuned` kernel. On tensors without data there is nothing to time: each configuration is compiled."""
    if args[0].is_meta:
        kernel.warmup(*args, grid=grid, **constants)
    elif torch.are_deterministic_algorithms_enabled():
        first = kernel.early_config_prune(kernel.configs, {}, **constants)[0]
        kernel.fn[grid](*args, **constants, **first.all_kwargs())
    else:
        kernel[grid](*args, **constants)
