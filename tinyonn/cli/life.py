"""`tinyonn life`: stores of lives."""

from __future__ import annotations

import itertools
import json
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from .._io.config import read_yaml
from .._io.units import readable_bytes
from ..errors import InputError
from . import screen

life = typer.Typer(help="Look at the stores of lives, go back, fork, compact and check them.")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A store, or the folder of `tinyonn train`.", show_default=False)]
Step = Annotated[int | None, typer.Option("--step", metavar="N", min=0, help="A kept step; the newest if not given.", show_default=False)]
SHOWN = 12  # kept steps in a table
WAIT = 600.0  # seconds for a running training to compact


@life.command()
def show(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Stores, or folders of `tinyonn train`.", show_default=False)],
    page: Annotated[
        Path | None,
        typer.Option("--page", metavar="FILE", help="The page; timeline.html in the first folder if not given.", show_default=False),
    ] = None,
) -> None:
    """Print what the lives are, and draw their timeline: loss, PI, experts, stretches and stops."""
    from ..report.life import LifeLine, write_timeline_page
    from ..store.overview import overview

    lines = []
    for folder in folders:
        found = overview(folder, "DIR")
        records = found.log.effective()
        events = Counter(record["event"] for record in records)
        runs = [record["event"] for record in records if record["event"] in ("stretch", "stop")]
        killed = sum(one == after == "stretch" for one, after in itertools.pairwise(runs))
        parent = "none" if found.parent is None else f"{found.parent['life']}, step {found.parent['step']}"
        last = [record for record in records if record["event"] == "metrics" and record.get("loss") is not None][-1:]
        values: list[tuple[str, object]] = [
            ("life", found.life),
            ("parent", parent),
            ("step", found.steps[-1] if found.steps else "none yet"),
            ("kept", _kept(found.steps)),
            ("stored", readable_bytes(found.stored_bytes)),
            ("stretches", f"{events['stretch']}, {screen.counted(events['stop'], 'stop')}{f', {killed} killed' * bool(killed)}"),
            ("experts", f"{screen.counted(events['birth'], 'birth')}, {screen.counted(events['recycling'], 'recycling')}"),
        ]
        values += [("loss", f"{record['loss']:.3f} at step {record['step']}") for record in last]
        if found.log.torn is not None:
            values.append(("note", "the log ends in a part of a record, which the next run drops"))
        print(f"{screen.printable(str(folder))}\n{screen.rows(values)}\n")
        notes = ["The log ends in a part of a record."] if found.log.torn is not None else []
        lines.append(LifeLine(folder.resolve().name, found.life, found.parent, records, found.steps, found.stored_bytes, notes))
    target = page or folders[0] / "timeline.html"
    write_timeline_page(target, lines)
    print(f"Open {target.resolve()}")


@life.command()
def log(
    folder: Folder,
    event: Annotated[list[str] | None, typer.Option("--event", metavar="NAME", help="Only these events.", show_default=False)] = None,
    last: Annotated[int | None, typer.Option("--last", metavar="N", min=1, help="Only the last N.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON lines.")] = False,
) -> None:
    """Print the log of a life."""
    from ..store.life_log import LOG, read_life_log
    from ..store.overview import find_store

    found = read_life_log(find_store(folder, "DIR") / LOG)
    records = [record for record in found.records if not event or record["event"] in event]
    if event and not records:
        known = sorted({record["event"] for record in found.records})
        raise InputError(f"--event must be one of {', '.join(known)}, got {', '.join(event)}.")
    for record in records[-last:] if last else records:
        if as_json:
            print(json.dumps(record))
            continue
        fields = {name: value for name, value in record.items() if name not in ("number", "time", "event", "step", "crc")}
        details = ", ".join(f"{name} {_words(name, value)}" for name, value in fields.items())
        line = f"{record['number']:>6}  {record['time'][:19]}  step {record['step']:<8} {record['event']:<10} {details}"
        print(screen.printable(line.rstrip()))
    if found.torn is not None:
        screen.say("the log ends in a part of a record, which the next run drops")


@life.command()
def restore(folder: Folder, step: Step = None) -> None:
    """Go back to a kept step; the steps after it are forgotten.

    `tinyonn life fork` keeps them elsewhere first. Also brings back the manifest before a damaged one.
    """
    from ..store.overview import find_store
    from ..store.rewinding import rewind

    store = find_store(folder, "DIR")
    print(f"step {rewind(store, step)} is the newest now")


