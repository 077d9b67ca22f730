"""Configuration of TinyOnn models."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, ClassVar, NamedTuple, get_args

from transformers import PretrainedConfig

from ...errors import InputError, did_you_mean, listed, shown
from ...nn.dyn_onn_block import MAX_INTERMEDIATE, AttentionKind
from ...ops._checks import check_flag, check_number, check_size

NEAR = 0.8  # similarity of an unknown option's name to a known one, from which it counts as misspelt


class _Size(NamedTuple):
    """Sizes of a bonsai; `experts` are allocated ones, fewer where attention has experts too."""

    vocab_size: int
    hidden_size: int
    head_dim: int
    num_hidden_layers: int
    max_position_embeddings: int
    experts: int
    experts_with_smha: int


BONSAI = {
    "1m": _Size(1024, 128, 16, 3, 2048, 32, 20),
    "10m": _Size(8192, 256, 32, 4, 4096, 64, 32),
    "100m": _Size(32768, 512, 32, 8, 8192, 192, 88),
}


class TinyOnnConfig(PretrainedConfig):
    """Configuration of `TinyOnnModel`.

    What else a model of this kind usually has follows from these numbers: `num_attention_heads` is hidden_size / head_dim, an expert has
    head_dim neurons, and a token uses as many experts at first as there are attention heads, or half of the experts if these are fewer.

    Args:
        vocab_size: number of tokens in the vocabulary.
        hidden_size: features of a token, a multiple of head_dim.
        head_dim: features of an attention head and neurons of an expert, even and at most 128.
        num_hidden_layers: number of `nn.DynONNBlock`s.
        init_num_experts: experts of a layer that are live at first.
        max_num_experts: allocated experts of a layer; None for init_num_experts.
        max_position_embeddings: context length, for tools that cut texts; positions are rotary and have no table.
        attention: "dyn_nsa", "dyn_smha" or "full"; see `nn.DynONNBlock`.
        alpha, gamma: of predictive integrity; see `train.predictive_integrity`. `train.OnnTrainer` uses these and the next four.
        pruning_threshold: share of the tokens below which an expert is recycled; see `train.ExpertLifecycle`.
        growth_threshold: share of the tokens that no expert serves, above which an expert is born.
        w_ce, w_kl: weights of the routers' loss on surprise (`train.SurpriseLoss`). Where both are 0 the main loss alone trains routers.
        has_life: whether layers record the life of their experts, in buffers that are saved; `train.OnnTrainer` sets it.
        rms_norm_eps: added to the mean square in each RMSNorm.
        initializer_range: standard deviation of the initial weights of embeddings and projections.
        use_cache: whether calls without gradients return keys and values for decoding.
        tie_word_embeddings: whether the head is the embedding.
        pad_token_id, bos_token_id, eos_token_id: tokens of the tokenizer.
        others: see `transformers.PretrainedConfig`.

    Raises:
        InputError: the name of an option is misspelt, or an option follows from others.
        TypeError, ValueError: an option has the wrong type or is out of range.
    """

    model_type: ClassVar[str] = "tiny_onn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 8192
    hidden_size: int = 256
    head_dim: int = 32
    num_hidden_layers: int = 4
    init_num_experts: int = 56
    max_num_experts: int | None = None
    max_position_embeddings: int = 4096
    attention: str = "dyn_nsa"
    alpha: float = 1.0
    gamma: float = 0.5
    pruning_threshold: float = 0.005
    growth_threshold: float = 0.05
    w_ce: float = 0.0
    w_kl: float = 0.0
    has_life: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_names(kwargs)
        for name in ("vocab_size", "hidden_size", "head_dim", "num_hidden_layers", "init_num_experts", "max_position_embeddings"):
            check_size(name, getattr(self, name))
        if self.max_num_experts is None:
            self.max_num_experts = self.init_num_experts
        check_size("max_num_experts", self.max_num_experts)
        if self.max_num_experts < self.init_num_experts:
            raise ValueError(f"max_num_experts must be at least init_num_experts {self.init_num_experts}, got {self.max_num_experts}.")
        if self.head_dim % 2 or self.head_dim > MAX_INTERMEDIATE or self.hidden_size % self.head_dim:
            raise ValueError(
                f"head_dim must be even, at most {MAX_INTERMEDIATE}, and divide hidden_size {self.hidden_size}, got {self.head_dim}."
            )
        kinds = get_args(AttentionKind)
        if self.attention not in kinds:
            raise InputError(
                f"attention must be one of {', '.join(kinds)}, got {shown(self.attention)}{did_you_mean(self.attention, kinds)}"
            )
        for name in ("alpha", "pruning_threshold", "growth_threshold", "w_ce", "w_kl", "rms_norm_eps", "initializer_range"):
            check_number(name, getattr(self, name), at_least=0)
        check_number("gamma", self.gamma, at_least=0, at_most=1)
        for name in ("has_life", "use_cache", "tie_word_embeddings"):
            check_flag(name, getattr(self, name))
        super().__post_init__(**kwargs)

    @classmethod
    def _check_names(cls, given: dict[str, Any]) -> None:
        """Raises InputError for names of options that do not exist; what transformers or other tools add to a file is not near any."""
        own = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if isinstance(getattr(cls, name, None), property) and getattr(cls, name).fset is None:
                raise InputError(f"TinyOnnConfig must not be given {name}, which follows from its other sizes.")
            if not name.startswith("_") and (near := difflib.get_close_matches(name, own, n=1, cutoff=NEAR)):
                raise InputError(f"TinyOnnConfig must be given its own options, got {name!r}; did you mean {near[0]!r}?")

    @classmethod
    def bonsai(cls, size: str, **options: Any) -> TinyOnnConfig:
        """Configuration of a named size: "1m", "10m" or "100m" parameters.

        An eighth of the allocated experts is not live at first, so that there is room to grow.

        Args:
            size: "1m", "10m" or "100m", with or without "bonsai-" before it.
            options: options in place of those of the size.

        Raises:
            InputError: there is no such size. Others: see `TinyOnnConfig`.
        """
        names = {name: sizes for short, sizes in BONSAI.items() for name in (short, f"bonsai-{short}")}
        if not isinstance(size, str) or size.casefold() not in names:
            raise InputError(f"size must be one of {listed(BONSAI)}, got {shown(size)}{did_you_mean(size, BONSAI)}")
        sizes = names[size.casefold()]._asdict()
        most, fewer = sizes.pop("experts"), sizes.pop("experts_with_smha")
        if options.get("attention") == "dyn_smha":
            most = fewer
        live = {"max_num_experts": most, "init_num_experts": most - most // 8}
        if "init_num_experts" in options or "max_num_experts" in options:
            live = {}
        return cls(**{**sizes, **live, **options})

    @property
    def num_attention_heads(self) -> int:
        """hidden_size / head_dim; with attention="dyn_smha", experts take their place."""
        return self.hidden_size // self.head_dim

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Neurons of an expert, head_dim."""
        return self.head_dim

    @property
    def target_k(self) -> int:
        """Experts per token at first: as many as there are attention heads, or half of the experts if these are fewer."""
        return max(1, min(self.num_attention_heads, self.init_num_experts // 2))
