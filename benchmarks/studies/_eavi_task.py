"""The tasks of the study of EAVI: one grid to transform by a rule that the prompt names.

    <task> FAMILY MOVE COLOUR COLOUR <input> GRID <output> | GRID <end>

The rules are those of the generated families of `tinyonn.arc`. They are named by digits and not by demonstrations, so that a model of a
million parameters learns them within minutes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinyonn.arc import FAMILIES, Vocabulary
from tinyonn.arc.families import FALLS, MIRRORS, RULES, Rule
from tinyonn.arc.tokens import INPUT, OUTPUT, TASK

VOCABULARY = Vocabulary(numbered_rows=True)


@dataclass(frozen=True)
class Rows:
    """Prompts and true answers, with the family of each.

    Attributes:
        prompts: (P,) int64 each.
        answers: (A,) int64 each, with the end token.
        families: names.
    """

    prompts: list[Tensor]
    answers: list[Tensor]
    families: list[str]


def draw(seed: tuple[int, ...], count: int, side: int, exclude: Collection[bytes] = ()) -> Rows:
    """Rows of all families in turn, all different.

    Args:
        seed: of the draws.
        count: rows.
        side: rows and columns of each input.
        exclude: keys of rows that must not come.
    """
    rng = np.random.default_rng(seed)
    seen = set(exclude)
    rows = Rows([], [], [])
    while len(rows.prompts) < count:
        family = FAMILIES[len(rows.prompts) % len(FAMILIES)]
        number = int(rng.integers(len(RULES[family])))
        rule = RULES[family][number]
        given = rule.draw(rng, side, side)
        output = rule.apply(given)
        if output is None or (family != "copy" and np.array_equal(given, output)):
            continue
        named = [FAMILIES.index(family), *name(family, number, rule)]
        prompt = torch.from_numpy(np.concatenate([[TASK], named, [INPUT], VOCABULARY.encode_answer(given)[:-1], [OUTPUT]]))
        if key(prompt) in seen:
            continue
        seen.add(key(prompt))
        rows.prompts.append(prompt)
        rows.answers.append(torch.from_numpy(VOCABULARY.encode_answer(output)))
        rows.families.append(family)
    return rows


def name(family: str, number: int, rule: Rule) -> tuple[int, int, int]:
    """A rule within its family: its move, and one or two colours; 0 for none."""
    if rule.change is not None:
        moves = MIRRORS + FALLS
        return (moves.index(rule.move) if rule.move in moves else 0), *rule.change
    if family in ("mirror", "gravity"):
        return number, 0, 0
    return 0, 0 if family == "copy" else number + 1, 0


def key(prompt: Tensor) -> bytes:
    """A row's identity."""
    return bytes(prompt.numpy().astype(np.uint8))
