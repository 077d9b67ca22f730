"""Steps before and after the forward of a converted model, and the addition of its parts."""

from __future__ import annotations

import inspect
import warnings
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMode

from ...errors import InputError
from ...nn.dyn_nsa import DynNSACore, normalised_entropy
from .._forward import ForwardAround, forward_around, refuse_replicas, tokens_of
from ..peft_parts import frozen
from .decoding import note_tau, noted_tau, recall
from .options import checked_options, open_price, price_of_budget
from .parts import ARRIVALS, DYN_NSA, PART, attention_of, cores, take_budget_loss

PRICE, BUDGET = "block_price", "block_budget"  # keywords of a call; transformers passes the first to the attention function
OBSERVED_TOKENS = 256  # about as many evenly spaced tokens of a row give their output entropy in training, because logits are large


def add_parts(model: PreTrainedModel, options: dict[str, Any], layers: dict[str, list[int]]) -> None:
    """Adds a core to each layer that has none, and wraps the model's forward.

    Args:
        options: fields of `DynNSAOptions`, which all layers share.
        layers: name of each attention layer -> query heads, key heads, head size.

    Raises:
        InputError, TypeError, ValueError: a bad option.
    """
    shared = checked_options(options)
    for name, (heads, kv_heads, dim) in layers.items():
        module = model.get_submodule(name)
        if PART in module._modules:  # the base model has added it
            continue
        device, dtype = _place_of(model, module)
        with torch.inference_mode(False):
            core = DynNSACore(heads, kv_heads, dim, shared, price=open_price(shared), device=device, dtype=dtype)
        module.add_module(PART, core.train(module.training))
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel):
            remove_observed_forward(inner)
    model.forward = ObservedForward(model)
    for method, refusal in (*_REFUSED.items(), ("_validate_generation_mode", CheckedGeneration(model))):
        setattr(model, method, refusal)


