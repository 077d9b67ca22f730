"""Factories, tolerances and oracles that the tests share. Needs pytest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from .triton import ARCHS, Usage, compile_launches, cross_compile, usages_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ARCHS",
    "IMPLS",
    "TOLERANCE",
    "Usage",
    "assert_close_rms",
    "compare_with_oracle",
    "compile_launches",
    "cross_compile",
    "dtype_id",
    "dyn_nsa_case",
    "impl_device",
    "left_padding",
    "poisoned",
    "pooled",
    "rms_error_ratio",
    "save_tiny_model",
    "shape_id",
    "tiny_causal_lm",
    "tiny_dyn_nsa_lm",
    "tiny_encoder",
    "token_ids",
    "usages_of",
]

# Root-mean-square error over root-mean-square value. Half precision is judged against the oracle of the same rounded inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}


def _triton_skip_reason() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device, and TRITON_INTERPRET is not set"
    return None


# What a test is parametrised with: every implementation that is judged. Triton runs on the GPU, else in its interpreter.
IMPLS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(_triton_skip_reason() is not None, reason=_triton_skip_reason() or "")),
]


def impl_device(impl: str) -> str:
    """Where an implementation's tests put their tensors: Triton's on the GPU if there is one."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def shape_id(value: object) -> str | None:
    """Test id of a shape: (3, 100) -> "3x100"; None (pytest's own choice) for anything else."""
    if isinstance(value, tuple) and all(isinstance(size, int) for size in value):
        return "x".join(map(str, value)) or "scalar"
    return None


