"""The cross-compiler finds spills, too much shared memory and code that does not compile, and every kernel has a line in the lock file."""

from __future__ import annotations

import ast
import json
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


def test_every_kernel_has_a_line_for_every_architecture():
    kernels = {name for functions in jit_functions().values() for name in functions if name.endswith("_kernel")}
    lines = [key.split(" ") for key in json.loads((PACKAGE.parent / "resources.json").read_text())]
    assert {(first, last) for first, *_, last in lines} == {(name, f"sm_{arch}") for name in kernels for arch in ARCHS}


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


def test_a_spill_is_found(tmp_path, monkeypatch):
    (tmp_path / "spilling.py").write_text(SPILLING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONWARNINGS", "error::RuntimeWarning:runpy")  # of a module that is loaded twice
    (usage,) = usages_of("spilling", 90, tmp_path / "cache")
    assert (usage.kernel, usage.label, usage.arch) == ("_spilling_kernel", "one warp", 90)
    assert usage.stack > 640
    assert usage.looped == 0
    assert usage.complaints() == [
        f"_spilling_kernel [one warp] must spill at most 640 bytes on sm_90, got {usage.stack} stack and {usage.local} local bytes, "
        "with 0 instructions in loops."
    ]


def test_a_spill_in_a_loop_is_found(tmp_path, monkeypatch):
    """Sums that are too many for a thread, and are added to in every step."""
    source = SPILLING.replace("    values = tl.load(x_ptr + lane)\n", "")
    source = source.replace(
        "    tl.store(out_ptr + lane, values / tl.sum(values))",
        "    total = tl.zeros((SIZE,), tl.float32)\n"
        "    for step in range(0, 100):\n        total = tl.sqrt(total) + tl.load(x_ptr + lane + step)\n"
        "    tl.store(out_ptr + lane, total)",
    )
    (tmp_path / "looping.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (usage,) = usages_of("looping", 90, tmp_path / "cache")
    assert usage.looped > 8
    (complaint,) = usage.complaints()
    assert "must spill at most 160 bytes on sm_90, got" in complaint
    assert f"with {usage.looped} instructions in loops." in complaint


PRODUCT = """
import torch, triton
import triton.language as tl

@triton.jit
def _product_kernel(x_ptr, y_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    row, column, depth = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :], tl.arange(0, DEPTH)
    x = tl.load(x_ptr + row * DEPTH + depth[None, :])
    y = tl.load(y_ptr + depth[:, None] * COLUMNS + column)
    tl.store(out_ptr + row * COLUMNS + column, tl.dot(x, y))

def offered(arch):
    x, out = torch.empty(1 << 14, dtype=torch.bfloat16, device="meta"), torch.empty(1 << 14, device="meta")
    launch = lambda rows, columns, warps: _product_kernel[(1,)](x, x, out, ROWS=rows, COLUMNS=columns, DEPTH=64, num_warps=warps)
    sizes = [(64, 64, 4), (64, 64, 8), (16, 16, 1), (16, 16, 4), (16, 16, 8)]
    return {f"{size}": lambda size=size: launch(*size) for size in sizes}
"""


@pytest.mark.parametrize("arch", [80, 90])
def test_products_that_are_computed_twice_are_found(arch, tmp_path, monkeypatch):
    """A warp computes 16 x 8 values at least, so 16 x 16 values are work for two."""
    (tmp_path / "product.py").write_text(PRODUCT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    usages = {usage.label: usage for usage in usages_of("product", arch, tmp_path / "cache")}
    times = {label: usage.duplicated for label, usage in usages.items()}
    assert times == {"(64, 64, 4)": 1, "(64, 64, 8)": 1, "(16, 16, 1)": 1, "(16, 16, 4)": 2, "(16, 16, 8)": 4}
    (complaint,) = usages["(16, 16, 4)"].complaints()
    assert complaint == f"_product_kernel [(16, 16, 4)] must compute each product once on sm_{arch}, got 2 times."


def test_a_kernel_that_does_not_compile_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(SPILLING.replace("tl.sum(values)", "tl.no_such_function(values)"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(RuntimeError, match=r"(?s)broken must compile for sm_80, got.*no_such_function"):
        usages_of("broken", 80, tmp_path / "cache")


@pytest.mark.parametrize(("arch", "limit"), [(80, 166912), (90, 232448), (100, 232448)])
def test_shared_memory_is_judged_per_architecture(arch, limit):
    fits = Usage("_k", "large", arch, registers=128, stack=0, local=0, looped=0, duplicated=1, shared=limit)
    exceeds = Usage("_k", "large", arch, registers=128, stack=0, local=0, looped=0, duplicated=1, shared=limit + 1)
    assert fits.complaints() == []
    assert exceeds.complaints() == [f"_k [large] must use at most {limit} bytes of shared memory on sm_{arch}, got {limit + 1}."]
