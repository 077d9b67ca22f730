"""Excursion-alignment variational inference (EAVI): the model writes its whole answer, and is then aligned with the truth along it.

excursion   y' ~ model(prompt)                     free generation, no gradient
alignment   Σ_t -log p(y_t | prompt, y'_<t)        one forward over the model's own answer; at each position the true token is the target

Teacher forcing has y_<t in place of y'_<t, so a model never sees its own mistakes in training.

Where own and true answer differ in length, both are continued with the end token to the longer one, and all positions have a loss: one
that ended too early learns the rest of the truth after its end token, one that went on learns to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InputError, shown
from ..ops._checks import check_int, check_number, check_size
from .hyper_step import HyperStep

IGNORED = -100
MODES = ("own", "super_batch")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LEAST_TEMPERATURE = 1e-30  # below it, logits that are divided by it overflow float32; the draws are greedy long before


@dataclass(frozen=True)
class Ramp:
    """A share that rises or falls in a straight line over the steps of training.

    Args:
        begin, end: shares before `first` and after `last`, from 0 to 1.
        first, last: steps between which the share changes; the same for a jump.

    Raises:
        ValueError: a share is out of range; last is below first.
    """

    begin: float
    end: float
    first: int
    last: int

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            check_number(name, getattr(self, name), at_least=0, at_most=1)
        check_size("first", self.first, 0)
        check_size("last", self.last, self.first)

    def __call__(self, step: int) -> float:
        """The share of a step."""
        way = (step - self.first) / (self.last - self.first) if self.last > self.first else float(step >= self.first)
        return self.begin + (self.end - self.begin) * min(max(way, 0.0), 1.0)


class EaviBatch(NamedTuple):
    """A batch for any causal language model of transformers, and what it cost to make it.

    Attributes:
        inputs: input_ids, attention_mask and labels, each (R, T) int64, padded on the right. The label of a position is the true token,
            whatever the input there; -100 in prompts and padding.
        own: the model's answers, each (length,) int64, up to their end token; None for rows of teacher forcing.
        exact: (B,) bool, whether each own answer is the truth; False for rows without one.
        generated_tokens: tokens that the excursion passed through the model, prompts included.
        trained_tokens: tokens that the alignment passes, forward and backward.
    """

    inputs: dict[str, Tensor]
    own: list[Tensor | None]
    exact: Tensor
    generated_tokens: int
    trained_tokens: int


class EaviStepResult(NamedTuple):
    """Result of a step.

    Attributes:
        loss: 0-d, mean over the positions with a target, detached.
        gating_loss: 0-d, mean loss of the routers; None without a `HyperStep`.
        batch: what was trained on.
    """

    loss: Tensor
    gating_loss: Tensor | None
    batch: EaviBatch


def excursion(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    end_token_id: int,
    pad_token_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
) -> list[Tensor]:
    """The model's own answers: generated in a batch with a cache, in evaluation mode and without gradients.

    The generation settings of the checkpoint, such as a repetition penalty, have no effect. The mode of every module is restored, and so
    is the caller's random state, except where tokens are drawn from it (`seed` is None).

    Args:
        model: a causal language model of transformers, or one wrapped by DistributedDataParallel.
        prompts: B tensors, each (P,) of integers, P at least 1.
        end_token_id: token that ends an answer.
        pad_token_id: token for padding.
        max_new_tokens: tokens of an answer, at most.
        temperature: of the distribution that tokens are drawn from; 0 for the most likely token.
        seed: of the draws; None for the caller's random state, which then advances.

    Returns:
        B tensors, each (A,) int64 with its end token; without one where the answer did not end.

    Raises:
        TypeError: the model cannot generate.
        ValueError: a prompt is empty; an option is out of range; tokens are to be drawn and the model's logits are not finite.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    check_size("max_new_tokens", max_new_tokens)
    check_number("temperature", temperature, at_least=0)
    check_tokens(end_token_id, pad_token_id)
    inner: Any = getattr(model, "module", model)
    if not callable(getattr(inner, "generate", None)):
        raise TypeError(f"model must be a causal language model of transformers, which can generate, got {type(model).__name__}.")
    device = next(model.parameters()).device
    _check_rows("prompts", prompts)
    ids = _padded(prompts, pad_token_id, left=True).to(device)
    mask = _padded([torch.ones_like(row) for row in prompts], 0, left=True).to(device)
    sampling: dict[str, Any] = {"do_sample": False}
    checks: dict[str, Any] = {}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": max(float(temperature), LEAST_TEMPERATURE), "top_k": 0, "top_p": 1.0}
        checks = {"logits_processor": LogitsProcessorList([_check_logits])}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=end_token_id, pad_token_id=pad_token_id, bos_token_id=None, use_cache=True,
        num_beams=1, **sampling,
    )  # fmt: skip
    modes = [(module, module.training) for module in model.modules()]
    # Whatever `config` leaves open, generate takes from the model's own, such as a repetition penalty.
    own_configs = [(module, vars(module)["generation_config"]) for module in model.modules() if "generation_config" in vars(module)]
    devices = [device] if device.type == "cuda" else []
    model.eval()
    try:
        for module, _ in own_configs:
            module.generation_config = config  # type: ignore[assignment]
        with torch.no_grad(), torch.random.fork_rng(devices, enabled=seed is not None or not temperature):
            if seed is not None:
                torch.manual_seed(seed)
            found: Any = inner.generate(input_ids=ids, attention_mask=mask, generation_config=config, **checks)
    finally:
        for module, mode in modes:
            module.training = mode
        for module, own_config in own_configs:
            module.generation_config = own_config
    return [_until_end(row, end_token_id) for row in found[:, ids.shape[1] :].cpu()]


