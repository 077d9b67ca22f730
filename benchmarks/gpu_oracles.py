"""Every kernel against its float64 oracle, in each of its autotuning configurations. Questions of `gpu.py`.

A case contains the inputs, the op and its reference. The reference runs once in float64, on values rounded to the case's dtype. The op runs
once per configuration, with uninitialised memory filled with NaN. Errors are RMS errors divided by the RMS of the oracle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.testing import assert_close_rms, dyn_nsa_case, poisoned

# Limits for outputs and gradients. A half-precision kernel rounds the probabilities between its two products; backward rounds more often.
LIMITS = {torch.float32: (1e-5, 4e-5), torch.float16: (5e-3, 1e-2), torch.bfloat16: (1e-2, 2e-2)}
LISTS_APART = {torch.float32: 0.0, torch.float16: 0.01, torch.bfloat16: 0.01}  # allowed share of lists that differ
PARTLY_OPEN = 0.2  # minimum share of optional blocks with a gate strictly between 0 and 1
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One test case of an op.

    Attributes:
        tensors: inputs by name; floating-point inputs have the case's dtype.
        call: function of `ops` or `reference`, and of the tensors as keywords.
        grad: inputs whose gradients are compared, for a random cotangent of every differentiable output.
        lists: function of the same arguments that returns the selected blocks; they are compared separately.
        limit: error limit of outputs; None for the limit of the dtype.
    """

    tensors: dict[str, Tensor]
    call: Callable[..., Outputs]
    grad: tuple[str, ...] = ()
    lists: Callable[..., Outputs] | None = None
    limit: float | None = None


def check(report: dict[str, Any], device: str, *, op: str, dtype: str, sizes: Sequence[dict[str, Any]]) -> None:
    """Checks the op at several sizes; fails after all sizes have run and lists the failures.

    Args:
        report: receives `errors` (by size and tensor; maximum over configurations), `configurations` (by kernel) and `shapes`.
        op: key of `CASES`.
        dtype: float32 or bfloat16; the interpreter cannot multiply bfloat16, so float16 replaces it on a CPU.
    """
    kind = getattr(torch, dtype)
    if device == "cpu" and kind == torch.bfloat16:
        kind = torch.float16
    report.update(dtype=str(kind).removeprefix("torch."), errors={}, configurations={}, shapes={})
    failures: list[str] = []
    for size in sizes:
        label = ", ".join(f"{name} {value}" for name, value in size.items())
        case = CASES[op](kind, **size)
        report["shapes"][label] = {name: list(x.shape) for name, x in case.tensors.items()}
        with poisoned():
            _every_configuration(case, kind, device, label, report, failures)
    if failures:
        raise AssertionError(f"{len(failures)} wrong: {'; '.join(failures)}")


def _every_configuration(case: Case, kind: torch.dtype, device: str, label: str, report: dict[str, Any], failures: list[str]) -> None:
    from tinyonn_kernels._tune import forced

    exact = {name: _leaf(x.double() if x.is_floating_point() else x, name in case.grad) for name, x in case.tensors.items()}
    expected = case.call(reference, **exact)
    generator = torch.Generator().manual_seed(0)
    # The lse of rows without visible keys is -inf; it is excluded.
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) * x.detach().isfinite() for x in expected]
    exact_grads = _gradients(expected, [exact[name] for name in case.grad], cotangents)
    exact_lists = case.lists(reference, **exact) if case.lists else ()
    of_outputs, of_gradients = LIMITS[kind]
    errors = report["errors"].setdefault(label, {})

    def judge(name: str, number: int, error: Callable[[], float]) -> None:
        try:
            errors[name] = max(errors.get(name, 0.0), error())
        except AssertionError as wrong:
            failures.append(f"{label}, configuration {number}: {wrong}")

    for number in itertools.count():
        with forced(number) as offered:
            given = {name: _leaf(x.to(device), name in case.grad) for name, x in case.tensors.items()}
            outputs = case.call(ops, **given)
            grads = _gradients(outputs, [given[name] for name in case.grad], cotangents)
            lists = case.lists(ops, **given) if case.lists else ()
        for place, (got, wanted) in enumerate(zip(outputs, expected, strict=True)):
            name, limit = f"output {place}", case.limit or of_outputs
            judge(name, number, lambda got=got, wanted=wanted, name=name, limit=limit: assert_close_rms(got, wanted, limit, name))
        for leaf, got, wanted in zip(case.grad, grads, exact_grads, strict=True):
            assert wanted.any(), f"the oracle's gradient of {leaf} must not vanish"
            name = f"gradient of {leaf}"
            judge(name, number, lambda got=got, wanted=wanted, name=name: assert_close_rms(got, wanted, of_gradients, name))
        if lists:
            judge("lists apart", number, lambda lists=lists: _apart(lists, exact_lists, LISTS_APART[kind]))
        for kernel, configurations in offered.items():
            known = report["configurations"].setdefault(kernel, [])
            known.extend(one for one in configurations[: number + 1] if one not in known)
        if number + 1 >= max(map(len, offered.values()), default=1):
            return


