"""What every test shares. The interpreter must be chosen before the first import of triton, so this comes before all else."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import re
import resource
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from tinyonn.testing.interpreter import replace_language_once_a_launch

if not torch.cuda.is_available():
    if "triton" in sys.modules:
        raise RuntimeError("triton must not be imported before tests/conftest.py sets TRITON_INTERPRET, got it in sys.modules.")
    os.environ["TRITON_INTERPRET"] = "1"
    sys.modules["fla"] = None  # type: ignore[assignment]  # transformers calls its kernels wherever it is installed, GPU or not
    if find_spec("triton") is not None:
        replace_language_once_a_launch()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Garbage is looked for among what tests make: walking all modules and tests each time took a tenth of the run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Each test compiles for itself: recompilations of one function are limited, and earlier tests would use them up."""
    yield
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is not None and utils.counters["stats"]:
        torch._dynamo.reset()
        utils.counters.clear()


SEED_FILES = {
    "importance_pre.jsonl": {
        "loss_increase": "I_pre",
        "accuracy_drop": "accuracy_drop_pre",
        "taylor": "taylor_pre",
        "taylor_abs": "taylor_abs_pre",
    },
    "importance_post.jsonl": {
        "loss_increase": "I_post",
        "accuracy_drop": "accuracy_drop_post",
        "taylor": "taylor_post",
        "taylor_abs": "taylor_abs_post",
    },
    "gradfisher_pre.jsonl": {"gradient_norm": "G_pre", "fisher": "fisher_pre"},
    "update.jsonl": {name: name for name in ("Uq", "Uk", "Uv", "Uo", "U", "Urel")},
}


def record_checksums(folder: Path) -> None:
    """measure_parts.json of the files that lie there, as if the step measure had written them."""

    def checksum(name: str) -> str:
        path = folder / name
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""

    record = {"training_sha256": checksum("train.json"), "subset_sha256": checksum("eval_subset.json")}
    parts = {name: {"sha256": checksum(name), "layers": 1, "heads": 1, "seconds": 1.0, "facts": {}} for name in SEED_FILES}
    (folder / "measure_parts.json").write_text(json.dumps({**record, "parts": parts}))


@pytest.fixture
def files_of_at_most() -> Callable[[int], AbstractContextManager[None]]:
    """`files_of_at_most(size)`: within the block, writing beyond so many bytes fails, as it does on a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="module")
def forked() -> Iterator[Callable[[Callable[[], object]], multiprocessing.process.BaseProcess]]:
    """`forked(call)`: runs a call in a copy of this process, which needs no imports; `join` and read `exitcode`."""
    started = []

    def start(call: Callable[[], object]) -> multiprocessing.process.BaseProcess:
        def run() -> None:
            torch.set_num_threads(1)  # threads of the pool are not copied
            call()

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def two_ranks(forked: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[int], None]], None]:
    """`two_ranks(work)`: runs `work(rank)` in the two processes of a gloo group; both must succeed."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")

    def run(work: Callable[[int], None]) -> None:
        meeting = tmp_path_factory.mktemp("group") / "store"

        def member(rank: int) -> None:
            distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
            work(rank)
            distributed.destroy_process_group()

        processes = [forked(partial(member, rank)) for rank in range(2)]
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0, 0]

    return run


@pytest.fixture
def reseal() -> Callable[[Path], None]:
    """`reseal(folder)`: makes the record of checksums fit files of OUTPUT/TASK/seedN that a test has edited."""
    return record_checksums


@pytest.fixture
def make_seed() -> Callable[..., dict[str, np.ndarray]]:
    """Writes what the steps train and measure of a plasticity run leave in OUTPUT/TASK/seedN/, with random numbers or given columns.

    Columns are (layers, heads), by their names in heads.csv; those not given are random. Returns all of them.
    """

    def make(
        folder: Path, layers: int = 4, heads: int = 6, seed: int = 0, model: str = "tiny-model", **columns: np.ndarray
    ) -> dict[str, np.ndarray]:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        names = [column for fields in SEED_FILES.values() for column in fields.values()]
        signed = {name for name in names if name.startswith(("I_", "accuracy", "taylor"))} - {"taylor_abs_pre", "taylor_abs_post"}
        drawn = {name: rng.normal(size=(layers, heads)) * (0.1 if name in signed else 1.0) for name in names}
        values = {name: drawn[name] if name in signed else np.exp(drawn[name]) for name in names} | columns
        for file, fields in SEED_FILES.items():
            lines = [
                json.dumps({"layer": layer, "head": head} | {field: float(values[column][layer, head]) for field, column in fields.items()})
                for layer in range(layers)
                for head in range(heads)
            ]
            (folder / file).write_text("\n".join(lines) + "\n")
        options = {
            "model_path": model,
            "task": folder.parent.name,
            "data_path": "rows.jsonl",
            "seed": seed,
            "learning_rate": 2e-5,
            "epochs": 3,
        }
        trained = {
            "options": options,
            "checkpoints": {},
            "data": "0123456789abcdef" * 2,
            "labels": ["false", "true"],
            "source": "rows.jsonl",
            "train_rows": 1200,
            "evaluation_rows": 256,
            "steps": 4,
            "losses": [0.7, 0.65, 0.6, 0.5],
            "evaluation_loss": 0.41,
            "accuracy": 0.8,
            "seconds": 61.5,
            "dtype": "fp32",
            "device": "cpu",
            "versions": {"tinyonn": "0.1.0"},
        }
        measured = {
            "model": Path(model).name,
            "task": folder.parent.name,
            "seed": seed,
            "samples": 256,
            "layers": layers,
            "heads": layers * heads,
            "base_loss_pre": 0.69,
            "base_accuracy_pre": 0.5,
            "base_loss_post": 0.41,
            "base_accuracy_post": 0.8,
            "seconds": 30.0,
            "versions": {"tinyonn": "0.1.0"},
        }
        subset = {"source": "validation.jsonl", "seed": 999, "size": 3, "indices": [4, 0, 7], "labels": [0, 1, 1]}
        for file, content in (("train.json", trained), ("measure.json", measured), ("eval_subset.json", subset)):
            (folder / file).write_text(json.dumps(content))
        record_checksums(folder)
        return values

    return make


NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*(?:e[-+]?\d+)?|\bnan\b|\binf\b)")


@pytest.fixture
def words_of() -> Callable[[str], set[str]]:
    """`words_of(output)`: its lines without numbers and spacing, for outputs of another model; lists of numbers are alike at any length."""

    def words_of(text: str) -> set[str]:
        lines = (re.sub(r"#(?:[,\s]+#)+", "#", NUMBER.sub("#", " ".join(line.split()))) for line in text.splitlines())
        return {line for line in lines if line.strip(" .…")}

    return words_of
