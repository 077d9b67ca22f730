"""Batches of tasks for training, prompts for generation, and the place of every token in its grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .augmentations import Augmentation
from .tasks import COLOURS, Task
from .tokens import END, FIRST_ROW, OUTPUT, PAD, Example, Vocabulary, fit_context

IGNORED = -100  # label of a token without a loss, in transformers
# First of the numbers after the seed, so that no two random streams are the same: to numpy, [1, 2] and [1, 2, 0] are the same seed.
_ORDER, _AUGMENTATION = 1, 2


class TaskBatches:
    """Batches of tasks without end. Each depends on the seed and its step alone: training that stopped after a step goes on with the next.

    Every pass over the tasks has its own order and, if wanted, its own augmentations. Test pairs without an output are left out.

    Args:
        tasks: the tasks.
        vocabulary: the tokens.
        context: most tokens of prompt and answer; longer tasks are left out, and listed in `fitting`.
        batch_size: examples in a batch.
        seed: seed of orders and augmentations.
        augment: whether each example gets a random symmetry, permutation of colours and order of demonstrations.
        keep_black: whether colour 0 stays 0 in augmentations.
        all_outputs: whether the outputs of demonstrations have labels too.

    Attributes:
        fitting: test pairs that fit the context, and the tasks that do not.

    Raises:
        InputError: no task fits, or none has a known output.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        vocabulary: Vocabulary,
        *,
        context: int,
        batch_size: int,
        seed: int = 0,
        augment: bool = True,
        keep_black: bool = True,
        all_outputs: bool = False,
    ) -> None:
        self.fitting = fit_context(tasks, vocabulary, context, turned=augment)
        self._pairs = [(task, number) for task, number in self.fitting.pairs if task.test[number].output is not None]
        if not self._pairs:
            raise InputError("tasks must have a test pair with an output that fits the context, got none.")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        if seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}.")
        self._vocabulary, self._batch_size, self._seed = vocabulary, batch_size, seed
        self._augment, self._keep_black, self._all_outputs = augment, keep_black, all_outputs

    def __len__(self) -> int:
        """Batches of one pass over the tasks."""
        return -(-len(self._pairs) // self._batch_size)

    def examples(self, step: int) -> list[Example]:
        """The examples of a batch, after augmentation.

        Args:
            step: number of the batch, from 0.
        """
        return [self._example(place) for place in range(step * self._batch_size, (step + 1) * self._batch_size)]

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step, as `pad_examples` makes it.

        Args:
            step: number of the batch, from 0.
        """
        return pad_examples(self.examples(step), all_outputs=self._all_outputs)

    def _example(self, place: int) -> Example:
        """The example of a place in the endless order, which crosses from one pass to the next within a batch."""
        epoch, index = divmod(place, len(self._pairs))
        task, number = self._pairs[np.random.default_rng([self._seed, _ORDER, epoch]).permutation(len(self._pairs))[index]]
        if self._augment:
            rng = np.random.default_rng([self._seed, _AUGMENTATION, epoch, index])
            task = Augmentation.random(rng, len(task.train), keep_black=self._keep_black).task(task)
        return self._vocabulary.encode(task, number)


def pad_examples(examples: Sequence[Example], *, all_outputs: bool = False) -> dict[str, Tensor]:
    """A batch for training, padded on the right.

    Args:
        examples: at least one, with answers.
        all_outputs: whether the outputs of demonstrations have labels too, with the <end> of each.

    Returns:
        input_ids, attention_mask and labels, each (B, T) int64. A label is the token itself, as causal models of transformers take it, and
        -100 where there is no loss.

    Raises:
        InputError: there is no example, or one has no answer; the message names the task.
    """
    rows, labels = [], []
    for example in examples:
        if example.answer is None:
            raise InputError(f"task {example.task} must have an output for test pair {example.number + 1}, got none.")
        ids = np.concatenate([example.prompt, example.answer])
        counted = _inside_outputs(ids) if all_outputs else np.arange(len(ids)) >= len(example.prompt)
        rows.append(ids)
        labels.append(np.where(counted, ids, IGNORED))
    return {
        "input_ids": _stacked(rows, PAD, left=False),
        "attention_mask": _stacked([np.ones_like(row) for row in rows], 0, left=False),
        "labels": _stacked(labels, IGNORED, left=False),
    }


def pad_prompts(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Prompts for `generate` of transformers, padded on the left.

    Args:
        examples: at least one; answers are ignored.

    Returns:
        input_ids and attention_mask, each (B, T) int64.
    """
    rows = [example.prompt for example in examples]
    return {
        "input_ids": _stacked(rows, PAD, left=True),
        "attention_mask": _stacked([np.ones_like(row) for row in rows], 0, left=True),
    }


def _stacked(rows: Sequence[np.ndarray], padding: int, *, left: bool) -> Tensor:
    """(rows, longest) int64."""
    if not rows:
        raise InputError("examples must have at least one example, got none.")
    stacked = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int64)
    for place, row in zip(stacked, rows, strict=True):
        place[slice(-len(row), None) if left else slice(len(row))] = row
    return torch.from_numpy(stacked)


def _inside_outputs(ids: np.ndarray) -> np.ndarray:
    """Whether each token follows an <output> and no later <end>; an <end> itself does."""
    begun, ended = np.cumsum(ids == OUTPUT), np.cumsum(ids == END)
    return (begun - (ended - (ids == END)) > 0) & (ids != OUTPUT)


def coordinates(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each token in its grid, for models that embed them, such as through `inputs_embeds`.

    Args:
        input_ids: (..., T), tokens of either vocabulary; with padding on either side.

    Returns:
        Rows and columns, each (..., T) int64, from 1. The mark of a row has that row and column 0; tokens outside of grids have 0 and 0.
    """
    is_row, place = input_ids >= FIRST_ROW, torch.arange(input_ids.shape[-1], device=input_ids.device)
    is_mark = (input_ids >= COLOURS) & ~is_row
    begun = is_row.cumsum(-1)
    rows = begun - (begun * is_mark).cummax(-1).values
    columns = place - (place * (is_row | is_mark)).cummax(-1).values
    return rows, columns * (rows > 0)
