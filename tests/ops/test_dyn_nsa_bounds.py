"""What must not matter to DynNSA: packing, padding, the cache, strides."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.testing import assert_close_rms, dyn_nsa_case, pooled

INPUTS = ("query", "key", "value", "key_compressed", "value_compressed", "gates", "base", "slope")
IMPLS = ["torch"]


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_sequences_equal_themselves_alone(impl):
    lengths = [100, 1, 64, 0, 200, 37]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    total = int(bounds[-1])
    tensors = dyn_nsa_case(total, compress_size=32)
    kc = torch.full((1, total // 32, 2, 16), torch.nan, dtype=torch.float64)
    vc = torch.full_like(kc, torch.nan)
    pieces = []
    for start, end in pairwise(bounds.tolist()):
        piece = {name: tensor[:, start:end] if name in ("query", "key", "value", "gates") else tensor for name, tensor in tensors.items()}
        piece["key_compressed"], piece["value_compressed"] = pooled(piece["key"], 32), pooled(piece["value"], 32)
        at = start // 32
        kc[:, at : at + piece["key_compressed"].shape[1]] = piece["key_compressed"]
        vc[:, at : at + piece["value_compressed"].shape[1]] = piece["value_compressed"]
        pieces.append(piece)
    # What no sequence uses may hold anything finite; here it would show.
    unused = kc.isnan()
    tensors["key_compressed"], tensors["value_compressed"] = kc.masked_fill(unused, 1e3), vc.masked_fill(unused, 1e3)
    options = {"compress_size": 32, "window": 40, "max_blocks": 4}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    whole = ops.dyn_nsa(**leaves, impl=impl, cu_seqlens=bounds, **options)
    assert_close_rms(whole.out, reference.dyn_nsa(**tensors, cu_seqlens=bounds, **options).out, 1e-12)
    (grad,) = torch.autograd.grad(whole.out.square().sum(), [leaves["key"]])
    for piece, (start, end) in zip(pieces, pairwise(bounds.tolist()), strict=True):
        piece["key"] = piece["key"].clone().requires_grad_()
        alone = ops.dyn_nsa(**piece, impl=impl, **options)
        assert_close_rms(whole.out[:, start:end], alone.out, 1e-12)
        assert torch.equal(whole.counts[:, start:end], alone.counts)
        if end > start:
            assert_close_rms(grad[:, start:end], torch.autograd.grad(alone.out.square().sum(), [piece["key"]])[0], 1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(impl, side):
    lengths, width = [150, 90, 7], 180
    rows = [dyn_nsa_case(length, seed=i, compress_size=16) for i, length in enumerate(lengths)]
    starts = [{"left": width - n, "right": 0, "both": (width - n) // 2}[side] for n in lengths]
    batch: dict[str, Tensor] = {}
    for name in INPUTS[:6]:
        size = width if name in ("query", "key", "value", "gates") else width // 16
        batch[name] = torch.full((3, size, *rows[0][name].shape[2:]), 1e3, dtype=torch.float64)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            at = start if size == width else 0
            batch[name][i, at : at + row[name].shape[1]] = row[name][0]
    batch["base"], batch["slope"] = rows[0]["base"], rows[0]["slope"]
    bounds = {
        "key_start": torch.tensor(starts, dtype=torch.int32),
        "key_end": torch.tensor([s + n for s, n in zip(starts, lengths, strict=True)], dtype=torch.int32),
    }
    options = {"compress_size": 16, "window": 30, "max_blocks": 5}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in batch.items()}
    result = ops.dyn_nsa(**leaves, impl=impl, **bounds, **options)
    grads = torch.autograd.grad(result.out.square().sum(), [leaves["query"], leaves["key"]])
    overflowing = 0.0
    for i, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        alone = ops.dyn_nsa(**{**row, "base": batch["base"], "slope": batch["slope"]}, impl=impl, **options)
        overflowing += alone.overflow.item() * length
        inside = slice(start, start + length)
        assert_close_rms(result.out[i, inside], alone.out[0], 1e-12)
        outside = torch.ones(width, dtype=torch.bool)
        outside[inside] = False
        assert (result.out[i, outside] == 0).all()
        for grad in grads:
            assert (grad[i, outside] == 0).all()
    assert result.overflow.item() == pytest.approx(overflowing / sum(lengths))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_padding_does_not_count_as_rows_that_did_not_overflow(impl):
    tensors = dyn_nsa_case(400, compress_size=16)
    tensors["base"] = torch.full_like(tensors["base"], -30.0)
    options = {"compress_size": 16, "window": 30, "max_blocks": 3, "impl": impl}
    half = ops.dyn_nsa(**tensors, **options, key_start=torch.tensor([200], dtype=torch.int32))
    alone = ops.dyn_nsa(
        **{name: x if x.dim() < 3 else x[:, -200:] if x.shape[1] == 400 else x[:, :12] for name, x in tensors.items()}, **options
    )
    assert 0.03 < alone.overflow < 1
    assert half.overflow.item() == pytest.approx(alone.overflow.item())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("queries", [1, 5, 70])
def test_decoding_equals_the_last_rows(impl, queries):
    tensors = dyn_nsa_case(300)
    whole = ops.dyn_nsa(**tensors, impl=impl, compress_size=32, window=50)
    last = {name: tensor[:, -queries:] if name in ("query", "gates") else tensor for name, tensor in tensors.items()}
    result = ops.dyn_nsa(**last, impl=impl, compress_size=32, window=50)
    assert_close_rms(result.out, whole.out[:, -queries:], 1e-12)
    assert torch.equal(result.counts, whole.counts[:, -queries:])


def test_strides_do_not_matter():
    tensors = dyn_nsa_case(150)
    turned = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in tensors.items()}
    a, b = ops.dyn_nsa(**tensors, compress_size=32), ops.dyn_nsa(**turned, compress_size=32)
    assert_close_rms(a.out, b.out, 1e-14)


def test_no_tokens():
    tensors = dyn_nsa_case(0)
    result = ops.dyn_nsa(**{name: tensor.requires_grad_() for name, tensor in tensors.items()}, compress_size=32)
    assert result.out.shape == (1, 0, 4, 16)
    result.out.sum().backward()
    assert tensors["base"].grad.tolist() == [0, 0]
