"""A model and its tokenizer, loaded from a local folder or the hub; errors are one line."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from .._io.config import dtype_name, local_model
from .._io.folders import adapter_files, has_tokenizer, is_adapter, read_adapter_config, tokenizer_fault
from .._io.hub import SMALL_FILES, hub_folder
from .._io.units import readable_bytes
from ..errors import InputError, listed, reason
from .adapters import check_adapter, merge, take_over, trained_class
from .memory import available_memory, is_out_of_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Kind of model that a class loads, for messages.
_MODELS = {"AutoModelForCausalLM": "causal language model", "AutoModelForSequenceClassification": "sequence classifier"}
# Heads that a checkpoint of the bare transformer lacks, and that an adapter may contain.
_HEADS = r"^(score|classifier|pre_classifier|pooler|lm_head|head)\b"


def resolve_model(model_path: str) -> Path:
    """The folder of a model or PEFT adapter: `model_path` itself, or the snapshot of a hub id, downloaded if it is not in the cache.

    Raises:
        InputError: the folder does not exist or contains no model; the id cannot be downloaded; an adapter cannot be read, or its base
            model is missing.
    """
    path = local_model(model_path)
    if path is None:
        path = _download(model_path)
    if is_adapter(path):
        check_adapter(path)
        base_folder(path)
        return path
    if not weight_files(path):
        raise InputError(f"model_path must hold weights (*.safetensors or *.bin), got {model_path}.")
    return path


def base_folder(folder: Path) -> Path:
    """The folder with the whole model: the base model's for an adapter, otherwise `folder` itself.

    Raises:
        InputError: the base model of an adapter is not here and cannot be downloaded.
    """
    if not is_adapter(folder):
        return folder
    name = base_name(folder)
    beside = folder / name  # a relative path is relative to the working folder of the training, or to the adapter's folder
    try:
        return base_folder(resolve_model(str(beside) if not Path(name).is_dir() and beside.is_dir() else name))
    except InputError as error:
        raise InputError(f"adapter {folder.name} needs its base model: {error}") from error


def base_name(folder: Path) -> str:
    """The base model of an adapter, as the adapter names it."""
    return str(read_adapter_config(folder)["base_model_name_or_path"])


def tokenizer_folder(folder: Path) -> Path:
    """The folder of a model's tokenizer: for an adapter without one, its base model's."""
    return folder if not is_adapter(folder) or has_tokenizer(folder) else base_folder(folder)


def _download(model_id: str) -> Path:
    def complete(folder: Path) -> bool:
        return is_adapter(folder) or ((folder / "config.json").is_file() and bool(weight_files(folder)))

    # Repositories often contain the same weights twice; safetensors are preferred.
    for weights in ("*.safetensors", "*.bin"):
        if folder := hub_folder(model_id, "model_path must be an existing folder or a hub id", (*SMALL_FILES, weights), complete):
            return folder
    raise InputError(f"model_path must hold a model with config.json and weights, got {model_id}.")


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers loads a model's weights, sorted: safetensors or PyTorch files, one file or those in the index.

    Other files are ignored, such as the same weights in another layout or an optimiser's state. An adapter's files follow those of its base
    model.
    """
    if is_adapter(folder):
        return [*weight_files(base_folder(folder)), *adapter_files(folder)]
    for whole, pattern in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "*.bin")):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return [folder / name for name in _indexed(index)]
        if files := sorted(file for file in folder.glob(pattern) if file.name != "training_args.bin"):
            return files
    return []


def _indexed(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"model_path must hold a valid index of its weights, got a damaged {index.name}.") from error
    for name in names:
        if not isinstance(name, str) or not (index.parent / name).is_file():
            raise InputError(f"model_path must hold all files that {index.name} names, got none called {name}.")
    return names


