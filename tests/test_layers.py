"""Imports run one way, read from the source; and the library stands without triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"tinyonn": ROOT / "tinyonn", "tinyonn_kernels": ROOT / "kernels" / "tinyonn_kernels"}

ABOVE = {
    "tinyonn.hf.adapters",
    "tinyonn.hf.interfaces",
    "tinyonn.hf.loading",
    "tinyonn.hf.memory",
    "tinyonn.nn",
    "tinyonn.ops",
    "tinyonn.mscan",
}
# Layer -> what it may import besides itself and SHARED.
ALLOWED: dict[str, set[str]] = {
    "tinyonn_kernels": set(),
    "tinyonn.reference": set(),
    "tinyonn.ops": {"tinyonn.reference", "tinyonn_kernels"},
    "tinyonn.nn": {"tinyonn.ops"},
    "tinyonn.hf": {"tinyonn.nn", "tinyonn.ops"},
    "tinyonn.mscan": set(),
    "tinyonn.scan": ABOVE,
    "tinyonn.heads": ABOVE,
    "tinyonn.train": ABOVE,
    "tinyonn.report": {"tinyonn.mscan", "tinyonn.ops"},
}
SHARED = {
    "tinyonn",
    "tinyonn._C",
    "tinyonn._config",
    "tinyonn._debug",
    "tinyonn._files",
    "tinyonn._folders",
    "tinyonn._lazy",
    "tinyonn._locks",
    "tinyonn._not_measured",
    "tinyonn._records",
    "tinyonn._streams",
    "tinyonn._study",
    "tinyonn._units",
    "tinyonn.errors",
}  # single modules under every layer but the two lowest
UNRESTRICTED = {"tinyonn.cli", "tinyonn.__main__"}
FOR_TESTS = {"tinyonn.testing", "tinyonn._cross_compile", "tinyonn._tiny_families", "tinyonn._timing"}  # no layer imports these
LOWEST = {"tinyonn_kernels": {"torch", "triton"}, "tinyonn.reference": {"torch"}}  # and nothing else from outside


def _modules() -> dict[str, Path]:
    found = {}
    for base, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((base, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()
KNOWN = {*MODULES, "tinyonn._C"}


def imports(source: str, name: str, is_package: bool = False) -> Iterator[tuple[str, bool]]:
    """Modules that `name` imports, as absolute names, and whether inside a function; `from a import b` is `a.b` if that is a module."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {inner for function in functions for inner in ast.walk(function)}
    path = name.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = path[: len(path) - node.level + is_package] if node.level else []
            base = ".".join([*anchor, *([node.module] if node.module else [])])
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                yield deeper if deeper in KNOWN else base, node in lazy


def layer_of(name: str) -> str:
    parts = name.split(".")
    return parts[0] if parts[0] == "tinyonn_kernels" else ".".join(parts[:2])


def breaches(name: str, imported: set[str]) -> list[str]:
    layer = layer_of(name)
    if layer in UNRESTRICTED | FOR_TESTS:
        return []
    if layer not in ALLOWED and name not in SHARED:
        return [f"{layer} is not in the table of layers"]
    ours = {other for other in imported if other.split(".")[0] in SOURCES}
    shared = set() if layer in LOWEST else SHARED
    open_to_it = {layer, *ALLOWED.get(layer, set())}
    wrong = {o for o in ours - shared if not any(o == target or o.startswith(target + ".") for target in open_to_it)}
    if layer in LOWEST:
        outside = {other.split(".")[0] for other in imported - ours} - sys.stdlib_module_names
        wrong |= outside - LOWEST[layer]
    return sorted(wrong)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    path = MODULES[name]
    imported = {other for other, _ in imports(path.read_text(), name, path.name == "__init__.py")}
    assert breaches(name, imported) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("tinyonn.ops.x", "from tinyonn.scan import engine", ["tinyonn.scan.engine"]),
        ("tinyonn.ops.x", "def f():\n    import tinyonn.cli", ["tinyonn.cli"]),
        ("tinyonn.ops.x", "from ..report.page import Page", ["tinyonn.report.page"]),
        ("tinyonn.scan.x", "from tinyonn.hf import smollm2", ["tinyonn.hf.smollm2"]),
        ("tinyonn.reference.x", "import tinyonn_kernels.block_norms", ["tinyonn_kernels.block_norms"]),
        ("tinyonn.reference.x", "import numpy", ["numpy"]),
        ("tinyonn_kernels.x", "from tinyonn.errors import InputError", ["tinyonn.errors"]),
        ("tinyonn.mscan.x", "from tinyonn.testing import poisoned", ["tinyonn.testing"]),
        ("tinyonn.somewhere.x", "import torch", ["tinyonn.somewhere is not in the table of layers"]),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_a_breach_is_found(name, source, found):
    assert breaches(name, {other for other, _ in imports(source, name)}) == found


@pytest.mark.parametrize("name", [name for name in MODULES if layer_of(name) not in FOR_TESTS | {"tinyonn_kernels"}])
def test_kernels_and_triton_are_imported_only_inside_calls(name):
    path = MODULES[name]
    eager = {other.split(".")[0] for other, lazy in imports(path.read_text(), name, path.name == "__init__.py") if not lazy}
    assert not eager & {"tinyonn_kernels", "triton"}


def test_kernels_folder_is_no_package():
    # transformers probes for a package called `kernels`; from the repository's root it would find ours.
    assert (ROOT / "kernels" / "tinyonn_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_ops_work_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, tinyonn.ops as ops
assert torch.equal(ops.block_norms(torch.full((2, 4), 3.0), 4), torch.full((2, 1), 6.0))
assert ops.token_grad_norms(torch.ones(1, 4), torch.ones(1, 9), None).item() == 6.0
assert ops.integrate_sps(torch.tensor([[1.0, 3.0]]), torch.tensor([[3.0, 1.0]]), [0, 2]).tolist() == [-2.0, 2.0]
try:
    ops.block_norms(torch.ones(1, 1), impl="triton")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "install triton or pass impl='torch'" in done.stdout


@pytest.mark.parametrize(
    "name", ["tinyonn", "tinyonn._config", "tinyonn._files", "tinyonn._folders", "tinyonn._locks", "tinyonn._records", "tinyonn._study"]
)
def test_what_every_command_imports_is_light(name):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {name}; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
