"""Reads a damaged file in every mode and compares all that comes of it with what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from damage_kinds import METADATA
from model_file import Model, Truth, per_entry

from tinyonn.errors import InputError, MscanError
from tinyonn.mscan import MscanReader
from tinyonn.mscan.convert import recover, verify

MODES = ("strict", "tail", "salvage")


def expect(holds: object, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.all((a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= 2e-7 * np.abs(b))))


def names(layout: list) -> list[tuple[str, int, int]]:
    return [(entry.name, entry.out_features, entry.blocks) for entry in layout]


class Judge:
    """Compares all that an open reader gives with the models; AssertionError where it is none of theirs."""

    def __init__(self, reader: MscanReader, models: list[Model], lossless: bool) -> None:
        self.reader, self.models = reader, models
        self.lossless = lossless  # nothing was reported: nothing may lack
        self.refused = 0
        self.found: list[Truth] = []
        self.lost_tokens = 0

    def run(self) -> str:
        reader = self.reader
        expect(reader.metadata == METADATA or (not reader.metadata and reader.report), "metadata")
        layouts = [names(layout) for model in self.models for layout in model.layouts]
        expect(names(reader.layout) in [*layouts, []], "layout")
        for i in range(len(reader.sequences)):
            try:
                self.found.append(self._sequence(i))
            except MscanError:
                expect(reader.recovery == "tail", "a sequence that was opened must read")
                self.refused += 1
        if not self.refused:
            self._whole()
        return "refused in part" if self.refused else "reported" if reader.report else "right"

    def _sequence(self, i: int) -> Truth:
        sequence = self.reader.sequences[i]
        all_truths = [truth for model in self.models for truth in model.truths]
        matching = [truth for truth in all_truths if truth.sequence_id == sequence.sequence_id]
        planes = np.stack(self.reader.planes(i)) if self._declares_planes(i, matching) else None
        integral = self.reader.sequence_integral(i)
        expect(self.reader.find(sequence.sequence_id) is not None, "an id that is not found")
        for truth in matching:
            if self._is(sequence, truth, planes, integral):
                self.lost_tokens += sequence.lost_tokens
                return truth
        raise AssertionError(f"sequence {i}, {sequence.sequence_id!r}, is none that was written")

    def _declares_planes(self, i: int, matching: list[Truth]) -> bool:
        if self.reader.sequences[i].has_records:
            return True
        try:
            expect(np.isnan(np.stack(self.reader.planes(i))).all(), "planes of a sequence without records")
        except MscanError as error:
            expect("must hold planes" in error.rule, "planes that do not read")
            expect(any(truth.planes is None for truth in matching), "planes are missing")
        return False

    def _is(self, sequence, truth: Truth, planes: np.ndarray | None, integral) -> bool:
        mask = np.ones(len(truth.token_ids), np.uint8) if truth.mask is None else truth.mask
        if sequence.text != truth.text or not all(
            np.array_equal(got, wanted)
            for got, wanted in ((sequence.token_ids, truth.token_ids), (sequence.loss, truth.loss), (sequence.mask, mask))
        ):
            return False
        if self.lossless and (sequence.lost_tokens or sequence.lost_integral):
            return False
        if (truth.integral is None or sequence.lost_integral) != (integral is None):
            return False
        if integral is not None:
            width = truth.integral.shape[1]
            got = np.stack(integral.planes())
            if not np.array_equal(got[:, :width], truth.integral) or got[:, width:].any():
                return False
        if truth.planes is None:
            return planes is None and not sequence.lost_tokens
        if planes is None:
            return sequence.lost_tokens == len(truth.token_ids)
        width = truth.planes.shape[2]
        if not np.isnan(planes[:, :, width:]).all():
            return False
        here = np.array([same(planes[:, t, :width], truth.planes[:, t]) for t in range(len(truth.token_ids))])
        gone = np.isnan(planes).all(axis=(0, 2)) & ~here
        return bool((here | gone).all()) and int(gone.sum()) <= sequence.lost_tokens < len(truth.token_ids)

    def _whole(self) -> None:
        reader, count = self.reader, len(self.found)
        prefixes = [
            model
            for model in self.models
            if count <= len(model.truths) and all(a is b for a, b in zip(self.found, model.truths, strict=False))
        ]
        if self.lossless:
            expect(prefixes, "sequences lack, or are in another order, and nothing was reported")
        if reader.recovery == "strict":
            prefixes = [m for m in prefixes if len(m.truths) == count and names(m.layouts[-1]) == names(reader.layout)]
            expect(prefixes, "strict accepted another file than was written")
        self._total(prefixes)
        self._stats(prefixes)

    def _total(self, prefixes: list[Model]) -> None:
        count = len(self.found)
        try:
            got = np.stack(self.reader.integral().planes())
        except MscanError:
            kept = any(covers == count for model in prefixes for covers, *_ in model.totals)
            expect(not (self.lossless and self.reader.recovery == "strict" and kept), "the total was lost")
            return
        width = got.shape[1]
        allowed = [
            np.pad(planes, ((0, 0), (0, width - planes.shape[1])))
            for model in (prefixes if self.lossless else self.models)
            for covers, planes, linked in model.totals
            # That a total was moved, or a sequence before it taken out, shows by its link, which it lacks in files of the old revision.
            if planes.shape[1] <= width and (covers == count or not self.lossless or not linked)
        ]
        if any(np.array_equal(got, planes) for planes in allowed):
            return
        parts = [self.reader.sequence_integral(i) for i in range(count)]
        expect(all(part is not None for part in parts), "a total that nobody wrote")
        expect(np.allclose(got, merged([np.stack(part.planes()) for part in parts], width), rtol=1e-9), "a total that nobody wrote")

    def _stats(self, prefixes: list[Model]) -> None:
        stats = self.reader.stats()
        got = [
            (plane.count[e], plane.zeros[e], plane.missing[e], plane.nonfinite[e], plane.mean[e], plane.m2[e])
            for e in range(len(self.reader.layout))
            for plane in (stats.activation, stats.grad_norm)
        ]
        if self.reader.recovery == "salvage":
            if self.lost_tokens == 0:
                expect(agree(got, per_entry(self.found, self.reader.layout)), "statistics of what was salvaged")
            return
        if not self.reader.layout:
            return
        several = [per_entry(model.truths[: len(self.found)], self.reader.layout) for model in (prefixes or self.models)]
        expect(any(agree(got, expected) for expected in several), "statistics that are nobody's")


def agree(got: list, expected: list) -> bool:
    return len(got) == len(expected) and all(
        list(a[:4]) == list(b[:4]) and np.allclose(a[4:], b[4:], rtol=1e-5) for a, b in zip(got, expected, strict=True)
    )


def merged(parts: list[np.ndarray], width: int) -> np.ndarray:
    """The integral over the tokens of all parts, from the sums of squares."""
    total = np.zeros((6, width))
    for part in parts:
        total[:2] += part[:2]
    for mean, square in ((2, 3), (4, 5)):
        with np.errstate(invalid="ignore", divide="ignore"):
            centre = np.nan_to_num(sum(part[1] * part[mean] for part in parts) / total[1]) if parts else total[mean]
        total[mean] = centre
        total[square] = sum((part[square] + part[1] * (part[mean] - centre) ** 2 * (part[1] > 0) for part in parts), np.zeros(width))
    return total


def read(path: Path, models: list[Model], intact: bool) -> dict[str, str]:
    """What came of each mode."""
    outcomes = {}
    for mode in MODES:
        try:
            with MscanReader(path, recovery=mode) as reader:
                outcomes[mode] = Judge(reader, models, lossless=not reader.report).run()
        except MscanError as error:
            expect(str(path) in str(error), "an error without the file's name")
            outcomes[mode] = "refused"
        closed = models[0].kinds[-1] == 0
        wanted = "refused" if mode == "strict" and not closed else "right"
        expect(not intact or outcomes[mode] == wanted, f"an intact file is {outcomes[mode]}")
    outcomes["verify"] = _verify(path, outcomes["strict"])
    outcomes["recover"] = _recover(path, outcomes["salvage"])
    return outcomes


def _verify(path: Path, strict: str) -> str:
    expect(verify(path).ok == (strict == "right"), "verify and strict disagree")
    try:
        with MscanReader(path) as reader:
            reader.verify()
        ok = True
    except MscanError:
        ok = False
    expect(ok == (strict == "right"), "reader.verify and strict disagree")
    return "right" if ok else "refused"


def _recover(path: Path, salvage: str) -> str:
    output = path.with_name("clean.mscan")
    try:
        done = recover(path, output, overwrite=True, sync="none")
    except (MscanError, InputError) as error:
        expect(str(path) in str(error), "an error without the file's name")
        expect(salvage == "refused" or "must hold records or a layout" in str(error), "salvage reads it, recover does not")
        return "refused"
    expect(salvage != "refused", "recover reads what salvage does not")
    with MscanReader(output, recovery="strict") as clean, MscanReader(path, recovery="salvage") as source:
        ids = [clean.sequences[i].sequence_id for i in range(len(clean))]
        expect(ids == list(dict.fromkeys(ids)), "an id twice")
        expect(set(ids) == {source.sequences[i].sequence_id for i in range(len(source))}, "a sequence was not recovered")
        expect(bool(done.dropped) or not source.report, "what salvage reports, recover does not")
        for i in range(len(clean)):
            twins = [k for k in range(len(source)) if source.sequences[k].sequence_id == ids[i]]
            expect(any(_copied(clean, i, source, k) for k in twins), f"{ids[i]} was recovered as something else")
        expect(len(clean) == done.sequences, "a wrong count of sequences")
    return "reported" if done.dropped else "right"


def _copied(clean: MscanReader, i: int, source: MscanReader, k: int) -> bool:
    a, b = clean.sequences[i], source.sequences[k]
    if a.text != b.text or a.has_records != (b.has_records or b.lost_tokens > 0) or not np.array_equal(a.token_ids, b.token_ids):
        return False
    x, y = clean.sequence_integral(i), source.sequence_integral(k)
    if (x is None) != (y is None) or (x is not None and not np.array_equal(np.stack(x.planes()), np.stack(y.planes()))):
        return False
    # Encoding log2u16 again may change the last bit.
    return not a.has_records or np.allclose(np.stack(clean.planes(i)), np.stack(source.planes(k)), rtol=2e-3, equal_nan=True)