def weights_of(folder: Path) -> int:
    """Number of weights of a model, from the headers of safetensors files, or from the size of PyTorch files. An adapter adds none.

    Raises:
        InputError: a file is not safetensors, or is truncated.
    """
    folder = base_folder(folder)
    values = 0
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            values += file.stat().st_size // _stored_width(folder)
            continue
        try:
            with safe_open(file, "np") as opened:
                values += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"model_path must hold whole safetensors files, got {file.name}: {reason(error)}") from error
    return values


def _stored_width(folder: Path) -> int:
    """Bytes per weight in PyTorch files, by the dtype in the configuration; float32 if there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
    except (OSError, ValueError, AttributeError):
        named = None
    return named.itemsize if isinstance(named, torch.dtype) else 4


def resolve_device(device: str, local_rank: int = 0) -> torch.device:
    """The torch device of an option; "auto" is this process's GPU if there is one, else the CPU.

    Raises:
        InputError: the device is unknown, or the GPU does not exist.
    """
    if device == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local_rank % count) if count else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:  # an unknown device, or an index beyond torch's integers
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {device}.") from error
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device must be cpu where torch finds no GPU, got {device}.")
        index = local_rank if resolved.index is None else resolved.index
        if index >= torch.cuda.device_count():
            raise InputError(f"device must be one of the {torch.cuda.device_count()} GPUs here, got cuda:{index}.")
        return torch.device("cuda", index)
    return resolved


def load_config(folder: Path) -> Any:
    """The model's transformers configuration.

    Raises:
        InputError: transformers does not know the architecture, or the file is damaged.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base_folder(folder))
    except Exception as error:  # errors of transformers on a damaged file have no common type
        raise InputError(f"model_path must hold a model that transformers knows, got {folder.name}: {reason(error)}") from error


def settings_of(model_config: Any) -> dict[str, Any]:
    """What a configuration has on the computation of the model, without where it comes from, precision and use of a cache."""
    found: dict[str, Any] = json.loads(model_config.to_json_string())
    others = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
    return {name: value for name, value in found.items() if name not in others}


def resolve_dtype(dtype: str, device: torch.device, model_config: Any) -> torch.dtype:
    """The precision of an option; "auto" is the checkpoint's own on a GPU and float32 on a CPU, where half precision is slow."""
    if (name := dtype_name(dtype)) != "auto":
        return DTYPES[name]
    stored = getattr(model_config, "dtype", None)
    if device.type == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return stored


def position_limit(model_config: Any) -> int | None:
    """Longest sequence by the model's configuration, None for no limit. A loaded model may accept less; see `usable_positions`."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def usable_positions(model: nn.Module) -> int | None:
    """Longest sequence that a loaded transformers model accepts, None for no limit.

    RoBERTa and related models count positions from padding_idx + 1, so 514 positions in their configuration leave 512 for a text.
    """
    limits = [position_limit(model.config)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and name.endswith("position_embeddings"):
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit is not None), default=None)


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: the folder contains none.
    """
    from transformers import AutoTokenizer

    source = tokenizer_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # errors of transformers on a damaged file have no common type
        raise InputError(f"model_path must hold a tokenizer, got {folder.name}: {tokenizer_fault(source, error)}") from error