@life.command()
def fork(
    folder: Folder,
    target: Annotated[Path, typer.Argument(metavar="NEW", help="A new folder.", show_default=False)],
    step: Step = None,
) -> None:
    """Begin a new life from a kept step; it shares the segments of the old one.

    A fork of a folder of `tinyonn train` is such a folder too. Its first run may change texts, learning rate, thresholds and more;
    `docs/life.md` lists them. A fork of `tinyonn train arc` goes on with the options of its parent.
    """
    from ..life.forking import fork_life, is_training, linked_bytes
    from ..store.overview import find_store

    find_store(folder, "DIR")
    screen.say(f"files of {readable_bytes(linked_bytes(folder, step))} are shared by hard links, or copied to another disk")
    made = fork_life(folder, target, step)
    assert made.parent is not None
    lines: list[tuple[str, object]] = [
        ("life", made.life), ("parent", f"{made.parent['life']}, step {made.parent['step']}"), ("folder", target)
    ]  # fmt: skip
    if is_training(target):
        options = target / "options.yaml"
        on_arc = ["arc"] if "data" in read_yaml(options, "NEW") else []
        command = ["tinyonn", "train", *on_arc, "--config", str(options), "--output-dir", str(target), "--steps", "N"]
        lines.append(("go on", shlex.join(command)))
    print(screen.rows(lines))


@life.command()
def compact(folder: Folder) -> None:
    """Drop what no kept step needs, and merge segments; a running training does it itself, between two saves."""
    from ..store.life_log import LOG, read_life_log
    from ..store.overview import find_store
    from ..store.saving import REQUEST

    source = find_store(folder, "DIR")
    if _compacted(source):
        return
    (source / REQUEST).touch()
    with screen.Progress("waiting for the training that uses the store"):
        end = time.monotonic() + WAIT
        while (source / REQUEST).exists() and time.monotonic() < end:
            if _compacted(source):  # the training ended
                return
            time.sleep(0.2)
    if (source / REQUEST).exists():
        print("the training compacts at its next save")
        return
    compactions = [record for record in read_life_log(source / LOG).records if record["event"] == "compact"]
    if compactions and "failed" in compactions[-1]:
        raise InputError(f"the training could not compact the store: {compactions[-1]['failed']}")
    print("the training compacted the store")


@life.command()
def verify(folder: Folder) -> None:
    """Read all of a store, and compare every checksum. The exit code is 1 if something is damaged."""
    from ..store.overview import find_store
    from ..store.verification import verify as check

    source = find_store(folder, "DIR")
    with screen.Progress("checking segments"):
        found = check(source)
    size = readable_bytes(found.bytes)
    if not found.faults:
        print(
            f"ok       {source}: {screen.counted(found.files, 'segment')}, {size}, {screen.counted(len(found.readable), 'step')} readable"
        )
        return
    for fault in found.faults[:SHOWN]:
        print(f"DAMAGED  {screen.printable(fault)}")
    if len(found.faults) > SHOWN:
        print(f"         and {len(found.faults) - SHOWN:,} more")
    print(f"         readable: {_kept(found.readable)}; lost: {_kept(found.lost)}")
    if found.lost and found.readable:
        print(f"         `tinyonn life restore {folder} --step {found.readable[-1]}` goes back to the last readable step")
    raise typer.Exit(1)


def _compacted(source: Path) -> bool:
    """Compacts a store if no training uses it; returns whether it did."""
    from ..store.compaction import compact as run
    from ..store.rewinding import editing
    from ..store.saving import REQUEST

    with editing(source, required=False) as ledger:
        if ledger is None:
            return False
        (source / REQUEST).unlink(missing_ok=True)
        total = int(ledger.files()["size"].sum())
        screen.say(f"merging segments of {readable_bytes(total)}, which takes at most as much room meanwhile")
        found = run(ledger)
    before, after = readable_bytes(found.bytes_before), readable_bytes(found.bytes_after)
    print(f"{before} in {screen.counted(found.files_before, 'file')} before, {after} in {found.files_after} after")
    return True


def _kept(steps: list[int]) -> str:
    if len(steps) <= SHOWN:
        return ", ".join(map(str, steps)) or "none"
    return f"{len(steps):,} steps, {', '.join(map(str, steps[:3]))}, …, {', '.join(map(str, steps[-3:]))}"


def _words(name: str, value: Any) -> str:
    if name != "changed":
        return _short(value)
    from ..report.life.timeline import changed_options

    return changed_options(value) or "nothing"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
