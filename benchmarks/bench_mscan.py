"""`.mscan` appends of large chunks against raw writes, other stores and version 1.

Every candidate opens a new file, appends, closes and removes it. Only the appends are timed. No candidate calls fsync. Files are in
pytest's temporary folder (`--basetemp` moves it); the heading of the table names its file system.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyonn import _C
from tinyonn.mscan import LayoutEntry, MscanReader, MscanWriter, SequenceRecord

pa = pytest.importorskip("pyarrow")
h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")

TOKENS, BLOCKS, APPENDS = 512, 2048, 8  # one append writes one DATA chunk of 4 MiB: 2 planes x 512 x 2048 codes
VALUES = 2 * TOKENS * BLOCKS
LAYOUT = [LayoutEntry(f"model.layers.{i}.mlp.up_proj.weight", 64 * 64, 64, 64 * i) for i in range(BLOCKS // 64)]
V1_RECORD = np.dtype([("token_idx", "<u4"), ("param_id", "<u2"), ("block_idx", "<u2"), ("activation", "<u2"), ("grad_norm", "<u2")])


@dataclass(frozen=True)
class Timed:
    seconds: float
    value: Any


@cache
def planes() -> tuple[np.ndarray, np.ndarray]:
    """Two (512, 2048) arrays of norms whose blocks differ in scale, as in a model."""
    rng = np.random.default_rng(0)
    scale = rng.normal(-2, 1.5, (2, 1, BLOCKS))
    activation, grad_norm = np.exp(scale + rng.normal(0, 0.7, (2, TOKENS, BLOCKS))).astype(np.float32)
    return activation, grad_norm * 1e-4


@cache
def codes() -> np.ndarray:
    """(2, 512, 2048) uint16 codes of the same norms."""
    return np.stack([_C.encode_log2u16(plane)[0].reshape(plane.shape) for plane in planes()])


def timed_appends(append: Callable[[], Any], payload: np.ndarray | None = None) -> float:
    """Seconds of the appends. uint16 payloads are encoded again, untimed, before each append, so that all writers find them in cache."""
    seconds = 0.0
    for _ in range(APPENDS):
        if payload is not None and payload.dtype == np.uint16:
            for target, plane in zip(payload, planes(), strict=True):
                target[:] = _C.encode_log2u16(plane)[0].reshape(plane.shape)
        start = time.perf_counter()
        append()
        seconds += time.perf_counter() - start
    return seconds


def mscan(path: Path, codec: str, *, timed: str) -> Timed:
    """Appends norms. `timed`: "append" for the whole call, "write" for file writes, or "crc and write" for both."""
    record = SequenceRecord("s", np.arange(TOKENS), np.zeros(TOKENS, np.float32), *planes())
    with MscanWriter(path, {}, LAYOUT, codec=codec, sync="none") as writer:
        seconds = timed_appends(lambda: writer.append(record))
        encoding, writing = writer.seconds
        encoded_size = path.stat().st_size
    if timed != "append":
        seconds = writing
    if timed == "crc and write":  # the writer takes the crc as part of encoding, while the codes are in cache
        payload = codes()
        seconds += timed_appends(lambda: _C.crc32c(payload), payload)
    with MscanReader(path) as reader:
        value = np.stack(reader.planes(APPENDS - 1))
    path.unlink()
    return Timed(seconds, (value, encoded_size, encoding))


def raw(path: Path, data: np.ndarray) -> Timed:
    payload = memoryview(data).cast("B")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    seconds = timed_appends(lambda: os.write(fd, payload), data)
    value = np.frombuffer(os.pread(fd, data.nbytes, (APPENDS - 1) * data.nbytes), data.dtype).reshape(data.shape)
    size = os.fstat(fd).st_size
    os.close(fd)
    path.unlink()
    return Timed(seconds, (value, size, 0.0))


def arrow_stream(path: Path, data: np.ndarray) -> Timed:
    columns = [pa.FixedSizeListArray.from_arrays(pa.array(plane.reshape(-1)), BLOCKS) for plane in data]
    batch = pa.record_batch(columns, names=["activation", "grad_norm"])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        seconds = timed_appends(lambda: writer.write_batch(batch), data)
    size = path.stat().st_size
    with pa.memory_map(str(path)) as source:
        last = list(pa.ipc.open_stream(source))[-1]
        value = np.stack([np.asarray(column.flatten()).reshape(TOKENS, BLOCKS) for column in last.columns])
    path.unlink()
    return Timed(seconds, (value, size, 0.0))


def hdf5(path: Path, data: np.ndarray) -> Timed:
    with h5py.File(path, "w", libver="latest") as file:
        store = file.create_dataset(
            "planes", (0, 2, TOKENS, BLOCKS), maxshape=(None, 2, TOKENS, BLOCKS), chunks=(1, 2, TOKENS, BLOCKS), dtype=data.dtype
        )

        def append() -> None:
            store.resize(len(store) + 1, axis=0)
            store.id.write_direct_chunk((len(store) - 1, 0, 0, 0), data)  # bypasses the filters and the chunk cache

        seconds = timed_appends(append, data)
        value = store[-1]
    size = path.stat().st_size
    path.unlink()
    return Timed(seconds, (value, size, 0.0))


def zarr_v3(path: Path, data: np.ndarray) -> Timed:
    store = zarr.create_array(
        str(path), shape=(0, 2, TOKENS, BLOCKS), chunks=(1, 2, TOKENS, BLOCKS), dtype=data.dtype, compressors=None, zarr_format=3
    )

    def append() -> None:
        store.resize((store.shape[0] + 1, *store.shape[1:]))
        store[-1] = data

    seconds = timed_appends(append, data)
    value = store[-1]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path)
    return Timed(seconds, (value, size, 0.0))


def v1_packing(path: Path, data: np.ndarray, *, prepared: bool) -> Timed:
    """Packs 12-byte records as the writer of version 1 did. A `prepared` packer computes indices once and then fills in only values."""
    token, column = (part.reshape(-1) for part in np.indices((TOKENS, BLOCKS)))
    places = np.zeros(TOKENS * BLOCKS, V1_RECORD)
    places["token_idx"], places["param_id"], places["block_idx"] = token, column // 64, column % 64

    def append() -> None:
        records = places if prepared else np.empty(TOKENS * BLOCKS, V1_RECORD)
        if not prepared:
            records["token_idx"], records["param_id"], records["block_idx"] = token, column // 64, column % 64
        records["activation"], records["grad_norm"] = data.reshape(2, -1)
        os.write(fd, memoryview(records).cast("B"))

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    seconds = timed_appends(append, data)
    last = np.frombuffer(os.pread(fd, places.nbytes, (APPENDS - 1) * places.nbytes), V1_RECORD)
    size = os.fstat(fd).st_size
    os.close(fd)
    path.unlink()
    return Timed(seconds, (np.stack([last["activation"], last["grad_norm"]]).reshape(data.shape), size, 0.0))


def heading(kind: str, **more: str) -> dict[str, str]:
    return {"file system": kind, "appends a sample": str(APPENDS), **more}


def test_append_of_encoded_chunks(compare: Callable[..., Any], tmp_path: Path, file_system: str) -> None:
    """Writing the bytes of a 4 MiB chunk: our crc and write, against stores that receive the same bytes already encoded."""
    data = codes()
    path = tmp_path / "store"
    candidates = {
        "mscan, crc and write": lambda: mscan(path, "log2u16", timed="crc and write"),
        "mscan, write": lambda: mscan(path, "log2u16", timed="write"),
        "raw write": lambda: raw(path, data),
        "Arrow IPC stream": lambda: arrow_stream(path, data),
        "HDF5, direct chunks": lambda: hdf5(path, data),
        "Zarr v3, uncompressed": lambda: zarr_v3(path, data),
        "version 1 packing": lambda: v1_packing(path, data, prepared=False),
        "version 1 packing, places kept": lambda: v1_packing(path, data, prepared=True),
    }

    def check(outputs: dict[str, Timed]) -> None:
        for name, output in outputs.items():
            if name.startswith("mscan"):
                np.testing.assert_allclose(output.value[0], np.stack(planes()), rtol=2e-3)
            else:
                np.testing.assert_array_equal(output.value[0], data, err_msg=name)

    goal = "raw write >= 0.95x, Arrow >= 1.1x, version 1 >= 8x"
    result = compare("append 8 encoded 4 MiB chunks", candidates, check, rounds=25, info=heading(file_system, goal=goal))
    rate = APPENDS * data.nbytes / 1e6
    result.info["MB/s"] = {name: round(rate / result.median(name)) for name in candidates}


def test_append_of_norms(compare: Callable[..., Any], tmp_path: Path, file_system: str) -> None:
    """Float32 norms to file, encoding included. The other stores write float32 unchanged; version 1 writes its own records."""
    norms = np.stack(planes())
    integers = np.clip(norms * 100, 0, 65535)
    path = tmp_path / "store"
    candidates = {
        "mscan log2u16": lambda: mscan(path, "log2u16", timed="append"),
        "mscan f32": lambda: mscan(path, "f32", timed="append"),
        "raw write of float32": lambda: raw(path, norms),
        "Arrow IPC stream, float32": lambda: arrow_stream(path, norms),
        "HDF5, float32": lambda: hdf5(path, norms),
        "Zarr v3, float32": lambda: zarr_v3(path, norms),
        "version 1 packing": lambda: v1_packing(path, integers, prepared=False),
        "version 1 packing, places kept": lambda: v1_packing(path, integers, prepared=True),
    }
    bytes_per_value = {}

    def check(outputs: dict[str, Timed]) -> None:
        for name, output in outputs.items():
            bytes_per_value[name] = round(output.value[1] / (APPENDS * VALUES), 3)
            expected, tolerance = (integers.astype(np.uint16), 0) if name.startswith("version") else (norms, 2e-3 if "log2" in name else 0)
            np.testing.assert_allclose(output.value[0], expected, rtol=tolerance, err_msg=name)

    info = heading(file_system, goal="version 1 >= 8x")
    result = compare("append 8 x 2M float32 norms, encoding included", candidates, check, rounds=25, info=info)
    result.info["bytes a value"] = bytes_per_value


def test_encoding(compare: Callable[..., Any], tmp_path: Path) -> None:
    """Encoding alone, including statistics and crc, in float32 bytes per second on one core."""
    norms = np.stack(planes())
    path = tmp_path / "store"

    def ours() -> Timed:
        done = mscan(path, "log2u16", timed="append")
        return Timed(done.value[2] / APPENDS, done.value[0])

    def numpy_log2() -> list[np.ndarray]:
        result = []
        for plane in norms:
            logs = np.log2(plane)
            lo, hi = logs.min(), logs.max()
            result.append(np.rint((logs - lo) * (65532 / (hi - lo)) + 1).astype(np.uint16))
        return result

    candidates = {
        "mscan log2u16, statistics and crc": ours,
        "log2u16 in NumPy, no statistics": numpy_log2,
        "float16 in NumPy": lambda: norms.astype(np.float16),
        "a copy": norms.copy,
    }

    def check(outputs: dict[str, Any]) -> None:
        np.testing.assert_allclose(outputs["mscan log2u16, statistics and crc"].value, norms, rtol=2e-3)
        difference = np.stack(outputs["log2u16 in NumPy, no statistics"]).astype(int) - codes()
        assert np.abs(difference).max() <= 1

    result = compare("encode 2M float32 norms", candidates, check, rounds=25, info={"goal": "1 GB/s of float32 a core"})
    result.info["GB/s"] = {name: round(norms.nbytes / result.median(name) / 1e9, 2) for name in candidates}
