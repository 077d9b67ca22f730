"""Checks and measures everything on a GPU, from the tree alone: no network, nothing built or installed beforehand.

    python benchmarks/gpu.py                      eight minutes: oracles of every kernel, goals, rest
    python benchmarks/gpu.py --dry-run            list the questions in order, with estimated seconds
    python benchmarks/gpu.py --only "64k|mixture"
    python benchmarks/gpu.py --resume             leave out questions that these sources have answered
    python benchmarks/gpu.py --device cpu         try the script at tiny sizes; its times mean nothing

Also `make gpu` (GPU_ARGS="..."). Needs Python, torch, triton and pytest; a C++ compiler, pybind11 and setuptools for the tests at the end.
Wheels in `.wheels/` (`make gpu-wheels` fetches them) are installed into a temporary folder. Other libraries are measured if installed.

The result of each question is saved at once to a JSON file in benchmarks/results/GPU/questions/; all.json and table.txt beside that folder
always hold all results. If $OUT is set, copies of these two are written there. A question that fails, hangs or crashes is recorded, and the
next one runs. Ctrl-C stops the run and keeps all results so far. The exit code is 1 if a question failed or its answer was wrong, 2 for
wrong arguments and 130 after Ctrl-C. The README's GPU table contains only figures from this script.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from gpu_questions import QUESTIONS, STAGES, Question  # noqa: E402
from gpu_runs import FAILURES, Results, Run, matching, slug  # noqa: E402

PEERS = {  # package -> comparisons that use it, if it is installed
    "transformers": "mixtures of experts, grouped_mm",
    "fla-core": "block-sparse attention",
    "liger-kernel": "mixtures of experts, fused",
    "flash-attn": "dense attention; torch has FlashAttention-2 too",
    "flash-attn-4": "dense attention",
}
NO_GPU = "this machine has no CUDA device"


def describe(versions: dict[str, str | None]) -> list[str]:
    """One line per peer, from the versions that a worker found."""
    return [
        f"{name} {versions[name]}: {what}" if versions.get(name) else f"{name} is not installed, so it is not measured against: {what}"
        for name, what in PEERS.items()
    ]


def commit() -> str:
    """Commit of the checkout, followed by "+" if files have changed; "unknown" outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.strip() else "")


def sources() -> str:
    """Checksum of all measured sources; needs no git."""
    digest = hashlib.sha256()
    for pattern in ("kernels/**/*.py", "tinyonn/**/*.py", "benchmarks/*.py", "csrc/*.[ch]pp"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def install(wheels: Path, site: Path) -> None:
    """Installs wheels one by one, so that one that does not fit does not affect the others."""
    for wheel in sorted(wheels.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
        done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            print(f"{wheel.name} was not installed: {lines[-1]}", file=sys.stderr)


def environment(device: str, site: Path) -> dict[str, str]:
    paths = [str(site), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    found.pop("TRITON_INTERPRET", None)
    return {**found, "TRITON_INTERPRET": "1"} if device == "cpu" else found


def listing(questions: list[Question], jobs: int) -> str:
    """Questions in order, with estimated seconds of each question and stage."""
    lines = [f"{question.seconds:6.0f} s  {question.stage:<7} {question.name}" for question in questions]
    for stage in STAGES:
        total = sum(question.seconds for question in questions if question.stage == stage)
        together = f", {total / jobs:.0f} s with {jobs} at a time" if stage == "oracle" else ""
        lines.append(f"{stage}: about {total:.0f} s{together}")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", metavar="PATTERN", help="run only questions whose name matches this regular expression")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all questions; those that do not fit are skipped (default 8)")
    parser.add_argument("--dry-run", action="store_true", help="list the questions in order, with estimated seconds, and exit")
    parser.add_argument("--resume", action="store_true", help="leave out questions that these sources have answered")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the script at tiny sizes")
    parser.add_argument("--jobs", type=int, help="number of oracles that run at a time (default: half the CPUs, at most 8)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels", help="folder of wheels to install")
    found = parser.parse_args(argv)
    cpus = len(os.sched_getaffinity(0))
    found.threads, found.jobs = cpus, max(1, min(8, cpus // 2)) if found.jobs is None else found.jobs
    if not found.minutes > 0:
        parser.error(f"argument --minutes: must be greater than 0, got {found.minutes:g}.")
    if found.jobs < 1:
        parser.error(f"argument --jobs: must be at least 1, got {found.jobs}.")
    try:
        re.compile(found.only or "")
    except re.error as error:
        parser.error(f"argument --only: must be a regular expression, got {found.only!r} ({error}).")
    return found


def unwritable(folder: Path) -> str:
    """Reason why no file can be created in a folder, or an empty string; creates the folder if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__


def main(argv: Sequence[str] | None = None, questions: list[Question] = QUESTIONS) -> int:
    given = arguments(argv)
    chosen = matching(questions, given.only)
    if not chosen:
        print(f"gpu.py: --only {given.only!r} matches no question; --dry-run lists them.", file=sys.stderr)
        return 2
    if given.dry_run:
        print(listing(chosen, given.jobs))
        return 0
    copies = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    for name, folder in (("--output", given.output), ("$OUT", copies)):
        if folder is not None and (why := unwritable(folder)):
            print(f"gpu.py: {name} must be a folder that files can be written to, got {folder}: {why}.", file=sys.stderr)
            return 2
    interrupted = False
    with contextlib.ExitStack() as at_the_end:
        temporary = at_the_end.enter_context(tempfile.TemporaryDirectory(prefix="gpu-"))
        site = Path(temporary) / "site"
        run = Run(given.device, given.minutes, environment(given.device, site), Path(temporary), given.jobs, given.threads)
        at_the_end.callback(run.close)
        if given.wheels.is_dir():
            install(given.wheels, site)
        first = run.worker()
        if "error" in first.facts:
            remedy = " Try the script itself with --device cpu." if NO_GPU in first.facts["error"] else ""
            print(f"make gpu: {first.facts['error']}{remedy}", file=sys.stderr)
            return 1
        shared: dict[str, Any] = {"machine": first.facts, "device": given.device, "commit": commit(), "sources": sources()}
        versions = first.facts["versions"]
        name = first.facts.get("gpu") or "cpu, tiny sizes"
        print(f"{name}, torch {versions['torch']}, triton {versions['triton']}, Python {first.facts['python']}")
        print("\n".join(describe(versions)), flush=True)
        results = Results(given.output.resolve() / slug(name), shared, copies)
        if given.resume:
            chosen = [question for question in chosen if not results.answered(question.name)]
        try:
            run.go(chosen, results, first)
        except KeyboardInterrupt:
            interrupted = True
    names = [question.name for question in chosen]
    print(f"\n{results.table(names)}results: {results.folder}")
    if interrupted:
        print("gpu.py: interrupted; --resume goes on with what is not answered yet.", file=sys.stderr)
        return 130
    return int(any(results.records[name]["status"] in FAILURES for name in names))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the workers
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:  # before the first question
        print("gpu.py: interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
