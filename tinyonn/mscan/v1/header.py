"""Offset and number of the records of a version 1 file.

    <5sHII  magic "MSCAN", version 1, header length, record count; then JSON; then packed 12-byte records

The header length includes the 15 bytes of the prologue in every known file; the other reading (JSON only) is accepted
where only it agrees with the size of the file. Version 1 has no checksum: the checks compare the prologue, the JSON and
the size of the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import MscanError, reason

MAGIC = b"MSCAN"
PROLOGUE = struct.Struct("<5sHII")
RECORD = np.dtype([("token_idx", "<u4"), ("param_id", "<u2"), ("block_idx", "<u2"), ("activation", "<u2"), ("grad_norm", "<u2")])
RECORD_BYTES = RECORD.itemsize
RECOVERY = ("strict", "tail", "salvage")


@dataclass(frozen=True)
class V1Header:
    """Validated header of a file.

    Args:
        metadata: the JSON, unchanged.
        offset: byte offset of the first whole record.
        records: number of whole records from there.
        lost: one sentence for each missing or omitted part.
        discarded: number of records that a longer header overwrote or that lie past the end of the file.
    """

    metadata: dict[str, Any]
    offset: int
    records: int
    lost: tuple[str, ...] = ()
    discarded: int = 0


def read_header(path: str, head: bytes, size: int, recovery: str, plausible: Callable[[dict[str, Any], int], bool]) -> V1Header:
    """Validates the head of a version 1 file.

    Args:
        path: path for error messages.
        head: first bytes of the file, at least header length + 15 if the file is that long.
        size: size of the whole file in bytes.
        recovery: "strict", "tail" or "salvage".
        plausible: whether records with this metadata may begin at this byte; distinguishes an overwritten file from a truncated one.

    Raises:
        MscanError: the header breaks a rule that `recovery` does not tolerate.
    """
    _, length, count = read_prologue(path, head)
    if not PROLOGUE.size <= length <= size:
        raise MscanError(path, f"header length must lie between {PROLOGUE.size} and the file's {size} bytes, got {length}.", 7)
    offset = length
    if PROLOGUE.size + length + RECORD_BYTES * count == size:
        offset = PROLOGUE.size + length
    metadata = _parse_json(path, head[PROLOGUE.size : offset])
    have = (size - offset) // RECORD_BYTES
    if offset + RECORD_BYTES * count == size:
        return V1Header(metadata, offset, count)
    if offset + RECORD_BYTES * count > size:
        overwritten = _overwritten_offset(metadata, size, count)
        if overwritten is not None and overwritten < offset:
            discarded = min(count, -((overwritten - offset) // RECORD_BYTES))
            if plausible(metadata, overwritten + RECORD_BYTES * discarded):
                return _salvage_overwritten(path, metadata, overwritten, discarded, count, recovery)
        if recovery == "strict":
            raise MscanError(path, f"the file must hold {count} records of {RECORD_BYTES} bytes from byte {offset} on, got {have}.", offset)
        lost = f"the file ends {count - have} records before the {count} that its header counts"
        return V1Header(metadata, offset, have, (lost,), count - have)
    return _with_trailing_bytes(path, metadata, offset, count, have, size, recovery)


def read_prologue(path: str, head: bytes) -> tuple[int, int, int]:
    """Version, header length and record count in the first bytes of a file; only version 1 has the last two.

    Raises:
        MscanError: they do not belong to a `.mscan` file of version 1 or 2.
    """
    if not head.startswith(MAGIC[: len(head)]):
        raise MscanError(path, "a .mscan file must start with MSCAN.", 0)
    if len(head) < PROLOGUE.size:
        found = str(len(head)) if head else "an empty file"
        raise MscanError(path, f"a .mscan file must have at least {PROLOGUE.size} bytes, got {found}.", len(head))
    _, version, length, count = PROLOGUE.unpack_from(head)
    if version not in (1, 2):
        raise MscanError(path, f"version must be 1 or 2, got {version}.", 5)
    return version, length, count


def _parse_json(path: str, text: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MscanError(path, f"metadata must be UTF-8: {error.reason}.", PROLOGUE.size + error.start) from None
    except json.JSONDecodeError as error:
        raise MscanError(path, f"metadata must be JSON: {error.msg}.", PROLOGUE.size + len(text.decode()[: error.pos].encode())) from None
    except (ValueError, RecursionError) as error:
        raise MscanError(path, f"metadata must be JSON: {reason(error, 100)}.", PROLOGUE.size) from None
    if not isinstance(metadata, dict):
        raise MscanError(path, f"metadata must be a JSON object, got {type(metadata).__name__}.", PROLOGUE.size)
    return metadata


def _overwritten_offset(metadata: dict[str, Any], size: int, count: int) -> int | None:
    # One writer started the file with metadata without sequences (or with an empty list) and on close wrote the full metadata
    # from byte 0, over the first records. The length of the first form, dumped again, is the offset of the records.
    first = {key: value for key, value in metadata.items() if key != "sequences"}
    for candidate in (first, {**metadata, "sequences": []}):
        offset = PROLOGUE.size + len(json.dumps(candidate, indent=2).encode())
        if offset + RECORD_BYTES * count == size:
            return offset
    return None


def _salvage_overwritten(path: str, metadata: dict[str, Any], begin: int, discarded: int, count: int, recovery: str) -> V1Header:
    lost = f"a longer header was written over the first {discarded} of {count} records"
    if recovery != "salvage":
        raise MscanError(path, f"{lost}; recovery='salvage' reads the rest.", begin)
    return V1Header(metadata, begin + RECORD_BYTES * discarded, count - discarded, (lost,), discarded)


def _with_trailing_bytes(path: str, metadata: dict[str, Any], offset: int, count: int, have: int, size: int, recovery: str) -> V1Header:
    end = offset + RECORD_BYTES * count
    if recovery == "strict":
        raise MscanError(path, f"the file must end after its {count} records, got {size - end} bytes more.", end)
    if recovery == "tail":
        return V1Header(metadata, offset, count, (f"{size - end} bytes follow the {count} records that the header counts",))
    # A killed writer did not update the count; the records exist.
    lost = [f"the header counts {count} records, the file holds {have}: all are read"]
    if rest := (size - offset) % RECORD_BYTES:
        lost.append(f"{rest} bytes of an unfinished record at the end")
    return V1Header(metadata, offset, have, tuple(lost))