def alignment(
    prompts: Sequence[Tensor], answers: Sequence[Tensor], own: Sequence[Tensor], *, end_token_id: int, pad_token_id: int
) -> dict[str, Tensor]:
    """The batch that aligns answers with the truth: inputs are the given answers, targets the true ones.

    Args:
        prompts: B tensors, each (P,) of integers.
        answers: the true answers, B tensors, each (A,) with its end token.
        own: the answers to align, B tensors, each (A',); `answers` themselves for teacher forcing.
        end_token_id: token with which the shorter of the two answers continues.
        pad_token_id: token for padding after the answers.

    Returns:
        input_ids, attention_mask and labels, each (B, T) int64. Causal models of transformers compare the label of a position with the
        logits before it, so the label of the n-th token of an own answer is the n-th true token.

    Raises:
        TypeError, ValueError: a prompt or a true answer is empty or no row of token ids, their numbers differ, or an id is negative.
    """
    check_tokens(end_token_id, pad_token_id)
    _check_rows("prompts", prompts)
    _check_rows("answers", answers)
    if not len(prompts) == len(answers) == len(own):
        raise ValueError(f"answers and own must be as many as prompts, {len(prompts)}, got {len(answers)} and {len(own)}.")
    inputs, labels = [], []
    _check_rows("own", own, least=0)
    for rows in zip(prompts, answers, own, strict=True):
        prompt, true, given = (row.long() for row in rows)  # uint8 has no place for the label -100
        length = max(len(true), len(given))
        inputs.append(torch.cat([prompt, _continued(given, length, end_token_id)]))
        labels.append(torch.cat([torch.full_like(prompt, IGNORED), _continued(true, length, end_token_id)]))
    return {
        "input_ids": _padded(inputs, pad_token_id),
        "attention_mask": _padded([torch.ones_like(row) for row in inputs], 0),
        "labels": _padded(labels, IGNORED),
    }


