"""The mixture's Triton kernels against every expert for every token in float64: values, every gradient, the surprise; how they launch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tinyonn
from tinyonn import ops, reference
from tinyonn.testing import IMPLS, assert_close_rms, dtype_id, impl_device

from .expert_cases import LAYOUTS as SHARED_LAYOUTS

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]
DEVICE = impl_device("triton")
HALF = torch.float16  # Triton's interpreter multiplies bfloat16 as integers
LAYOUTS = SHARED_LAYOUTS | {"interleaved-without-gate": {"interleaved": True, "gated": False}}


def case(
    tokens: int = 23,
    features: int = 20,
    experts: int = 5,
    neurons: int = 9,
    slots: int = 3,
    *,
    biased: bool = False,
    layout: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Weights of a size that reaches the clamps; each token names distinct experts, and leaves three slots in ten unused."""
    generator = torch.Generator().manual_seed(0)
    layout = layout or {}
    width = 2 * neurons if layout.get("gated", True) else neurons

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    up, down = 3 * draw(experts, width, features) / features**0.5, draw(experts, features, neurons) / neurons**0.5
    if layout.get("transposed"):
        up, down = up.mT.contiguous(), down.mT.contiguous()
    index = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :slots]
    unused = torch.rand(index.shape, generator=generator) < 0.3
    tensors = {
        "hidden_states": draw(tokens, features),
        "gate_up_proj": up,
        "down_proj": down,
        "top_k_weights": draw(*index.shape).masked_fill(unused, 0),
    }
    if biased:
        tensors |= {"gate_up_bias": draw(experts, width), "down_bias": draw(experts, features)}
    return {name: x.to(dtype) for name, x in tensors.items()} | {"top_k_index": index.masked_fill(unused, experts)}


def check(
    tensors: dict[str, Tensor], kind: str | None = "expert", layout: dict[str, Any] | None = None, grad_out: Tensor | None = None
) -> None:
    """Output, the surprise and gradients of all floating-point inputs; inputs keep their strides."""
    layout = layout or {}
    ours = {name: x.to(DEVICE).detach() for name, x in tensors.items()}
    exact = {name: x.detach().cpu().double() if x.is_floating_point() else x.cpu() for name, x in tensors.items()}
    names = [name for name, x in tensors.items() if x.is_floating_point()]
    dtype = tensors["hidden_states"].dtype
    if grad_out is None:
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(tensors["hidden_states"].shape, generator=generator, dtype=torch.float64).to(dtype)
    results = []
    probe = torch.zeros(tensors["top_k_index"].shape, device=DEVICE, requires_grad=kind is not None)
    extra = {"impl": "triton"} if kind is None else {"impl": "triton", "surprise": probe, "surprise_kind": kind}
    for function, values, options in ((ops.expert_mlp, ours, extra), (reference.expert_mlp, exact, {})):
        leaves = [values[name].requires_grad_() for name in names]
        out = function(**values, **layout, **options)
        leaves += [probe] if kind is not None and values is ours else []
        results.append((out, *torch.autograd.grad(out, leaves, grad_out.to(out.device, out.dtype), materialize_grads=True)))
    (out, *grads), (expected, *expected_grads) = results
    assert out.dtype == dtype
    assert_close_rms(out, expected, dtype)
    for name, got, wanted in zip(names, grads, expected_grads, strict=False):
        assert got.dtype == tensors[name].dtype
        assert_close_rms(got, wanted, dtype, f"gradient of {name}")
    if kind is not None:
        expected_surprise = reference.expert_surprise(**exact, grad_output=grad_out.cpu(), kind=kind, **layout)
        assert_close_rms(grads[-1], expected_surprise, dtype, "surprise")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_activation_and_layout(name):
    check(case(layout=LAYOUTS[name], biased=True), layout=LAYOUTS[name])


