"""Answers to prompts, by the model's own `generate`; the scan then reads prompt and answer in one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from .tokens import TokenSequence, padded


@dataclass(frozen=True)
class Generator:
    """Generates up to `new_tokens` tokens for each prompt of a batch.

    Args:
        model: a causal language model with `generate`.
        tokenizer: its tokenizer.
        padding: token id that fills shorter prompts on the left.
        new_tokens: largest number of tokens of an answer.
        temperature: sampling temperature; 0 is greedy.
        top_p: probability mass of nucleus sampling.
        seed: seed of sampling. With the prompt's id it determines the answer, in any batch and in a resumed scan.

    Only the end-of-text tokens of the model's generation_config are used.
    """

    model: Any
    tokenizer: Any
    padding: int
    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def answer(self, prompts: list[TokenSequence]) -> list[TokenSequence]:
        """Prompts with their answers; an answer ends with its end-of-text token."""
        device = next(self.model.parameters()).device
        ids, mask = padded(prompts, self.padding, "left")
        processors = LogitsProcessorList()
        if self.temperature > 0:
            seeds = [self._seed_of(prompt.sequence_id) for prompt in prompts]
            processors.extend([TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p), _Noise(seeds)])
        with _own_generation(self.model, self._end_tokens(), self.padding), torch.no_grad():
            grown = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self.new_tokens,
                do_sample=False,
                logits_processor=processors,
            )
        return [self._answered(prompt, row) for prompt, row in zip(prompts, grown[:, ids.shape[1] :].cpu().numpy(), strict=True)]

    def _answered(self, prompt: TokenSequence, new: NDArray[np.int64]) -> TokenSequence:
        ends = np.flatnonzero(np.isin(new, self._end_tokens()))
        answer = new[: ends[0] + 1] if len(ends) else new
        token_ids = np.concatenate([prompt.token_ids, answer])
        marked = np.zeros(len(token_ids), np.uint8)
        marked[len(prompt.token_ids) :] = 1
        # Decoded separately, so that the prompt's text does not change.
        text = prompt.text + self.tokenizer.decode(answer)
        return TokenSequence(prompt.sequence_id, token_ids, text, marked)

    def _end_tokens(self) -> list[int]:
        configured = self.model.generation_config.eos_token_id
        if configured is None:
            return []
        return list(configured) if isinstance(configured, (list, tuple)) else [int(configured)]

    def _seed_of(self, sequence_id: str) -> int:
        digest = hashlib.sha256(f"{self.seed}:{sequence_id}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


class _Noise(LogitsProcessor):
    """Adds Gumbel noise, so that the largest score is a sample of the softmax. Each row has its own generator."""

    def __init__(self, seeds: list[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self._generators])
        return cast(torch.FloatTensor, scores - noise.log_().to(scores))


@contextmanager
def _own_generation(model: Any, end_tokens: list[int], padding: int) -> Iterator[None]:
    """Replaces the model's generation_config within the block by one that only has end-of-text and padding tokens."""
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=end_tokens or None, pad_token_id=padding)
    try:
        yield
    finally:
        model.generation_config = before
