"""Choice of the implementation, and registration of ops.

Which registration an op uses:

- `register_statistic`: an op that is not differentiable.
- `register`: an op whose derivative is an op too. `nsa._register.register_differentiable` registers both for the ops of DynNSA.
- `torch.library.custom_op` itself: an op that writes to an argument, or that differentiates by calling itself, such as `block_norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, cast, get_type_hints, overload

import torch
from torch import Tensor

from ._checks import check_choice

IMPLS = ("auto", "triton", "torch", "reference")
Impl = Literal["triton", "torch", "reference"]
TRITON_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


_LIBRARY = torch.library.Library("tinyonn", "FRAGMENT")


def register_statistic(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `tinyonn::name` on every device; the annotations of `function` are the schema, `fake` returns empty results.

    For an op that is not differentiable and writes to none of its inputs. `torch.library.custom_op` would work too, but its overhead per
    call is larger than the time of the norms of a small layer.
    """
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tinyonn::{name}", fake)
    packet = getattr(torch.ops.tinyonn, name)
    operator: Callable[..., Any] = packet.default
    return operator


def register(name: str, function: Callable[..., Any], fake: Callable[..., Any], schema: str) -> torch.library.CustomOpDef:
    """Registers `tinyonn::name`, an op that writes to none of its inputs, with its shapes."""
    operator = torch.library.custom_op(f"tinyonn::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float", float | None: "float?", bool: "bool",
    list[bool]: "bool[]", str: "str", str | None: "str?",
}  # fmt: skip


def schema_of(*inputs: type, returns: type | int | str) -> str:
    """Schema of a registered op whose arguments are the fields of named tuples, one after the other, and then `str impl`.

    Args:
        inputs: named tuples of tensors and numbers; `parts_of` puts the arguments back into them.
        returns: the named tuple of tensors that the op returns, a number of tensors, or another type of a schema.
    """
    kinds = [field for part in inputs for field in get_type_hints(part).items()]
    assert len(dict(kinds)) == len(kinds)  # the inductor needs distinct names
    if not isinstance(returns, str):
        count = returns if isinstance(returns, int) else len(get_type_hints(returns))
        returns = f"({', '.join(['Tensor'] * count)})"
    fields = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in kinds]
    return f"({', '.join([*fields, 'str impl'])}) -> {returns}"


_A = TypeVar("_A")
_B = TypeVar("_B")
_C = TypeVar("_C")
_D = TypeVar("_D")
_E = TypeVar("_E")


@overload
def parts_of(arguments: Sequence[Any], a: type[_A], /) -> tuple[_A, *tuple[Any, ...]]: ...
@overload
def parts_of(arguments: Sequence[Any], a: type[_A], b: type[_B], /) -> tuple[_A, _B, *tuple[Any, ...]]: ...
@overload
def parts_of(arguments: Sequence[Any], a: type[_A], b: type[_B], c: type[_C], /) -> tuple[_A, _B, _C, *tuple[Any, ...]]: ...
@overload
def parts_of(
    arguments: Sequence[Any], a: type[_A], b: type[_B], c: type[_C], d: type[_D], /
) -> tuple[_A, _B, _C, _D, *tuple[Any, ...]]: ...
@overload
def parts_of(
    arguments: Sequence[Any], a: type[_A], b: type[_B], c: type[_C], d: type[_D], e: type[_E], /
) -> tuple[_A, _B, _C, _D, _E, *tuple[Any, ...]]: ...
def parts_of(arguments: Sequence[Any], *kinds: Any) -> tuple[Any, ...]:
    """The arguments of a registered op as named tuples of these kinds, in the order of `schema_of`, followed by the remaining arguments."""
    parts: list[Any] = []
    at = 0
    for kind in kinds:
        count = len(kind._fields)
        parts.append(kind(*arguments[at : at + count]))
        at += count
    return *parts, *arguments[at:]


_Rest = ParamSpec("_Rest")
_First = TypeVar("_First", Tensor, Any)
_Result = TypeVar("_Result")


def without_autocast(function: Callable[Concatenate[_First, _Rest], _Result]) -> Callable[Concatenate[_First, _Rest], _Result]:
    """Runs a function without autocast, so that it chooses its own precision.

    The first argument, on whose device autocast is switched off, is a tensor or a named tuple that begins with one.
    """

    @wraps(function)
    def run(first: _First, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        with autocast_off(first if isinstance(first, Tensor) else first[0]):
            return function(first, *args, **kwargs)

    return run


def on_its_device(function: Callable[Concatenate[_First, _Rest], _Result]) -> Callable[Concatenate[_First, _Rest], _Result]:
    """Runs a function that launches Triton kernels on the GPU of its first tensor, because Triton launches on the current device.

    The first argument is a tensor, or a named tuple that begins with one.
    """

    @wraps(function)
    def run(first: _First, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return function(first, *args, **kwargs)

    return run


def autocast_off(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context without autocast on the tensor's device; no effect on devices without autocast, such as meta."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """dtype of autocast on the tensor's device; None where autocast is off."""
    device = tensor.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def check_impl(impl: str) -> None:
    check_choice("impl", impl, IMPLS)


def choose_impl(impl: str, tensor: Tensor) -> Impl:
    """Resolves `auto`, and raises an error if an explicit `triton` cannot run; called with real tensors only.

    `auto` is triton for CUDA tensors of a dtype that the kernels support, if triton can be imported; otherwise torch.
    """
    check_impl(impl)  # again, for callers of `torch.ops.tinyonn`
    if impl == "auto":
        return "triton" if tensor.is_cuda and tensor.dtype in TRITON_FLOATS and _triton_missing() is None else "torch"
    if impl == "triton":
        reason = _triton_missing()
        if reason is not None:
            raise RuntimeError(f"impl='triton' needs triton, which cannot be imported ({reason}): install triton or pass impl='torch'.")
        if tensor.dtype not in TRITON_FLOATS:
            raise ValueError(f"impl='triton' needs float16, bfloat16 or float32 tensors, got {tensor.dtype}; pass impl='torch'.")
        if not tensor.is_cuda and not _interpreted():
            raise RuntimeError(
                f"impl='triton' needs CUDA tensors, got {tensor.device}: move them to a GPU, pass impl='torch', "
                "or set TRITON_INTERPRET=1 before the first import to run Triton's interpreter."
            )
    return cast(Impl, impl)


def refuse_reference(op: str, impl: Impl) -> Literal["triton", "torch"]:
    """ValueError for the reference in a registered op that does not compute it: its derivative would not be that of the reference."""
    if impl == "reference":
        raise ValueError(f"impl='reference' is not part of the registered op; call tinyonn.ops.{op}.")
    return impl


@cache
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"'{error}'"
    return None


def _interpreted() -> bool:
    from tinyonn_kernels import INTERPRETED

    return INTERPRETED


def refuse_tangents(op: str, *tensors: Tensor | None, remedy: str = "use backward or vjp, or impl='reference'") -> None:
    """RuntimeError for a forward-mode tangent, which a registered op would drop silently: the derivative would be 0."""
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{op} does not support forward-mode differentiation: {remedy}.")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of statistics: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
