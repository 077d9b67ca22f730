"""Damages `.mscan` files in many ways and reads them in every mode: no false value, no crash, no hang.

    damage.py [--files 100000] [--seed 0] [--workers 2] [--keep FOLDER]    a campaign; exit code 1 where a file was misread
    damage.py --case SEED [--keep FOLDER]                                  one file of it again, with the traceback

The files and what they hold come from model_file.py, which was written from docs/mscan.md and imports nothing of tinyonn. A
worker reads them under a limit of memory; one that ends, or says nothing for a while, names the file that it was reading.
"""

from __future__ import annotations

import argparse
import os
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from damage_judge import MODES, read
from damage_kinds import FAMILIES, Family, damaged

MEMORY = 2 << 30  # bytes of address space of a worker
SILENCE = 60  # seconds after which a worker hangs


def families() -> list[Family]:
    return [Family(seed) for seed in range(FAMILIES)]


def case(seed: int, family: Family, path: Path) -> tuple[str, dict[str, str]]:
    kind, data, models = damaged(seed, family)
    path.write_bytes(data)
    return kind, read(path, models, data in [model.data() for model in family.models])


def worker(first: int, step: int, end: int, folder: Path) -> None:
    """Reads the files of every step-th seed; a line before each and one after it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    known = families()
    for seed in range(first, end, step):
        print("reading", seed, flush=True)
        try:
            kind, outcomes = case(seed, known[seed % FAMILIES], folder / "case.mscan")
        except Exception as error:  # whatever a damaged file makes of the reader, MemoryError included, is the finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            print("failed", seed, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})", flush=True)
        else:
            print("read", kind.replace(" ", "_"), *outcomes.values(), sep="\t", flush=True)


class Campaign:
    """Starts workers, listens to them, keeps what failed."""

    def __init__(self, first: int, count: int, workers: int, keep: Path) -> None:
        self.first, self.end, self.workers, self.keep = first, first + count, workers, keep
        self.tally: dict[str, Counter[str]] = {name: Counter() for name in (*MODES, "verify", "recover")}
        self.kinds: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
            running = {k: self._start(k, self.first + k, Path(scratch), lines) for k in range(self.workers)}
            at = dict.fromkeys(running, -1)
            heard = dict.fromkeys(running, time.monotonic())
            while running:
                try:
                    k, line = lines.get(timeout=1)
                except queue.Empty:
                    k, line = -1, ""
                for silent in [n for n in running if time.monotonic() - heard[n] > SILENCE]:
                    running[silent].kill()  # its end comes as a line
                    heard[silent] = time.monotonic()
                if k < 0:
                    continue
                heard[k] = time.monotonic()
                if line is None:
                    code = running.pop(k).wait()
                    if code != 0:
                        self._fail(at[k], f"the reader {'hung' if code == -9 else f'ended with {code}'}", Path(scratch) / str(k))
                        running[k] = self._start(k, at[k] + self.workers, Path(scratch), lines)
                    continue
                self._take(k, line, at, Path(scratch) / str(k))

    def _start(self, k: int, first: int, scratch: Path, lines: queue.Queue) -> subprocess.Popen[str]:
        folder = scratch / str(k)
        folder.mkdir(exist_ok=True)
        command = [sys.executable, __file__, "--worker", *map(str, (first, self.workers, self.end, folder))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put((k, line.rstrip("\n")))
            lines.put((k, None))

        threading.Thread(target=listen, daemon=True).start()
        return process

    def _take(self, k: int, line: str, at: dict[int, int], folder: Path) -> None:
        word, _, rest = line.partition(" " if line.startswith(("reading", "failed")) else "\t")
        if word == "reading":
            at[k] = int(rest)
        elif word == "failed":
            seed, _, message = rest.partition(" ")
            self._fail(int(seed), message, folder)
        else:
            kind, *outcomes = rest.split("\t")
            self.kinds[kind] += 1
            if sum(self.kinds.values()) % 10_000 == 0:
                print(f"{sum(self.kinds.values()):,} files, {len(self.failures)} failed", file=sys.stderr, flush=True)
            for name, outcome in zip(self.tally, outcomes, strict=True):
                self.tally[name][outcome] += 1

    def _fail(self, seed: int, message: str, folder: Path) -> None:
        self.keep.mkdir(parents=True, exist_ok=True)
        kept = self.keep / f"damage-{seed}.mscan"
        if (folder / "case.mscan").exists():
            shutil.copy(folder / "case.mscan", kept)
        self.failures.append(f"seed {seed}: {message}; kept as {kept}")
        print(self.failures[-1], flush=True)

    def lines(self) -> Iterator[str]:
        yield f"{sum(self.kinds.values()):,} files read, seeds {self.first} … {self.end - 1}; {len(self.failures)} failed"
        for name, outcomes in self.tally.items():
            yield f"{name:8} " + ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
        yield "damage   " + ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in self.kinds.most_common())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first file; each has its own")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--keep", type=Path, default=Path("damage-failures"), help="where files that failed are kept")
    parser.add_argument("--case", type=int, help="read the file of this seed alone")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(*map(int, given.worker[:3]), Path(given.worker[3]))
        return 0
    if given.case is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
        path = given.keep / f"damage-{given.case}.mscan"
        print(*case(given.case, Family(given.case % FAMILIES), path), path)
        return 0
    start = time.monotonic()
    campaign = Campaign(given.seed, given.files, given.workers, given.keep)
    campaign.run()
    print(*campaign.lines(), sep="\n")
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
