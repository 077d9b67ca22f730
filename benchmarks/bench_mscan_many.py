"""`.mscan` with many small appends, with many sequences and through version 1's functions; bytes per value with compression."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyonn.mscan import (
    LayoutEntry,
    MscanReader,
    MscanWriter,
    SequenceRecord,
    append_records_to_mscan,
    create_mscan_file,
    load_mscan_file,
)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")

BLOCKS = 2430  # blocks of one token of SmolLM2-135M without its output head
LAYOUT = [LayoutEntry(f"model.layers.{i}.weight", 81 * 64, 81, 81 * i) for i in range(30)]
MANY = 1_000_000
V1_RECORD = np.dtype([("token_idx", "<u4"), ("param_id", "<u2"), ("block_idx", "<u2"), ("activation", "<u2"), ("grad_norm", "<u2")])


def norms(tokens: int) -> np.ndarray:
    """(2, tokens, 2430) float32 norms whose blocks differ in scale."""
    rng = np.random.default_rng(0)
    scale = rng.normal(-2, 1.5, (2, 1, BLOCKS))
    return np.exp(scale + rng.normal(0, 0.7, (2, tokens, BLOCKS))).astype(np.float32)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_append_of_one_token(compare: Callable[..., Any], tmp_path: Path, file_system: str, stack: ExitStack) -> None:
    """One token per append, into stores that stay open. All receive float32; ours encodes it and commits each append separately."""
    row = norms(1)
    record = SequenceRecord("s", np.array([7]), np.array([0.5], np.float32), *row)
    writer = stack.enter_context(MscanWriter(tmp_path / "a.mscan", {}, LAYOUT, sync="none"))

    fields = [pa.field("id", pa.string()), pa.field("token_id", pa.int32()), pa.field("loss", pa.float32())]
    fields += [pa.field(name, pa.list_(pa.float32(), BLOCKS)) for name in ("activation", "grad_norm")]
    stream = stack.enter_context(pa.OSFile(str(tmp_path / "a.arrow"), "wb"))
    arrow = stack.enter_context(pa.ipc.new_stream(stream, pa.schema(fields)))

    planes = [pa.FixedSizeListArray.from_arrays(pa.array(plane[0]), BLOCKS) for plane in row]
    batch = pa.record_batch([pa.array(["s"]), pa.array([7], pa.int32()), pa.array([0.5], pa.float32()), *planes], pa.schema(fields))

    store = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=(0, 2, BLOCKS), chunks=(1, 2, BLOCKS), dtype=np.float32, compressors=None, zarr_format=3
    )

    zarr_tokens = zarr.create_array(
        str(tmp_path / "b.zarr"), shape=(0, 2), chunks=(1024, 2), dtype=np.float64, compressors=None, zarr_format=3
    )  # token id and loss, which the Arrow and `.mscan` records also hold

    def zarr_append() -> None:
        store.resize((store.shape[0] + 1, 2, BLOCKS))
        store[-1] = row[:, 0]
        zarr_tokens.resize((zarr_tokens.shape[0] + 1, 2))
        zarr_tokens[-1] = (7, 0.5)

    file = stack.enter_context(h5py.File(tmp_path / "a.h5", "w", libver="latest"))
    data = file.create_dataset("planes", (0, 2, BLOCKS), maxshape=(None, 2, BLOCKS), chunks=(1, 2, BLOCKS), dtype=np.float32)

    hdf5_tokens = file.create_dataset("tokens", (0, 2), maxshape=(None, 2), chunks=(1024, 2), dtype=np.float64)

    def hdf5_append() -> None:
        data.resize(len(data) + 1, axis=0)
        data.id.write_direct_chunk((len(data) - 1, 0, 0), row)
        hdf5_tokens.resize(len(hdf5_tokens) + 1, axis=0)
        hdf5_tokens[-1] = (7, 0.5)

    fd = os.open(tmp_path / "a.raw", os.O_WRONLY | os.O_CREAT)
    stack.callback(os.close, fd)
    payload = memoryview(row).cast("B")
    candidates = {
        "mscan": lambda: writer.append(record),
        "raw write": lambda: os.write(fd, payload),
        "Arrow IPC stream": lambda: arrow.write_batch(batch),
        "HDF5": hdf5_append,
        "Zarr v3": zarr_append,
    }

    def check(_: dict[str, Any]) -> None:
        np.testing.assert_array_equal(store[-1], row[:, 0])
        np.testing.assert_array_equal(data[-1], row[:, 0])
        with MscanReader(tmp_path / "a.mscan") as reader:
            np.testing.assert_allclose(np.stack(reader.planes(0)), row, rtol=2e-3)

    info = {"file system": file_system, "goal": "Zarr >= 300x, Arrow >= 1x"}
    result = compare(f"append one token of {BLOCKS} blocks", candidates, check, rounds=20, info=info)
    result.info["appends a second"] = {name: round(1 / result.median(name)) for name in candidates}


def test_opening_a_million_sequences(compare: Callable[..., Any], tmp_path: Path, file_system: str) -> None:
    path = tmp_path / "many.mscan"
    with MscanWriter(path, {}, LAYOUT, sync="none") as writer:
        token_ids, loss = np.array([7]), np.array([0.5], np.float32)
        for i in range(MANY):
            writer.append(SequenceRecord(str(i), token_ids, loss))
    torn = tmp_path / "torn.mscan"
    shutil.copyfile(path, torn)
    os.truncate(torn, path.stat().st_size - 64)

    def open_and_count(file: Path) -> int:
        with MscanReader(file) as reader:
            return len(reader.sequences)

    def open_and_read() -> str:
        with MscanReader(path) as reader:
            return reader.sequences[MANY - 3].sequence_id

    candidates = {
        "open": partial(open_and_count, path),
        "open, read one sequence": open_and_read,
        "open without a trailer": partial(open_and_count, torn),
    }

    def check(outputs: dict[str, Any]) -> None:
        assert list(outputs.values()) == [MANY, str(MANY - 3), MANY]

    info = {"goal": "50 ms", "file": f"{path.stat().st_size / 1e6:.0f} MB", "file system": file_system}
    compare("open 10^6 sequences", candidates, check, info=info)
    path.unlink()
    torn.unlink()


def test_bytes_a_value(compare: Callable[..., Any], tmp_path: Path) -> None:
    """Time and size of storing 256 tokens of synthetic norms whose blocks differ in scale."""
    planes = norms(256)
    record = SequenceRecord("s", np.arange(256), np.zeros(256, np.float32), *planes)
    sizes: dict[str, float] = {}

    def mscan(codec: str, compression: str | None) -> np.ndarray:
        path = tmp_path / "a.mscan"
        with MscanWriter(path, {}, LAYOUT, mode="w", codec=codec, compression=compression, sync="none") as writer:
            writer.append(record)
        sizes[f"mscan {codec}{' + zstd' if compression else ''}"] = path.stat().st_size
        with MscanReader(path) as reader:
            return np.stack(reader.planes(0))

    def parquet() -> np.ndarray:
        sink = io.BytesIO()
        table = pa.table({"activation": planes[0].reshape(-1), "grad_norm": planes[1].reshape(-1)})
        pq.write_table(table, sink, compression="zstd", use_dictionary=False, use_byte_stream_split=True)
        sizes["Parquet float32, byte split + zstd"] = len(sink.getvalue())
        sink.seek(0)
        back = pq.read_table(sink)
        return np.stack([column.to_numpy() for column in back.columns]).reshape(planes.shape)

    def hdf5() -> np.ndarray:
        path = tmp_path / "a.h5"
        with h5py.File(path, "w", libver="latest") as file:
            file.create_dataset("planes", data=planes, chunks=(1, 256, BLOCKS), shuffle=True, compression="gzip", compression_opts=4)
        sizes["HDF5 float32, shuffle + gzip"] = path.stat().st_size
        with h5py.File(path) as file:
            return file["planes"][:]

    candidates = {
        "mscan log2u16": partial(mscan, "log2u16", None),
        "mscan log2u16 + zstd": partial(mscan, "log2u16", "zstd"),
        "mscan f32": partial(mscan, "f32", None),
        "mscan f32 + zstd": partial(mscan, "f32", "zstd"),
        "Parquet float32, byte split + zstd": parquet,
        "HDF5 float32, shuffle + gzip": hdf5,
    }
    errors = {}

    def check(outputs: dict[str, np.ndarray]) -> None:
        for name, found in outputs.items():
            np.testing.assert_allclose(found, planes, rtol=2e-3 if "log2" in name else 0, err_msg=name)
            errors[name] = f"{np.abs(found / planes - 1).max():.1e}"

    result = compare("store and read 256 tokens", candidates, check, info={"largest relative error": errors})
    result.info["bytes a value"] = {name: round(size / planes.size, 3) for name, size in sizes.items()}


def rewriting_append(path: Path, records: np.ndarray, info: dict[str, Any]) -> None:
    """The first appender of version 1: reads the whole file, writes a copy with the new records at its end, and renames it."""
    data = path.read_bytes()
    _, _, length, count = struct.unpack_from("<5sHII", data)
    metadata = json.loads(data[15:length])
    metadata["sequences"].append(info)
    text = json.dumps(metadata, indent=2).encode()
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        file.write(struct.pack("<5sHII", b"MSCAN", 1, 15 + len(text), count + len(records)) + text)
        file.write(data[length:])
        file.write(records.tobytes())
    beside.replace(path)


def test_append_through_the_names_of_version_1(compare: Callable[..., Any], tmp_path: Path, file_system: str) -> None:
    """The 1st and the 100th append of a sequence of 32 tokens (0.9 MB of records). The time of ours does not grow with the file."""
    metadata: dict[str, Any] = {"id_to_param_name_map": {str(i): entry.name for i, entry in enumerate(LAYOUT)}, "sequences": []}
    token, column = (part.reshape(-1) for part in np.indices((32, BLOCKS)))
    records = np.zeros(token.size, V1_RECORD)
    records["param_id"], records["block_idx"] = column // 81, column % 81
    records["activation"], records["grad_norm"] = np.random.default_rng(0).integers(0, 65536, (2, token.size))
    text = json.dumps(metadata, indent=2).encode()

    def prepared(name: str, appends: int, append: Callable[..., None]) -> Callable[[], int]:
        path, count = tmp_path / name, 0

        def call() -> int:
            nonlocal count
            records["token_idx"] = token + 32 * count
            append(path, records, {"sequence_id": count, "num_tokens": 32})
            count += 1
            return count

        if append is rewriting_append:
            path.write_bytes(struct.pack("<5sHII", b"MSCAN", 1, 15 + len(text), 0) + text)
        else:
            create_mscan_file(path, {key: value for key, value in metadata.items() if key != "sequences"})
        for _ in range(appends):
            call()
        return call

    candidates = {
        "append_records_to_mscan, after 100": prepared("new100", 100, append_records_to_mscan),
        "append_records_to_mscan, after 1": prepared("new1", 1, append_records_to_mscan),
        "whole-file appender, after 100": prepared("old100", 100, rewriting_append),
        "whole-file appender, after 1": prepared("old1", 1, rewriting_append),
    }

    def check(_: dict[str, int]) -> None:
        new, old = load_mscan_file(tmp_path / "new1"), load_mscan_file(tmp_path / "old1")
        assert new[0] == old[0]
        np.testing.assert_array_equal(new[1], old[1])

    compare("append 32 tokens of version 1 records", candidates, check, rounds=7, info={"file system": file_system})