def _place_of(model: PreTrainedModel, module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a layer's parts. The dtype ignores weights in integers or eight bits, which are not computed in that dtype."""
    own = list(module.parameters())
    weights = [weight for weight in (*own, *model.parameters()) if weight.is_floating_point() and weight.itemsize > 1]
    # While a model loads, weights drawn by torch.normal are on the CPU, and the others are still on the meta device.
    return next((weight for weight in own if weight.is_meta), own[0]).device, weights[0].dtype


def remove_observed_forward(model: PreTrainedModel) -> bool:
    """Removes the model's `ObservedForward`, and keeps other wrappers around it. False if it is not found."""
    forward, outer = forward_around(model, ObservedForward)
    if forward is None:
        return False
    if outer is not None:
        outer.inner = forward.inner
        return True
    for method in ("forward", "_validate_generation_mode", *_REFUSED):
        delattr(model, method)
    if forward.inner != model.forward:
        model.forward = forward.inner  # a wrapper from before the conversion
    return True


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> None:
    raise InputError("DynNSA does not support the paged cache of continuous batching; use generate.")


# Methods that would bypass the model's forward or its cache.
_REFUSED: dict[str, Any] = {
    "_replicate_for_data_parallel": refuse_replicas,
    "init_continuous_batching": _refuse_continuous_batching,  # every entry point calls it first
}


class CheckedGeneration:
    """A converted model's `_validate_generation_mode`, which `generate` calls first. It is an object, so that the model can be copied."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, generation_mode: Any, *args: Any, **kwargs: Any) -> None:
        part = next(cores(self.model), None)
        if generation_mode == GenerationMode.ASSISTED_GENERATION and part is not None and part.options.tau_source == "output":
            raise InputError(
                "tau_source must be 'attention' or 'constant' for assisted generation, got 'output'. One forward checks several guessed "
                "tokens, so the output before each is not known yet, and the generated text would change."
            )
        type(self.model)._validate_generation_mode(self.model, generation_mode, *args, **kwargs)  # type: ignore[attr-defined]


class ObservedForward(ForwardAround):
    warned = False

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's signature, with the price and the budget of a call: `generate` reads the names of a model's keywords from it."""
        own = super().__signature__
        others = [parameter for parameter in own.parameters.values() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        named = [parameter for parameter in own.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in (PRICE, BUDGET)]
        return own.replace(parameters=[*named, *keywords, *others])

    @property
    def __code__(self) -> CodeType:
        """Code of `__call__`; `torch.export` names it as the origin of its symbols."""
        return type(self).__call__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.by_name(args, kwargs)
        found = list(cores(self.model))  # once: dynamo does not search modules again after one has changed
        if not found:
            return self.inner(*args, **kwargs)
        if not torch.compiler.is_compiling():
            self._warn_if_unused()
        if (budget := kwargs.pop(BUDGET, None)) is not None:
            if kwargs.get(PRICE) is not None:
                raise InputError(f"a call must be given {PRICE} or {BUDGET}, got both.")
            kwargs[PRICE] = price_of_budget(found[0].options, budget)
        tau = _before(self.model, found, given)
        if tau is not None:
            kwargs["tau"] = tau
        named = next((name for name in (BUDGET, PRICE, "tau") if given.get(name) is not None), None if tau is None else "tau_source")
        arrivals: list[nn.Module] = []
        if named is not None:
            kwargs[ARRIVALS] = arrivals
        try:
            output = self.inner(*args, **kwargs)
        finally:
            for core in found:
                core.collecting = False
        if named is not None and not arrivals and attention_of(self.model.config) == DYN_NSA:
            raise InputError(not_passed(named, self.model))
        return _after(self.model, found, given, output)

    def _warn_if_unused(self) -> None:
        if not self.warned and (running := attention_of(self.model.config)) != DYN_NSA:
            self.warned = True
            warnings.warn(
                f"attn_implementation is '{running}', so the converted layers are not used; set '{DYN_NSA}' or call revert_attention.",
                stacklevel=3,
            )


def not_passed(name: str, model: nn.Module) -> str:
    """Message for a keyword of a call, or "tau_source" for "output", in a model whose layers do not pass keywords to their attention."""
    why = f"because the layers of {type(model).__name__} do not pass keywords to their attention"
    if name == "tau_source":
        return f"tau_source must be 'attention' or 'constant', got 'output', {why}."
    return f"{name} must not be given, {why}." + ("" if name == "tau" else " calibrate sets one price for all calls.")


def _before(model: nn.Module, found: list[DynNSACore], given: dict[str, Any]) -> Tensor | None:
    """Prepares the cores. Returns the tau for tau_source="output", which is passed in so that recomputation in backward uses it too."""
    if not torch.compiler.is_compiling():
        _check_packing(model, given)
        recall(model, given)
    first = found[0]
    for core in found:
        core.collecting, core.collected = True, []
    if first.options.tau_source != "output" or given.get("tau") is not None:
        return None
    tau, tokens = first.output_tau.clone(), tokens_of(given)
    if tokens is None:
        raise InputError("the model needs input_ids or inputs_embeds.")
    past = given.get("past_key_values")
    if not model.training and past is not None and tokens.shape[1] == 1:
        if not torch.compiler.is_compiling():
            tau = noted_tau(model, past, tau)
        elif (previous := first.previous_tau) is not None and len(previous) == len(tokens):  # assumes that rows kept their order
            tau = torch.where(torch.as_tensor(past.get_seq_length(), device=tau.device) > 0, previous, tau)
    return tau


def _check_packing(model: nn.Module, given: dict[str, Any]) -> None:
    """InputError for packed sequences with a cache: transformers does not look for them there, so they would attend to each other."""
    positions, use_cache = given.get("position_ids"), given.get("use_cache")
    if (
        positions is None
        or positions.dim() != 2
        or any(given.get(n) is not None for n in ("attention_mask", "past_key_values", "cu_seq_lens_q"))
    ):
        return
    if (getattr(model.config, "use_cache", False) if use_cache is None else use_cache) and bool((positions[:, 1:] == 0).any()):
        raise InputError(
            "position_ids must not restart within a row (packed sequences) when the model uses a cache; pass use_cache=False or "
            "cu_seq_lens_q."
        )


def _after(model: nn.Module, found: list[DynNSACore], given: dict[str, Any], output: Any) -> Any:
    """Adds the budget loss and the distillation loss to the model's loss, and records the output's entropy."""
    first = found[0]
    labels = given.get("labels")
    logits = _logits(model, output, labels)
    if first.options.tau_source == "output" and logits is not None:
        logits = logits if model.training else logits[:, -1:]
        mask = given.get("attention_mask")
        mask = mask[:, -logits.shape[1] :] if isinstance(mask, Tensor) and mask.dim() == 2 else None
        step = max(1, logits.shape[1] // OBSERVED_TOKENS)
        entropy = normalised_entropy(logits[:, ::step])
        mask = None if mask is None else mask[:, ::step]
        for core in found:
            core.observe_output(entropy, mask)
        if not model.training and not torch.compiler.is_compiling():
            cache = given.get("past_key_values") if isinstance(output, tuple) else getattr(output, "past_key_values", None)
            note_tau(model, cache, entropy[:, -1])
    if not (first.options.budget_weight or first.options.distil_weight) or labels is None or not model.training:
        return output
    loss = take_budget_loss(found)
    if loss is None:
        return output  # the model was switched to another attention
    taught = {"budget": [core.base for core in found] if first.options.budget_weight else []}
    taught["distillation"] = [p for core in found for p in core.estimate_parameters().values()] if first.options.distil_weight else []
    lost = [name for name, parameters in taught.items() if not frozen(parameters)]
    if torch.is_grad_enabled() and not loss.requires_grad and lost:
        raise RuntimeError(f"the {lost[0]} loss has no gradient; gradient checkpointing needs use_reentrant=False.")
    if (items := given.get("num_items_in_batch")) is not None:
        # Like the model's own loss, this is the batch's share of the optimiser step. Tokens are counted as in Trainer.
        counted = given.get("shift_labels")
        if counted is None:
            counted = labels[..., 1:] if labels.dim() > 1 else labels
        items = items.to(loss.device) if isinstance(items, Tensor) else items
        loss = loss * ((counted != -100).sum().to(loss.device) / items)
    # In a model on several devices, the layers' loss is on that of the first layer, and the model's on that of its head.
    if isinstance(output, tuple):
        return (output[0] + loss.to(output[0].device), *output[1:])
    output["loss"] = output["loss"] + loss.to(output["loss"].device)
    return output


def _logits(model: nn.Module, output: Any, labels: Tensor | None) -> Tensor | None:
    """Logits of a model with a head; with return_dict=False the first output, or the second if there is a loss."""
    if not isinstance(output, tuple):
        return getattr(output, "logits", None)
    assert isinstance(model, PreTrainedModel)
    return None if model.get_output_embeddings() is None else output[0 if labels is None else 1]
