"""Runs the questions of `gpu.py` in worker processes, with timeouts; saves each result at once and continues after any failure.

Statuses: ok; wrong (a result disagrees with its oracle); failed (an exception); timeout; crashed (the process ended); skipped.
A worker answers many questions, because imports take seconds. A worker that hangs, ends or loses its device is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from gpu_questions import Question

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180.0  # timeout of a worker's imports
ORACLE_SHARE = 0.45  # share of the time after which remaining oracles wait for the goals
FAILURES = ("wrong", "failed", "timeout", "crashed")
# Timing of comparisons: seconds on a GPU, with at least five rounds; a single round on a CPU, where times mean nothing.
TIMING = {"cuda": {"budget": 3.0}, "cpu": {"rounds": 1}}
TINY_SECONDS = 30.0  # estimate for any question on a CPU


class Worker:
    """A process of `gpu_worker.py` with its child processes."""

    def __init__(self, device: str, environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "benchmarks" / "gpu_worker.py"), device],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Facts about the machine, once the worker has started; `error` if it did not start."""
        try:
            line = self._lines.get(timeout=START_SECONDS)
        except queue.Empty:
            return {"error": f"a worker did not start within {START_SECONDS:g} s"}
        return json.loads(line)["facts"] if line else {"error": f"a worker ended while it started: {self.last_words()}"}

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a request and returns the record; after a timeout or crash, the measurements so far."""
        assert self.process.stdin is not None
        end, record = time.monotonic() + seconds, {}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            while line := self._lines.get(timeout=max(0.0, end - time.monotonic())):
                message = json.loads(line)
                if "record" in message:
                    return message["record"]
                record = message["partial"]
        except queue.Empty:
            return {**record, "status": "timeout", "reason": f"no answer within {seconds:.0f} s", "seconds": round(seconds, 2)}
        except OSError:
            pass
        code = self.process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {**record, "status": "crashed", "reason": f"the process ended ({how}): {self.last_words()}"}

    def last_words(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4000))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "no message"

    def close(self) -> None:
        """Ends the process and its child processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Results:
    """Records on disk: one JSON file per question, one with all records, and a table. Files are replaced atomically."""

    def __init__(self, folder: Path, shared: dict[str, Any], copies: Path | None) -> None:
        self.folder, self.shared, self.copies = folder, shared, copies
        (folder / "questions").mkdir(parents=True, exist_ok=True)
        files = sorted((folder / "questions").glob("*.json"))
        self.records: dict[str, dict[str, Any]] = {record["name"]: record for record in map(_loaded, files) if record}
        self._lock = threading.Lock()

    def add(self, question: Question, record: dict[str, Any]) -> dict[str, Any]:
        whole = {
            "name": question.name, "stage": question.stage, "target": question.target, "arguments": question.arguments,
            "estimated_seconds": question.seconds, "written": datetime.now(UTC).isoformat(timespec="seconds"), **record, **self.shared,
        }  # fmt: skip
        with self._lock:
            self.records[question.name] = whole
            write(self.folder / "questions" / f"{slug(question.name)}.json", json.dumps(whole, indent=1))
            together = json.dumps({**self.shared, "questions": list(self.records.values())}, indent=1)
            for path in (self.folder / "all.json", *([self.copies / f"{self.folder.name}.json"] if self.copies else [])):
                write(path, together)
            for path in (self.folder / "table.txt", *([self.copies / f"{self.folder.name}.txt"] if self.copies else [])):
                write(path, self.table([*self.records]))
        return whole

    def answered(self, name: str) -> bool:
        """Whether the stored record is ok and comes from the same sources."""
        record = self.records.get(name, {})
        return record.get("status") == "ok" and record.get("sources") == self.shared["sources"]

    def table(self, names: list[str]) -> str:
        rows = [self.row(self.records[name]) for name in names if name in self.records]
        counts: dict[str, int] = {}
        for name in names:
            if name in self.records:
                status = self.records[name]["status"]
                counts[status] = counts.get(status, 0) + 1
        facts = self.shared["machine"]
        title = f"{facts.get('gpu') or facts.get('cpu')}, commit {self.shared['commit']}, sources {self.shared['sources']}"
        return "\n".join([title, *rows, ", ".join(f"{number} {status}" for status, number in counts.items())]) + "\n"

    def row(self, record: dict[str, Any]) -> str:
        old = "" if record.get("sources") == self.shared["sources"] else " [other sources]"
        return f"{record['status']:<8}{record.get('seconds', 0):7.1f} s  {record['name']}{old}: {headline(record)}"


