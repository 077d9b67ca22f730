"""Trials of configurations leave no trace, without a GPU: a clock that is made up picks one, after running all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn import ops
from tinyonn.testing import IMPLS, assert_close_rms, impl_device

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]
DEVICE = impl_device("triton")
KERNELS = {
    "interval_attention_fwd": "_interval_fwd_kernel",
    "interval_attention_dq": "_interval_dq_kernel",
    "interval_attention_dkv": "_interval_dkv_kernel",
    "block_sparse_fwd": "_block_sparse_fwd_kernel",
    "block_sparse_dq": "_block_sparse_dq_kernel",
    "block_sparse_dkv": "_block_sparse_dkv_kernel",
    "select_blocks_fwd": "_select_fwd_kernel",
    "select_blocks_dq": "_select_dq_kernel",
    "select_blocks_dk": "_select_dk_kernel",
}


TRIED = {name for module, name in KERNELS.items() if not module.startswith("select")}  # those have a single configuration


def tuned_kernels() -> dict[str, Any]:
    import importlib

    return {name: getattr(importlib.import_module(f"tinyonn_kernels.nsa.{module}"), name) for module, name in KERNELS.items()}


@pytest.fixture
def trials(monkeypatch) -> Callable[[bool], list[str]]:
    """Lets every kernel try its configurations on float16; the last or the first wins. The names of those that did are noted."""
    from tinyonn_kernels import _tune

    def start(last: bool) -> list[str]:
        ran: list[str] = []
        monkeypatch.setattr(_tune, "INTERPRETED", False)
        for name, kernel in tuned_kernels().items():
            clock = [0.0]

            def bench(call: Callable[[], None], quantiles: Any, name: str = name, clock: list[float] = clock) -> list[float]:
                call()
                call()
                ran.append(name)
                clock[0] += -1 if last else 1
                return clock * 3

            monkeypatch.setattr(kernel, "caches", defaultdict(dict))
            monkeypatch.setitem(kernel.__dict__, "do_bench", bench)
        return ran

    return start


def run() -> list[Tensor]:
    """Every output and gradient of `dyn_nsa` in float16: sums of several kernels, in chunks."""
    generator = torch.Generator().manual_seed(0)
    tokens, heads, kv_heads, dim = 60, 3, 1, 16

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half().to(DEVICE).requires_grad_()

    compressed = (1, tokens // 16, kv_heads, dim)
    leaves = [draw(1, tokens, heads, dim), *(draw(1, tokens, kv_heads, dim) for _ in range(2)), draw(*compressed), draw(*compressed)]
    leaves += [draw(1, tokens, heads, 3), draw(kv_heads), draw(kv_heads)]
    result = ops.dyn_nsa(*leaves, block_size=32, compress_size=16, window=20, max_blocks=3, temperature=2.0, impl="triton")
    loss = (result.out.float() * torch.randn(result.out.shape, generator=generator).to(DEVICE)).sum() + result.soft_counts.sum()
    return [result.out, result.counts, *torch.autograd.grad(loss, leaves)]


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_trials_change_nothing(trials, last, monkeypatch):
    from tinyonn.ops.nsa import _triton_dyn_nsa

    monkeypatch.setattr(_triton_dyn_nsa, "CHUNK_ELEMENTS", 3 * 16 * 40)
    alone = run()
    ran = trials(last)
    tried = run()
    assert set(ran) == TRIED
    for number, (wanted, found) in enumerate(zip(alone, tried, strict=True)):
        if last:
            assert_close_rms(found, wanted.double(), torch.float16, f"result {number}")
        else:
            assert torch.equal(found, wanted), f"result {number}"


def test_an_accumulating_kernel_adds_once_however_many_trials(trials):
    """The window's branch is added to what is there; twice a trial, were the sum not put back."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.interval_attention_fwd import interval_attention_fwd

    def added() -> Tensor:
        query, key = (torch.randn(1, 20, 1, 16, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE) for seed in (0, 1))
        out = torch.full(query.shape, 7.0, device=DEVICE)
        lse = torch.empty(1, 20, 1, device=DEVICE)
        geometry = geometry_of(query, 20, None, None, None)
        interval_attention_fwd(query, key, key, out, lse, None, geometry, 5, 0.25, None, compressed=False, accumulate=True)
        return out

    alone = added()
    ran = trials(False)
    assert torch.equal(added(), alone)
    assert ran == ["_interval_fwd_kernel"] * 2