def eavi_batch(
    model: nn.Module,
    prompts: Sequence[Tensor],
    answers: Sequence[Tensor],
    *,
    end_token_id: int,
    pad_token_id: int,
    mode: str = "own",
    share: float = 1.0,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> EaviBatch:
    """An excursion, and the batch that aligns it; for training loops of one's own.

    Args:
        model: a causal language model of transformers.
        prompts: B tensors, each (P,) of integers.
        answers: the true answers, B tensors, each (A,) with its end token.
        end_token_id: token that ends an answer.
        pad_token_id: token for padding.
        mode: "own" trains on the model's answers; "super_batch" on them and on the true answers, in one batch of twice the rows.
        share: part of the rows that get an excursion, drawn for each row; the others are teacher forcing. See `Ramp` for a schedule.
        max_new_tokens: tokens of an own answer, at most; None for those of the longest true answer.
        temperature: see `excursion`.
        seed: of the draws of rows and tokens; give each step, and each process, its own.

    Returns:
        The batch, on the CPU.

    Raises:
        TypeError, ValueError: see `excursion` and `alignment`; mode or share is out of range.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {shown(mode)}.")
    check_number("share", share, at_least=0, at_most=1)
    check_int("seed", seed)
    _check_rows("prompts", prompts)
    _check_rows("answers", answers)
    if len(prompts) != len(answers):
        raise ValueError(f"answers must be as many as prompts, {len(prompts)}, got {len(answers)}.")
    prompts, answers = [row.long().cpu() for row in prompts], [row.long().cpu() for row in answers]
    chosen = (torch.rand(len(prompts), generator=torch.Generator().manual_seed(seed)) < share).nonzero().flatten().tolist()
    own: list[Tensor | None] = [None] * len(prompts)
    generated = 0
    if chosen:
        found = excursion(
            model, [prompts[row] for row in chosen], end_token_id=end_token_id, pad_token_id=pad_token_id,
            max_new_tokens=max(map(len, answers)) if max_new_tokens is None else max_new_tokens, temperature=temperature, seed=seed,
        )  # fmt: skip
        for row, answer in zip(chosen, found, strict=True):
            own[row] = answer
            generated += len(prompts[row]) + len(answer)
    elif share and _is_sharded(model):
        # Other processes, which draw other rows, need this one's part of the weights in each forward pass.
        excursion(model, prompts[:1], end_token_id=end_token_id, pad_token_id=pad_token_id, max_new_tokens=1)
    exact = torch.tensor([given is not None and torch.equal(given, true) for given, true in zip(own, answers, strict=True)])
    given = [true if one is None else one for one, true in zip(own, answers, strict=True)]
    rows = list(zip(prompts, answers, given, strict=True))
    if mode == "super_batch":
        rows += [(prompts[row], answers[row], answers[row]) for row in chosen]
    inputs = alignment(*map(list, zip(*rows, strict=True)), end_token_id=end_token_id, pad_token_id=pad_token_id)
    return EaviBatch(inputs, own, exact, generated, int(inputs["attention_mask"].sum()))


def eavi_step(
    model: nn.Module,
    update: HyperStep | Optimizer,
    prompts: Sequence[Tensor],
    answers: Sequence[Tensor],
    *,
    end_token_id: int,
    pad_token_id: int,
    mode: str = "own",
    share: float = 1.0,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> EaviStepResult:
    """A training step of EAVI: an excursion, one forward and backward pass along it, and the optimiser.

        step = HyperStep(model, optimizer)
        for number, (prompts, answers) in enumerate(batches):
            eavi_step(model, step, prompts, answers, end_token_id=13, pad_token_id=14, share=ramp(number), seed=number)

    Args:
        model: a causal language model of transformers, in training mode.
        update: a `HyperStep` of the model, whose routers learn from the surprise of this loss in the same step; or an optimiser.
        others: see `eavi_batch`.

    Raises:
        TypeError, ValueError: see `eavi_batch` and `HyperStep`.
    """
    batch = eavi_batch(
        model, prompts, answers, end_token_id=end_token_id, pad_token_id=pad_token_id, mode=mode, share=share,
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
    )  # fmt: skip
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}

    def compute_loss() -> Tensor:
        loss: Tensor = model(**inputs).loss
        return loss

    if isinstance(update, HyperStep):
        result = update(compute_loss, token_mask=inputs["attention_mask"])
        return EaviStepResult(result.loss, result.gating_loss, batch)
    loss = compute_loss()
    loss.backward()
    update.step()
    update.zero_grad()
    return EaviStepResult(loss.detach(), None, batch)


def _is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs all processes; those are the models for which generate waits until all processes have ended."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    return bool(is_deepspeed_zero3_enabled() or is_fsdp_managed_module(getattr(model, "module", model)))


def check_tokens(end_token_id: int, pad_token_id: int) -> None:
    """TypeError or ValueError unless both are token ids: a padding id may be None, and a checkpoint may have several end ids."""
    check_size("end_token_id", end_token_id, 0)
    check_size("pad_token_id", pad_token_id, 0)


def _check_logits(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A processor of generate: torch draws from no distribution with NaN, and on a GPU it then ends the process's use of it."""
    if not scores.amax(-1).isfinite().all():  # of NaN and infinity; a token may have -infinity
        raise InputError("model must have finite logits to draw tokens from, got NaN or infinity: weights are damaged or too large.")
    return scores


def _check_rows(name: str, rows: Sequence[Tensor], least: int = 1) -> None:
    if not len(rows):
        raise ValueError(f"{name} must be at least one tensor, got none.")
    for number, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dim() != 1 or len(row) < least or row.dtype not in INTEGERS:
            got = f"shape {tuple(row.shape)} of {str(row.dtype).removeprefix('torch.')}" if isinstance(row, Tensor) else shown(row)
            rule = "with at least one token id" if least else "of token ids"
            raise ValueError(f"{name} must be tensors of shape (tokens,) {rule}, got {got} in row {number}.")


def _until_end(row: Tensor, end: int) -> Tensor:
    """An answer up to its first end token."""
    ends = (row == end).nonzero()
    return row[: int(ends[0]) + 1] if len(ends) else row


def _continued(row: Tensor, length: int, end: int) -> Tensor:
    return torch.cat([row, row.new_full((length - len(row),), end)])


def _padded(rows: Sequence[Tensor], value: int, left: bool = False) -> Tensor:
    """(rows, longest) int64."""
    side = "left" if left else "right"
    return nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True, padding_value=value, padding_side=side)
