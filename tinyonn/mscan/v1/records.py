"""Assignment of the records of a version 1 file to its sequences, in one pass over the file."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from ...errors import MscanError
from .header import RECORD, RECORD_BYTES, V1Header

CHUNK_RECORDS = 1 << 18


@dataclass(frozen=True)
class RecordIndex:
    """Result of one pass over the records.

    Args:
        blocks: (65536,) int64, number of blocks of each parameter id; 0 without a record.
        bounds: (sequences + 1,) int64, token_idx of each sequence's first token, then the total.
        segments: (n, 3) int64, rows of (first record, end record, sequence), in file order.
        invalid: number of records omitted because their parameter or token does not exist.
        zero_gradients: whether the file has records and every grad_norm is 0.
    """

    blocks: np.ndarray
    bounds: np.ndarray
    segments: np.ndarray
    invalid: int
    zero_gradients: bool


def read_records(path: str, fd: int, header: V1Header, first: int, end: int) -> np.ndarray:
    """Records [first, end), read into memory, because a mapped file ends the process if another one truncates it."""
    want, at = (end - first) * RECORD_BYTES, header.offset + first * RECORD_BYTES
    buffer = bytearray(want)
    view, have = memoryview(buffer), 0
    while have < want:
        got = os.preadv(fd, [view[have:]], at + have)
        if got == 0:
            raise MscanError(path, f"the file must hold {want} bytes here, got {have}: it was truncated while open.", at)
        have += got
    return np.frombuffer(buffer, RECORD)


def index_records(path: str, fd: int, header: V1Header, known: np.ndarray, num_tokens: list[int], recovery: str) -> RecordIndex:
    """Reads every record once and assigns it to a sequence by its token_idx, which runs over all sequences.

    Args:
        known: (65536,) bool, parameter ids that have a name.
        num_tokens: number of tokens of each sequence in the metadata; if it is empty, all records are one sequence.

    Raises:
        MscanError: a record's parameter or token does not exist ("salvage" omits such records, unless they are the majority).
    """
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_tokens or [1 << 32], dtype=np.int64)])
    blocks = np.zeros(1 << 16, np.int64)
    starts, owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    owner, last_token, invalid, zero_gradients = -1, -1, 0, header.records > 0
    for first in range(0, header.records, CHUNK_RECORDS):
        records = read_records(path, fd, header, first, min(header.records, first + CHUNK_RECORDS))
        param, token = records["param_id"].copy(), records["token_idx"].astype(np.int64)
        valid = known[param] & (token < bounds[-1])
        if not valid.all():
            if recovery != "salvage":
                _reject(path, header, first, records, known, valid, int(bounds[-1]))
            invalid += int(valid.size - np.count_nonzero(valid))
            param, token = param[valid], token[valid]
        grow_blocks(blocks, param, records["block_idx"][valid])
        last_token = max(last_token, int(token.max(initial=-1)))
        zero_gradients = zero_gradients and not records["grad_norm"].any()
        owned = np.searchsorted(bounds, records["token_idx"], side="right") - 1
        change = np.flatnonzero(np.diff(owned, prepend=owner))
        starts.append(change + first)
        owners.append(owned[change])
        owner = int(owned[-1])
    if 2 * invalid > header.records:
        rule = f"most records must have a known parameter and token, got {invalid} of {header.records} without."
        raise MscanError(path, rule, header.offset)
    if not num_tokens:
        bounds = np.array([0, last_token + 1], np.int64)[: 2 if header.records else 1]
    start, owner_of = np.concatenate(starts), np.concatenate(owners)
    segments = np.stack([start, np.append(start[1:], header.records)[: start.size], owner_of], axis=1)
    return RecordIndex(blocks, bounds, segments[owner_of < len(bounds) - 1], invalid, zero_gradients)


def grow_blocks(blocks: np.ndarray, param: np.ndarray, block: np.ndarray) -> None:
    """Raises blocks[p] to the number of blocks in the records of parameter p."""
    # Records of one parameter are adjacent, so a maximum per run leaves few values to scatter.
    if param.size:
        runs = np.flatnonzero(np.diff(param.astype(np.int32), prepend=-1))
        np.maximum.at(blocks, param[runs], np.maximum.reduceat(block.astype(np.int64), runs) + 1)


def _reject(path: str, header: V1Header, first: int, records: np.ndarray, known: np.ndarray, valid: np.ndarray, tokens: int) -> None:
    bad = int(np.argmin(valid))
    at = header.offset + (first + bad) * RECORD_BYTES
    if not known[records["param_id"][bad]]:
        raise MscanError(path, f"param_id must be a key of id_to_param_name_map, got {records['param_id'][bad]}.", at + 4)
    raise MscanError(path, f"token_idx must be below the {tokens} tokens of all sequences, got {records['token_idx'][bad]}.", at)
