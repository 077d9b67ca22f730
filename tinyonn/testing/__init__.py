"""Tiny models, tolerances and oracles that the tests share. Only `IMPLS`, for parametrising, needs pytest."""

from typing import TYPE_CHECKING, Any

from .models import dyn_nsa_case, left_padding, save_tiny_model, tiny_causal_lm, tiny_dyn_nsa_lm, tiny_encoder, token_ids
from .oracles import TOLERANCE, assert_close_rms, compare_with_oracle, dtype_id, impl_device, poisoned, pooled, rms_error_ratio, shape_id
from .triton import ARCHS, Usage, compile_launches, cross_compile, usages_of

if TYPE_CHECKING:
    from .parametrise import IMPLS

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


def __getattr__(name: str) -> Any:
    if name == "IMPLS":
        from . import parametrise

        return parametrise.IMPLS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
