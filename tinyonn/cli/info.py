"""`tinyonn info`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._io.units import readable_bytes
from . import screen

if TYPE_CHECKING:
    from ..mscan.convert import Description

# Metadata shown first, in this order.
FIRST = ("model", "topic", "corpus", "credit", "targets", "dtype", "store", "generate")
HASHES = ("sha256", "hash")


def info(
    file: Annotated[Path, typer.Argument(help="A .mscan file, or the name of a set of ranks.", show_default=False)],
    layout: Annotated[bool, typer.Option("--layout", help="List every weight with its blocks.")] = False,
    sequences: Annotated[int, typer.Option(metavar="N", min=0, help="List the first N sequences.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show the contents of a .mscan file."""
    from ..mscan.convert import describe

    found = describe(file)
    listed = _sequences(file, sequences) if sequences else []
    if as_json:
        print(json.dumps({**_as_json(found), "first_sequences": listed} if sequences else _as_json(found), indent=2, ensure_ascii=False))
        return
    parts = [screen.rows(_summary(found))]
    if found.metadata:
        parts.append(screen.rows(_metadata(found.metadata)))
    if layout:
        lines = [(entry.name, entry.out_features, entry.blocks, entry.base) for entry in found.layout]
        parts.append(screen.columns(("weight", "features", "blocks", "first"), lines))
    if listed:
        keys = ("sequence", "tokens", "loss", "text")
        lines_of_text = [(row["sequence_id"], row["tokens"], _loss(row["loss"]), _start(row["text"])) for row in listed]
        parts.append(screen.columns(keys, lines_of_text, right=(1, 2)))
    print("\n\n".join(parts))


def _summary(found: Description) -> list[tuple[str, object]]:
    planes = found.sequences_with_planes
    kept = "values of all" if planes == found.sequences else f"values of {screen.number(planes)}, only sums of the others"
    lines: list[tuple[str, object]] = [
        ("file", f"{found.path}, {readable_bytes(found.size)}, .mscan version {found.version}"),
        ("sequences", f"{screen.number(found.sequences)}, {screen.counted(found.tokens, 'token')}; {kept if planes else 'only sums'}"),
        (
            "blocks",
            f"{screen.number(found.blocks)}: {screen.counted(len(found.layout), 'weight')}, {screen.counted(found.layers, 'layer')}",
        ),
    ]
    if planes and math.isfinite(found.bytes_per_value):
        lines.append(("size", f"{found.bytes_per_value:.2f} bytes a value, all else included"))
    return lines + [("missing" if index == 0 else "", text) for index, text in enumerate(found.missing)]


def _metadata(metadata: dict[str, Any]) -> list[tuple[str, object]]:
    names = [name for name in FIRST if name in metadata] + [name for name in metadata if name not in FIRST]
    return [(name, _value(name, metadata[name])) for name in names if metadata[name] is not None]


def _value(name: str, value: object) -> str:
    if isinstance(value, (dict, list)):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:57]}... ({len(value)} entries; --json shows all)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and name.endswith(HASHES):
        return value[:16]
    return screen.number(value) if name == "parameters" and isinstance(value, int) else str(value)


def _as_json(found: Description) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "version": found.version,
        "size": found.size,
        "sequences": found.sequences,
        "sequences_with_planes": found.sequences_with_planes,
        "tokens": found.tokens,
        "blocks": found.blocks,
        "groups": found.groups,
        "layout": [
            {"name": entry.name, "out_features": entry.out_features, "blocks": entry.blocks, "base": entry.base} for entry in found.layout
        ],
        "missing": found.missing,
        "metadata": found.metadata,
    }


def _sequences(file: Path, count: int) -> list[dict[str, Any]]:
    import numpy as np

    from ..mscan import MscanReader

    rows = []
    with MscanReader(file) as reader:
        for index in range(min(count, len(reader.sequences))):
            sequence = reader.sequences[index]
            losses = np.asarray(sequence.loss, np.float64)
            labelled = losses[~np.isnan(losses)]
            loss = float(labelled.mean()) if labelled.size else None
            rows.append({"sequence_id": sequence.sequence_id, "tokens": int(sequence.num_tokens), "loss": loss, "text": sequence.text})
    return rows


def _loss(value: float | None) -> str:
    return "--" if value is None else f"{value:.3f}"


def _start(text: str | None) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= 40 else f"{line[:37]}..."
