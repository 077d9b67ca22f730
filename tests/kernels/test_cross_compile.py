"""Every kernel compiles for every supported GPU, as its launcher launches it, without spills and within shared memory."""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path

import pytest

from tinyonn.testing import ARCHS, Usage, usages_of

pytest.importorskip("triton")

PACKAGE = Path(__file__).parents[2] / "kernels" / "tinyonn_kernels"


@cache
def jit_functions() -> dict[str, dict[str, ast.FunctionDef]]:
    """Module -> its `@triton.jit` functions."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): {
            node.name: node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        }
        for path in sorted(PACKAGE.rglob("*.py"))
    }


WITH_KERNELS = [module for module, functions in jit_functions().items() if any(name.endswith("_kernel") for name in functions)]


def test_every_jit_function_is_a_kernel_or_used_by_one():
    functions = {name: node for module in jit_functions().values() for name, node in module.items()}
    reached, open_ends = set(), [name for name in functions if name.endswith("_kernel")]
    assert open_ends
    while open_ends:
        name = open_ends.pop()
        if name not in reached:
            reached.add(name)
            open_ends += [node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name) and node.id in functions]
    assert set(functions) == reached


# Attention and experts take up to a minute a module: of their forward passes the suite compiles every fourth launch, and the first of
# each kernel, for one architecture; `make test-slow` compiles all.
QUICK = ("nsa.block_lists", "statistics.block_norms", "statistics.integrate_sps", "statistics.token_grad_norms")
BACKWARD = ("_bwd", "_dq", "_dk", "_dkv", "expert_outer", "expert_rows")


OFFERED = [pytest.param(module, ARCHS, 1, id=module) for module in QUICK]
OFFERED += [
    pytest.param(module, (arch,), 1, id=f"{module}-sm_{arch}", marks=pytest.mark.slow)
    for module in WITH_KERNELS
    for arch in ARCHS
    if module not in QUICK
]
OFFERED += [
    pytest.param(module, (90,), 4, id=f"{module}-sm_90-sample")
    for module in WITH_KERNELS
    if module not in QUICK and not module.endswith(BACKWARD)
]


@pytest.mark.parametrize(("module", "archs", "every"), OFFERED)
def test_offered_configurations_fit(module, archs, every, tmp_path):
    usages = usages_of(f"tinyonn_kernels.{module}", archs, tmp_path, every)
    for usage in usages:
        print(
            f"sm_{usage.arch} {usage.kernel} {usage.label}: {usage.registers} registers, {usage.stack} stack, {usage.local} local, "
            f"{usage.shared} shared"
        )
    offered = {(usage.kernel, usage.arch) for usage in usages}
    missing = {(name, arch) for name in jit_functions()[module] if name.endswith("_kernel") for arch in archs} - offered
    assert not missing, f"{module}.offered must launch every kernel of the module, got none of {sorted(missing)}."
    assert [complaint for usage in usages for complaint in usage.complaints()] == []


SPILLING = """
import torch, triton
import triton.language as tl

@triton.jit
def _spilling_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    values = tl.load(x_ptr + lane)
    tl.store(out_ptr + lane, values / tl.sum(values))

def offered(arch):
    x = torch.empty(1 << 14, device="meta")
    return {"one warp": lambda: _spilling_kernel[(1,)](x, x, SIZE=1 << 14, num_warps=1)}
"""


def test_a_sample_holds_the_first_launch_of_every_kernel(tmp_path, monkeypatch):
    more = """
@triton.jit
def _other_kernel(x_ptr):
    tl.store(x_ptr, 1.0)

def offered(arch):
    x = torch.empty(4, device="meta")
    def both():
        _other_kernel[(1,)](x)
        _spilling_kernel[(1,)](x, x, SIZE=4)
    return {f"spilling {n}": lambda: _spilling_kernel[(1,)](x, x, SIZE=4) for n in range(4)} | {"both": both, "last": both}
"""
    (tmp_path / "several.py").write_text(SPILLING.split("def offered")[0] + more)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = [(usage.kernel, usage.label) for usage in usages_of("several", 90, tmp_path / "cache", every=3)]
    assert found == [
        *(("_spilling_kernel", f"spilling {n}") for n in (0, 3)),
        ("_other_kernel", "both"),
        ("_spilling_kernel", "both"),
    ]


def test_a_spill_is_found(tmp_path, monkeypatch):
    (tmp_path / "spilling.py").write_text(SPILLING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (usage,) = usages_of("spilling", 90, tmp_path / "cache")
    assert (usage.kernel, usage.label, usage.arch) == ("_spilling_kernel", "one warp", 90)
    assert usage.stack > 0
    assert usage.complaints() == [
        f"_spilling_kernel [one warp] must not spill on sm_90, got {usage.stack} stack and {usage.local} local bytes."
    ]


def test_a_kernel_that_does_not_compile_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(SPILLING.replace("tl.sum(values)", "tl.no_such_function(values)"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)broken must compile for sm_80, got.*no_such_function"):
        usages_of("broken", 80, tmp_path / "cache")


@pytest.mark.parametrize(("arch", "limit"), [(80, 166912), (90, 232448), (100, 232448)])
def test_shared_memory_is_judged_per_architecture(arch, limit):
    fits = Usage("_k", "large", arch, registers=128, stack=0, local=0, shared=limit)
    exceeds = Usage("_k", "large", arch, registers=128, stack=0, local=0, shared=limit + 1)
    assert fits.complaints() == []
    assert exceeds.complaints() == [f"_k [large] must use at most {limit} bytes of shared memory on sm_{arch}, got {limit + 1}."]
