"""TinyOnn models for transformers: embedding, `nn.DynONNBlock`s, RMSNorm, head.

B batch, T tokens, F features, V vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ...errors import InputError
from ...nn import DynNSACore, DynONNBlock
from ...nn.rotary import positions
from ...nn.routed import Routed
from .cache import fitted
from .configuration import TinyOnnConfig
from .masks import bounds_of, restarts, sequences_of

logger = logging.get_logger(__name__)


class TinyOnnPreTrainedModel(PreTrainedModel):
    """Base of TinyOnn models: initialisation, checkpointing, and what they support."""

    config_class = TinyOnnConfig
    config: TinyOnnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DynONNBlock"]  # noqa: RUF012  # as in transformers
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  # as in transformers
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DynONNBlock}  # noqa: RUF012  # as in transformers

    def __init__(self, config: TinyOnnConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        kind = config._attn_implementation
        if kind not in (None, "sdpa", "eager"):
            raise InputError(f"attn_implementation must be left out for TinyOnn, whose configuration has attention, got {kind!r}.")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises what no file had; tensors that one had keep their values."""
        super()._init_weights(module)
        if isinstance(module, (Routed, DynNSACore)):
            tensors = module.state_dict(keep_vars=True)
            read = {name: tensor for name, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
            if len(read) < len(tensors):
                values = {name: tensor.clone() for name, tensor in read.items()}
                module.reset_parameters()  # type: ignore[operator]  # every kind of `Routed` has it
                for name, value in values.items():
                    read[name].copy_(value)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            logger.warning_once("TinyOnn's checkpoints are non-reentrant whatever `use_reentrant` is.")
        blocks = [module for module in self.modules() if isinstance(module, DynONNBlock)]
        for index, block in enumerate(blocks):
            block.gradient_checkpointing = enable and index % every_n_layers == 0


class TinyOnnModel(TinyOnnPreTrainedModel):
    """The layers without a head: token ids -> hidden states."""

    def __init__(self, config: TinyOnnConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        kind: Any = config.attention
        gating: Any = "surprise" if config.w_ce or config.w_kl else "none"
        self.layers = nn.ModuleList(
            DynONNBlock(
                config.hidden_size, config.head_dim, config.init_num_experts, max_num_experts=config.max_num_experts,
                target_k=config.target_k, gating_loss=gating, attention=kind, rms_norm_eps=config.rms_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )  # fmt: skip
        if config.has_life:
            for module in self.layers.modules():
                if isinstance(module, Routed):
                    module.track_life()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last layer, after its norm.

        Args:
            input_ids: (B, T).
            attention_mask: (B, Tk), 0 for padding, over the tokens of the cache and the new ones. With attention="full" also any mask that
                transformers' causal models take.
            position_ids: (B, T); None to count. Positions that restart mark sequences packed in one row.
            past_key_values: a `DynamicCache`.
            inputs_embeds: (B, T, F), in place of input_ids.
            use_cache: whether to return a cache; None for `config.use_cache`, but not where gradients are on, because cached keys of the
                sparse kinds of attention have none, and not of packed sequences.
            cu_seq_lens_q: (sequences + 1,), bounds of sequences packed in one row.

        Raises:
            InputError: the mask, the cache or packed sequences do not fit the kind of attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("exactly one of input_ids and inputs_embeds must be given.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        packed = cu_seq_lens_q is not None or (attention_mask is None and restarts(position_ids))
        past_key_values = self._cache(past_key_values, use_cache, packed)
        prepare = self._full if self.config.attention == "full" else self._sparse
        arguments = prepare(hidden_states, attention_mask, position_ids, past_key_values, cu_seq_lens_q)
        for block, given in zip(self.layers, arguments, strict=True):
            hidden_states = block(hidden_states, **given)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _cache(self, cache: Any, use_cache: bool | None, packed: bool) -> Any:
        """The cache of a call, or None."""
        checkpointed = any(block.gradient_checkpointing for block in self.layers)
        if self.training and checkpointed and (cache is not None or use_cache):
            logger.warning_once("A cache cannot be used with gradient checkpointing; use_cache is False.")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled() and not packed
        if packed and (use_cache or cache is not None):
            raise InputError("use_cache must be False for sequences packed in a row.")
        return DynamicCache(config=self.config) if use_cache and cache is None else cache

    def _counted(self, attention_mask: Tensor | None, tokens: int) -> Tensor | None:
        """(B, T), tokens that are not padding; None for all."""
        return None if attention_mask is None or attention_mask.dim() != 2 else attention_mask[:, -tokens:]

    def _full(
        self, hidden_states: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Any, cu_seqlens: Tensor | None
    ) -> list[dict[str, Any]]:
        """Arguments of each block with attention="full"."""
        tokens = hidden_states.shape[1]
        if position_ids is None:
            position_ids = positions(hidden_states, 0 if cache is None else cache.get_seq_length(), None, cu_seqlens)
        causal = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=mask, past_key_values=cache, position_ids=position_ids
        )
        common = {"position_ids": position_ids, "attention_mask": causal, "token_mask": self._counted(mask, tokens)}
        appends = [None if cache is None else functools.partial(cache.update, layer_idx=index) for index in range(len(self.layers))]
        return [{**common, "cache": append} for append in appends]

    def _sparse(
        self, hidden_states: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Any, cu_seqlens: Tensor | None
    ) -> list[dict[str, Any]]:
        """Arguments of each block with another kind of attention."""
        kind, tokens = self.config.attention, hidden_states.shape[1]
        common = {"position_ids": position_ids, "token_mask": self._counted(mask, tokens)}
        if cache is None:
            start, end = bounds_of(mask, tokens, kind)
            if cu_seqlens is None and mask is None:
                cu_seqlens = sequences_of(position_ids, kind)
            return [{**common, "key_start": start, "key_end": end, "cu_seqlens": cu_seqlens} for _ in self.layers]
        if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise InputError(f"use_cache must be False where gradients are on with attention={kind!r}, whose cached keys have none.")
        layers = fitted(cache, kind, len(self.layers))
        past = layers[0].get_seq_length()
        start = bounds_of(mask, past + tokens, kind).key_start
        if past and not torch.compiler.is_compiling() and not _same(start, layers[0].key_start):
            raise InputError("attention_mask must mark the padding of each row as in the call that began the cache.")
        return [{**common, "cache": layer.started(start, len(hidden_states))} for layer in layers]


def _same(start: Tensor | None, cached: Tensor | None) -> bool:
    """Whether two first positions, (B,), are the same; None is 0."""
    if start is None or cached is None:
        given = cached if start is None else start
        return given is None or not bool(given.any())
    return torch.equal(start, cached)


class TinyOnnForCausalLM(TinyOnnPreTrainedModel, GenerationMixin):
    """TinyOnn with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # as in transformers

    def __init__(self, config: TinyOnnConfig) -> None:
        super().__init__(config)
        self.model = TinyOnnModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss.

        Args:
            labels: (B, T), token ids, of which each is compared with the logits before it; -100 for none.
            logits_to_keep: number of last tokens that get logits, or their indices; 0 for all tokens.
            others: see `TinyOnnModel.forward`; what is left is given to the loss function.

        Returns:
            loss, 0-d, with labels; logits (B, T, V); past_key_values; hidden_states.
        """
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        kind = generation_config.cache_implementation
        if self.config.attention != "full" and kind not in (None, "dynamic", "dynamic_full"):
            raise InputError(f"cache_implementation must be dynamic with attention={self.config.attention!r}, got {kind!r}.")
        return GenerationMixin._prepare_cache_for_generation(self, generation_config, *args, **kwargs)
