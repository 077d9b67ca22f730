"""`tinyonn tune`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from . import screen


def tune(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model with attention or experts of tinyonn.", show_default=False)],
    tokens: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="Sequence length to tune for; repeat the option for several. [default: 4096]"),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences in a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="Precision: auto (the checkpoint's own), fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str, typer.Option(help="GPU: auto, cuda or cuda:N.")] = "auto",
    backward: Annotated[bool, typer.Option("--backward/--no-backward", help="Tune backward too.")] = True,
) -> None:
    """Find the fastest configurations of the kernels that a model uses on this GPU, and keep them. It needs a GPU.

    Triton compiles a kernel when it first runs, and tries several configurations for each kind and size of input. This command does so
    ahead of training, with random tokens. Later processes find the results in Triton's cache folder. Calibrate the model first: the fastest
    configuration depends on how many key blocks a query reads.
    """
    from ..hf import tuning
    from ..hf.loading import load_config, load_model, resolve_device, resolve_dtype, resolve_model

    place = resolve_device(device)
    tuning.check_gpu(place)
    folder = resolve_model(model)
    loaded = load_model(folder, resolve_dtype(dtype, place, load_config(folder)), place, training=backward)
    lengths, begin = tokens or [4096], time.monotonic()
    with screen.Progress("tuning") as bar:
        done = iter(range(len(lengths)))
        found = tuning.tune_kernels(
            loaded,
            lengths,
            batch=batch,
            backward=backward,
            progress=lambda n: bar.update(next(done) / len(lengths), f"{screen.number(n)} tokens"),
        )
    took = screen.duration(time.monotonic() - begin)
    if not found:
        print(f"Nothing to tune: each kernel has one configuration for these inputs, or was tuned in this process ({took}).")
        return
    lines = [(one.kernel, screen.number(one.tokens), one.tried, one.configuration) for one in found]
    print(screen.columns(("kernel", "tokens", "tried", "configuration"), lines, right=(1, 2)))
    print(f"\nTuned in {took}; later processes use what was found.")