def dtype_id(value: object) -> str | None:
    """Test id of a dtype: torch.float16 -> "float16"; None for anything else."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@contextmanager
def poisoned() -> Iterator[None]:
    """Within this context uninitialised memory is NaN (integers: the largest), so output that a kernel forgot to write shows.

    It is torch's own deterministic fill, which reaches every `torch.empty` and its kin, from C++ too.
    """
    enabled, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def rms_error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of `actual - expected` over that of `expected`, in float64; 0 where they are equal or empty."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if torch.equal(actual, expected):
        return 0.0
    scale = expected.square().mean().sqrt().item()
    return (actual - expected).square().mean().sqrt().item() / scale if scale else float("inf")


def assert_close_rms(actual: Tensor, expected: Tensor, tolerance: float | torch.dtype, name: str = "output") -> float:
    """Shapes agree, NaN and infinities stand in the same places, and the error ratio of the rest is within `tolerance`.

    Args:
        actual: what is judged.
        expected: the oracle's, in float64.
        tolerance: a ratio, or the dtype the op ran in, which stands for that of `TOLERANCE`.
        name: of the tensor, in the message.

    Returns:
        the error ratio.
    """
    limit = TOLERANCE[tolerance] if isinstance(tolerance, torch.dtype) else tolerance
    assert actual.shape == expected.shape, f"{name} must have shape {tuple(expected.shape)}, got {tuple(actual.shape)}."
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        differ = kind(actual) != kind(expected)
        assert not differ.any(), f"{name} must match the oracle's {kind.__name__} everywhere, got {int(differ.sum())} differences."
    finite = expected.isfinite()
    ratio = rms_error_ratio(actual[finite], expected[finite])
    assert ratio <= limit, f"{name} must have an RMS error ratio of at most {limit:g}, got {ratio:.3g}."
    return ratio


def compare_with_oracle(
    op: Callable[..., Any],
    oracle: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    grad: Sequence[str] = (),
    statistics: Sequence[int] = (),
    tolerance: float | None = None,
) -> None:
    """Runs `op` in `dtype` and `oracle` in float64 on the same rounded values, and compares outputs and gradients.

    Args:
        op: called with `tensors` as keywords, floating-point ones cast to `dtype`; returns a tensor or a tuple of tensors.
        oracle: called with the same values in float64 on the CPU; returns as many.
        tensors: inputs by name.
        dtype: the op's.
        device: the op's.
        grad: names of the inputs whose gradients are compared too, under one random cotangent per differentiable output.
        statistics: outputs, by number, that carry no gradient, even where the oracle's formula could be differentiated; all others must.
        tolerance: error ratio; by default that of `dtype`.
    """
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    low = {name: (t.to(dtype) if t.is_floating_point() else t).to(device).detach().clone() for name, t in tensors.items()}
    exact = {name: t.detach().cpu().double() if t.is_floating_point() else t.cpu() for name, t in low.items()}
    for name in grad:
        low[name].requires_grad_()
        exact[name].requires_grad_()
    outputs, references = _tuple(op(**low)), _tuple(oracle(**exact))
    assert len(outputs) == len(references), f"op must return {len(references)} tensors, got {len(outputs)}."
    for number, (output, expected) in enumerate(zip(outputs, references, strict=True)):
        assert_close_rms(output, expected, limit, f"output {number}")
    if not grad:
        return
    for number, output in enumerate(outputs):
        assert output.requires_grad != (number in statistics), f"output {number} must {'not ' * (number in statistics)}carry a gradient."
    pairs = [(o, r) for number, (o, r) in enumerate(zip(outputs, references, strict=True)) if number not in statistics]
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o, r in pairs]
    actual = torch.autograd.grad([o for o, _ in pairs], [low[name] for name in grad], [c.to(device) for c in cotangents])
    wanted = torch.autograd.grad([r for _, r in pairs], [exact[name] for name in grad], [c.double() for c in cotangents])
    for name, got, want in zip(grad, actual, wanted, strict=True):
        assert_close_rms(got, want, limit, f"gradient of {name}")


def pooled(x: Tensor, size: int) -> Tensor:
    """Means of whole blocks of positions, (B, T, K, D) -> (B, T // size, K, D)."""
    whole = x.shape[1] // size * size
    return x[:, :whole].unflatten(1, (-1, size)).mean(2) if whole else x[:, :0]


def dyn_nsa_case(
    tokens: int = 330,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    queries: int | None = None,
    compress_size: int = 32,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    sharpness: float = 3.0,
) -> dict[str, Tensor]:
    """Inputs of `ops.dyn_nsa` by name, of unit scale; 16 keys in a row share a part, so that compressed keys are not all alike.

    Args:
        tokens: Tk, keys.
        queries: the last of them; None for all.
        seed: of the values, which are drawn in float64: the same case in every dtype.
        sharpness: of the compressed branch's softmax; more spreads the importance of blocks wider.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries = tokens if queries is None else queries
    topics = draw(batch, -(-tokens // 16), kv_heads, dim).repeat_interleave(16, 1)[:, :tokens]
    key = draw(batch, tokens, kv_heads, dim) * 0.6 + topics * 0.8
    value = draw(batch, tokens, kv_heads, dim)
    tensors = {
        "query": draw(batch, queries, heads, dim) * sharpness**0.5,
        "key": key,
        "value": value,
        "key_compressed": pooled(key, compress_size) * sharpness**0.5,
        "value_compressed": pooled(value, compress_size),
        "gates": draw(batch, queries, heads, 3),
        "base": draw(kv_heads) * 0.3,
        "slope": draw(kv_heads) * 0.3,
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# Weights spread wide enough that attention is far from uniform and every softcap bends: a nearly linear model proves little.
_COMMON = {"vocab_size": 97, "initializer_range": 0.25, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_OWN_SIZES = ("gpt2", "gptj", "bloom", "gpt_neox", "mamba")
_TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"head_dim": 24}),
    "llama": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "max_position_embeddings": 128},
    ),
    "bloom": ("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
    "qwen3_next": (
        "qwen3_next",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
    ),
    "mamba": ("mamba", {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 8}),
    "phimoe": ("phimoe", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptj": ("gptj", {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128}),
}


def tiny_causal_lm(arch: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random causal language model of a few thousand weights, in eval mode.

    Vocabulary 97, hidden size 48, three layers, four query and two key heads where the architecture has such; sliding windows
    are 5 tokens, softcaps low enough to bend the scores.

    Args:
        arch: qwen3, llama, mistral, gemma2, gpt2, qwen3_moe, gpt_oss, bloom, lfm2, qwen3_next, gpt_neox, gptj, mamba or phimoe.
        seed: of the weights; the global generators are left as they were.
        dtype: of the weights.
        **overrides: of the architecture's configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, own = _TINY[arch]
    sizes = {} if arch in _OWN_SIZES else _SIZES
    config = AutoConfig.for_model(model_type, **{**_COMMON, **sizes, **own, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


_TINY_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {"dim": 48, "hidden_dim": 80, "n_layers": 3, "n_heads": 4, "hidden_size": None, "num_hidden_layers": None},
    "modernbert": {"local_attention": 6, "global_attn_every_n_layers": 2},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    },
}


def tiny_encoder(arch: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random encoder of a few thousand weights, in eval mode; with `num_labels`, a classifier of sequences.

    Vocabulary 97, hidden size 48, three layers of four heads. DeBERTa is shaped like version 3: relative positions in buckets.

    Args:
        arch: bert, roberta, distilbert, modernbert or deberta-v2.
        seed: of the weights; the global generators are left as they were.
        dtype: of the weights.
        **overrides: of the architecture's configuration.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    sizes = {name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}
    special = {"pad_token_id": 95, "cls_token_id": 93, "sep_token_id": 94, "bos_token_id": None, "eos_token_id": None}
    merged = {"vocab_size": 97, "initializer_range": 0.25, **sizes, **special, **_TINY_ENCODERS[arch], **overrides}
    config = AutoConfig.for_model(arch, **{name: value for name, value in merged.items() if value is not None or name in special})
    loader = AutoModelForSequenceClassification if "num_labels" in overrides else AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = loader.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def tiny_dyn_nsa_lm(arch: str = "llama", *, layers: int = 2, weight: float = 0.1, **options: Any) -> PreTrainedModel:
    """A tiny model, of full attention, converted to DynNSA with its schedule run to the end: 5 blocks of 16 keys at most.

    Gates, thresholds and compression are moved away from their start, so that every branch counts.

    Args:
        arch: of `tiny_causal_lm`.
        layers: of the model.
        weight: of the budget loss.
        **options: of `convert_attention`; `dtype` is that of the model.
    """
    from ..hf import BudgetSchedule, convert_attention
    from ..hf.dyn_nsa import cores

    overrides: dict[str, Any] = {"sliding_window": None} if arch == "mistral" else {}
    dtype = options.pop("dtype", torch.float32)
    model = tiny_causal_lm(arch, dtype=dtype, num_hidden_layers=layers, max_position_embeddings=512, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        convert_attention(model, **{"compress_size": 16, "block_size": 16, "window": 20, **options})
        BudgetSchedule(3.0, 1, weight=weight, max_blocks=5).apply(model, 1)
        with torch.no_grad():
            for core in cores(model):
                for parameter in core.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def token_ids(length: int = 130, batch: int = 2) -> Tensor:
    """(batch, length), the same ones each time, of the vocabulary of `tiny_causal_lm`."""
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def left_padding(length: int = 130, padding: int = 21) -> Tensor:
    """(2, length), a mask whose first row begins with padding."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


def save_tiny_model(
    folder: str | os.PathLike[str], arch: str = "llama", *, end_token: bool = True, chat_template: str | None = None, **options: Any
) -> Path:
    """Saves a tiny causal language model, or encoder, with a tokenizer of its own: one token per printable ASCII character.

    An encoder's tokenizer writes [CLS] a [SEP] or [CLS] a [SEP] b [SEP], in the places of the last three of them, and has token types.

    Args:
        folder: made if it is not there.
        arch, **options: of `tiny_causal_lm` or `tiny_encoder`.
        end_token: give a language model's tokenizer an end-of-text token, which is what batches are padded with.
        chat_template: jinja, for a tokenizer that takes chats.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    path = Path(folder)
    encoder = arch in _TINY_ENCODERS
    vocabulary = {chr(code): index for index, code in enumerate(range(32, 127))} | {"<eos>": 95, "<unk>": 96}
    if encoder:
        vocabulary = {token: index for token, index in vocabulary.items() if index < 93} | {
            "[CLS]": 93,
            "[SEP]": 94,
            "[PAD]": 95,
            "<unk>": 96,
        }
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>"} if end_token else {}
    if encoder:
        special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        ends = [("[CLS]", 93), ("[SEP]", 94)]
        characters.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
        names = ["input_ids", "attention_mask", *([] if arch in ("distilbert", "modernbert") else ["token_type_ids"])]
        special["model_input_names"] = names  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>", **special)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    (tiny_encoder if encoder else tiny_causal_lm)(arch, **options).save_pretrained(path)
    return path
