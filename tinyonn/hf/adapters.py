"""Folders of PEFT adapters: which model they belong to, and both merged into one.

An adapter is read merged: its products are added to the weights of the base model, W' = W + scale · B·A. So a merged model has the
base model's modules under the base model's names, and each weight is the one that the tokens met.
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

# The class of transformers that an adapter of a task was trained on.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Where an adapter came from and how it was made, which change no value.
_DESCRIPTIVE = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping")


def check_adapter(folder: Path) -> None:
    """Refuses an adapter that cannot be read merged, before anything is loaded.

    Raises:
        InputError: PEFT is missing, the configuration is damaged or of a kind that adds no weights (prompts, prefixes), the weights
            are missing, or no base model is named.
    """
    config = read_adapter_config(folder)
    if not config.get("base_model_name_or_path"):
        raise InputError(f"model_path must be an adapter that names its base model, got {folder.name}: {ADAPTER_CONFIG} has none.")
    if not adapter_files(folder):
        raise InputError(f"model_path must hold the adapter's weights (adapter_model.safetensors), got {folder.name}.")
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"{needs(f'model_path is a PEFT adapter, {folder.name}, which', 'peft')}. "
            "Or merge it elsewhere (merge_and_unload, save_pretrained) and give that folder."
        )
    kind = str(config.get("peft_type"))
    if any(word in kind for word in ("PROMPT", "PREFIX", "P_TUNING", "CPT")):
        raise InputError(f"model_path must be an adapter of weights, such as LoRA, got {folder.name} of the type {kind}.")


def settings_hash(folder: Path) -> str:
    """SHA-256 of what an adapter's configuration says of its values (rank, alpha, targets), in hexadecimal."""
    config = {name: value for name, value in read_adapter_config(folder).items() if name not in _DESCRIPTIVE}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def trained_class(folder: Path, wanted: str) -> str:
    """Name of the transformers class that an adapter was trained on; `wanted` where it does not say."""
    return _CLASSES.get(str(read_adapter_config(folder).get("task_type")), wanted)


def merge(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base model with an adapter's products added to its weights, in place; all of its weights may be trained again.

    Raises:
        InputError: the adapter's weights are not those that its configuration makes of this model, or cannot be merged.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing weights, which are refused below; of Conv1D; of what transformers will drop
            found = _stored_shapes(folder)
            _make_room(base, found)
            adapted = PeftModel.from_pretrained(base, str(folder))
            wanted = set(get_peft_model_state_dict(adapted))
            tied = _is_tied(base)
            _unshare(adapted)
            merged = cast(Any, adapted).merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT raises a dozen types, by version and kind of adapter
        if is_out_of_memory(error):
            raise
        wanted_kind = "model_path must be an adapter that can be merged into its base model"
        text = str(error)
        place = max(text.find("size mismatch"), 0)  # torch names the class and the model before what is wrong
        raise InputError(f"{wanted_kind}, got {folder.name}: {reason(text[place:])}") from error
    # Weights that are missing PEFT leaves at their start.
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
    """Gives each adapted layer a weight of its own: PEFT adds a product in place, which would change a tied weight's other use too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = Counter(id(module._parameters.get("weight")) for module in adapted.modules())
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            weight = layer._parameters.get("weight")
            if weight is not None and uses[id(weight)] > 1:
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _tie_if_equal(merged: PreTrainedModel) -> None:
    """Ties output head and input embeddings again where the adapter left them equal, else has the configuration say that they differ."""
    head, embeddings = cast(Any, merged.get_output_embeddings()), cast(Any, merged.get_input_embeddings())
    if head.weight.shape == embeddings.weight.shape and bool((head.weight == embeddings.weight).all()):
        head.weight = embeddings.weight
    else:
        merged.config.tie_word_embeddings = False


def take_over(model: nn.Module, donor: nn.Module) -> None:
    """Gives the transformer inside a model the weights of the same transformer under another head.

    Raises:
        InputError: they are not the same.
    """
    try:
        cast(Any, model).base_model.load_state_dict(cast(Any, donor).base_model.state_dict())
    except RuntimeError as error:
        raise InputError(f"model_path must be an adapter of a {type(model).__name__}, got one of a {type(donor).__name__}.") from error


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from peft.utils import load_peft_weights

    return {name: tuple(tensor.shape) for name, tensor in load_peft_weights(str(folder), device="cpu").items()}


def _make_room(base: PreTrainedModel, stored: dict[str, tuple[int, ...]]) -> None:
    """Resizes the vocabulary of the base model to that of an adapter which was trained with more tokens and holds the embeddings whole.

    Raises:
        InputError: rows of the output head would be left without a trained value.
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
        raise InputError(f"the adapter must hold an output head for its {size} tokens, got embeddings alone")
    base.resize_token_embeddings(size, mean_resizing=False)
