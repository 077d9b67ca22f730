"""Export of a scan: arrays in an .npz file, or a Parquet table. Both are written one sequence at a time."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingPackageError, needs
from .layout import group_name, layout_blocks
from .output import Conversion, PathLike, replacing
from .reader import MscanReader

ROWS_PER_TABLE = 1 << 20  # rows of the long table held in memory at once


def to_npz(path: PathLike, output: PathLike, *, recovery: str = "tail", overwrite: bool = False) -> Conversion:
    """Writes a scan as an uncompressed .npz.

    Tokens of all sequences are concatenated; sequence i is `[offsets[i]:offsets[i + 1]]`.

        activation, grad_norm  (tokens, blocks) float32, NaN = missing
        loss                   (tokens,) float32
        token_ids              (tokens,) int64
        mask                   (tokens,) uint8
        offsets                (sequences + 1,) int64
        sequence_ids, texts    (sequences,) strings; a text that was not stored is empty
        weights, weight_base   (weights,) name and first column of each weight
        metadata               JSON, a 0-d string

    Args:
        path: a file of either version or a rank set.
        output: the new file.
        recovery: as for `MscanReader`.
        overwrite: replace an output that exists.
    """
    with MscanReader(path, recovery=recovery) as reader, replacing(output, overwrite, [path]) as beside:
        sequences = list(reader.sequences)
        offsets = np.concatenate([[0], np.cumsum([s.num_tokens for s in sequences], dtype=np.int64)]).astype(np.int64)
        tokens, blocks = int(offsets[-1]), layout_blocks(reader.layout)
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            for plane, name in enumerate(("activation", "grad_norm")):
                parts = (_planes(reader, i, blocks)[plane] for i in range(len(sequences)))
                _write_rows(archive, name, np.float32, (tokens, blocks), parts)
            for name, dtype in {"loss": np.float32, "token_ids": np.int64, "mask": np.uint8}.items():
                _write_rows(archive, name, dtype, (tokens,), (np.asarray(getattr(s, name), dtype) for s in sequences))
            whole = {
                "offsets": offsets,
                "sequence_ids": np.array([s.sequence_id for s in sequences], np.str_),
                "texts": np.array([s.text or "" for s in sequences], np.str_),
                "weights": np.array([entry.name for entry in reader.layout], np.str_),
                "weight_base": np.array([entry.base for entry in reader.layout], np.int64),
                "metadata": np.array(json.dumps(reader.metadata)),
            }
            for name, value in whole.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, value, allow_pickle=False)
        return Conversion(Path(output), len(sequences), tokens, [str(item) for item in reader.report])


def to_parquet(path: PathLike, output: PathLike, *, recovery: str = "tail", overwrite: bool = False) -> Conversion:
    """Writes a scan as one long Parquet table: one row per token and block, without missing values.

    Columns: sequence (int32), sequence_id, token (position, int32), token_id (int64), loss (float32), marked (bool), layer,
    weight (dictionaries), block (int32, within its weight), activation, grad_norm (float32). Rows keep the order of the
    file, so row-group statistics on `sequence` let a reader skip row groups. The schema's metadata holds the scan's metadata
    under "tinyonn".

    Args:
        path: a file of either version or a rank set.
        output: the new file.
        recovery: as for `MscanReader`.
        overwrite: replace an output that exists.

    Raises:
        RuntimeError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingPackageError(f"{needs('Parquet output', 'pyarrow')}.") from None

    with MscanReader(path, recovery=recovery) as reader, replacing(output, overwrite, [path]) as beside:
        weights = [entry.name for entry in reader.layout]
        layers = list(dict.fromkeys(group_name(name) for name in weights))
        weight_of = np.repeat(np.arange(len(weights), dtype=np.int32), [entry.blocks for entry in reader.layout])
        layer_of = np.array([layers.index(group_name(name)) for name in weights], np.int32)
        block_of = np.arange(weight_of.size, dtype=np.int32) - np.array([entry.base for entry in reader.layout], np.int32)[weight_of]
        dictionary = pa.dictionary(pa.int32(), pa.string())
        kinds = {"sequence": pa.int32(), "sequence_id": dictionary, "token": pa.int32(), "token_id": pa.int64(), "loss": pa.float32()}
        kinds |= {"marked": pa.bool_(), "layer": dictionary, "weight": dictionary, "block": pa.int32()}
        kinds |= {"activation": pa.float32(), "grad_norm": pa.float32()}
        schema = pa.schema(list(kinds.items()), metadata={"tinyonn": json.dumps(reader.metadata)})

        def table(i: int, first: int, planes: tuple[np.ndarray, np.ndarray]) -> Any:
            sequence = reader.sequences[i]
            token, column = np.nonzero(~(np.isnan(planes[0]) & np.isnan(planes[1])))
            at = token + first
            weight = weight_of[column]
            columns: dict[str, Any] = {
                "sequence": np.full(token.size, i, np.int32),
                "sequence_id": pa.DictionaryArray.from_arrays(np.zeros(token.size, np.int32), [sequence.sequence_id]),
                "token": at.astype(np.int32),
                "token_id": np.asarray(sequence.token_ids, np.int64)[at],
                "loss": np.asarray(sequence.loss, np.float32)[at],
                "marked": np.asarray(sequence.mask, bool)[at],
                "layer": pa.DictionaryArray.from_arrays(layer_of[weight], layers),
                "weight": pa.DictionaryArray.from_arrays(weight, weights),
                "block": block_of[column],
                "activation": pa.array(planes[0][token, column], from_pandas=True),
                "grad_norm": pa.array(planes[1][token, column], from_pandas=True),
            }
            return pa.table(columns, schema=schema)

        tokens = 0
        with pq.ParquetWriter(beside, schema, compression="zstd") as writer:
            for i in range(len(reader.sequences)):
                tokens += reader.sequences[i].num_tokens
                if not reader.sequences[i].has_records:
                    continue
                planes = reader.planes(i)
                step = max(1, ROWS_PER_TABLE // planes[0].shape[1])
                for first in range(0, len(planes[0]), step):
                    writer.write_table(table(i, first, (planes[0][first : first + step], planes[1][first : first + step])))
        return Conversion(Path(output), len(reader.sequences), tokens, [str(item) for item in reader.report])


def _planes(reader: MscanReader, i: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    if reader.sequences[i].has_records:
        return reader.planes(i)
    missing = np.full((reader.sequences[i].num_tokens, blocks), np.nan, np.float32)
    return missing, missing


def _write_rows(archive: zipfile.ZipFile, name: str, dtype: Any, shape: tuple[int, ...], parts: Iterator[np.ndarray]) -> None:
    # An .npy member, written without the whole array in memory.
    header: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_2_0(member, header)
        for part in parts:
            member.write(np.ascontiguousarray(part).tobytes())
