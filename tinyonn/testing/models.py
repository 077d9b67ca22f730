"""Tiny models of transformers, made at random, and inputs for them. Needs no pytest."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .oracles import pooled

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
_TINY: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 24},
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 5},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 5,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 16,
    },
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "qwen3_moe": {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {
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
    "gpt_neox": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "mamba": {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 8},
    "phimoe": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
}


def tiny_causal_lm(arch: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random causal language model of a few thousand weights, in eval mode.

    Vocabulary 97, hidden size 48, three layers, four query and two key heads where the architecture has such; sliding windows
    are 5 tokens, softcaps low enough to bend the scores.

    Args:
        arch: qwen3, llama, mistral, gemma2, gpt2, qwen3_moe, gpt_oss, bloom, lfm2, qwen3_next, gpt_neox, gptj, mamba or phimoe.
        seed: seed of the weights; the global generators are left as they were.
        dtype: precision of the weights.
        **overrides: fields of the architecture's configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {} if arch in _OWN_SIZES else _SIZES
    return _random(AutoModelForCausalLM, AutoConfig.for_model(arch, **{**_COMMON, **sizes, **_TINY[arch], **overrides}), seed, dtype)


def _random(loader: Any, config: PretrainedConfig, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, biases and sinks included, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = loader.from_config(config)
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
        seed: seed of the weights; the global generators are left as they were.
        dtype: precision of the weights.
        **overrides: fields of the architecture's configuration.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    sizes = {name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}
    special = {"pad_token_id": 95, "cls_token_id": 93, "sep_token_id": 94, "bos_token_id": None, "eos_token_id": None}
    merged = {"vocab_size": 97, "initializer_range": 0.25, **sizes, **special, **_TINY_ENCODERS[arch], **overrides}
    config = AutoConfig.for_model(arch, **{name: value for name, value in merged.items() if value is not None or name in special})
    loader = AutoModelForSequenceClassification if "num_labels" in overrides else AutoModel
    return _random(loader, config, seed, dtype)


def tiny_dyn_nsa_lm(arch: str = "llama", *, layers: int = 2, weight: float = 0.1, **options: Any) -> PreTrainedModel:
    """A tiny model, of full attention, converted to DynNSA: 5 blocks of 16 keys at most, wide gates, and a price that some blocks pass.

    Gates, thresholds and compression are moved away from their start, so that every branch counts.

    Args:
        arch: an architecture of `tiny_causal_lm`.
        layers: number of layers of the model.
        weight: weight of the budget loss.
        **options: options of `convert_attention`; `dtype` is the model's precision.
    """
    from ..hf import BudgetSchedule, convert_attention
    from ..hf.dyn_nsa import cores

    overrides: dict[str, Any] = {"sliding_window": None} if arch == "mistral" else {}
    dtype = options.pop("dtype", torch.float32)
    model = tiny_causal_lm(arch, dtype=dtype, num_hidden_layers=layers, max_position_embeddings=512, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        start = {"compress_size": 16, "block_size": 16, "window": 20, "temperature": 1.0, "slope": 0.5}
        convert_attention(model, **{**start, **options})
        BudgetSchedule(3.0, 1, weight=weight, temperature=None, max_blocks=5).apply(model, 1)
        with torch.no_grad():
            for core in cores(model):
                core.price.fill_(-2.5)
                for parameter in core.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def token_ids(length: int = 130, batch: int = 2) -> Tensor:
    """Token ids, (batch, length), of the vocabulary of `tiny_causal_lm`; the same ones each time."""
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def left_padding(length: int = 130, padding: int = 21) -> Tensor:
    """Attention mask, (2, length), whose first row begins with padding."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


def save_tiny_model(
    folder: str | os.PathLike[str], arch: str = "llama", *, end_token: bool = True, chat_template: str | None = None, **options: Any
) -> Path:
    """Saves a tiny causal language model, or encoder, with a tokenizer of its own: one token per printable ASCII character.

    An encoder's tokenizer writes [CLS] a [SEP] or [CLS] a [SEP] b [SEP], in the places of the last three of them, and has token types.

    Args:
        folder: folder of the model; created if missing.
        arch, **options: arguments of `tiny_causal_lm` or `tiny_encoder`.
        end_token: whether a language model's tokenizer has an end-of-text token, which also pads batches.
        chat_template: Jinja template of chats; None for a tokenizer without one.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    path = Path(folder)
    encoder = arch in _TINY_ENCODERS
    vocabulary = {chr(code): index for index, code in enumerate(range(32, 127))} | {"<eos>": 95, "<unk>": 96}
    if encoder:
        vocabulary = {token: index for token, index in vocabulary.items() if index not in (93, 94, 95)}
        vocabulary |= {"[CLS]": 93, "[SEP]": 94, "[PAD]": 95}
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
    importance: str = "share",
) -> dict[str, Tensor]:
    """Inputs of `ops.dyn_nsa` by name, of unit scale; groups of 16 keys share a component, so that compressed keys differ.

    Args:
        tokens: number of keys, Tk.
        queries: number of queries, the last of these tokens; None for all.
        seed: seed of the values, which are drawn in float64 and are therefore the same in every dtype.
        sharpness: factor on the scores of the compressed branch; more spreads the importance of blocks wider.
        importance: the rule that base is made for; shares fall with the number of blocks, and thresholds of shares with them.
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
        "base": draw(kv_heads) * 0.3 - (math.log1p(tokens / 64) if importance == "share" else 0),
        "slope": draw(kv_heads) * 0.3,
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
