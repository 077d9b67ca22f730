"""The block: its formula in float64, what checkpointing recomputes and what it must not, and its messages."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tinyonn.nn import DynNSACache, DynNSAOptions, DynONNBlock, token_mask_of
from tinyonn.nn.full_attention import FullAttention
from tinyonn.nn.routed import Routed

KINDS = ["dyn_nsa", "full", "dyn_smha"]
SMALL = {"compress_size": 16, "block_size": 16, "window": 16, "max_blocks": 8}


def block(kind: str, **options) -> DynONNBlock:
    torch.manual_seed(0)
    if kind == "dyn_nsa":
        options = {"nsa_options": DynNSAOptions(**SMALL), **options}
    return DynONNBlock(32, 16, 6, **{"max_num_experts": 8, "target_k": 2.0, "attention": kind, **options})


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def causal_attention(module: nn.Module, x: Tensor) -> Tensor:
    """One query at a time, rotary embedding by complex numbers."""
    length, width = x.shape[0], module.head_dim
    turn = torch.outer(torch.arange(length).double(), 10000.0 ** (-torch.arange(0, width, 2).double() / width))
    turn = torch.polar(torch.ones_like(turn), turn)[:, None]

    def heads(proj: nn.Linear, rotated: bool = True) -> Tensor:
        y = (x @ proj.weight.T).view(length, -1, width)
        if not rotated:
            return y
        y = torch.complex(*y.chunk(2, -1)) * turn
        return torch.cat([y.real, y.imag], -1)

    query, key, value = heads(module.q_proj), heads(module.k_proj), heads(module.v_proj, rotated=False)
    rows = []
    for t in range(length):
        shares = torch.einsum("hd,jhd->hj", query[t], key[: t + 1]).div(width**0.5).softmax(-1)
        rows.append(torch.einsum("hj,jhd->hd", shares, value[: t + 1]).flatten())
    return torch.stack(rows) @ module.o_proj.weight.T


def mixture(module: Routed, x: Tensor) -> Tensor:
    """One token and one expert at a time."""
    routing = module.route(x)
    out = torch.zeros_like(x)
    for t, (experts, weights) in enumerate(zip(routing.top_k_index, routing.top_k_weights, strict=True)):
        for e, weight in zip(experts.tolist(), weights, strict=True):
            if e < len(module.down_proj):
                gate, up = (module.gate_up_proj[e] @ x[t]).chunk(2)
                out[t] += weight * (module.down_proj[e] @ (gate * gate.sigmoid() * up))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_attention_and_experts_with_residuals(kind):
    module, x = block(kind).double().eval(), tokens(2, 70, 32)
    with torch.no_grad():
        for norm in (module.attention_norm, module.experts_norm):
            norm.weight.copy_(tokens(32, seed=1).abs() + 0.5)
        normed = rms_norm(x, module.attention_norm.weight)
        if kind == "full":
            attended = torch.stack([causal_attention(module.attention, row) for row in normed])
        else:
            attended = module.attention(normed)
            attended = attended.out if kind == "dyn_nsa" else attended
        middle = x + attended
        wanted = middle + mixture(module.experts, rms_norm(middle, module.experts_norm.weight).flatten(0, 1)).view_as(middle)
        torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that share such small matrices mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(kind: str, checkpointed: bool, steps: int):
    """Gradients and thresholds of each of so many steps in bfloat16, one step after the other."""
    torch.manual_seed(0)
    model = block(kind, gradient_checkpointing=checkpointed).bfloat16().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(steps):
        x = tokens(1, 80, 32, seed=number, dtype=torch.bfloat16)
        (model(x).float() - x.float().roll(1, 1)).square().mean().backward()
        yield [p.grad.clone() for p in model.parameters()], [b.clone() for name, b in model.named_buffers() if name.endswith("thresholds")]
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
def test_200_steps_in_bfloat16_have_the_gradients_of_a_run_without_checkpoints(kind):
    moved = None
    for kept, recomputed in zip(trained(kind, False, 200), trained(kind, True, 200), strict=True):
        for a, b in zip(kept[0] + kept[1], recomputed[0] + recomputed[1], strict=True):
            assert torch.equal(a, b)
        moved = recomputed[1] if moved is None else moved
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(moved, recomputed[1], strict=True))  # so the choice of experts has changed


def counted(monkeypatch, owner: object, name: str) -> list[int]:
    """Grows by one with each call of `owner.name`."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_backward_recomputes_experts_and_projections_but_no_choice(kind, monkeypatch):
    module, x = block(kind, gradient_checkpointing=True).train(), tokens(2, 70, 32, dtype=torch.float32).requires_grad_()
    chosen = counted(monkeypatch, importlib.import_module("tinyonn.nn.threshold_router"), "threshold_route")
    selected = counted(monkeypatch, importlib.import_module("tinyonn.ops.nsa._torch_dyn_nsa"), "dyn_nsa_forward")
    executed = counted(monkeypatch, module.experts, "execute")
    module(x).square().mean().backward()
    assert len(executed) == 2
    assert len(chosen) == (2 if kind == "dyn_smha" else 1)
    assert len(selected) == (1 if kind == "dyn_nsa" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_less_for_backward(kind):
    def kept(checkpointed: bool) -> int:
        module, sizes = block(kind, gradient_checkpointing=checkpointed).train(), {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = module(tokens(4, 100, 32, dtype=torch.float32).requires_grad_())
        parameters = {parameter.data_ptr() for parameter in module.parameters()}
        assert out.requires_grad
        return sum(size for address, size in sizes.items() if address not in parameters)

    assert kept(True) < 0.7 * kept(False)


def test_an_evaluated_block_checkpoints_nothing(monkeypatch):
    module = block("dyn_nsa", gradient_checkpointing=True).eval()
    executed = counted(monkeypatch, module.experts, "execute")
    with torch.no_grad():
        module(tokens(1, 20, 32, dtype=torch.float32))
    assert len(executed) == 1


def test_a_cache_continues_the_row():
    module, x = block("dyn_nsa").double().eval(), tokens(2, 90, 32)
    cache = DynNSACache()
    with torch.no_grad():
        parts = [module(part, cache=cache) for part in x.split([60, 1, 29], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x), rtol=1e-10, atol=1e-10)


def test_counts_leave_out_padding_unless_a_context_says_which_tokens_count():
    module, x = block("dyn_nsa").eval(), tokens(2, 20, 32, dtype=torch.float32)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    module(x, token_mask=mask)
    assert module.experts.tokens_seen == 33
    with token_mask_of(module, torch.zeros_like(mask)):
        module(x, token_mask=mask)
    assert module.experts.tokens_seen == 33


class StubSMHA(Routed):
    """Stands for `DynSMHA`: adds a multiple of its input, and shows how it was called."""

    def __init__(self, hidden_size, head_dim, num_experts, *, max_num_experts=None, target_k=None, rope_theta, device=None, dtype=None):
        nn.Module.__init__(self)
        self.checkpoint = False
        self.sizes = (hidden_size, head_dim, num_experts, max_num_experts, target_k, rope_theta)

    def forward(self, hidden_states, **given):
        self.given = given
        return 0.5 * hidden_states


def test_experts_of_attention_get_the_sizes_and_the_call_of_the_block(monkeypatch):
    monkeypatch.setattr("tinyonn.nn.dyn_onn_block.DynSMHA", StubSMHA)
    module, x = block("dyn_smha", gradient_checkpointing=True), tokens(2, 20, 32, dtype=torch.float32)
    start, mask = torch.tensor([3, 0]), torch.ones(2, 20, dtype=torch.long)
    module.attention(x)
    out = module(x, key_start=start, token_mask=mask)
    assert module.attention.sizes == (32, 16, 6, 8, 2.0, 10000.0)
    assert module.attention.checkpoint
    assert module.attention.given["key_start"] is start
    assert module.attention.given["token_mask"] is mask
    middle = x + 0.5 * module.attention_norm(x)
    torch.testing.assert_close(out, middle + module.experts(module.experts_norm(middle)))
    module.gradient_checkpointing = False
    assert not module.attention.checkpoint
    assert not module.experts.checkpoint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "nsa"}, "attention must be one of dyn_nsa, dyn_smha, full, got 'nsa'."),
        ({"head_dim": 15}, "head_dim must be even and divide hidden_size 32, got 15."),
        ({"head_dim": 24}, "head_dim must be even and divide hidden_size 32, got 24."),
        ({"intermediate_size": 129}, "intermediate_size must be at most 128, got 129: use more experts instead."),
        ({"attention": "full", "nsa_options": DynNSAOptions()}, "nsa_options must be None unless attention='dyn_nsa'"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing must be True or False, got 1."),
        ({"rope_theta": 0}, "rope_theta must be above 0, got 0."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options_are_named(options, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        DynONNBlock(**{"hidden_size": 32, "head_dim": 16, "num_experts": 4, **options})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("dyn_nsa", "attention_mask", "attention_mask must be None with attention='dyn_nsa'; mark padding by key_start and key_end."),
        ("full", "key_start", "key_start must be None with attention='full'; use attention_mask."),
        ("full", "cu_seqlens", "cu_seqlens must be None with attention='full'; use attention_mask."),
    ],
)
def test_arguments_of_another_kind_of_attention_are_named(kind, given, message):
    with pytest.raises(ValueError, match=message):
        block(kind)(tokens(1, 4, 32, dtype=torch.float32), **{given: torch.zeros(1, dtype=torch.int32)})


def test_an_expert_has_128_neurons_at_most():
    assert DynONNBlock(512, 256, 2).experts.down_proj.shape[-1] == 128


class Held:
    """Keys and values of earlier pieces, with room for later ones or without."""

    def __init__(self, room: int) -> None:
        self.places = [torch.zeros(2, 2, room, 16, dtype=torch.float64) for _ in range(2)]
        self.length, self.room = 0, room

    def __call__(self, key, value):
        begin, self.length = self.length, self.length + key.shape[2]
        for place, new in zip(self.places, (key, value), strict=True):
            place[:, :, begin : self.length] = new
        seen = self.room if key.shape[2] > 1 else self.length  # one query has no mask, so it must see what is there
        return tuple(place[:, :, :seen] for place in self.places)


@pytest.mark.parametrize("room", [12, 17])
def test_full_attention_in_pieces_without_a_mask_equals_one_pass(room):
    torch.manual_seed(0)
    attention, append = FullAttention(32, 16).double(), Held(room)
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    pieces = [(0, 5), (5, 9), (9, 10), (10, 12)]
    parts = [attention(x[:, begin:end], position_ids=torch.arange(begin, end)[None], append=append) for begin, end in pieces]
    torch.testing.assert_close(torch.cat(parts, 1), attention(x))