@pytest.mark.parametrize("name", ["silu", "relu2", "gpt-oss", "interleaved-without-gate"])
def test_layouts_without_biases(name):
    """With and without a gate, in halves and interleaved."""
    check(case(layout=LAYOUTS[name]), layout=LAYOUTS[name])


@pytest.mark.parametrize("name", ["silu", "gpt-oss"])
def test_half_precision(name):
    """No value is next to a clamp, where the slope depends on how it rounded."""
    check(case(layout=LAYOUTS[name], biased=True, dtype=HALF), layout=LAYOUTS[name])


@pytest.mark.parametrize("kind", ["down_proj", "output", "saving", None])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_every_kind_of_surprise(kind, biased):
    check(case(biased=biased), kind)


@pytest.mark.parametrize("kind", ["down_proj", "expert", "output", "saving"])
def test_an_expert_named_twice_counts_with_its_summed_weight(kind):
    tensors = case(biased=True)
    tensors["top_k_index"][0] = torch.tensor([1, 5, 1])
    tensors["top_k_weights"][0] = torch.tensor([0.7, 0.0, -0.2])
    tensors["top_k_index"][1] = 5  # a token without an expert
    check(tensors, kind)


@pytest.mark.parametrize(
    ("tokens", "features", "experts", "neurons", "slots"),
    [(5, 16, 1, 8, 1), (1, 60, 8, 8, 8), (20, 17, 3, 130, 2), (6, 8, 70, 8, 4), (7, 1, 4, 1, 3), (40, 140, 3, 33, 2)],
)
def test_any_size(tokens, features, experts, neurons, slots):
    check(case(tokens, features, experts, neurons, slots))


def test_wide_tiles_in_half_precision():
    """64 rows a tile, where an expert has many; sizes that are whole tiles, and more than one."""
    check(case(100, 144, 1, 80, 1, dtype=HALF, biased=True))


def test_all_tokens_to_one_expert():
    tensors = case(40, slots=2)
    tensors["top_k_index"][:, 0], tensors["top_k_index"][:, 1] = 5, 3
    check(tensors)


@pytest.mark.parametrize("layout", [{}, {"interleaved": True}], ids=["plain", "interleaved"])
def test_experts_with_many_tokens_are_summed_in_parts(monkeypatch, layout):
    """Parts of 20 pairs: one expert begins within the first part and ends with the third, the next one has exactly two, the last one has
    the rest of a part whose end is unused.
    """
    monkeypatch.setattr("tinyonn_kernels.experts.expert_outer.PART", 20)
    sizes = {0: 3, 7: 57, 20: 40, 39: 22, 40: 9}
    tensors = case(131, features=150, experts=40, slots=1, biased=True, layout=layout)
    index = torch.repeat_interleave(torch.tensor(list(sizes)), torch.tensor(list(sizes.values())))
    tensors["top_k_index"][:, 0] = index[torch.randperm(131, generator=torch.Generator().manual_seed(2))]
    check(tensors, layout=layout)


def test_partial_sums_stay_small():
    from tinyonn_kernels.experts.expert_outer import PART, part_size

    assert part_size(16384 * 8, 1024, 16) == PART
    assert part_size(1 << 20, 64, 16) == 1 << 16  # at most 16 parts of 64 experts' matrices
    assert part_size(1 << 18, 8, 14336) == 0  # Mixtral: one matrix occupies the GPU


def test_unused_slots_are_never_read():
    """Whatever a sentinel's weight, and whichever way an index is out of range."""
    tensors = case()
    unused = tensors["top_k_index"] == 5
    assert 10 < int(unused.sum()) < 40
    probe = torch.zeros(unused.shape, device=DEVICE, requires_grad=True)
    results = []
    for index, weight in ((5, 0.0), (-3, torch.nan), (1 << 40, torch.nan)):
        changed = tensors | {
            "top_k_index": tensors["top_k_index"].masked_fill(unused, index),
            "top_k_weights": tensors["top_k_weights"].masked_fill(unused, weight),
        }
        leaves = {name: x.to(DEVICE).requires_grad_(x.is_floating_point()) for name, x in changed.items()}
        out = ops.expert_mlp(**leaves, surprise=probe, surprise_kind="expert", impl="triton")
        floats = [x for x in leaves.values() if x.is_floating_point()]
        results.append([out, *torch.autograd.grad(out.square().sum(), [*floats, probe])])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert all(x.isfinite().all() for x in results[0])
    assert (results[0][-1][unused] == 0).all()


