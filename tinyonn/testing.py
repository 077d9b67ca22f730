"""Factories that the tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
_OWN_SIZES = ("gpt2", "gptj", "bloom")
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
    "gptj": ("gptj", {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128}),
}


def tiny_causal_lm(arch: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random causal language model of a few thousand weights, in eval mode.

    Vocabulary 97, hidden size 48, three layers, four query and two key heads where the architecture has such; sliding windows
    are 5 tokens, softcaps low enough to bend the scores.

    Args:
        arch: qwen3, llama, mistral, gemma2, gpt2, qwen3_moe, gpt_oss, bloom, lfm2, qwen3_next or gptj.
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
