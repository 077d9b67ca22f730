"""Compressed keys that know how much attention a block gets, learned from the model's own attention.

    KL( P || p )    P: true share of each far block in a query's attention, and one bucket for the rest; p: the same, from compressed keys

The layers learn side by side while batches run through the model, each from the queries and keys of the batch that is there. Nothing else
is kept. B batch, T queries, H query heads, K key/value heads, D head dim, NB key blocks
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from ...errors import InputError
from ...nn.block_shares import block_shares, kinds_of_blocks
from ...nn.dyn_nsa import DynNSACore
from ...nn.share_distillation import share_divergence
from ...ops._checks import check_size
from ..interfaces import modes_kept
from ..peft_parts import active_modules, keep_in_adapter
from .observing import Attended, checked_sample, run, watched
from .parts import PART, cores, set_options
from .shares import Sequence, drawn, true_block_shares

VISIT = 10  # steps on one batch before the next
RATES = {"position": 2e-2, "up": 3e-3, "down": 3e-3, "query_map": 3e-3}
LAST_RATE = 0.1  # share of the rate that is left at the end


def distil_compression(
    model: PreTrainedModel, sample: Iterable[Tensor | Mapping[str, Any]], steps: int = 150, *, queries: int = 192
) -> dict[str, tuple[float, float]]:
    """Teaches the compressed branch what share of the attention each block gets, so that one price means the same in every head.

    Only the compression of keys and the maps of queries for the compressed branch learn; no weight of the model changes, and no gradient
    is left. Call `calibrate` afterwards: importances have changed, and prices of other budgets that it noted are dropped. The sample runs
    once for each ten steps, with all blocks read.

    Args:
        model: model that `convert_attention` has converted. It keeps its training or eval mode and its price.
        sample: batches of (B, T) token ids, or of the model's keyword arguments, as long as the texts that the model will see.
        steps: steps of Adam for each layer.
        queries: queries of each step, drawn at random among those that may leave out blocks.

    Returns:
        For each layer by name, the divergence in nats at the first step and its mean over the last ten.

    Raises:
        InputError: the model is not converted, or has nothing to learn there; the sample is empty or too short; a loss, or what is learned,
            is not finite. The model is then as before.
        TypeError, ValueError: steps or queries is no positive int. TypeError: the sample is not an iterable of batches.
    """
    check_size("steps", steps)
    check_size("queries", queries)
    batches = checked_sample(model, sample)
    keep_in_adapter(model, PART)
    found = list(cores(model))
    before = [core.price.clone() for core in found]
    names = {module: name for name, module in active_modules(model).items()}
    with torch.inference_mode(False):
        distillers = {core: _LayerDistiller(core, names[core], steps, queries) for core in found}
    try:
        with modes_kept(model), torch.inference_mode(False):
            model.eval()
            with watched(found, lambda call: distillers[call.core].step(call)):
                done, idle = 0, 0
                for batch in cycle(batches):
                    run(model, batch)
                    before_it, done = done, sum(len(distiller.losses) for distiller in distillers.values())
                    idle = idle + 1 if done == before_it else 0
                    if done == steps * len(found) or idle == len(batches):
                        break
    finally:
        for core, price in zip(found, before, strict=True):
            core.price.copy_(price)
            core.reset_statistics()
    if short := [distiller for distiller in distillers.values() if not distiller.losses]:
        least = max(distiller.least for distiller in short)
        raise InputError(f"sample must have texts of more than {least:,} tokens, got none: every block of shorter ones is read anyway.")
    for distiller in distillers.values():
        distiller.check()
    for distiller in distillers.values():
        distiller.write_back()
    set_options(model, prices=())  # those of an earlier calibration no longer hold
    return {distiller.name: distiller.progress() for distiller in distillers.values()}


class _LayerDistiller:
    """What one layer learns: float32 copies of its parameters, and their optimiser."""

    def __init__(self, core: DynNSACore, name: str, steps: int, queries: int) -> None:
        self.core, self.name, self.steps, self.queries = core, name, steps, queries
        self.given = core.estimate_parameters()
        if not self.given:
            raise InputError(f"{name} must have learnable_compression or compress_query to distil, got neither.")
        self.learned = {key: value.detach().float().clone().requires_grad_() for key, value in self.given.items()}
        self.optimizer = torch.optim.Adam([{"params": [value], "lr": RATES[key]} for key, value in self.learned.items()])
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - (1 - LAST_RATE) * step / steps)
        self.generator = torch.Generator().manual_seed(0)
        self.losses: list[float] = []
        self.least = core.options.forced * core.options.block_size

    def step(self, call: Attended) -> None:
        """Some steps on the texts of one call."""
        texts = [text for text in call.sequences() if text.end - text.begin > self.least]
        for _ in range(min(VISIT, self.steps - len(self.losses)) if texts else 0):
            text = texts[int(torch.randint(len(texts), (), generator=self.generator))]
            with torch.enable_grad():
                loss = self._divergence(call, text)
            if not torch.isfinite(loss):
                raise InputError(
                    f"distil_compression must have a finite loss, got {loss.item()} in {self.name} at step {len(self.losses) + 1}."
                )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.rate.step()
            self.losses.append(loss.item())

    def _divergence(self, call: Attended, text: Sequence) -> Tensor:
        """Mean of the divergence over some queries of a text and all heads, 0-d."""
        options, length = self.core.options, text.end - text.begin
        place = drawn(length, self.least, self.queries, self.generator).to(call.key.device)
        query = call.query[text.row, text.begin + place].detach().float()
        key = call.key[text.row, text.begin : text.end].detach().float()
        far, _ = kinds_of_blocks(place, length, options)
        true = true_block_shares(query, key, place, options.block_size, call.scores) * far
        maps = {name: value for name, value in self.learned.items() if name != "query_map"}
        keys = functional_call(self.core.compress_key, maps, (key[None],))[0]
        if "query_map" in self.learned:
            query = torch.einsum("thd,hde->the", query, self.learned["query_map"])
        found = block_shares(query, keys, place, length, options, call.scores) * far
        return share_divergence(true, found).mean()

    def check(self) -> None:
        """InputError if the last step has learned what is not finite."""
        for name, value in self.learned.items():
            if not value.isfinite().all():
                raise InputError(f"distil_compression must learn finite values, got others for {name} of {self.name}.")

    @torch.no_grad()
    def write_back(self) -> None:
        for name, value in self.given.items():
            value.copy_(self.learned[name])

    def progress(self) -> tuple[float, float]:
        return self.losses[0], sum(self.losses[-VISIT:]) / len(self.losses[-VISIT:])
