"""`kernels/resources.json`: what every kernel uses, in every configuration that users get, on every supported GPU. For tests.

    python -m tinyonn.testing.resources refresh FILE MODULE...   compile what changed, and write the file (`make kernels`)
    python -m tinyonn.testing.resources check FILE MODULE...     print what is wrong with the file, and fail (`make test`)

One line of the file is one compiled kernel: its name, the launch of `MODULE.offered`, the configuration and the architecture, then what it
uses (`Usage`) and the hash of all that decides it (`Build.digest`). A module may be a package: all of its modules with `offered` are meant.

`check` compiles little. A hash that differs from the file's is an error, and so is a missing line or one too many. Spills, shared
memory and products that are computed twice are judged in every line. Then it compiles lines drawn by `--seed`: `--changed` of those that
differ from `--before`, and `--sample` of the rest. A figure that the compiler does not confirm is an error.

Neither works under TRITON_INTERPRET=1, where there is nothing to compile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import random
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from .triton import ARCHS, Build, Usage, builds_of

FIGURES = ("registers", "stack", "local", "looped", "duplicated", "shared")
REMEDY = "run `make kernels`"
AGAIN = "Run `make kernels KERNELS_ARGS=--all`"

_builds: dict[str, Build] = {}  # what the processes that compile share


def listed(modules: Iterable[str]) -> dict[str, Build]:
    """Key -> build of all that the modules offer on every architecture. Nothing is compiled."""
    builds: dict[str, Build] = {}
    for module in _with_offered(modules):
        for arch in ARCHS:
            for label, launch in module.offered(arch).items():
                for build in builds_of(launch, arch, label):
                    key, number = build.key, 2
                    while key in builds and builds[key].digest != build.digest:
                        key, number = f"{build.key} #{number}", number + 1
                    builds[key] = build
    return builds


def _with_offered(modules: Iterable[str]) -> Iterator[Any]:
    for name in modules:
        module = importlib.import_module(name)
        if hasattr(module, "offered"):
            yield module
        if hasattr(module, "__path__"):
            yield from _with_offered(f"{name}.{found.name}" for found in pkgutil.iter_modules(module.__path__))


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Key -> figures and hash; empty where there is no such file."""
    return json.loads(file.read_text()) if file.exists() else {}


def write(file: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Sorted, one line an entry, so that a diff shows what a change did."""
    lines = [f"{json.dumps(key)}: {json.dumps(entries[key], sort_keys=True)}" for key in sorted(entries)]
    temporary = file.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.replace(file)


def compiled(builds: dict[str, Build]) -> dict[str, dict[str, Any]]:
    """Key -> figures and hash, by the compiler. Equal builds are compiled once."""
    _builds.clear()
    _builds.update({build.digest: build for build in builds.values()})
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), multiprocessing.get_context("fork")) as pool:
        by_digest = dict(zip(_builds, pool.map(_figures, _builds), strict=True))
    return {key: by_digest[build.digest] for key, build in builds.items()}


def _figures(digest: str) -> dict[str, Any]:
    usage = _builds[digest].compile()
    return {name: getattr(usage, name) for name in FIGURES} | {"hash": digest}


def refresh(file: Path, modules: Iterable[str], everything: bool = False) -> int:
    """Brings the file up to date; returns how many lines were compiled."""
    builds = listed(modules)
    known = {} if everything else {entry["hash"]: entry for entry in read(file).values()}
    changed = {key: build for key, build in builds.items() if build.digest not in known}
    fresh = compiled(changed) if changed else {}
    write(file, {key: fresh.get(key) or known[build.digest] for key, build in builds.items()})
    return len(changed)


def check(
    file: Path, modules: Iterable[str], before: Path | None = None, seed: str = "", changed: int = 0, sample: int = 0
) -> tuple[list[str], list[str]]:
    """What is wrong with the file, and the lines that were compiled to find out."""
    builds, entries = listed(modules), read(file)
    complaints = [f"{key} is missing; {REMEDY}." for key in sorted(builds.keys() - entries.keys())]
    complaints += [f"{key} is a line of the file, but nothing launches it; {REMEDY}." for key in sorted(entries.keys() - builds.keys())]
    current = []
    for key in sorted(builds.keys() & entries.keys()):
        if builds[key].digest == entries[key]["hash"]:
            current.append(key)
        else:
            complaints.append(f"{key} has changed since the file was written; {REMEDY}.")
    for key, entry in entries.items():
        name, *_, arch = key.partition(" #")[0].split(" ")
        usage = Usage(name, key, int(arch.removeprefix("sm_")), **{figure: entry[figure] for figure in FIGURES})
        complaints += usage.complaints()

    old = read(before) if before else entries
    differing = [key for key in current if old.get(key) != entries[key]]
    draw = random.Random(seed)
    drawn = draw.sample(differing, min(changed, len(differing)))
    rest = [key for key in current if key not in drawn]
    drawn += draw.sample(rest, min(sample, len(rest)))
    for key, entry in compiled({key: builds[key] for key in drawn}).items():
        complaints += [
            f"{key} must have {figure} {entry[figure]}, as compiled; the file has {entries[key][figure]}. {AGAIN}."
            for figure in FIGURES
            if entry[figure] != entries[key][figure]
        ]
    return complaints, drawn


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tinyonn.testing.resources", description="What every kernel uses on every GPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    refreshing = commands.add_parser("refresh", help="compile what changed, and write the file")
    refreshing.add_argument("--all", action="store_true", help="compile everything, as if there were no file")
    checking = commands.add_parser("check", help="print what is wrong with the file, and fail")
    checking.add_argument("--before", type=Path, help="the file before the change, for --changed")
    checking.add_argument("--seed", default="", help="decides which lines are compiled")
    checking.add_argument("--changed", type=int, default=0, metavar="N", help="compile N lines that differ from --before (default: 0)")
    checking.add_argument("--sample", type=int, default=0, metavar="N", help="compile N of the other lines (default: 0)")
    for command in (refreshing, checking):
        command.add_argument("file", type=Path)
        command.add_argument("modules", nargs="+")
    given = parser.parse_args(arguments)
    if given.command == "refresh":
        print(f"{given.file}: {refresh(given.file, given.modules, given.all)} lines compiled")
        return 0
    complaints, drawn = check(given.file, given.modules, given.before, given.seed, given.changed, given.sample)
    print("\n".join([*complaints, *(f"compiled: {key}" for key in drawn)]))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
