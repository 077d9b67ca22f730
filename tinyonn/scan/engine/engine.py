"""The scan of one batch: activation and gradient norm of every weight block for every token."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from transformers import PretrainedConfig, PreTrainedModel

from ..._io.options import one_of
from ...errors import InputError
from ...hf.interfaces import attention_implementation
from ...mscan.layout import LayoutEntry, layout_groups
from ...mscan.types import Integral
from ..config import CREDITS
from .batch import Batch
from .capture import Capture, Recorder, module_hooks
from .experts import PairRecorder, recorded_experts
from .forward import check_differentiable, frozen, logits_from_embeddings, loss_into_gradient_, position_switches, vocabulary_size
from .integral import sequence_integral
from .local_credit import LOCAL_CREDIT
from .lookup import TiedLookup, tied_lookup
from .proof import logit_change, probe_tokens, prove_causal, prove_local_credit
from .targets import Selection, Target, find_targets, layout_of
from .witness import NO_GRADIENT, prove_weights

_entered: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class SequenceScan:
    """Result for one sequence of a batch, without its padding.

    Attributes:
        activation: (tokens, blocks) float32, ‖output block‖₂; NaN for the last token, which has no label.
        grad_norm: (tokens, blocks) float32, per-token gradient norm of the weight's block, in nats per weight; NaN for the last token, for
            experts that the token was not routed to, and for modules that did not run.
        loss: (tokens,) float32 in nats; loss[t] is that of predicting token t + 1; NaN for the last token.
        integral: ∫SPS and moments over the tokens that are not NaN; ∫SPS is NaN for a block without such a token.
    """

    activation: NDArray[np.float32]
    grad_norm: NDArray[np.float32]
    loss: NDArray[np.float32]
    integral: Integral


class ScanEngine:
    """Records activation and gradient norms of a causal language model, batch by batch.

        with ScanEngine(model) as engine:
            for result in engine.scan(input_ids, attention_mask):
                result.activation, result.grad_norm, result.loss

    The loss is cross-entropy summed over tokens, so a token's gradient does not depend on its sequence's length. The measured
    weights are the matrices, not the biases. A weight that is also the input embeddings is recorded as the output head, with the
    look-up's part in its gradient. A sequence's values do not depend on its padding or its neighbours in the batch beyond rounding.

    On entry, a probe batch proves for every weight that its hook fires and that the recorded outer products sum to the weight's own
    gradient. Weights that fail are left out; `not_measured` has the reasons. On exit, the model is restored: hooks, requires_grad,
    training modes, implementations and any `.grad`.

    Args:
        model: causal language model of transformers, on one device.
        credit: "full" includes a token's effect on later tokens in its gradient. "local" uses only its own loss, through its
            own positions; keys and values of other tokens are constants.
        targets: modules to record; see `tinyonn.scan.engine.targets.find_targets`.

    Attributes:
        layout: one LayoutEntry per weight, in column order of the planes; final after entry.
        group_offsets: (groups + 1,) int64, first column of each decoder layer; final after entry.
        not_measured: name of a requested weight that is left out -> reason; final after entry.
        unproven: name of a recorded weight whose own gradient could not be compared, such as a quantised weight -> reason.

    Raises:
        InputError: the credit is unknown, a target does not exist, or the model is not of transformers or not on one device; on entry, the
            model is not causal, its 4-bit weights were repacked for inference, local credit is not exact, or a pattern names a weight that
            cannot be measured.
    """

    def __init__(self, model: PreTrainedModel, *, credit: str = "full", targets: str = "all") -> None:
        if not isinstance(getattr(model, "config", None), PretrainedConfig):
            raise InputError(f"model must be a transformers causal language model, got {type(model).__name__}.")
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise InputError("model must have weights that autograd takes, got some made under torch.inference_mode: load it outside.")
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            raise InputError(f"model must be on one device, got {', '.join(sorted(map(str, devices)))}.")
        self.model = model
        self.credit = one_of(*CREDITS)(credit, "credit")
        self.device = devices.pop()
        self._take(find_targets(model, targets))
        self.unproven: Mapping[str, str] = {}
        self._lookup: TiedLookup | None = None
        self._stack: ExitStack | None = None
        self._lock = threading.Lock()

    def _take(self, selection: Selection) -> None:
        self._selection = selection
        self.layout: list[LayoutEntry] = layout_of(selection.targets)
        self.group_offsets = torch.from_numpy(layout_groups(self.layout)[1])

    @property
    def blocks(self) -> int:
        """Columns of a plane."""
        return self._targets[-1].end

    @property
    def not_measured(self) -> Mapping[str, str]:
        return self._selection.left_out

    @property
    def _targets(self) -> list[Target]:
        return self._selection.targets

    def __enter__(self) -> ScanEngine:
        if self._stack is not None:
            raise RuntimeError("ScanEngine is entered already; exit it before entering it again.")
        with ExitStack() as stack, _recording():
            check_differentiable(self.model)
            stack.enter_context(_alone(self.model))
            stack.enter_context(frozen(self.model))
            self._prove()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._stack is not None
        stack, self._stack = self._stack, None
        stack.close()

    def scan(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[SequenceScan]:
        """Scans one batch.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 for tokens and 0 for padding, at either end of a row; None for no padding.

        Returns:
            One SequenceScan per row.

        Raises:
            InputError: the shapes differ; a row has no token, or padding between tokens; a token is outside the vocabulary; a
                module's output does not have one row per token.
        """
        with self._lock:  # threads take turns
            return self._scan_parts(input_ids, attention_mask)

    def _scan_parts(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[SequenceScan]:
        if self._stack is None:
            raise RuntimeError("ScanEngine is not entered; call scan inside `with engine:`.")
        if any(module.training for module in self.model.modules()):
            raise RuntimeError("model was put into training mode; it must stay in eval mode while the engine is entered.")
        check_differentiable(self.model)
        batch = Batch.of(input_ids, attention_mask, vocabulary_size(self.model), self.device)
        switches, limit = position_switches(self.model)
        if limit is not None and max(batch.lengths) > limit:
            raise InputError(
                f"input_ids must be at most {limit} tokens long for this model, whose positions beyond depend on what ran before, "
                f"got {max(batch.lengths)}."
            )
        results: dict[int, SequenceScan] = {}
        for rows, part in batch.split(switches):
            with _recording():
                results.update(zip(rows, self._results(part, *self._captured(part)), strict=True))
        return [results[row] for row in range(len(results))]

    def _captured(self, batch: Batch) -> tuple[Capture, Tensor]:
        """The planes of a batch, and the loss of each token."""
        capture = Capture(self._targets, batch.input_ids, self._lookup)
        with self._recording_into(capture):
            logits, embeddings = logits_from_embeddings(self.model, batch.input_ids)
            if int(batch.labels.max()) >= logits.shape[-1]:
                raise InputError(f"input_ids must be 0 … {logits.shape[-1] - 1}, which the model has logits for.")
            # The gradient is written over the logits. The edge into the graph is taken before: a view that was written to gets a
            # new one, without the hooks. Should an earlier step need the logits for its own backward, autograd raises.
            edge, values = get_gradient_edge(logits), logits.detach().view(-1, logits.shape[-1])
            loss = loss_into_gradient_(values, batch.labels.reshape(-1))
            (embedding_grad,) = torch.autograd.grad([edge], [embeddings], [values.view_as(logits)])
            capture.finish(embedding_grad)
            del logits, values, edge, embeddings, embedding_grad
        return capture, loss

    @contextmanager
    def _recording_into(self, recorder: Recorder | None) -> Iterator[None]:
        """Hooks on every target, and the attention and experts functions of a scan. `generate` between scans uses the model's own."""
        with ExitStack() as stack:
            if recorder is not None:
                stack.enter_context(module_hooks(self._targets, recorder))
            stack.enter_context(self._experts(recorder))
            if self.credit == "local":
                stack.enter_context(attention_implementation(self.model, LOCAL_CREDIT))
            yield

    def _results(self, batch: Batch, capture: Capture, loss: Tensor) -> Iterator[SequenceScan]:
        shape = batch.shape
        activation, grad_norm = capture.activation.unflatten(0, shape), capture.grad_norm.unflatten(0, shape)
        offsets = self.group_offsets.to(self.device)
        for row, length in enumerate(batch.lengths):
            planes = activation[row, :length], grad_norm[row, :length]
            for plane in planes:
                plane[-1] = torch.nan
            integral = sequence_integral(*planes, offsets)
            yield SequenceScan(planes[0].cpu().numpy(), planes[1].cpu().numpy(), loss.view(shape)[row, :length].cpu().numpy(), integral)

    @contextmanager
    def _experts(self, recorder: Recorder | None) -> Iterator[None]:
        by_module: dict[nn.Module, dict[str, Target]] = {}
        for target in self._targets:
            if target.is_experts:
                by_module.setdefault(target.module, {})[target.weight] = target
        with recorded_experts(self.model, {module: _pair_recorder(weights, recorder) for module, weights in by_module.items()}):
            yield

    def _prove(self) -> None:
        experts = {target.name for target in self._targets if target.is_experts}
        if experts and (change := logit_change(self.model, lambda: self._experts(None))):
            why = f"computing its experts one product at a time changes the logits by {change}"
            self._take(self._selection.without(dict.fromkeys(experts, why)))
        with self._experts(None):
            if self.credit == "local":
                prove_local_credit(self.model)
            prove_causal(self.model)
        if self.credit == "local" and (change := logit_change(self.model, lambda: self._recording_into(None))):
            raise InputError(f"credit must be 'full' for this model: credit='local' changes its logits by {change}.")
        self._prove_weights()

    def _prove_weights(self) -> None:
        tokens = probe_tokens(self.model)[0]
        probe = torch.stack([tokens, tokens.flip(0)])
        self._lookup = self._tied(probe)
        verdict = prove_weights(self.model, self._targets, probe, self._recording_into, self._lookup)
        self.unproven = verdict.unproven
        self._without(verdict.faults)
        # With its weights frozen, a scan reaches only what depends on the embeddings.
        capture, _ = self._captured(Batch.of(probe, None, vocabulary_size(self.model), self.device))
        self._without({target.name: NO_GRADIENT for target in self._targets if target.name not in capture.reached})

    def _without(self, faults: dict[str, str]) -> None:
        """Leaves out the targets in `faults`, and moves the columns of the others, including a tied output head's."""
        if not faults:
            return
        self._take(self._selection.without(faults))
        if self._lookup is not None:
            name = self._lookup.target.name
            head = next((target for target in self._targets if target.name == name), None)
            self._lookup = None if head is None else replace(self._lookup, target=head)

    def _tied(self, probe: Tensor) -> TiedLookup | None:
        found = (tied_lookup(self.model, target, probe) for target in self._targets if not target.is_experts)
        return next((lookup for lookup in found if lookup is not None), None)


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Keeps other engines from entering the model within the block: the first to exit would undo what the other still needs."""
    if model in _entered:
        raise RuntimeError("another ScanEngine has entered this model; only one can at a time.")
    _entered.add(model)
    try:
        yield
    finally:
        _entered.discard(model)


@contextmanager
def _recording() -> Iterator[None]:
    """Enables autograd and disables compilation within the block, because compiled code does not call new hooks."""
    with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        yield


def _pair_recorder(weights: dict[str, Target], recorder: Recorder | None) -> PairRecorder:
    def record(name: str, *pairs: Any) -> None:
        if recorder is not None and name in weights:
            recorder.record_pairs(weights[name], *pairs)

    return record
