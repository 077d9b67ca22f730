"""Report of one scan: maps of layers and modules, highest and lowest blocks and heads, and a replay of the text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..._io.files import write_atomically
from ...errors import InputError, did_you_mean
from ...mscan import MscanReader
from ..html.maps import NORMALISATIONS, HeatMap, Normalisation, scan_maps
from . import figures
from .data import ScanData, collect
from .grid import short_names
from .heads import head_scores
from .replay import REPLAY_ORDERS, ReplayOrder, choose_sequences, read_replay
from .report_page import profile_series, report_page, scan_title
from .token_text import find_tokenizer


@dataclass(frozen=True)
class ReportResult:
    """Files of a report: the page and its PNGs."""

    html: Path
    pngs: tuple[Path, ...]


def write_report(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    normalise: Normalisation = "layer",
    top: int = 20,
    replay: int = 8,
    replay_order: ReplayOrder = "surprising",
    tokenizer: str | os.PathLike[str] | None = None,
    figures_too: bool = True,
) -> ReportResult:
    """Writes one self-contained HTML page about a scan, and PNGs of its maps next to it.

    Args:
        path: a `.mscan` file, or one of a set of ranks.
        output: the page; the PNGs are named after it, with `-maps.png` and `-profiles.png`.
        normalise: normalisation of the PNGs and, at first, of the maps: "layer", "global" or "none" (`tinyonn.report.html.maps`).
        top: number of listed blocks and heads.
        replay: number of sequences in the replay; 0 for none.
        replay_order: "surprising" for the sequences with the highest mean loss, or "first".
        tokenizer: folder of the model, or its tokenizer.json, to show tokens as text; None uses the scan's own if this machine has
            it, and token ids otherwise.
        figures_too: whether to draw the PNGs; needs matplotlib.

    Returns:
        The files written.

    Raises:
        InputError: wrong option, an output that cannot be written, missing matplotlib, or a layout that cannot be shown.
        MscanError: the file is damaged.
    """
    choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("normalise", normalise, NORMALISATIONS),
        ("replay_order", replay_order, REPLAY_ORDERS),
    )
    for option, value, known in choices:
        if value not in known:
            raise InputError(f"{option} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")
    check_least(top=(top, 1), replay=(replay, 0))
    target = check_output(output)
    if figures_too:
        figures.require_matplotlib("figures_too=False")
    name = Path(path).name
    with MscanReader(path) as reader:
        data = collect(reader, name)
        decoder = find_tokenizer(data.metadata, tokenizer)
        sequences = read_replay(reader, data.grid, choose_sequences(data.losses, replay, replay_order), decoder)
        dropped = list(reader.report)
    maps = scan_maps(data)
    heads = head_scores(data.grid, data.totals, data.metadata)
    write_atomically(target, report_page(data, maps, heads, sequences, normalise, top, replay_order, dropped))
    drawn = _draw(target, data, maps, normalise) if figures_too else ()
    return ReportResult(target, drawn)


def check_least(**options: tuple[int, int]) -> None:
    """Raises InputError unless each option, a value and its minimum, is large enough."""
    for name, (value, least) in options.items():
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}.")


def png_paths(target: Path, *parts: str) -> tuple[Path, ...]:
    """Paths of the figures of a page, such as page-maps.png for page.html."""
    return tuple(target.with_name(f"{target.stem}-{part}.png") for part in parts)


def check_output(output: str | os.PathLike[str]) -> Path:
    """Path of the page, checked before any work.

    Raises:
        InputError: it does not end in .html, is a folder, or its folder does not exist.
    """
    target = Path(output)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"output must end in .html, got {os.fspath(output)}.")
    if target.is_dir():
        raise InputError(f"output must be a file, got the folder {os.fspath(output)}.")
    if not target.parent.is_dir():
        raise InputError(f"output must be in a folder that exists, got {os.fspath(output)}.")
    return target


def _draw(target: Path, data: ScanData, maps: Sequence[HeatMap], normalise: Normalisation) -> tuple[Path, ...]:
    title = scan_title(data)
    short = short_names(data.grid.modules)
    paths = png_paths(target, "maps", "profiles")
    figures.draw_maps(paths[0], title, maps, normalise, data.grid.layers, short)
    panels = [(f"{heat_map.title} ({heat_map.unit})", profile_series(data, heat_map.values), not heat_map.signed) for heat_map in maps[:3]]
    figures.draw_profiles(paths[1], title, panels, data.grid.layers)
    return paths
