from __future__ import annotations

import ast
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tinyonn import ops
from tinyonn.ops import _dispatch, block_norms
from tinyonn.testing import dtype_id

Q, K, KC = torch.randn(1, 64, 2, 16, requires_grad=True), torch.randn(1, 64, 1, 16), torch.randn(1, 2, 1, 16)
LISTS = torch.zeros(1, 64, 1, 1, dtype=torch.int32)
X, INDEX = torch.ones(2, 4, requires_grad=True), torch.tensor([[0], [1]])
CALLS = {
    "block_norms": lambda impl: ops.block_norms(torch.ones(2, 3), impl=impl),
    "token_grad_norms": lambda impl: ops.token_grad_norms(torch.ones(2, 3), torch.ones(2, 3), impl=impl),
    "integrate_sps": lambda impl: ops.integrate_sps(torch.ones(2, 3), torch.ones(2, 3), [0, 3], impl=impl),
    "attention_stats": lambda impl: ops.attention_stats(Q, K, impl=impl),
    "compressed_attention": lambda impl: ops.compressed_attention(Q, KC, KC, compress_size=32, impl=impl),
    "select_blocks": lambda impl: ops.select_blocks(Q, KC, Q[..., 0], K[..., 0], compress_size=32, impl=impl),
    "block_sparse_attention": lambda impl: ops.block_sparse_attention(Q, K, K, LISTS, LISTS[..., 0] + 1, impl=impl),
    "sliding_window_attention": lambda impl: ops.sliding_window_attention(Q, K, K, 8, impl=impl),
    "dyn_nsa": lambda impl: ops.dyn_nsa(Q, K, K, KC, KC, Q[..., :3], torch.zeros(1), torch.zeros(1), compress_size=32, impl=impl),
    "expert_mlp": lambda impl: ops.expert_mlp(X, torch.ones(2, 6, 4), torch.ones(2, 4, 3), INDEX, torch.ones(2, 1), impl=impl),
    "expert_linear": lambda impl: ops.expert_linear(X, torch.ones(2, 3, 4), INDEX, impl=impl),
}
WITH_REFERENCE = ("attention_stats", "block_norms", "token_grad_norms", "integrate_sps")  # in the registered op


def test_auto_on_the_cpu_is_torch(monkeypatch):
    monkeypatch.setattr(_dispatch, "_triton_missing", lambda: pytest.fail("auto asked for triton on a CPU tensor"))
    assert block_norms(torch.ones(1, 4), 4).item() == 2.0


@pytest.mark.parametrize(
    ("dtype", "impl"),
    [(torch.float16, "triton"), (torch.bfloat16, "triton"), (torch.float32, "triton"), (torch.float64, "torch")],
    ids=dtype_id,
)
def test_auto_on_the_gpu_is_triton_except_for_float64(monkeypatch, dtype, impl):
    with FakeTensorMode():
        tensor = torch.empty(1, dtype=dtype, device="cuda")
    monkeypatch.setattr(_dispatch, "_triton_missing", lambda: None)
    assert _dispatch.choose_impl("auto", tensor) == impl
    monkeypatch.setattr(_dispatch, "_triton_missing", lambda: "'No module named triton'")
    assert _dispatch.choose_impl("auto", tensor) == "torch"


@pytest.mark.parametrize("name", CALLS)
def test_explicit_triton_never_falls_back(monkeypatch, name):
    monkeypatch.setattr(_dispatch, "_triton_missing", lambda: "'No module named triton'")
    with pytest.raises(
        RuntimeError,
        match=r"impl='triton' needs triton, which cannot be imported \('No module named triton'\): install triton or pass impl='torch'",
    ):
        CALLS[name]("triton")


@pytest.mark.parametrize("name", CALLS)
def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch, name):
    pytest.importorskip("triton")
    monkeypatch.setattr(_dispatch, "_interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="impl='triton' needs CUDA tensors, got cpu: move them to a GPU"):
        CALLS[name]("triton")


def test_a_registered_op_called_by_name_refuses_what_no_implementation_is():
    for call in (
        lambda: torch.ops.tinyonn.block_norms(torch.ones(2, 3), None, 3, "fast"),
        lambda: torch.ops.tinyonn.block_norms_out(torch.ones(2, 3), None, torch.ones(2, 1), 3, "fast"),
        lambda: torch.ops.tinyonn.token_grad_norms(torch.ones(2, 3), torch.ones(2, 3), 3, "fast"),
        lambda: torch.ops.tinyonn.integrate_sps(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 3]), None, False, "fast"),
    ):
        with pytest.raises(ValueError, match="impl must be one of auto, triton, torch, reference, got 'fast'"):
            call()


class RegisteredCalls(TorchDispatchMode):
    """Records the calls of the registered ops, as a graph of torch.export would hold them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tinyonn":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in CALLS if name not in WITH_REFERENCE])
def test_a_registered_op_and_its_derivative_refuse_a_reference_that_they_do_not_compute(name):
    with RegisteredCalls() as recorded:
        found = CALLS[name]("torch")
        outputs = found if isinstance(found, tuple) else (found,)
        learned = [x for x in outputs if x.requires_grad]
        torch.autograd.backward(learned, [torch.ones_like(x) for x in learned])
    assert [func.name() for func, _ in recorded.calls] == [f"tinyonn::{name}", f"tinyonn::{name}_backward"]
    for func, (*args, impl) in recorded.calls:
        assert impl == "torch"
        with pytest.raises(ValueError, match=rf"impl='reference' is not part of the registered op; call tinyonn.ops.{name}\."):
            func(*args, "reference")


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_registered_statistic_computes_its_reference(name):
    with RegisteredCalls() as recorded:
        expected = CALLS[name]("torch")
    (func, (*args, _)) = recorded.calls[-1]
    found, expected = (x[0] if isinstance(x, tuple) else x for x in (func(*args, "reference"), expected))
    torch.testing.assert_close(found, expected)


def test_the_interpreter_is_off_unless_asked_for():
    pytest.importorskip("triton")
    program = """
import os; os.environ.pop("TRITON_INTERPRET", None)
import torch, tinyonn.ops
try:
    tinyonn.ops.block_norms(torch.ones(2, 3), impl="triton")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "set TRITON_INTERPRET=1 before the first import" in done.stdout


def launching() -> dict[str, ast.FunctionDef]:
    """Functions of the ops that launch kernels."""
    found = {}
    for path in sorted(Path(ops.__file__).parent.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            modules = [part.module or "" for part in ast.walk(node) if isinstance(part, ast.ImportFrom)]
            kernels = [module for module in modules if module.startswith("tinyonn_kernels.") and module != "tinyonn_kernels._tune"]
            if isinstance(node, ast.FunctionDef) and kernels:
                found[f"{path.stem}.{node.name}"] = node
    return found


@pytest.mark.parametrize("name", launching())
def test_kernels_run_on_the_gpu_of_their_tensors(name):
    """Triton launches on the current device, wherever its arguments lie."""
    source = ast.unparse(launching()[name])
    assert "@on_its_device" in source or "with torch.cuda.device_of(" in source


def test_the_device_is_that_of_the_first_tensor(monkeypatch):
    entered = []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.zeros(2)
    assert _dispatch.on_its_device(lambda first, more: first.sum() + more)(x, 3) == 3
    assert entered == [x]
