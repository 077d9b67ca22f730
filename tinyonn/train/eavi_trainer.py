"""A transformers Trainer that trains along the model's own answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import shown
from ..ops._checks import check_number, check_size
from .eavi import MODES, Ramp, check_tokens, eavi_batch

PROMPTS = "prompt_lengths"


@dataclass(frozen=True)
class Eavi:
    """How a Trainer makes excursions; see `eavi_batch`.

    Args:
        end_token_id: token that ends an answer.
        pad_token_id: token for padding.
        mode: "own" or "super_batch".
        share: part of the rows that get an excursion: a number, or a `Ramp` over the steps.
        max_new_tokens: tokens of an own answer, at most; None for those of the longest true answer of a batch.
        temperature: of the distribution that tokens are drawn from; 0 for the most likely token.

    Raises:
        TypeError, ValueError: a value is out of range.
    """

    end_token_id: int
    pad_token_id: int
    mode: str = "own"
    share: float | Ramp = 1.0
    max_new_tokens: int | None = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_tokens(self.end_token_id, self.pad_token_id)
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {shown(self.mode)}.")
        if not isinstance(self.share, Ramp):
            check_number("share", self.share, at_least=0, at_most=1)
        if self.max_new_tokens is not None:
            check_size("max_new_tokens", self.max_new_tokens)
        check_number("temperature", self.temperature, at_least=0)

    def share_at(self, step: int) -> float:
        """Part of the rows that get an excursion in a step, from 0."""
        return self.share(step) if isinstance(self.share, Ramp) else self.share


class EaviMixin:
    """Trains along the model's own answers: `class MyTrainer(EaviMixin, OnnTrainer)`, or before any `transformers.Trainer`.

    Batches have input_ids, attention_mask and labels, (B, T) and padded on the right, as for teacher forcing, and `prompt_lengths`, (B,),
    the tokens before each answer. Labels within prompts stay, and count once where a prompt has two rows. An own answer is greedy or drawn
    with random numbers of its own, which depend on `args.seed`, step and process, so a resumed run draws the same. Evaluation is by teacher
    forcing.

    Own answers to all accumulated batches are generated before the first of them is trained on. So Trainer counts the targets of the whole
    step, and each has equal weight, as in any training.

    The log gets, as means since its last line, `own_share`, the part of the rows with an excursion, and `own_exact`, the part of these
    whose answer was the truth; and the sums over the run `generated_tokens` and `trained_tokens`, of this process.

    Args:
        args, others: see `transformers.Trainer`.
        eavi: how excursions are made; None for teacher forcing.

    Raises:
        ValueError: a batch of training has no `prompt_lengths`, or they do not leave a prompt and an answer in each row; with `eavi`, a
            batch is not padded on the right.
    """

    def __init__(self, *args: Any, eavi: Eavi | None = None, **kwargs: Any) -> None:
        self._eavi = eavi
        self._rows = self._own = self._exact = 0
        self._generated = self._trained = 0
        super().__init__(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The batches of a step, with own answers in the share of the step, and the number of their targets."""
        trainer: Any = super()
        batches, number = trainer.get_batch_samples(epoch_iterator, num_batches, device)
        share = 0.0 if self._eavi is None else self._eavi.share_at(self._global_step())
        made = [self._made(batch, share, place) for place, batch in enumerate(batches)]
        return made, trainer._get_num_items_in_batch(made, device) if share else number

    def _made(self, inputs: dict[str, Any], share: float, place: int) -> dict[str, Any]:
        """The inputs of an accumulated batch of a step, by its place among them."""
        if PROMPTS not in inputs:
            raise ValueError(
                f"inputs must have {PROMPTS}, got {', '.join(sorted(inputs))}: put it in each batch, and give remove_unused_columns=False "
                "if it is a column of the data set."
            )
        given = {name: value for name, value in inputs.items() if name != PROMPTS}
        if missing := {"input_ids", "attention_mask", "labels"} - given.keys():
            raise ValueError(f"inputs must have input_ids, attention_mask, labels and {PROMPTS}, got none of {', '.join(sorted(missing))}.")
        lengths = torch.as_tensor(inputs[PROMPTS])
        if self._eavi is not None:
            _check_batch(given["input_ids"], given["attention_mask"], lengths)
        self._rows += len(lengths)
        if not share:
            self._trained += int(given["attention_mask"].sum())
            return given
        return self._aligned(given, lengths.tolist(), share, place)

    def _aligned(self, given: dict[str, Tensor], lengths: list[int], share: float, place: int) -> dict[str, Tensor]:
        assert self._eavi is not None
        trainer: Any = self
        ids, labels, ends = given["input_ids"].cpu(), given["labels"].cpu(), given["attention_mask"].sum(1).long().tolist()
        prompts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        answers = [row[length:end] for row, length, end in zip(ids, lengths, ends, strict=True)]
        batch = eavi_batch(
            trainer.model_wrapped, prompts, answers, end_token_id=self._eavi.end_token_id, pad_token_id=self._eavi.pad_token_id,
            mode=self._eavi.mode, share=share, max_new_tokens=self._eavi.max_new_tokens, temperature=self._eavi.temperature,
            seed=self._seed(place),
        )  # fmt: skip
        # The rows of a super batch that follow these repeat prompts, whose labels count once.
        for row, length in enumerate(lengths):
            batch.inputs["labels"][row, :length] = labels[row, :length]
        self._own += sum(own is not None for own in batch.own)
        self._exact += int(batch.exact.sum())
        self._generated += batch.generated_tokens
        self._trained += batch.trained_tokens
        device = given["input_ids"].device
        return {name: value.to(device) for name, value in batch.inputs.items()}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        return trainer.compute_loss(model, {name: value for name, value in inputs.items() if name != PROMPTS}, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._rows:
            logs["own_share"] = self._own / self._rows
            if self._own:
                logs["own_exact"] = self._exact / self._own
            logs |= {"generated_tokens": self._generated, "trained_tokens": self._trained}
            self._rows = self._own = self._exact = 0
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)

    def _global_step(self) -> int:
        trainer: Any = self
        return int(trainer.state.global_step)

    def _seed(self, place: int) -> int:
        """Of a batch: another one for each step, place among accumulated batches, and process."""
        trainer: Any = self
        number = self._global_step() * trainer.args.gradient_accumulation_steps + place
        number = number * trainer.args.world_size + trainer.args.process_index
        return int((trainer.args.seed * 1_000_003 + number) % 2**63)


def _check_batch(ids: Tensor, mask: Tensor, lengths: Tensor) -> None:
    """ValueError unless each row is a prompt, an answer and padding."""
    if mask.shape != ids.shape or (mask[:, 1:].int() > mask[:, :-1].int()).any():
        raise ValueError(f"attention_mask must be (rows, tokens), with padding on the right alone, got shape {tuple(mask.shape)}.")
    if lengths.shape != ids.shape[:1] or lengths.is_floating_point():
        raise ValueError(f"{PROMPTS} must be {len(ids)} whole numbers, one a row, got {lengths.dtype} of shape {tuple(lengths.shape)}.")
    for row, (length, end) in enumerate(zip(lengths.tolist(), mask.sum(1).tolist(), strict=True)):
        if not 1 <= length < end:
            raise ValueError(f"{PROMPTS} must leave a prompt and an answer in the {int(end)} tokens of row {row}, got {length}.")