@pytest.mark.parametrize(
    ("sizes", "index"),
    [
        ({"tokens": 0}, 0),
        ({"slots": 0}, 0),
        ({"experts": 0, "slots": 0}, 0),
        ({"tokens": 4}, 5),
        ({"tokens": 4, "neurons": 0}, 1),
    ],
    ids=["no-tokens", "no-slots", "no-experts", "all-unused", "no-neurons"],
)
def test_nothing_to_multiply(sizes, index):
    tensors = case(**sizes, biased=True)
    tensors["top_k_index"].fill_(index)
    check(tensors)


def test_strided_inputs():
    """Rows apart, features apart, weights and biases in slices, indices and weights of slots apart; a gradient that is one number."""
    tensors = case(biased=True, layout={"transposed": True})
    apart = {name: torch.stack([x, x], -1)[..., 0] for name, x in tensors.items()}
    assert not apart["hidden_states"].is_contiguous()
    check(apart, layout={"transposed": True}, grad_out=torch.ones(()).expand(23, 20))


def test_weights_of_another_precision_than_the_tokens():
    tensors = case(dtype=HALF)
    check(tensors | {"top_k_weights": tensors["top_k_weights"].float()})


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        leaves = {name: x.to(DEVICE).requires_grad_(x.is_floating_point()) for name, x in case(biased=True).items()}
        out = ops.expert_mlp(**leaves, impl="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), [x for x in leaves.values() if x.is_floating_point()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    tensors = {name: x.to(DEVICE) for name, x in case(7, 8, 4, 3, 2, biased=True).items()}
    tensors["top_k_index"] %= 4  # behind the last pair, what is kept for backward is unwritten
    probe = torch.zeros(7, 2, device=DEVICE, requires_grad=True)
    leaves = [tensors[name].requires_grad_() for name in ("hidden_states", "gate_up_proj", "down_proj")]
    rest = (tensors["top_k_index"], tensors["top_k_weights"].requires_grad_(), tensors["gate_up_bias"], tensors["down_bias"], probe)
    torch.library.opcheck(torch.ops.tinyonn.expert_mlp.default, (*leaves, *rest, "expert", "silu", True, False, False, 0.0, "triton"))


def test_debug_names_an_index_out_of_range():
    tensors = {name: x.to(DEVICE) for name, x in case().items()}
    tensors["top_k_index"][0, 1] = 7
    with tinyonn.debug(), pytest.raises(ValueError, match="top_k_index must be 0 … 5, 5 for an unused slot, got 7 for token 0"):
        ops.expert_mlp(**tensors, impl="triton")


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"impl='triton' needs float16, bfloat16 or float32 tensors, got torch\.float64"):
        ops.expert_mlp(**case(dtype=torch.float64), impl="triton")


@pytest.mark.parametrize("strides", [(1 << 31, 1 << 16, 1), (1, 1, 1 << 16)], ids=["large", "far-apart"])
def test_offsets_within_an_expert_that_pass_32_bits_are_refused(strides):
    from tinyonn_kernels.experts.expert_activation import check_reach

    size = (1 << 15) + 1
    weights = torch.empty_strided((2, size, size), strides, device="meta")
    with pytest.raises(ValueError, match="gate_up_proj must span fewer than 2147483648 elements an expert with impl='triton', got 214"):
        check_reach("gate_up_proj", weights)


