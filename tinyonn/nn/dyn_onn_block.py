"""One layer of a self-organising transformer: attention, then a mixture of many small experts.

    h = x + attention(norm(x))        out = h + experts(norm(h))

B batch, T tokens, F features
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops._checks import check_choice, check_flag, check_number, check_size
from .checkpointing import keep_selection
from .dyn_moe import DynMoE
from .dyn_nsa import DynNSAOptions
from .dyn_nsa_attention import DynNSAAttention
from .dyn_smha import DynSMHA
from .full_attention import FullAttention
from .routed import GatingLoss

AttentionKind = Literal["dyn_nsa", "dyn_smha", "full"]
MAX_INTERMEDIATE = 128  # neurons of an expert; the mixture is many small ones


class DynONNBlock(nn.Module):
    """RMSNorm, attention, residual, RMSNorm, `DynMoE`, residual: (B, T, F) -> (B, T, F).

    With `gradient_checkpointing` a training forward keeps less for backward. The experts are computed again there, and so are the
    attention's projections. What a token chooses is not: routing runs outside of what is checkpointed, and selected blocks are kept (see
    `keep_selection`). transformers sets the attribute in `activation_checkpointing_enable`. The checkpoints are always non-reentrant.

    Args:
        hidden_size: F.
        head_dim: features of an attention head, even, dividing F.
        num_experts: experts that are live at the start.
        max_num_experts: allocated experts; None for num_experts.
        intermediate_size: neurons of an expert, at most 128; None for head_dim, or 128 if that is more.
        target_k: experts per token at the start; None for the default of `DynMoE`.
        gating_loss: "none": the main loss alone trains the routers; "surprise": surprise does too, in `train.HyperStep`.
        attention: "dyn_nsa" for `DynNSAAttention`, "dyn_smha" for `DynSMHA` with as many attention experts as there are experts, "full" for
            causal attention to all earlier tokens.
        nsa_options: options with attention="dyn_nsa"; None for the defaults.
        rms_norm_eps: added to the mean square in both norms.
        rope_theta: base of the rotary embedding's wavelengths.
        gradient_checkpointing: see above.
        device, dtype: device and dtype of all parameters.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_experts: int,
        *,
        max_num_experts: int | None = None,
        intermediate_size: int | None = None,
        target_k: float | None = None,
        gating_loss: GatingLoss = "none",
        attention: AttentionKind = "dyn_nsa",
        nsa_options: DynNSAOptions | None = None,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        gradient_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("attention", attention, get_args(AttentionKind))
        check_choice("gating_loss", gating_loss, get_args(GatingLoss))
        check_size("hidden_size", hidden_size)
        check_size("head_dim", head_dim)
        check_number("rms_norm_eps", rms_norm_eps, at_least=0)
        check_number("rope_theta", rope_theta, above=0)
        if head_dim % 2 or hidden_size % head_dim:
            raise ValueError(f"head_dim must be even and divide hidden_size {hidden_size}, got {head_dim}.")
        intermediate_size = min(head_dim, MAX_INTERMEDIATE) if intermediate_size is None else intermediate_size
        check_size("intermediate_size", intermediate_size)
        if intermediate_size > MAX_INTERMEDIATE:
            raise ValueError(f"intermediate_size must be at most {MAX_INTERMEDIATE}, got {intermediate_size}: use more experts instead.")
        if nsa_options is not None and attention != "dyn_nsa":
            raise ValueError(f"nsa_options must be None unless attention='dyn_nsa', got them with attention={attention!r}.")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        pool: dict[str, Any] = {"max_num_experts": max_num_experts, "target_k": target_k}
        if gating_loss != "none":
            pool |= {"gating_loss": gating_loss, "thresholds": "balanced", "form": "linear"}
        self.attention_kind = attention
        self.attention_norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps, **place)
        self.attention: nn.Module
        match attention:
            case "dyn_nsa":
                heads = hidden_size // head_dim
                self.attention = DynNSAAttention(
                    hidden_size, heads, head_dim=head_dim, rope_theta=rope_theta, options=nsa_options, **place
                )  # fmt: skip
            case "dyn_smha":
                self.attention = DynSMHA(hidden_size, head_dim, num_experts, rope_theta=rope_theta, **pool, **place)
            case "full":
                self.attention = FullAttention(hidden_size, head_dim, rope_theta=rope_theta, **place)
        self.experts_norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps, **place)
        self.experts = DynMoE(hidden_size, intermediate_size, num_experts, **pool, **place)
        check_flag("gradient_checkpointing", gradient_checkpointing)
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether a training forward keeps less for backward."""
        return self.experts.checkpoint

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.experts.checkpoint = value
        if self.attention_kind == "dyn_smha":
            self.attention.checkpoint = value  # type: ignore[assignment]  # a bool, as in DynMoE

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """The layer's output. Arguments that another kind of attention takes must be None.

        Args:
            hidden_states: (B, T, F).
            position_ids: (B, T) or (1, T); None to count from the start of each row or packed sequence; required beside a cache with
                attention="full".
            cache: earlier keys and values: a `DynNSACache`, a `DynSMHACache`, or with attention="full" a function that appends keys and
                values, each (B, H, T, D), and returns all of them. Gradients do not flow through the first two.
            attention_mask: with attention="full", a mask of `scaled_dot_product_attention`; None for causal attention.
            key_start, key_end, cu_seqlens: padding and packed sequences of the other kinds; see `DynNSAAttention.forward`.
            token_mask: bool or integers, (B, T); which tokens the routers count, such as an attention mask. None, or a surrounding
                `token_mask_of`, for that context's mask, or all tokens. The output does not depend on it.

        Returns:
            (B, T, F).

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, or belongs to another kind of attention.
        """
        bounds = {"key_start": key_start, "key_end": key_end, "cu_seqlens": cu_seqlens}
        others = [name for name, value in bounds.items() if value is not None]
        if self.attention_kind != "full" and attention_mask is not None:
            raise ValueError(f"attention_mask must be None with attention={self.attention_kind!r}; mark padding by key_start and key_end.")
        if self.attention_kind == "full" and others:
            raise ValueError(f"{others[0]} must be None with attention='full'; use attention_mask.")
        if token_mask is not None and self.experts.surrounding_mask.value is not None:
            token_mask = None
        given: dict[str, Any] = {"position_ids": position_ids}
        match self.attention_kind:
            case "full":
                given |= {"append": cache, "attention_mask": attention_mask}
            case "dyn_nsa":
                given |= {"cache": cache, **bounds}
            case "dyn_smha":
                given |= {"cache": cache, "token_mask": token_mask, **bounds}
        # DynSMHA checkpoints its own experts, after its routing.
        again = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None and self.attention_kind != "dyn_smha"
        if again:
            kept: dict[str, Any] = {"context_fn": keep_selection} if self.attention_kind == "dyn_nsa" else {}
            attended = checkpoint(self._attend, hidden_states, given, use_reentrant=False, **kept)
            assert isinstance(attended, Tensor)
        else:
            attended = self._attend(hidden_states, given)
        hidden_states = hidden_states + attended
        return hidden_states + self.experts(self.experts_norm(hidden_states), token_mask=token_mask)

    def _attend(self, hidden_states: Tensor, given: dict[str, Any]) -> Tensor:
        result = self.attention(self.attention_norm(hidden_states), **given)
        return result.out if self.attention_kind == "dyn_nsa" else result

    def extra_repr(self) -> str:
        return f"attention={self.attention_kind}, gradient_checkpointing={self.gradient_checkpointing}"
