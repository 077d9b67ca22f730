"""Folders of PEFT adapters: their base model, and the merged model.

Adapters are merged: their products are added to the weights of the base model, W' = W + scale · B·A. A merged model has the modules and
names of the base model, and its weights are the effective ones.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from .._io.folders import ADAPTER_CONFIG, adapter_files, read_adapter_config
from ..errors import InputError, listed, needs, reason
from .memory import is_out_of_memory

# Class of transformers that an adapter was trained on, by task.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Fields on the origin of an adapter, which do not affect its values.
_DESCRIPTIVE = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping")


def check_adapter(folder: Path) -> None:
    """Checks that an adapter can be merged, before anything is loaded.

    Raises:
        InputError: PEFT is not installed; the configuration is damaged, names no base model, or is of a kind without weight updates
            (prompts, prefixes); the weights are missing.
    """
    config = read_adapter_config(folder)
    if not config.get("base_model_name_or_path"):
        raise InputError(f"model_path must be an adapter with a base model, got {folder.name}, whose {ADAPTER_CONFIG} names none.")
    if not adapter_files(folder):
        raise InputError(f"model_path must hold the adapter's weights (adapter_model.safetensors), got {folder.name}.")
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"{needs(f'model_path is a PEFT adapter, {folder.name}, which', 'peft')}. "
            "Or merge it elsewhere (merge_and_unload, save_pretrained) and use that folder."
        )
    kind = str(config.get("peft_type"))
    if any(word in kind for word in ("PROMPT", "PREFIX", "P_TUNING", "CPT")):
        raise InputError(f"model_path must be an adapter of weights, such as LoRA, got {folder.name} of the type {kind}.")


def settings_hash(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the fields of an adapter's configuration that affect its values (rank, alpha, targets)."""
    config = {name: value for name, value in read_adapter_config(folder).items() if name not in _DESCRIPTIVE}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def trained_class(folder: Path, wanted: str) -> str:
    """Name of the transformers class that an adapter was trained on; `wanted` if its configuration names no task."""
    return _CLASSES.get(str(read_adapter_config(folder).get("task_type")), wanted)


def merge(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Adds an adapter's products to the weights of the base model, in place. All weights require gradients afterwards.

    Raises:
        InputError: the adapter's weights do not match its configuration and the base model, or cannot be merged.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on missing weights, which raise an error below; on Conv1D; on deprecations
            found = _stored_shapes(folder)
            _make_room(base, found)
            adapted = PeftModel.from_pretrained(base, str(folder))
            wanted = set(get_peft_model_state_dict(adapted))
            tied = _is_tied(base)
            _unshare(adapted)
            merged = cast(Any, adapted).merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT raises a dozen types, depending on version and adapter
        if is_out_of_memory(error):
            raise
        wanted_kind = "model_path must be an adapter that can be merged into its base model"
        text = str(error)
        place = max(text.find("size mismatch"), 0)  # the message of torch begins with the class and the model
        raise InputError(f"{wanted_kind}, got {folder.name}: {reason(text[place:])}") from error
    # PEFT leaves missing weights at their initial values.
    if missing := sorted(wanted - set(found)):
        raise InputError(f"model_path must hold all weights of the adapter, got {folder.name} without {listed(missing, 2, width=80)}.")
    if others := sorted(name for name in set(found) - wanted if "embed" not in name and "lm_head" not in name):
        raise InputError(f"model_path must be an adapter of its base model, got {folder.name} with {listed(others, 2, width=80)}.")
    if tied and not _is_tied(merged):
        _tie_if_equal(merged)
    return cast(PreTrainedModel, merged.requires_grad_(True))


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _unshare(adapted: nn.Module) -> None:
    """Gives each adapted layer its own weight: PEFT adds a product in place, which would also change the other use of a tied weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = Counter(id(module._parameters.get("weight")) for module in adapted.modules())
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            weight = layer._parameters.get("weight")
            if weight is not None and uses[id(weight)] > 1:
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _tie_if_equal(merged: PreTrainedModel) -> None:
    """Ties output head and input embeddings again if they are equal; otherwise sets tie_word_embeddings to False."""
    head, embeddings = cast(Any, merged.get_output_embeddings()), cast(Any, merged.get_input_embeddings())
    if head.weight.shape == embeddings.weight.shape and bool((head.weight == embeddings.weight).all()):
        head.weight = embeddings.weight
    else:
        merged.config.tie_word_embeddings = False


def take_over(model: nn.Module, donor: nn.Module) -> None:
    """Copies the weights of the transformer inside `donor` to the same transformer under another head.

    Raises:
        InputError: the transformers differ.
    """
    try:
        cast(Any, model).base_model.load_state_dict(cast(Any, donor).base_model.state_dict())
    except RuntimeError as error:
        raise InputError(f"model_path must be an adapter of a {type(model).__name__}, got one of a {type(donor).__name__}.") from error


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from peft.utils import load_peft_weights

    return {name: tuple(tensor.shape) for name, tensor in load_peft_weights(str(folder), device="cpu").items()}


def _make_room(base: PreTrainedModel, stored: dict[str, tuple[int, ...]]) -> None:
    """Resizes the vocabulary of the base model to that of an adapter that contains whole embeddings, such as one with added tokens.

    Raises:
        InputError: the adapter lacks an output head for its tokens.
    """

    def rows(layer: nn.Module | None) -> int | None:
        name = next((name for name, module in base.named_modules() if module is layer), None) if layer is not None else None
        shape = stored.get(f"base_model.model.{name}.weight") or stored.get(f"base_model.model.{name}.base_layer.weight")
        return shape[0] if shape else None

    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    size = rows(embeddings)
    if size is None or size == cast(Any, embeddings).weight.shape[0]:
        return
    if head is not None and not _is_tied(base) and rows(head) != size:
        raise InputError(f"the adapter has embeddings for {size} tokens, but no output head for them")
    base.resize_token_embeddings(size, mean_resizing=False)