class Operations(TorchDispatchMode):
    """Names of what torch runs; whatever would read a value to the host is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if any(reading in name for reading in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal.default")):
            raise AssertionError(f"the host must wait for nothing, got {name}.")
        self.names.append(name)
        result = function(*args, **(kwargs or {}))
        devices = {x.device for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)}
        assert devices <= {torch.device("meta")}, f"{name} must stay on the device, got {devices}."
        return result


def launches(monkeypatch: pytest.MonkeyPatch, experts: int) -> tuple[list[str], list[str]]:
    """Kernels and torch operations of forward and backward, on tensors without data: no value can be read, and no kernel runs."""
    from triton.runtime.interpreter import InterpretedFunction

    from tinyonn.ops.experts import _triton_experts
    from tinyonn.ops.experts._tuples import Inputs, Layout, Saved, Wanted

    tensors = case(300, 32, experts, 16, 4, biased=True, dtype=HALF)
    inputs = Inputs(**{name: tensors[name].to("meta") for name in Inputs._fields})
    grad_out = torch.empty_like(inputs.hidden_states)
    kernels: list[str] = []
    layout = Layout("silu", True, False, False)
    with monkeypatch.context() as patch, Operations() as operations:
        patch.setattr(InterpretedFunction, "run", lambda self, *args, **options: kernels.append(self.fn.__name__))
        _, pre = _triton_experts.experts_forward(inputs, layout)
        _triton_experts.experts_backward(inputs, Saved(pre, grad_out), layout, Wanted("expert"))
    return kernels, operations.names


@pytest.mark.skipif(torch.cuda.is_available(), reason="without data a GPU's launcher compiles every configuration")
def test_launches_do_not_depend_on_the_number_of_experts(monkeypatch):
    few, many = launches(monkeypatch, 4), launches(monkeypatch, 64)
    assert few == many
    sort = ["_rank_pairs_kernel", "_scan_chunks_kernel", "_expert_offsets_kernel", "_fill_pairs_kernel"]
    rows, norms = ["_expert_rows_kernel", "_combine_slots_kernel"], ["_block_norms_kernel"]
    wanted = [*sort, "_expert_gate_up_kernel", *rows, *sort, *norms, "_expert_grad_pre_kernel", *rows, "_expert_outer_kernel"]
    # Without data every offered configuration is compiled, one after the other.
    assert [name for name, _ in itertools.groupby(few[0])] == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_id)
def test_values_on_a_gpu(dtype):
    check(case(500, 64, 16, 64, 4, dtype=dtype, biased=True))


def profiled_step(experts: int, dtype: torch.dtype) -> list[str]:
    """What the device did in a forward and a backward with the surprise, by name; nothing may wait for it."""
    tensors = case(500, 64, experts, 64, 4, dtype=dtype, biased=True)
    leaves = {name: x.to(DEVICE).requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    probe = torch.zeros(leaves["top_k_index"].shape, device=DEVICE, requires_grad=True)
    wanted = [*(x for x in leaves.values() if x.requires_grad), probe]

    def step() -> None:
        out = ops.expert_mlp(**leaves, surprise=probe, surprise_kind="expert")
        torch.autograd.grad(out, wanted, torch.ones_like(out))

    for _ in range(2):  # the fastest tiles are found, memory is there
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    events = profile.events()
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    # The profiler itself calls cudaDeviceSynchronize when it stops.
    waits = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMalloc", "cudaFree"}
    assert not waits & {event.name for event in events}
    assert not [name for name in on_device if "Memcpy" in name and "DtoD" not in name]
    return on_device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_a_profile_shows_no_wait_and_no_launch_per_expert(dtype):
    few, many = profiled_step(4, dtype), profiled_step(64, dtype)

    def kernels(names: list[str]) -> list[str]:
        return sorted(name for name in names if name.startswith("_"))

    assert "_expert_gate_up_kernel" in few
    assert kernels(few) == kernels(many)
    assert len(few) == len(many)