def test_determinism_takes_the_first(trials):
    ran = trials(True)
    torch.use_deterministic_algorithms(True)
    try:
        out = ops.sliding_window_attention(*(torch.randn(1, 20, 1, 16, device=DEVICE).half() for _ in range(3)), window=5, impl="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.isfinite().all()
    assert ran == []


@pytest.mark.parametrize("name", list(KERNELS.values()))
def test_keys_tell_groups_and_widths_apart(name):
    assert {"GROUP", "HEAD_DIM"} < set(tuned_kernels()[name].keys)


def window(tokens: int) -> Tensor:
    query, key = (torch.randn(1, tokens, 1, 16, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE) for seed in (0, 1))
    return ops.sliding_window_attention(query, key, key, window=5, impl="triton")


def test_a_short_input_does_not_choose_for_a_long_one(trials, monkeypatch):
    from tinyonn_kernels import _tune

    monkeypatch.setattr(_tune, "SMALL_BITS", 9)  # 512 values: 32 tokens of 16
    ran = trials(False)
    window(20)
    once = len(ran)
    assert once == 2  # both configurations
    window(32)
    assert len(ran) == once
    window(33)
    assert len(ran) == 2 * once
    window(20)
    window(128)
    assert len(ran) == 2 * once
    window(129)
    assert len(ran) == 3 * once


def test_sizes_are_classes_of_four_times_as_many_values():
    from tinyonn_kernels._tune import size_class

    sizes = [1, 1 << 21, (1 << 21) + 1, 1 << 23, (1 << 23) + 1, 1 << 25, 1 << 33]
    assert [size_class(torch.empty(size, device="meta")) for size in sizes] == [0, 0, 1, 1, 2, 2, 6]


def test_every_configuration_can_be_forced_and_is_right(monkeypatch):
    from tinyonn_kernels import _tune
    from tinyonn_kernels.nsa.interval_attention_fwd import _interval_fwd_kernel as kernel

    expected = window(40)
    chosen = []
    original = kernel.fn.run
    monkeypatch.setattr(kernel.fn, "run", lambda *args, **named: (chosen.append(named["ROWS"]), original(*args, **named)))
    for number, rows in enumerate((128, 64, 64)):  # of the last two, as there are two
        with _tune.forced(number) as offered:
            out = window(40)
        assert_close_rms(out, expected.double(), torch.float16)
        assert chosen.pop() == rows
        assert [len(configs) for configs in offered.values()] == [2]
        assert list(offered) == ["_interval_fwd_kernel"]


def test_a_launch_uses_the_table_of_its_architecture():
    from tinyonn_kernels import _tune

    kernel = tuned_kernels()["_interval_fwd_kernel"]
    constants = {"IEEE": False, "WIDTH": 128, "COMPRESSED": False}
    seen = []

    def launch() -> None:
        first = torch.empty(1, device="meta")
        seen.append(kernel.offered(constants, _tune.architecture(first))[0].num_warps)

    for arch in (80, 90, 100, 120):  # the last has the shared memory of sm_80's smaller kin
        _tune.compiled_for(arch, {"": launch})[""]()
    launch()
    assert seen == [8, 4, 4, 8, 4]
    with pytest.raises(ZeroDivisionError):
        _tune.compiled_for(80, {"": lambda: 1 // 0})[""]()  # type: ignore[dict-item, func-returns-value]
    launch()
    assert seen[-1] == 4


@pytest.fixture
def in_a_new_process(monkeypatch, tmp_path) -> Callable[..., str]:
    """Runs a window of so many tokens with caches as a new process has them, and names the configuration that was chosen."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        @staticmethod
        def get_current_target() -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        @staticmethod
        def get_current_device() -> int:
            return 0

    class Drivers:
        active = Driver

    monkeypatch.setattr(triton.runtime.autotuner, "driver", Drivers)
    kernel = tuned_kernels()["_interval_fwd_kernel"]
    monkeypatch.setattr(triton.runtime.autotuner, "JITFunction", type(kernel.fn))
    monkeypatch.setattr(kernel.fn, "cache_key", "source", raising=False)

    def run(tokens: int, folder: Path = tmp_path) -> str:
        monkeypatch.setattr(kernel, "caches", defaultdict(dict))
        monkeypatch.setattr(kernel, "cache_results", True)
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = str(folder)
            window(tokens)
        return str(kernel.best_config)

    return run


def test_later_processes_need_no_trial(trials, monkeypatch, in_a_new_process):
    from tinyonn_kernels import _tune

    ran = trials(True)  # the last configuration wins
    first = in_a_new_process(20)
    assert len(ran) == 2
    assert "ROWS: 64" in first  # not the first of the table
    assert in_a_new_process(20) == first
    assert len(ran) == 2
    monkeypatch.setattr(_tune, "SMALL_BITS", 9)
    in_a_new_process(33)  # another size class
    assert len(ran) == 4


def test_a_cache_folder_that_fails_costs_only_trials(trials, in_a_new_process, tmp_path):
    ran = trials(True)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="results of trials are not kept: NotADirectoryError"):
        first = in_a_new_process(20, tmp_path / "file" / "below")
    assert (len(ran), "ROWS: 64" in first) == (2, True)
    good = tmp_path / "good"
    in_a_new_process(20, good)
    (damaged,) = good.glob("*/*.autotune.json")
    for content in ("{", "", '{"configs_timings": []}', "[]"):
        damaged.write_text(content)
        before = len(ran)
        with pytest.warns(UserWarning, match="results of trials are not kept"):
            assert in_a_new_process(20, good) == first
        assert len(ran) == before + 2


def test_a_trial_adds_to_an_empty_tensor_of_the_same_layout(trials, monkeypatch):
    """A kernel gets strides apart from tensors, so that a view must stay one."""
    kernel = tuned_kernels()["_interval_fwd_kernel"]
    seen: list[Tensor] = []
    original = kernel.fn.run
    place = kernel.arg_names.index("out_ptr")
    monkeypatch.setattr(kernel.fn, "run", lambda *args, **named: (seen.append(args[place]), original(*args, **named)))
    trials(False)
    window(20)
    real = seen.pop()
    assert len(seen) == 4  # two of each configuration
    assert all(one.data_ptr() != real.data_ptr() and one.stride() == real.stride() and one.shape == real.shape for one in seen)


def converted(**options: Any) -> Any:
    pytest.importorskip("transformers")
    from tinyonn.hf import convert_attention
    from tinyonn.testing import tiny_causal_lm

    model = tiny_causal_lm("llama", num_hidden_layers=1, max_position_embeddings=512)
    return convert_attention(model, compress_size=16, block_size=16, window=20, impl="triton", **options).half().to(DEVICE)


@pytest.mark.slow
def test_a_model_is_tuned_at_each_length_and_stays_as_it_is(trials, monkeypatch):
    from tinyonn.hf import tune_kernels, tuning
    from tinyonn.hf.dyn_nsa import BudgetSchedule, statistics
    from tinyonn.hf.dyn_nsa.parts import loss_was_taken, take_counts

    monkeypatch.setattr(tuning, "check_gpu", lambda device: None)
    trials(True)
    model = converted().eval()
    BudgetSchedule(8.0, 10, weight=0.1).apply(model, 0)  # counts from here on
    assert take_counts(model) == (0, 0, 0)
    random = torch.get_rng_state()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps: list[int] = []
    found = tune_kernels(model, [40, 45], progress=steps.append)
    assert steps == [40, 45]
    assert {one.kernel for one in found} == {name.strip("_").removesuffix("_kernel") for name in TRIED}
    assert {one.tokens for one in found} == {40}  # 45 tokens are of the same size class, and have as many blocks
    assert all(one.tried > 1 and "num_warps" in one.configuration for one in found)
    assert tune_kernels(model, [40]) == []
    assert not model.training
    assert take_counts(model) == (0, 0, 0)
    assert not loss_was_taken(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert (next(model.parameters()).grad == 1).all()
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(entry["mean_count"] != entry["mean_count"] for entry in statistics(model).values())  # NaN: no call was counted


def test_without_backward_only_forward_is_tuned(trials, monkeypatch):
    from tinyonn.hf import tune_kernels, tuning

    monkeypatch.setattr(tuning, "check_gpu", lambda device: None)
    trials(False)
    found = tune_kernels(converted().requires_grad_(False), [40], backward=False)
    assert {one.kernel for one in found} == {"interval_fwd", "block_sparse_fwd"}


def test_the_command_prints_what_it_found(trials, monkeypatch, tmp_path, capsys):
    from tinyonn.cli.app import run
    from tinyonn.hf import tuning

    converted().save_pretrained(tmp_path / "model")
    command = ["tune", str(tmp_path / "model"), "--tokens", "40", "--no-backward", "--dtype", "fp16"]
    if not torch.cuda.is_available():
        assert run(command) == 2
        assert "kernels are tuned on a GPU that torch can use, got cpu" in capsys.readouterr().err
    monkeypatch.setattr(tuning, "check_gpu", lambda device: None)
    trials(True)
    assert run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kernel", "tokens", "tried", "configuration"]
    rows = [line.split() for line in lines[1 : lines.index("")]]
    assert {row[0] for row in rows} == {"interval_fwd", "block_sparse_fwd"}
    assert all(row[1] == "40" and int(row[2]) > 1 for row in rows)
    assert lines[-1].startswith("Tuned in ")
    assert run(command) == 0  # all is known
    assert "Nothing to tune: each kernel has one configuration" in capsys.readouterr().out


def test_what_cannot_be_tuned_is_told(monkeypatch):
    from tinyonn.errors import InputError
    from tinyonn.hf import tune_kernels, tuning
    from tinyonn.testing import tiny_causal_lm

    model = converted()
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="kernels are tuned on a GPU that torch can use, got cpu"):
            tune_kernels(model)
    monkeypatch.setattr(tuning, "check_gpu", lambda device: None)
    with pytest.raises(InputError, match="must have a weight that requires a gradient to tune backward"):
        tune_kernels(model.requires_grad_(False), [40])
    with pytest.raises(InputError, match="model must have attention or experts of tinyonn that run on its kernels, got none"):
        tune_kernels(tiny_causal_lm("llama"), [40])
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        tune_kernels(model, [0])
    with pytest.raises(InputError, match="tokens must be at most the 512 positions of the model, got 4,096"):
        tune_kernels(model)
    with pytest.raises(ValueError, match="batch times tokens must be at most 2,147,483,647"):
        tune_kernels(model, [512], batch=10**9)
    with pytest.raises(TypeError, match="tokens must be an iterable of ints, got int"):
        tune_kernels(model, 64)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        tune_kernels(torch.nn.Linear(3, 3), [32])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="model must have a language head, got LlamaModel"):
        tune_kernels(converted().model, [32])
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(InputError, match="use_deterministic_algorithms must be off"):
            tune_kernels(model, [40])
    finally:
        torch.use_deterministic_algorithms(False)


def test_longer_lists_and_a_softcap_are_tried_apart(trials):
    """Tables depend on both, and results stay: lists of all blocks must not choose for short ones."""
    ran = trials(False)
    query, key = (torch.randn(1, 96, 1, 16, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE) for seed in (0, 1))

    def read(slots: int, softcap: float | None = None) -> None:
        indices = torch.zeros(1, 96, 1, slots, dtype=torch.int32, device=DEVICE)
        counts = torch.ones(1, 96, 1, dtype=torch.int32, device=DEVICE)
        ops.block_sparse_attention(query, key, key, indices, counts, block_size=32, softcap=softcap, impl="triton")

    read(2)
    once = len(ran)
    assert once > 1
    read(3)
    assert len(ran) == once  # of the same class
    read(4)
    assert len(ran) == 2 * once
    read(2, 20.0)
    assert len(ran) > 2 * once
