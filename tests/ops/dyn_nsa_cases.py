"""Inputs and bounds for the tests of DynNSA, and the comparison of its implementations with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.testing import TOLERANCE, assert_close_rms, dyn_nsa_case, impl_device

DEVICE = impl_device("triton")
HALF = torch.float16  # Triton's interpreter multiplies bfloat16 as integers
INPUTS = ("query", "key", "value", "key_compressed", "value_compressed", "gates", "base", "slope")
SHAPES: dict[str, dict[str, Any]] = {
    "G2-D16": {},
    "G1-D60": {"heads": 1, "kv_heads": 1, "dim": 60},
    "G3-batch": {"heads": 3, "kv_heads": 1, "batch": 2, "tokens": 70},
    "G8": {"heads": 8, "kv_heads": 1, "tokens": 70},
    "G20": {"heads": 20, "kv_heads": 1, "tokens": 45},
    "decode-1": {"queries": 1},
    "decode-50": {"queries": 50},
    "T1": {"tokens": 1},
    "T63": {"tokens": 63},
}
PACKED = torch.tensor([0, 37, 38, 86, 86, 120], dtype=torch.int32)
BOUNDS: dict[str, dict[str, Tensor]] = {
    "packed": {"cu_seqlens": PACKED},
    "left": {"key_start": torch.tensor([13, 110], dtype=torch.int32)},
    "both": {"key_start": torch.tensor([13, 0], dtype=torch.int32), "key_end": torch.tensor([90, 3], dtype=torch.int32)},
}


def case(tokens: int = 120, **options: Any) -> dict[str, Tensor]:
    """Inputs of `ops.dyn_nsa` in float32, few enough for Triton's interpreter."""
    return dyn_nsa_case(tokens, **{"dtype": torch.float32, **options})