def _leaf(x: Tensor, differentiated: bool) -> Tensor:
    return x.detach().clone().requires_grad_(differentiated)


def _gradients(outputs: Outputs, leaves: list[Tensor], cotangents: list[Tensor]) -> Outputs:
    if not leaves:
        return ()
    pairs = [(x, g) for x, g in zip(outputs, cotangents, strict=True) if x.requires_grad]
    return torch.autograd.grad([x for x, _ in pairs], leaves, [g.to(x.device, x.dtype) for x, g in pairs])


def _apart(lists: Outputs, expected: Outputs, limit: float) -> float:
    """Share of rows whose list of blocks differs from the oracle's."""
    differ = torch.stack(
        [(got.cpu() != wanted).reshape(*wanted.shape[:3], -1).any(-1) for got, wanted in zip(lists, expected, strict=True)]
    )
    share = differ.any(0).float().mean().item()
    assert share <= limit, f"lists must differ from the oracle's in at most {limit:g} of the rows, got {share:.3g}."
    return share


def _attention(
    dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int, compress: int, block: int, window: int, blocks: int,
    queries: int | None = None, packed: bool = False, own_query: bool = False, sinks: bool = False, **others: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """Tensors and options of `dyn_nsa`; a packed case has three sequences, `own_query` gives the compressed branch another query."""
    importance = others.get("importance", "share")
    tensors = dyn_nsa_case(
        tokens, queries=queries, heads=heads, kv_heads=kv_heads, dim=dim, compress_size=compress, dtype=dtype, importance="relative"
    )
    # The mean share of a block is 1 / number of blocks. Thresholds below it, at this temperature, leave many gates between 0 and 1.
    tensors["base"] -= math.log(max(1, tokens // block // (2 if packed else 1))) + (0.6 if importance == "share" else -1.2)
    if own_query:
        tensors["query_compressed"] = tensors["query"].flip(1)
    if sinks:
        tensors["sinks"] = torch.linspace(-1, 2, heads)
    if packed:
        tensors["cu_seqlens"] = torch.tensor([0, tokens // 7, tokens // 2 + 1, tokens], dtype=torch.int32)
    options = {"window": window, "block_size": block, "compress_size": compress, "max_blocks": blocks, "temperature": 2.0, **others}
    return tensors, options


def _only(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if name in (*names, "cu_seqlens")}


def _branch(tensors: dict[str, Tensor], call: Callable[..., Outputs], *names: str, **lists: Tensor) -> Case:
    """A case of one branch, whose sinks are differentiated with it."""
    given = _only(tensors, *names, "sinks") | lists
    return Case(given, call, tuple(name for name in given if name in (*names, "sinks", "bias")))


def dyn_nsa(dtype: torch.dtype, **size: Any) -> Case:
    tensors, options = _attention(dtype, **size)

    def call(library: Any, **x: Tensor) -> Outputs:
        result = library.dyn_nsa(**x, **options, **_impl(library))
        return result.out, result.soft_counts

    return Case(tensors, call, tuple(name for name in tensors if name != "cu_seqlens"))


def compressed(dtype: torch.dtype, **size: Any) -> Case:
    tensors, options = _attention(dtype, **size)
    sizes = {"compress_size": options["compress_size"], "num_keys": size["tokens"], "softcap": options.get("softcap")}

    def call(library: Any, **x: Tensor) -> Outputs:
        return tuple(library.compressed_attention(**x, **sizes, **_impl(library)))

    return _branch(tensors, call, "query", "key_compressed", "value_compressed")


def sliding_window(dtype: torch.dtype, **size: Any) -> Case:
    tensors, options = _attention(dtype, **size)
    sizes = {"window": options["window"], "softcap": options.get("softcap")}

    def call(library: Any, **x: Tensor) -> Outputs:
        return (library.sliding_window_attention(**x, **sizes, **_impl(library)),)

    return _branch(tensors, call, "query", "key", "value")


def _scored(tensors: dict[str, Tensor], options: dict[str, Any], tokens: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and options of the selection; the oracle computes them from the compressed branch."""
    sizes = {"compress_size": options["compress_size"], "num_keys": tokens, "softcap": options.get("softcap")}
    where = _only(tensors)
    given = _only(tensors, "query", "key_compressed", "value_compressed", "sinks")
    _, lse, entropy = reference.compressed_attention(**given, **sizes)
    tau = reference.attention_tau(entropy, tensors["query"], tokens, tensors["key"].shape[2], options["compress_size"], **where)
    threshold = tensors["base"].double() - tensors["slope"].double() * tau
    scored = _only(tensors, "query", "key_compressed") | {"lse": lse.float(), "threshold": threshold.float()}
    names = ("block_size", "temperature", "importance", "forced_first", "forced_local")
    return scored, sizes | {name: options[name] for name in names if name in options}


def select(dtype: torch.dtype, **size: Any) -> Case:
    """Compares gates with max_blocks at all blocks, and lists separately with a small max_blocks."""
    tensors, options = _attention(dtype, **size)
    scored, sizes = _scored(tensors, options, size["tokens"])
    every = -(-size["tokens"] // options["block_size"])

    def listed(shift: float) -> tuple[Tensor, Tensor]:
        given = {**scored, "threshold": scored["threshold"] + shift}
        indices, counts, bias, *_ = reference.select_blocks(**given, **sizes, max_blocks=max(3, every))
        return counts.sum(), ((indices >= 0) & (bias < 0)).sum()

    free = listed(-1e6)[0] - listed(1e6)[0]
    assert listed(0.0)[1] >= PARTLY_OPEN * free > 0, f"gates between 0 and 1 must be {PARTLY_OPEN} of {free}, got {listed(0.0)[1]}."

    def call(library: Any, **x: Tensor) -> Outputs:
        indices, _, bias, soft_counts, _ = library.select_blocks(**x, **sizes, max_blocks=max(3, every), **_impl(library))
        gate = torch.where(indices >= 0, bias, -torch.inf).exp()  # the gradient of the logarithm is unbounded as a gate approaches 0
        place = torch.where(indices >= 0, indices, every).long()
        return gate.new_zeros(*gate.shape[:3], every + 1).scatter_add(-1, place, gate)[..., :every], soft_counts

    def lists(library: Any, **x: Tensor) -> Outputs:
        with torch.no_grad():
            return tuple(library.select_blocks(**x, **sizes, max_blocks=options["max_blocks"], **_impl(library))[:2])

    return Case(scored, call, ("query", "key_compressed", "lse", "threshold"), lists)


def block_sparse(dtype: torch.dtype, **size: Any) -> Case:
    tensors, options = _attention(dtype, **size)
    scored, sizes = _scored(tensors, options, size["tokens"])
    indices, counts, bias, *_ = reference.select_blocks(**scored, **sizes, max_blocks=options["max_blocks"])
    sizes = {"block_size": options["block_size"], "softcap": options.get("softcap")}

    def call(library: Any, **x: Tensor) -> Outputs:
        return tuple(library.block_sparse_attention(**x, **sizes, **_impl(library)))

    return _branch(tensors, call, "query", "key", "value", indices=indices, counts=counts, bias=bias.float())


def attention_stats(dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int, everything: bool = False) -> Case:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, tokens, count, dim, generator=generator) for count in (heads, kv_heads))
    tensors = {"query": (1.5 * query).to(dtype), "key": key.to(dtype), "span_mask": torch.rand(1, tokens, generator=generator) < 0.4}
    options: dict[str, Any] = {}
    if everything:
        options = {"window": tokens // 2, "softcap": 3.0}
        tensors |= {
            "sinks": torch.randn(heads, generator=generator),
            "key_mask": torch.arange(tokens)[None] >= 3,
            "bias": torch.rand(1, heads, tokens, tokens, generator=generator) < 0.8,
        }

    def call(library: Any, **x: Tensor) -> Outputs:
        return tuple(library.attention_stats(**x, **options, **_impl(library)))

    return Case(tensors, call, limit=1e-4)


def block_norms(dtype: torch.dtype, rows: int, features: int) -> Case:
    tensors = {"x": torch.randn(rows, features).to(dtype), "row_scale": torch.randn(rows).to(dtype)}
    return Case(tensors, lambda library, **x: (library.block_norms(**x, **_impl(library)),), ("x", "row_scale"))


def token_grad_norms(dtype: torch.dtype, rows: int, inputs: int, features: int, block_size: int | None = 64) -> Case:
    tensors = {"inputs": torch.randn(rows, inputs).to(dtype), "grad_output": torch.randn(rows, features).to(dtype)}

    def call(library: Any, **x: Tensor) -> Outputs:
        return (library.token_grad_norms(**x, block_size=block_size, **_impl(library)),)

    return Case(tensors, call, limit=1e-6)


def integrate_sps(dtype: torch.dtype, tokens: int, offsets: list[int]) -> Case:
    """Sums over tokens, in float64, and per-token scores; a tenth of the values is NaN."""
    activation, grad_norm = (torch.randn(tokens, offsets[-1]).exp().to(dtype) for _ in range(2))
    activation[torch.rand(tokens, offsets[-1]) < 0.1] = torch.nan
    tensors = {"activation": activation, "grad_norm": grad_norm, "token_mask": torch.rand(tokens) < 0.8}

    def call(library: Any, **x: Tensor) -> Outputs:
        options = {"return_per_token": True, **_impl(library)} if library is ops else {}
        return tuple(library.integrate_sps(**x, group_offsets=torch.tensor(offsets, device=x["activation"].device), **options))

    return Case(tensors, call, limit=1e-6)


LAYOUTS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gpt-oss": {"activation": "clamped_swiglu", "interleaved": True, "transposed": True},
    "no gate": {"activation": "relu2", "gated": False},
}


def expert_mlp(
    dtype: torch.dtype, tokens: int, features: int, experts: int, neurons: int, slots: int, layout: str = "silu", kind: str = "down_proj"
) -> Case:
    """Output, all gradients and the surprise; three slots in ten are unused, and all layouts but the first have biases."""
    generator = torch.Generator().manual_seed(0)
    options = LAYOUTS[layout]
    width = 2 * neurons if options.get("gated", True) else neurons

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    up, down = draw(experts, width, features, scale=features**-0.5), draw(experts, features, neurons, scale=neurons**-0.5)
    if options.get("transposed"):
        up, down = up.mT.contiguous(), down.mT.contiguous()
    index = torch.rand(tokens, experts, generator=generator).topk(slots).indices
    unused = torch.rand(index.shape, generator=generator) < 0.3
    tensors = {"hidden_states": draw(tokens, features), "gate_up_proj": up, "down_proj": down}
    tensors["top_k_weights"] = draw(tokens, slots).masked_fill(unused, 0)
    if layout != "silu":
        tensors |= {"gate_up_bias": draw(experts, width), "down_bias": draw(experts, features)}
    grad = tuple(tensors)
    cotangent = draw(tokens, features)
    tensors["top_k_index"] = index.masked_fill(unused, experts)

    def call(library: Any, **x: Tensor) -> Outputs:
        if library is reference:
            detached = {name: value.detach() for name, value in x.items()}
            surprise = reference.expert_surprise(**detached, grad_output=cotangent.double(), kind=kind, **options)
            return reference.expert_mlp(**x, **options), surprise
        device = x["hidden_states"].device
        probe = torch.zeros(index.shape, device=device, requires_grad=True)
        out = ops.expert_mlp(**x, **options, surprise=probe, surprise_kind=kind, **_impl(library))
        (surprise,) = torch.autograd.grad(out, probe, cotangent.to(device), retain_graph=True)
        return out, surprise

    return Case(tensors, call, grad)


def expert_linear(
    dtype: torch.dtype, tokens: int, features: int, experts: int, outputs: int, slots: int, rows: str = "token", summed: bool = False
) -> Case:
    """Output, all gradients and the surprise; three slots in ten are unused."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    index = torch.rand(tokens, experts, generator=generator).topk(slots).indices
    unused = torch.rand(index.shape, generator=generator) < 0.3
    tensors = {
        "hidden_states": draw(tokens, features) if rows == "token" else draw(tokens, slots, features),
        "weight": draw(experts, outputs, features, scale=features**-0.5),
        "bias": draw(experts, outputs),
    }
    if summed:
        tensors["top_k_weights"] = draw(tokens, slots).masked_fill(unused, 0)
    grad = tuple(tensors)
    cotangent = draw(tokens, outputs) if summed else draw(tokens, slots, outputs)
    tensors["top_k_index"] = index.masked_fill(unused, experts)

    def call(library: Any, **x: Tensor) -> Outputs:
        if library is reference:
            detached = {name: value.detach() for name, value in x.items()}
            surprise = reference.linear_surprise(**{"top_k_weights": None, **detached}, grad_output=cotangent.double())
            return reference.expert_linear(**x), surprise
        device = x["hidden_states"].device
        probe = torch.zeros(index.shape, device=device, requires_grad=True)
        out = ops.expert_linear(**x, surprise=probe, **_impl(library))
        (surprise,) = torch.autograd.grad(out, probe, cotangent.to(device), retain_graph=True)
        return out, surprise

    return Case(tensors, call, grad)


def threshold_route(dtype: torch.dtype, tokens: int, experts: int, features: int, form: str, combine: str) -> Case:
    """Scores and the weight of every expert. The op has no Triton kernel; it is checked on the device."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (tokens, features), "prototypes": (experts, features), "thresholds": (experts,)}
    tensors = {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["thresholds"] = 0.1 * tensors["thresholds"] + (0.2 if form == "sigmoid_cosine" else -1.4)

    def call(library: Any, **x: Tensor) -> Outputs:
        found = library.threshold_route(**x, form=form, scale=3.0, combine=combine)
        weights = found.top_k_weights
        return found.scores, weights.new_zeros(tokens, experts + 1).scatter_add(1, found.top_k_index.long(), weights)[:, :experts]

    return Case(tensors, call, ("hidden_states", "prototypes", "thresholds"))


def _impl(library: Any) -> dict[str, str]:
    return {"impl": "triton"} if library is ops else {}


CASES: dict[str, Callable[..., Case]] = {
    function.__name__: function
    for function in (
        dyn_nsa, compressed, sliding_window, select, block_sparse, attention_stats, block_norms, token_grad_norms, integrate_sps,
        expert_mlp, expert_linear, threshold_route,
    )
}  # fmt: skip
