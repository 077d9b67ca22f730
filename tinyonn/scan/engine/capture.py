"""Writes the block norms of every target's output and output gradient into two planes, while a model runs.

For `y = x Wᵀ + b`, token t's gradient of `W[block, :]` is `δ_t[block] ⊗ x_t`, of Frobenius norm `‖δ_t[block]‖·‖x_t‖`. A forward
hook takes `‖y_t[block]‖` and `‖x_t‖`; a hook on y's gradient takes `‖δ_t[block]‖·‖x_t‖`. The bias is not included. Only
`‖x_t‖`, one number per token, is kept between forward and backward, so an activation lives only as long as autograd needs it. The
exception is the input of a tied output head; see `lookup.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...ops import block_norms
from .lookup import LookupPart, TiedLookup
from .targets import BLOCK_SIZE, Target

RUNS_TWICE = "it runs more than once in a forward pass, so a token's gradient is no single outer product"


class Recorder(Protocol):
    """Receiver of what the hooks of a forward pass report."""

    def record(self, target: Target, inputs: Tensor, output: Tensor) -> None:
        """Called with a module's input and output, before backward."""

    def record_pairs(self, target: Target, tokens: Tensor, experts: Tensor, inputs: Tensor, output: Tensor) -> None:
        """Called with one expert product over routed (token, expert) pairs, before backward."""


class Capture:
    """Two planes of one batch, filled by hooks.

    Args:
        targets: targets to record, in column order.
        input_ids: (sequences, tokens) ids of the batch, on the model's device.
        lookup: output head whose weight is also the input embeddings; None if there is none.

    Attributes:
        activation, grad_norm: (sequences * tokens, blocks) float32, NaN where nothing was recorded.
        reached: names of the targets that received a gradient.
    """

    def __init__(self, targets: list[Target], input_ids: Tensor, lookup: TiedLookup | None = None) -> None:
        rows, blocks, device = input_ids.numel(), targets[-1].end, input_ids.device
        self.batch_shape = (input_ids.shape[0], input_ids.shape[1])
        self.activation = torch.full((rows, blocks), torch.nan, dtype=torch.float32, device=device)
        self.grad_norm = torch.full((rows, blocks), torch.nan, dtype=torch.float32, device=device)
        self.reached: set[str] = set()
        self._recorded: set[int] = set()
        self._input: weakref.ref[Tensor] | None = None
        self._input_version = -1
        self._input_norm: Tensor | None = None
        self._lookup = lookup
        self._input_ids = input_ids.reshape(-1)[:-1]
        self._part: LookupPart | None = None

    def record(self, target: Target, inputs: Tensor, output: Tensor) -> None:
        """Records a module's output now, and its gradient when backward reaches it."""
        self._claim(target)
        rows = token_rows(target, output, self.batch_shape)
        columns = slice(target.base, target.end)
        _write_norms(rows.detach(), None, self.activation[:, columns])
        if not output.requires_grad:
            return
        # The batch's last row has no label: its gradient is all zeros, which the norms take a detour for, and is not stored.
        input_norm, grad_plane, shape = self._norm_of(inputs)[:-1], self.grad_norm[:-1, columns], self.batch_shape
        tied = self._lookup is not None and self._lookup.target.name == target.name
        kept = token_rows(target, inputs.detach(), shape)[:-1] if tied else None

        def on_gradient(grad: Tensor) -> None:
            rows = token_rows(target, grad, shape)[:-1]
            self.reached.add(target.name)
            _write_norms(rows, input_norm, grad_plane)
            if kept is not None:
                self._part = LookupPart.of(rows, kept, input_norm, self._input_ids)

        output.register_hook(on_gradient)

    def finish(self, embedding_grad: Tensor) -> None:
        """Adds the look-up's part to a tied head's norms, after backward.

        Args:
            embedding_grad: (sequences, tokens, features), of the embedding module's output.
        """
        if self._lookup is not None and self._part is not None:
            columns = slice(self._lookup.target.base, self._lookup.target.end)
            rows = embedding_grad.reshape(-1, embedding_grad.shape[-1])[:-1]
            self._lookup.add(self._part, rows, self._input_ids, self.grad_norm[:-1, columns])
            self._part = None

    def record_pairs(self, target: Target, tokens: Tensor, experts: Tensor, inputs: Tensor, output: Tensor) -> None:
        """Records one expert product over routed (token, expert) pairs; the blocks of unrouted pairs stay NaN.

        Args:
            tokens, experts: (pairs,) row of the batch and index of the expert.
            inputs: (pairs, in_features). output: (pairs, out_features), whose gradient is recorded when it comes.
        """
        self._claim(target)
        places = (-1, target.experts, target.blocks)
        columns = slice(target.base, target.end)
        self.activation[:, columns].unflatten(1, places[1:])[tokens, experts] = block_norms(output.detach(), BLOCK_SIZE).float()
        if not output.requires_grad:
            return
        input_norm, grad_plane = _row_norm(inputs), self.grad_norm[:, columns].unflatten(1, places[1:])

        def on_gradient(grad: Tensor) -> None:
            self.reached.add(target.name)
            grad_plane[tokens, experts] = block_norms(grad, BLOCK_SIZE, row_scale=input_norm).float()

        output.register_hook(on_gradient)

    def _claim(self, target: Target) -> None:
        if target.base in self._recorded:
            raise InputError(f"targets must leave out {target.name}: {RUNS_TWICE}.")
        self._recorded.add(target.base)

    def _norm_of(self, inputs: Tensor) -> Tensor:
        # q, k and v (or gate and up) are handed the same tensor object one after another. A weak reference, so that the
        # input is not kept alive, and the version, so that one changed in place counts as another.
        if self._input is None or self._input() is not inputs or self._input_version != inputs._version:
            self._input_norm = _row_norm(inputs)
            self._input, self._input_version = weakref.ref(inputs), inputs._version
        assert self._input_norm is not None
        return self._input_norm


