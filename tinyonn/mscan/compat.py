"""The three functions of version 1, over version 2 files.

Names, record dtype and metadata are version 1's. The file on disk is of version 2, and every other reader of this package
opens it. An append writes its own records and an index of them, at a cost that does not grow with the file. As in version 1,
appended records survive the end of the process, but are not forced to the disk.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .layout import LayoutEntry, layout_blocks
from .reader import MscanReader
from .types import SequenceRecord
from .v1.header import RECORD
from .v1.reader import FEATURES_PER_BLOCK, V1Reader
from .v1.records import grow_blocks
from .writer import MscanWriter

_PLACEHOLDER = LayoutEntry("none", 1, 1, 0)  # the layout of a file that has no records yet
_LATER_BLOCKS = re.compile(r"(.+)\[(\d+):\]")  # blocks of a parameter that its first records lacked
_UNNAMED = re.compile(r"param_(\d+)")


def create_mscan_file(path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """Creates a file that holds the metadata and no records, replacing what was there.

    Args:
        path: the new file; missing folders are created.
        metadata: JSON values; `id_to_param_name_map` names the parameters, `{"0": "model.layers.0.mlp.up_proj.weight"}`.

    Raises:
        InputError: two ids have the same name, or an id is not a number below 65536.
    """
    _names(metadata)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _writer(path, dict(metadata), [_PLACEHOLDER], "w").close()


def append_records_to_mscan(path: str | os.PathLike[str], records: np.ndarray, sequence_info: Mapping[str, Any]) -> None:
    """Appends one sequence's records.

    Args:
        path: a file that `create_mscan_file` made.
        records: (n,) of the version 1 dtype, at most one for each token and block; values without a record are missing.
        sequence_info: `sequence_id`, `num_tokens`, optionally `source` (the text) and any other JSON values.

    Raises:
        InputError: wrong dtype, two records of the same token and block, or more tokens than `num_tokens`.
        MscanError: the file is damaged, or another writer has it open.
    """
    records = np.asarray(records)
    if records.dtype != RECORD or records.ndim != 1:
        raise InputError(f"records must be a vector of {RECORD}, got {records.dtype} of shape {records.shape}.")
    with MscanReader(path) as reader:
        if reader.version != 2:
            raise InputError(f"{os.fspath(path)} must be of version 2, got {reader.version}: convert it first.")
        metadata, count = reader.metadata, len(reader.sequences)
        layout = list(reader.layout) if count else []
        first = int(reader.sequences[count - 1].token_ids[-1]) + 1 if count else 0
    names = _names(metadata)
    layout = _extended(layout, records, names) or [_PLACEHOLDER]
    record = _to_planes(records, sequence_info, _columns(layout, names), layout_blocks(layout), first)
    # The first records determine the columns, and a layout can only grow, so the empty file is replaced.
    target = Path(path) if count else Path(f"{os.fspath(path)}.new")
    with _writer(target, metadata, layout, "a" if count else "w") as writer:
        writer.append(record)
    if not count:
        target.replace(path)


def load_mscan_file(path: str | os.PathLike[str], *, recovery: str = "tail") -> tuple[dict[str, Any], np.ndarray]:
    """Metadata, including `sequences`, and all records of a version 1 file or a file that the functions above wrote.

    Args:
        path: the file.
        recovery: as for `MscanReader`.

    Returns:
        The metadata; (n,) records of the version 1 dtype, in memory. Those of a version 2 file are ordered by token, parameter and block.

    Raises:
        InputError: the file holds norms that do not fit version 1's 16-bit integers; use `MscanReader`.
    """
    with MscanReader(path, recovery=recovery) as reader:
        if isinstance(reader, V1Reader):
            return reader.header.metadata, np.concatenate([np.empty(0, RECORD), *(reader.records(s.ordinal) for s in reader.sequences)])
        ids = {name: param for param, name in _names(reader.metadata).items()}
        columns = np.concatenate([np.zeros((0, 2), np.int64), *(_ids(entry, ids) for entry in reader.layout)])
        pieces, infos = [np.empty(0, RECORD)], []
        for i, sequence in enumerate(reader.sequences):
            infos.append(_decode_info(sequence.sequence_id, sequence.num_tokens, sequence.text))
            if sequence.has_records:
                activation, grad_norm = reader.planes(i)
                pieces.append(_to_records(reader.path, activation, grad_norm, sequence.token_ids, columns))
        metadata = {**reader.metadata, "sequences": [*reader.metadata.get("sequences", []), *infos]}
        return metadata, np.concatenate(pieces)


def _writer(path: str | os.PathLike[str], metadata: dict[str, Any], layout: list[LayoutEntry], mode: str) -> MscanWriter:
    return MscanWriter(path, metadata, layout, mode=mode, codec="f32", sync="none")


def _names(metadata: Mapping[str, Any]) -> dict[int, str]:
    try:
        names = {int(param): str(name) for param, name in metadata.get("id_to_param_name_map", {}).items()}
    except (AttributeError, ValueError):
        names = {-1: ""}
    if not all(0 <= param < 1 << 16 for param in names) or len(set(names.values())) < len(names):
        raise InputError("id_to_param_name_map must map ids 0 … 65535 to names, each once.")
    return names


def _columns(layout: list[LayoutEntry], names: dict[int, str]) -> dict[int, list[tuple[int, int, int]]]:
    """(first block, blocks, base) of each stretch of columns, by parameter id."""
    ids = {name: param for param, name in names.items()}
    columns: dict[int, list[tuple[int, int, int]]] = {}
    for entry in layout:
        if entry != _PLACEHOLDER:
            param, first = _ids(entry, ids)[0].tolist()
            columns.setdefault(param, []).append((first, entry.blocks, entry.base))
    return columns


def _ids(entry: LayoutEntry, ids: dict[str, int]) -> NDArray[np.int64]:
    """(blocks, 2): parameter id and block index of each column of an entry."""
    later = _LATER_BLOCKS.fullmatch(entry.name) if entry.name not in ids else None
    name, first = (later[1], int(later[2])) if later else (entry.name, 0)
    unnamed = _UNNAMED.fullmatch(name)
    param = ids[name] if name in ids else int(unnamed[1]) if unnamed else -1
    return np.stack([np.full(entry.blocks, param), np.arange(first, first + entry.blocks)], axis=1)


def _extended(layout: list[LayoutEntry], records: np.ndarray, names: dict[int, str]) -> list[LayoutEntry]:
    layout = list(layout)
    known = _columns(layout, names)
    blocks = np.zeros(1 << 16, np.int64)
    grow_blocks(blocks, records["param_id"].copy(), records["block_idx"])
    for param in np.flatnonzero(blocks).tolist():
        have = max((first + count for first, count, _ in known.get(param, [])), default=0)
        more = int(blocks[param]) - have
        if more > 0:
            name = names.get(param, f"param_{param}") + (f"[{have}:]" if have else "")
            layout.append(LayoutEntry(name, more * FEATURES_PER_BLOCK, more, layout_blocks(layout)))
    return layout


def _to_planes(
    records: np.ndarray, info: Mapping[str, Any], columns: dict[int, list[tuple[int, int, int]]], width: int, first: int
) -> SequenceRecord:
    tokens = records["token_idx"].astype(np.int64)
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (first, first)
    count = info.get("num_tokens", high - low + 1)
    if type(count) is not int or count < 1 or high - low >= count:
        raise InputError(f"num_tokens must be an integer that covers tokens {low} … {high}, got {count!r}.")
    if not first <= low <= high < first + count:  # not a running index: the sequence starts at its first record
        first = low
    param, block = records["param_id"].copy(), records["block_idx"].astype(np.int64)
    origin = np.zeros(1 << 16, np.int64)
    for known, stretches in columns.items():
        origin[known] = stretches[0][2]
    column = origin[param] + block
    for known, stretches in columns.items():
        for begin, _, base in stretches[1:]:
            later = (param == known) & (block >= begin)
            column[later] = base + block[later] - begin
    flat = (tokens - first) * width + column
    planes = np.full((2, count * width), np.nan, np.float32)
    planes[0, flat], planes[1, flat] = records["activation"], records["grad_norm"]
    if np.count_nonzero(~np.isnan(planes[0])) < flat.size:
        raise InputError("records contains two records of the same token and block.")
    activation, grad_norm = planes.reshape(2, count, width)
    text = info.get("source")
    return SequenceRecord(
        sequence_id=_encode_info(info),
        token_ids=np.arange(first, first + count),
        loss=np.full(count, np.nan, np.float32),
        activation=activation if records.size else None,
        grad_norm=grad_norm if records.size else None,
        text=text if isinstance(text, str) else None,
    )


def _to_records(path: str, activation: np.ndarray, grad_norm: np.ndarray, token_ids: np.ndarray, columns: np.ndarray) -> np.ndarray:
    token, column = np.nonzero(~np.isnan(activation))
    records = np.empty(token.size, RECORD)
    records["token_idx"] = np.asarray(token_ids)[token]
    records["param_id"], records["block_idx"] = columns[column].T
    for field, plane in (("activation", activation), ("grad_norm", grad_norm)):
        values = plane[token, column]
        if not ((values >= 0) & (values <= 0xFFFF) & (values == np.rint(values))).all() or (columns[column, 0] < 0).any():
            raise InputError(f"{path} must hold version 1 records, integers up to 65535; read it with MscanReader.")
        records[field] = values
    return records


def _encode_info(info: Mapping[str, Any]) -> str:
    # A version 2 sequence has an id, a length and a text. Further keys are stored in the id, as JSON.
    if "sequence_id" not in info:
        raise InputError("sequence_info has no sequence_id.")
    rest = {
        key: value for key, value in info.items() if key not in ("num_tokens", "source") or (key == "source" and not isinstance(value, str))
    }
    name = info["sequence_id"]
    if len(rest) > 1:
        return json.dumps(rest)
    return name if isinstance(name, str) and not _is_json(name) else json.dumps(name)


def _decode_info(name: str, num_tokens: int, text: str | None) -> dict[str, Any]:
    value = json.loads(name) if _is_json(name) else name
    info = dict(value) if isinstance(value, dict) else {"sequence_id": value}
    return {**info, "num_tokens": num_tokens, **({} if text is None else {"source": text})}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
