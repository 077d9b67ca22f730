"""The files in FOLDER/log, cut to a step."""

from __future__ import annotations

import json
from pathlib import Path

from .._io.files import write_atomically
from ..report.life.data import read_lines

LINES = ("metrics.jsonl", "events.jsonl", "choices.jsonl")
SNAPSHOT = "experts.json"  # of the last line
SAMPLE = "sample.json"  # of the end of a run, after its model is written


def cut_log(source: Path, target: Path, step: int) -> None:
    """Writes the lines up to a step of the log in `source` into the log in `target`, which may be the same folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in LINES:
        kept = [line for line in read_lines(source / name) if line["step"] <= step]
        write_atomically(target / name, "".join(json.dumps(line) + "\n" for line in kept))
    try:
        text = (source / SNAPSHOT).read_text(encoding="utf-8")
        early = json.loads(text)["step"] <= step
    except (OSError, ValueError, KeyError, TypeError):
        early = False
    if early:
        write_atomically(target / SNAPSHOT, text)
    else:
        (target / SNAPSHOT).unlink(missing_ok=True)


def ended_step(log: Path) -> int | None:
    """Step of the model, that of the last run that came to its end; None if there was none, or if it was of an earlier version."""
    try:
        found: int = json.loads((log / SAMPLE).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found