@contextmanager
def module_hooks(targets: Iterable[Target], recorder: Recorder) -> Iterator[None]:
    """Within the block, hooks on every target that is a module report to `recorder`."""

    def report(target: Target, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        recorder.record(target, args[0] if args else next(iter(kwargs.values())), output)

    with ExitStack() as stack:
        for target in targets:
            if not target.is_experts:
                stack.callback(target.module.register_forward_hook(partial(report, target), with_kwargs=True).remove)
        yield


def token_rows(target: Target, tensor: Tensor, batch_shape: tuple[int, int]) -> Tensor:
    """(..., features) as (sequences * tokens, features), where its rows are the batch's tokens in order."""
    if fault := row_fault(tensor, batch_shape):
        raise InputError(f"targets must leave out {target.name}: {fault}.")
    return tensor.reshape(-1, tensor.shape[-1])


def row_fault(output: Any, batch_shape: tuple[int, int]) -> str:
    """Reason why a module's output does not have one row per token of the batch; empty if it has."""
    if not isinstance(output, Tensor):
        return f"its output is a {type(output).__name__}, not a tensor"
    sequences, tokens = batch_shape
    leading = [size for size in output.shape[:-1] if size != 1]
    if leading not in ([size for size in batch_shape if size != 1], [sequences * tokens]):
        return f"its output has shape {tuple(output.shape)}, whose rows are not the {sequences} x {tokens} tokens of the batch"
    return ""


def _write_norms(rows: Tensor, row_scale: Tensor | None, columns: Tensor) -> None:
    if rows.dtype == torch.float64:  # whose norms are float64 too, and the planes are not
        columns.copy_(block_norms(rows, BLOCK_SIZE, row_scale=row_scale))
    else:
        block_norms(rows, BLOCK_SIZE, row_scale=row_scale, out=columns)


def _row_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach().reshape(-1, x.shape[-1]), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
