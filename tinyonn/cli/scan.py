"""`tinyonn scan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._io.units import not_finite_parts, readable_bytes
from ..scan.config import ScanConfig
from . import screen
from .options import ConfigFile, configured, takes_options

if TYPE_CHECKING:
    from ..scan import ScanEstimate, ScanProgress, ScanResult


@takes_options(ScanConfig, before="credit")
def scan(
    given: Mapping[str, Any],
    config: ConfigFile = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print bytes per token and peak memory, and stop.")] = False,
) -> None:
    """Scan a model over a corpus into a .mscan file.

    The file holds the activation and gradient norm of every block of every weight matrix, for every token. To continue an interrupted
    scan, run the same command again. Under torchrun, each process scans its share (torchrun --nproc-per-node 2 -m tinyonn scan ...).
    """
    options = configured(ScanConfig, config, given)
    from ..scan import estimate_scan, run_scan
    from ..scan.distributed import World

    if estimate:
        print(_estimate_screen(options, estimate_scan(options)))
        return
    leader = World.from_environment().rank == 0
    with screen.Progress("loading", enabled=leader) as bar:
        result = run_scan(options, progress=lambda state: show_progress(bar, state, options.topic_name))
    if leader:
        print(_result_screen(result))


def show_progress(bar: screen.Progress, state: ScanProgress, topic: str) -> None:
    if state.stage == "loading":
        bar.update(None, f"the model, for {topic}", label="loading")
        return
    text = f"{screen.number(state.done)}/{screen.counted(state.total, 'text')}"
    if state.tokens:
        text += f", {screen.number(state.tokens_per_second)} tokens/s, loss {state.loss:.2f}"
    bar.update(state.done / max(state.total, 1), text, label=f"scanning {topic}")


def _estimate_screen(options: ScanConfig, found: ScanEstimate) -> str:
    about = "about " if found.sampled else ""
    verdicts = [
        ("disk", f"{readable_bytes(found.total_bytes)}, {readable_bytes(found.disk_free_bytes)} free", found.fits_disk),
        ("peak memory", f"{readable_bytes(found.peak_memory_bytes)}, {readable_bytes(found.available_bytes)} free", found.fits_memory),
    ]
    shares = (("weights", found.weight_bytes), ("activations", found.activation_bytes), ("planes", found.plane_bytes))
    parts = ", ".join(f"{name} {readable_bytes(count)}" for name, count in shares)
    lines: list[tuple[str, object]] = [
        ("output", options.output),
        ("sequences", f"{about}{screen.number(found.sequences)}" + _skipped(found.skipped)),
        (
            "tokens",
            f"{about}{screen.number(found.tokens)}" + (f" ({screen.counted(found.truncated, 'text')} cut)" if found.truncated else ""),
        ),
        ("blocks a token", screen.number(found.blocks)),
        ("bytes a token", screen.number(found.bytes_per_token)),
    ]
    lines += [(name, text if fits else f"{text}: TOO LITTLE") for name, text, fits in verdicts]
    lines += [("", parts), ("runs on", f"{found.device}, {found.dtype}")]
    if not found.fits_memory:
        lines.append(("to lower", "--batch-size, --max-length, --dtype bf16"))
    if not found.fits_disk:
        lines.append(("to lower", "--store integral, --limit, --targets"))
    return screen.rows(lines)


def _result_screen(result: ScanResult) -> str:
    resumed = f", {screen.number(result.resumed)} were there" if result.resumed else ""
    lines: list[tuple[str, object]] = [
        ("scanned", f"{screen.counted(result.sequences, 'sequence')}, {screen.counted(result.tokens, 'token')}{resumed}"),
        ("loss", f"{result.loss:.3f} nats a token"),
        ("time", f"{screen.duration(result.seconds)}, loading included"),
        ("speed", f"{screen.number(result.tokens_per_second)} tokens/s, loading left out"),
    ]
    if result.truncated:
        lines.append(("cut", f"{screen.counted(result.truncated, 'text')} at --max-length"))
    for count, what in ((result.not_finite, "loss and gradients"), (result.overflowed, "norms of some tokens, left out of all sums,")):
        if count:
            found = f"{what} in {screen.number(count)} of {screen.counted(result.sequences, 'sequence')}"
            lines.append(("not finite", "\n".join([found, *not_finite_parts(result.dtype)])))
    for name, reasons in (("not measured", result.not_measured), ("not proven", result.unproven)):
        if reasons:
            from ..mscan.not_measured import describe  # imports numpy

            lines.append((name, "\n".join(describe(reasons, gap=":\n", between=",\n"))))
    if result.skipped:
        lines.append(("left out", ", ".join(f"{screen.number(count)} {reason}" for reason, count in result.skipped.items())))
    share = f" (rank {result.rank} of {result.world_size})" if result.world_size > 1 else ""
    return screen.rows([*lines, ("written", f"{result.path}, {readable_bytes(result.path.stat().st_size)}{share}")])


def _skipped(skipped: Any) -> str:
    return f" ({', '.join(f'{screen.number(count)} {reason}' for reason, count in skipped.items())} left out)" if skipped else ""