def bounded(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, with rows that nothing may read set to something large, and the bounds."""
    tensors = case(batch=1 if name == "packed" else 2, compress_size=16)
    bounds = BOUNDS[name]
    if name == "packed":
        for part in ("key_compressed", "value_compressed"):
            used = torch.zeros(tensors[part].shape[1], dtype=torch.bool)
            for start, end in pairwise(PACKED.tolist()):
                used[start // 16 : start // 16 + (end - start) // 16] = True
            tensors[part][:, ~used] = 1e3
    return tensors, bounds


def compare(
    function: Callable[..., Any],
    oracle: Callable[..., Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    grads: int,
    device: str = DEVICE,
) -> None:
    """Outputs and the gradients of random sums of them, by the first `grads` tensors; outputs of integers must be equal."""
    ours = {name: x.to(device, dtype if x.is_floating_point() else x.dtype).clone() for name, x in tensors.items()}
    exact = {name: x.double().cpu() if x.is_floating_point() else x.cpu() for name, x in ours.items()}
    for leaves in (ours, exact):
        for name in list(leaves)[:grads]:
            leaves[name].requires_grad_()
    results = []
    for call, leaves in ((function, ours), (oracle, exact)):
        outputs = call(**leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        generator = torch.Generator().manual_seed(2)
        loss = torch.zeros((), dtype=torch.float64)
        for out in outputs:
            if out.requires_grad:
                cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).double()
                loss = loss + (out.cpu().double().masked_fill(out.cpu().isinf(), 0) * cotangent).sum()
        wanted = list(leaves.values())[:grads]
        found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True) if loss.requires_grad else wanted
        results.append((outputs, found if loss.requires_grad else [torch.zeros_like(leaf) for leaf in wanted]))
    for number, (mine, theirs) in enumerate(zip(results[0][0], results[1][0], strict=True)):
        if not mine.is_floating_point():
            assert torch.equal(mine.cpu(), theirs), f"output {number}"
        else:
            assert_close_rms(mine, theirs, dtype, f"output {number}")
    for name, mine, theirs in zip(tensors, results[0][1], results[1][1], strict=False):
        if theirs.numel() == 0 or theirs.abs().max() < 1e-12:  # one key: nothing to choose, and what is left is rounding
            assert (mine.abs() < 1e-5).all(), f"gradient of {name}"
            continue
        # Two numbers each, sums over all tokens that mostly cancel.
        loose = 6 if name in ("base", "slope") else 1
        assert_close_rms(mine, theirs, TOLERANCE[dtype] * loose, f"gradient of {name}")


def partly_open(tensors: dict[str, Tensor], options: dict[str, Any]) -> float:
    """Share of the unforced selectable pairs whose gate lies strictly between 0 and 1."""
    num_keys = tensors["key"].shape[1]
    compress_size = options.get("compress_size", 64)
    keys = (tensors["query"], tensors["key_compressed"], tensors["value_compressed"])
    cap = {"softcap": options.get("softcap")}
    sizes = {"compress_size": compress_size, "num_keys": num_keys}
    _, lse, entropy = reference.compressed_attention(*keys, **sizes, **cap, sinks=tensors.get("sinks"))
    tau = reference.attention_tau(entropy, tensors["query"], num_keys, tensors["key"].shape[2], compress_size)
    threshold = tensors["base"].double() - tensors["slope"].double() * tau
    own = {key: options[key] for key in ("temperature", "block_size", "compress_size", "importance") if key in options}
    bias = reference.select_blocks(*keys[:2], lse, threshold, max_blocks=1000, num_keys=num_keys, **own, **cap).bias
    block_size = options.get("block_size", 64)
    block = torch.arange(-(-num_keys // block_size))
    place = torch.arange(num_keys - tensors["query"].shape[1], num_keys)
    past = (block + 1) * block_size <= place[:, None] + 1
    forced = (block == 0) | (block >= place[:, None] // block_size - 1)
    selectable = int((past & ~forced).sum()) * tensors["key"].shape[2]
    return int((bias < 0).sum()) / max(1, selectable)


def all_blocks(tokens: int, block_size: int) -> tuple[Tensor, Tensor]:
    """indices, counts: every block up to a query's own, for two key/value heads."""
    indices = torch.arange(-(-tokens // block_size), dtype=torch.int32).expand(1, tokens, 2, -1).contiguous()
    counts = (torch.arange(tokens) // block_size + 1).int()[None, :, None].expand(1, -1, 2).contiguous()
    return indices, counts


def attentions(impl: str, tokens: int, **options: Any) -> dict[str, Callable[..., Tensor]]:
    """Each op that can read all keys, as a function of query (1, tokens, 4, 16), key and value (1, tokens, 2, 16), and options."""
    device = impl_device(impl)

    def whole(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        tensors = dyn_nsa_case(tokens, compress_size=16, dtype=query.dtype)
        rest = {name: tensors[name].to(device) for name in INPUTS[3:5]}
        gates = torch.tensor([0.0, 1.0, 0.0], device=device, dtype=query.dtype).expand(1, tokens, 4, 3)
        level = torch.full((2,), -30.0, device=device)
        sizes: dict[str, Any] = {"block_size": 32, "compress_size": 16, "max_blocks": -(-tokens // 32), "impl": impl, **options, **more}
        result = ops.dyn_nsa(query, key, value, **rest, gates=gates, base=level, slope=torch.zeros_like(level), **sizes)
        assert (result.counts[0, :, 0].cpu() == torch.arange(tokens) // 32 + 1).all()
        return result.out

    def listed(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        indices, counts = (x.to(device) for x in all_blocks(tokens, 32))
        return ops.block_sparse_attention(query, key, value, indices, counts, block_size=32, impl=impl, **options, **more)[0]

    def window(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        return ops.sliding_window_attention(query, key, value, tokens, impl=impl, **options, **more)

    return {"dyn_nsa": whole, "block_sparse_attention": listed, "sliding_window_attention": window}