def padding_token(tokenizer: Any, batch_size: int) -> int:
    """Token id that fills shorter sequences of a batch; its positions are masked, so only its presence matters.

    Raises:
        InputError: the tokenizer has neither padding nor end-of-text token, and batches need one.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    if batch_size > 1:
        raise InputError(f"batch_size must be 1 where the tokenizer has no padding and no end-of-text token, got {batch_size}.")
    return 0


def check_fits(folder: Path, dtype: torch.dtype, device: torch.device, *, training: bool = False, remedy: str | None = None) -> None:
    """Checks that a model's weights fit in the device's free memory, before anything is loaded.

    Args:
        training: whether it is trained by Adam, for which gradients and both moments are each as large as the weights.
        remedy: advice in the message; None for a smaller `dtype` if there is one, else a smaller model.

    Raises:
        InputError: they do not fit; the message has both sizes and the remedy.
    """
    needed = weights_of(folder) * dtype.itemsize * (4 if training else 1)
    free = available_memory(device)
    if needed > free:
        remedy = remedy or ("--dtype bf16" if dtype.itemsize > 2 else "a smaller model")
        if device.type == "cuda":
            remedy += " or --device cpu"
        size = f"{readable_bytes(needed)} in {str(dtype).removeprefix('torch.')}"
        what = f"to train it takes {size} (weights, gradients, two moments)" if training else f"its weights take {size}"
        raise InputError(f"model_path must fit in memory: {what}, {device} has {readable_bytes(free)} free; use {remedy}.")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block, transformers shows no progress bars and no tables of new or unused weights. Errors are unaffected."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    auto_class: str = "AutoModelForCausalLM",
    may_lack: Sequence[str] = (),
    *,
    training: bool = False,
    remedy: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads a model in eval mode on a device, without output on the terminal. An adapter is merged into its base model.

    Args:
        auto_class: name of the transformers class that loads it.
        may_lack: regular expressions, searched in the names of parameters that the checkpoint may lack, or have in another shape, such as
            a classifier to be trained; transformers initialises these at random.
        training, remedy: as for `check_fits`, which runs first.
        **options: other arguments of `from_pretrained`, such as num_labels.

    Raises:
        InputError: the folder has no model of that class; weights are damaged, missing, or larger than memory.
    """
    import transformers

    check_fits(folder, dtype, device, training=training, remedy=remedy)
    if is_adapter(folder):
        with quiet_transformers():
            return _load_merged(folder, dtype, device, auto_class, may_lack, **options).to(device).eval()
    try:
        with quiet_transformers():
            loaded: Any = getattr(transformers, auto_class).from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:  # errors of transformers on a damaged file have no common type
        if is_out_of_memory(error):
            raise
        held = "valid safetensors files" if type(error).__name__ == "SafetensorError" else _wanted(auto_class)
        raise InputError(f"model_path must hold {held}, got {folder.name}: {class_fault(error, auto_class, folder)}") from error
    model, found = loaded
    unfilled = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}  # initialised at random
    if missing := sorted(name for name in unfilled if not any(re.search(pattern, name) for pattern in may_lack)):
        raise InputError(f"model_path must hold all weights of the model, got {folder.name} without {listed(missing, 3, width=80)}.")
    return cast(PreTrainedModel, model.to(device).eval())


def class_fault(error: Exception, auto_class: str, model: Any) -> str:
    """Why transformers cannot load a model with a class, without its list of architectures that the class supports.

    Args:
        error: error of transformers.
        auto_class: name of the class.
        model: folder or configuration of the model.
    """
    if "Unrecognized configuration class" not in str(error):
        return reason(error)
    config = load_config(model) if isinstance(model, Path) else model
    return f"{config.model_type} has no {_MODELS.get(auto_class, auto_class)} in transformers."


def _wanted(auto_class: str) -> str:
    return f"a {_MODELS[auto_class]}" if auto_class in _MODELS else "a model transformers knows"


def _load_merged(folder: Path, dtype: torch.dtype, device: torch.device, auto_class: str, may_lack: Sequence[str], **options: Any) -> Any:
    base, trained = base_folder(folder), trained_class(folder, auto_class)
    if trained == auto_class:
        return merge(load_model(base, dtype, device, auto_class, may_lack, **options), folder)
    # The adapter has the module names of the class that it was trained on, so it is merged there; the head may differ.
    donor = merge(load_model(base, dtype, device, trained, [_HEADS]), folder)
    if auto_class == "AutoModel":
        return donor.base_model
    model = load_model(base, dtype, device, auto_class, may_lack, **options)
    take_over(model, donor)
    return model


def display_name(model_path: str, folder: Path) -> str:
    """Name for the file's metadata: the hub id, or the name of the folder."""
    return folder.name if os.path.isdir(model_path) else model_path
