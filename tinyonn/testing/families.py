"""A tiny random model of every causal language model family that transformers knows, from shrunk default configurations."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN = 64
LOCAL = 64  # tokens of sliding windows and chunks

_BY_VALUE: list[tuple[int, tuple[str, ...]]] = [
    (97, ("vocab_size",)),
    (HIDDEN, ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "hidden_dim", "d_embed")),
    (4, (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads", "n_head", "n_heads", "num_heads",
        "decoder_layers", "decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "encoder_layers",
        "encoder_attention_heads", "num_decoder_layers", "moe_num_experts",
    )),
    (2, (
        "num_key_value_heads", "num_experts_per_tok", "moe_topk", "moe_k", "num_key_value_groups", "moe_top_k", "top_k_experts",
    )),
    (16, (
        "head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank", "global_head_dim", "kv_channels", "attention_head_dim",
        "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size",
    )),
    (8, ("qk_rope_head_dim", "rotary_dim")),
    (24, ("qk_head_dim",)),
    (1, ("n_group", "topk_group")),
    (80, (
        "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "moe_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff",
        "intermediate_size_mlp", "shared_expert_intermediate_size", "expert_hidden_size", "shared_intermediate_size", "feed_forward_size",
        "moe_shared_expert_intermediate_size", "ffn_hidden", "dim_ff",
    )),
    (LOCAL, ("sliding_window", "attention_chunk_size", "local_attention", "attention_window_size", "sliding_window_size", "window_size")),
    (512, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "original_max_position_embeddings")),
]  # fmt: skip
_SIZES = {name: value for value, names in _BY_VALUE for name in names}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")

# What the sizes above do not fit.
_FULL = ["full_attention"] * 4
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _FULL, "mamba_n_heads": 8, "mamba_d_head": 16},
    "hrm_text": {"initializer_range": 0.05},  # a recurrence that magnifies rounding
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "longcat_flash": {"head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 76, "initializer_range": 0.05},  # both have their kinds of layers listed
    "zamba2": {"num_hidden_layers": 54, "initializer_range": 0.05},
    "zaya": {"num_experts_per_tok": 1},
    "nemotron": {"num_key_value_heads": 2},
}


def causal_families() -> list[str]:
    """Model types of transformers that have a causal language model."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING_NAMES)


def tiny_config(config_class: type[PretrainedConfig], **overrides: Any) -> PretrainedConfig:
    """The default configuration with every size that has a known name made small; nested ones too."""
    default = config_class()
    given: dict[str, Any] = {}
    values = default.to_dict()
    known = set(inspect.signature(config_class).parameters) | set(values) | set(config_class.attribute_map)
    for name in sorted(known):
        value = getattr(default, name, None) if name in config_class.sub_configs else values.get(name)
        if name in config_class.sub_configs:
            sub = config_class.sub_configs[name]
            sub = type(value) if isinstance(value, PretrainedConfig) else sub
            given[name] = tiny_config(sub, **overrides.pop(name, {})) if sub is not AutoConfig else value
        elif name == "head_dim" and "qk_rope_head_dim" in known:
            continue  # made of two
        elif name == "num_key_value_heads" and "qk_rope_head_dim" in known:
            given[name] = 4  # MLA has a key for each query
        elif name == "is_decoder":
            given[name] = True
        elif name in _SIZES and (name in ("head_dim", "num_experts_per_tok") or (isinstance(value, int) and not isinstance(value, bool))):
            given[name] = _SIZES[name]
        elif name in _TOKENS:
            given[name] = None if value is None or isinstance(value, list) else 1
        elif "dropout" in name or name.endswith(("_pdrop", "_drop")):
            if isinstance(value, float):
                given[name] = 0.0
        elif name == "initializer_range":
            given[name] = 0.25
    for alias, name in config_class.attribute_map.items():
        if name in given:
            given.pop(alias, None)
    kinds = values.get("layer_types") or []
    if "full_attention" in kinds and "full_attention" not in kinds[:4] and "layer_types" not in overrides:
        given["layer_types"] = [kinds[0], "full_attention"] * 2
    given |= overrides
    return config_class(**{name: value for name, value in given.items() if name not in ("_name_or_path", "model_type")})


def tiny_family_lm(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal language model of a family, in eval mode."""
    config = tiny_config(CONFIG_MAPPING[family], **{**_OWN.get(family, {}), **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()
