"""Imports run one way, as CONTRIBUTING.md's table says; and the library stands without triton."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"tinyonn": ROOT / "tinyonn", "tinyonn_kernels": ROOT / "kernels" / "tinyonn_kernels"}

# Under every layer but the two lowest.
SHARED = {"tinyonn", "tinyonn._C", "tinyonn._debug", "tinyonn._io", "tinyonn._lazy", "tinyonn.errors"}
UNRESTRICTED = {"tinyonn.cli", "tinyonn.__main__", "tinyonn.testing"}  # the first two may import everything but the third
LOWEST = {"tinyonn_kernels": {"torch", "triton"}, "tinyonn.reference": {"torch"}}  # and nothing else from outside


def table() -> dict[str, set[str]]:
    """Layer -> what it may import besides itself, SHARED and other libraries, from CONTRIBUTING.md."""
    lines = re.findall(r"(?m)^\| `(tinyonn/\w+|kernels/tinyonn_kernels)/` \| .* \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text())
    found = {}
    for folder, cell in lines:
        names = [name.split("/")[-1] for name in re.findall(r"`([\w.]+)`", cell)]
        layer = folder.removeprefix("kernels/").replace("/", ".")
        found[layer] = {name if name.startswith("tinyonn") else f"tinyonn.{name}" for name in names}
    return found


ALLOWED = table()


def _modules() -> dict[str, Path]:
    found = {}
    for base, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((base, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()
KNOWN = {*MODULES, "tinyonn._C"}


class Imported(NamedTuple):
    """Attributes: name: an absolute name. lazy: inside a function. typing: under TYPE_CHECKING."""

    name: str
    lazy: bool
    typing: bool


def imports(source: str, name: str, is_package: bool = False) -> Iterator[Imported]:
    """Modules that `name` imports; `from a import b` is `a.b` if that is a module."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    lazy = {inner for function in functions for inner in ast.walk(function)}
    only_typed = {inner for block in typing for inner in ast.walk(block)}
    path = name.split(".")
    for node in ast.walk(tree):
        place = node in lazy, node in only_typed
        if isinstance(node, ast.Import):
            yield from (Imported(alias.name, *place) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = path[: len(path) - node.level + is_package] if node.level else []
            base = ".".join([*anchor, *([node.module] if node.module else [])])
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                yield Imported(deeper if deeper in KNOWN else base, *place)


@pytest.fixture(scope="module")
def imported_by() -> dict[str, list[Imported]]:
    """What each module imports. Reading them all takes seconds."""
    return {name: [*imports(path.read_text(), name, path.name == "__init__.py")] for name, path in MODULES.items()}


def layer_of(name: str) -> str:
    parts = name.split(".")
    return parts[0] if parts[0] == "tinyonn_kernels" else ".".join(parts[:2])


def breaches(name: str, imported: set[str]) -> list[str]:
    layer = layer_of(name)
    if layer in UNRESTRICTED:
        return sorted(o for o in imported if layer_of(o) == "tinyonn.testing" != layer)
    if layer not in ALLOWED and name not in SHARED:
        return [f"{layer} is not in the table of layers"]
    ours = {other for other in imported if other.split(".")[0] in SOURCES}
    shared = set() if layer in LOWEST else SHARED
    open_to_it = {layer, *ALLOWED.get(layer, set()), *(shared - {"tinyonn"})}
    wrong = {o for o in ours if o not in shared and not any(o == target or o.startswith(target + ".") for target in open_to_it)}
    if layer in LOWEST:
        outside = {other.split(".")[0] for other in imported - ours} - sys.stdlib_module_names
        wrong |= outside - LOWEST[layer]
    return sorted(wrong)


def test_imports_run_one_way(imported_by):
    found = {name: breaches(name, {other.name for other in imported}) for name, imported in imported_by.items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_the_table_lists_every_layer_and_nothing_that_no_layer_imports(imported_by):
    """What a layer may import and does not is a line that nobody checks."""
    layers = {layer_of(name) for name in MODULES if name not in SHARED} - {"tinyonn.__main__"}
    assert set(ALLOWED) == {*layers, "tinyonn._io"}
    used = {layer: {other.name for name in MODULES if layer_of(name) == layer for other in imported_by[name]} for layer in ALLOWED}
    idle = {
        layer: sorted(t for t in targets if not any(other == t or other.startswith(t + ".") for other in used[layer]))
        for layer, targets in ALLOWED.items()
    }
    assert {layer: targets for layer, targets in idle.items() if targets} == {}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    try:
        [*TopologicalSorter(graph).static_order()]
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_goes_in_a_circle(imported_by):
    """Imports inside functions count too: an import that waits for a call would hide a circle."""
    graph = {name: {o.name for o in imported if not o.typing and o.name in MODULES} - {name} for name, imported in imported_by.items()}
    assert circle(graph) == []
    assert circle({**graph, "tinyonn.errors": {"tinyonn.cli"}}) != []


def hidden(name: str, source: str) -> list[str]:
    """Modules of a package whose path its `__init__` gives to something else, as `from .dyn_nsa import dyn_nsa` does."""
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module is not None]
    bound = {alias.asname or alias.name for node in imported for alias in node.names}
    return sorted(f"{name}.{leaf}" for leaf in bound if f"{name}.{leaf}" in MODULES)


def test_no_module_is_hidden_by_a_name_of_its_package():
    """`tinyonn.ops.dyn_nsa` is a function; no module may have that path."""
    packages = {name: path for name, path in MODULES.items() if path.name == "__init__.py"}
    assert [found for name, path in packages.items() for found in hidden(name, path.read_text())] == []
    assert hidden("tinyonn.ops.nsa", "from .dyn_nsa import dyn_nsa") == ["tinyonn.ops.nsa.dyn_nsa"]


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("tinyonn.ops.x", "from tinyonn.scan import engine", ["tinyonn.scan.engine"]),
        ("tinyonn.ops.x", "def f():\n    import tinyonn.cli", ["tinyonn.cli"]),
        ("tinyonn.ops.x", "from ..report.html.page import Page", ["tinyonn.report.html.page"]),
        ("tinyonn.scan.x", "from tinyonn.hf import _converted", ["tinyonn.hf._converted"]),
        ("tinyonn.reference.x", "import tinyonn_kernels.statistics.block_norms", ["tinyonn_kernels.statistics.block_norms"]),
        ("tinyonn.reference.x", "import numpy", ["numpy"]),
        ("tinyonn_kernels.x", "from tinyonn.errors import InputError", ["tinyonn.errors"]),
        ("tinyonn.mscan.x", "from tinyonn.testing import poisoned", ["tinyonn.testing"]),
        ("tinyonn.cli.x", "from tinyonn.testing import poisoned", ["tinyonn.testing"]),
        ("tinyonn._io.x", "from ..mscan import MscanReader", ["tinyonn.mscan"]),
        ("tinyonn.somewhere.x", "import torch", ["tinyonn.somewhere is not in the table of layers"]),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_a_breach_is_found(name, source, found):
    assert breaches(name, {other.name for other in imports(source, name)}) == found


def test_kernels_and_triton_are_imported_only_inside_calls(imported_by):
    eager = {
        name: {other.name.split(".")[0] for other in imported if not other.lazy} & {"tinyonn_kernels", "triton"}
        for name, imported in imported_by.items()
        if layer_of(name) not in ("tinyonn.testing", "tinyonn_kernels")
    }
    assert {name: wrong for name, wrong in eager.items() if wrong} == {}


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


def test_what_every_command_imports_is_light():
    light = ["tinyonn", *(name for name in MODULES if layer_of(name) == "tinyonn._io")]
    program = f"import sys, {', '.join(light)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