def headline(record: dict[str, Any]) -> str:
    """The result on one line."""
    if "reason" in record:
        return str(record["reason"])
    parts: list[str] = []
    errors = [error for by_name in record.get("errors", {}).values() for error in by_name.values()]
    if errors:
        kernels = record.get("configurations", {})
        tried = sum(map(len, kernels.values()))
        parts.append(f"largest error {max(errors):.2g}" + (f", {tried} configurations of {len(kernels)} kernels" if kernels else ""))
    for found in record.get("comparisons", []):
        peers = [f"{name} {ratio:.2f}x" for name, ratio in found["times_the_subject"].items()]
        notes = [f"{key} {value}" for key, value in found["info"].items() if isinstance(value, int | float)]
        parts.append("; ".join([f"{found['subject']} {found['median_ms'][found['subject']]:.4g} ms", *peers, *notes]))
    return " | ".join(parts) or str(record.get("summary") or record.get("note") or "done")


class Run:
    """A run of all questions within `minutes`; oracles run several at a time."""

    def __init__(self, device: str, minutes: float, environment: dict[str, str], logs: Path, jobs: int, threads: int) -> None:
        self.device, self.environment, self.logs, self.jobs, self.threads = device, environment, logs, jobs, threads
        self.start = time.monotonic()
        self.end = self.start + 60 * minutes
        self.oracles_end = self.start + 60 * minutes * ORACLE_SHARE
        self._workers: list[Worker] = []
        self._stopped = False

    def worker(self) -> Worker:
        found = Worker(self.device, self.environment, self.logs / f"worker-{time.monotonic_ns()}.log")
        self._workers.append(found)
        return found

    def close(self) -> None:
        """Ends all workers; unfinished questions leave no record."""
        self._stopped = True
        for worker in self._workers:
            worker.close()

    def go(self, questions: list[Question], results: Results, first: Worker) -> None:
        """Runs all questions. Ctrl-C stops the current ones; earlier results are on disk."""
        late: list[Question] = []
        waiting: queue.SimpleQueue[Question] = queue.SimpleQueue()
        for question in questions:
            if question.stage == "oracle":
                waiting.put(question)

        def serve(worker: Worker | None) -> Worker | None:
            while not self._stopped:
                try:
                    question = waiting.get_nowait()
                except queue.Empty:
                    return worker
                if time.monotonic() > self.oracles_end:
                    late.append(question)
                else:
                    worker = self.put(question, results, worker, max(1, self.threads // self.jobs))
            return worker

        with ThreadPoolExecutor(self.jobs) as pool:
            serving = [pool.submit(serve, worker) for worker in (first, *[None] * (self.jobs - 1))]
            try:
                worker, *others = [future.result() for future in serving]
            except BaseException:  # the pool waits for threads that wait for their workers
                self.close()
                raise
        for other in others:
            if other:
                other.close()
        goals, rest = ([question for question in questions if question.stage == stage] for stage in ("goal", "rest"))
        for question in (*goals, *late, *rest):
            worker = self.put(question, results, worker, self.threads)

    def put(self, question: Question, results: Results, worker: Worker | None, threads: int) -> Worker | None:
        """Runs one question and records its result; returns the worker for the next question, or None."""
        if self.device == "cpu":
            if question.tiny is None:
                self._tell(results, results.add(question, {"status": "skipped", "reason": "needs a CUDA device"}))
                return worker
            question = replace(question, seconds=TINY_SECONDS, arguments={**question.arguments, **question.tiny})
        left = self.end - time.monotonic()
        if question.seconds > left:
            reason = f"no time: about {question.seconds:.0f} s are needed, {max(0.0, left):.0f} s are left"
            self._tell(results, results.add(question, {"status": "skipped", "reason": reason}))
            return worker
        worker = worker or self.worker()
        if "error" in worker.facts:
            record = {"status": "crashed", "reason": worker.facts["error"]}
        else:
            timing = TIMING[self.device]
            request = {"target": question.target, "arguments": question.arguments, "timing": timing, "threads": threads}
            limit = question.limit or max(60.0, 3 * question.seconds)
            record = worker.ask(request, min(limit, max(1.0, self.end - time.monotonic())))
        if self._stopped:
            return worker
        self._tell(results, results.add(question, record))
        if record["status"] in ("timeout", "crashed") or record.get("device_is_lost"):
            worker.close()
            return None
        return worker

    def _tell(self, results: Results, record: dict[str, Any]) -> None:
        print(f"{time.monotonic() - self.start:6.0f} s  {results.row(record)}", flush=True)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def _loaded(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except ValueError:
        return None
    return record if isinstance(record, dict) and "name" in record else None


def matching(questions: list[Question], pattern: str | None) -> list[Question]:
    """Questions whose name matches a regular expression, ignoring case."""
    found: Callable[[Question], Any] = lambda question: re.search(pattern or "", question.name, re.IGNORECASE)  # noqa: E731
    return [question for question in questions if found(question)]
