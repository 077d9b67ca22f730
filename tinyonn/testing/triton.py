"""Compiles Triton kernels for GPUs that are not there, and reads what they would use. For tests; `tinyonn.testing` exports it.

`usages_of` compiles in a process of its own: under TRITON_INTERPRET=1 there is nothing to compile.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from .products import duplicated
from .sass import Assembly, disassemble

ARCHS = (80, 90, 100)
"""Compute capabilities that kernels are compiled for: A100, H100, B200."""
MOST_SPILLED = 160  # bytes of a thread; on an H200, tiles that spill 120 bytes beat smaller ones that do not
MOST_SPILLED_OUTSIDE = 640  # where loops leave them alone: sums that are stored before a loop and read behind it
FEW_LOOPED = 8  # instructions in loops that read or write spilled registers
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a thread block can have, CUDA C++ guide table 24


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses.

    Attributes:
        kernel, label, arch: which one it is.
        registers: of a thread.
        stack, local: bytes of a thread in memory: spilled registers.
        looped: instructions in loops that read or write them.
        duplicated: operations of matrix instructions over those of the products; 1 where nothing is computed twice.
        shared: bytes of a block.
    """

    kernel: str
    label: str
    arch: int
    registers: int
    stack: int
    local: int
    looped: int
    duplicated: float
    shared: int

    def complaints(self) -> list[str]:
        """Why this must not be a default configuration; empty where it may."""
        found = []
        most = MOST_SPILLED if self.looped > FEW_LOOPED else MOST_SPILLED_OUTSIDE
        if self.stack + self.local > most:
            spilled = f"{self.stack} stack and {self.local} local bytes, with {self.looped} instructions in loops"
            found.append(f"{self.kernel} [{self.label}] must spill at most {most} bytes on sm_{self.arch}, got {spilled}.")
        if self.duplicated != 1:
            found.append(f"{self.kernel} [{self.label}] must compute each product once on sm_{self.arch}, got {self.duplicated:g} times.")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(
                f"{self.kernel} [{self.label}] must use at most {SHARED_LIMIT[self.arch]} bytes of shared memory on sm_{self.arch}, "
                f"got {self.shared}."
            )
        return found


def cross_compile(
    kernel: Any,
    signature: dict[str, str],
    constexprs: Mapping[Any, Any],
    arch: int,
    *,
    attrs: dict[tuple[int, ...], list[list[Any]]] | None = None,
    label: str = "",
    **options: Any,
) -> Usage:
    """Compiles one `@triton.jit` kernel for sm_`arch`.

    Args:
        kernel: the JITFunction.
        signature: argument name -> Triton type ("*fp32", "i32", "constexpr").
        constexprs: argument name, or position as a tuple of one, -> value.
        arch: 80, 90 or 100.
        attrs: alignment of arguments by position, as Triton's launcher derives it.
        label: names the configuration in messages.
        **options: num_warps, num_stages and the like.
    """
    return _usage(_compiled(kernel, signature, constexprs, arch, attrs, options), kernel.__name__, label, arch)


def _compiled(kernel: Any, signature: dict[str, str], constexprs: Mapping[Any, Any], arch: int, attrs: Any, options: dict[str, Any]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    source = ASTSource(kernel, signature, dict(constexprs), attrs)
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _usage(compiled: Any, name: str, label: str, arch: int) -> Usage:
    used = _resources(compiled.asm["cubin"])
    looped = disassemble(compiled.asm["cubin"]).spilling if used["stack"] + used["local"] else 0
    return Usage(name, label, arch, looped=looped, duplicated=duplicated(compiled.asm["ttgir"]), shared=compiled.metadata.shared, **used)


def _resources(cubin: bytes) -> dict[str, int]:
    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    # STACK holds spilled registers too; SHARED counts only static allocation, so shared memory comes from Triton's metadata.
    usage = dict(re.findall(r"\b([A-Z]+):(\d+)", text))
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"]), "local": int(usage["LOCAL"])}


@dataclass(frozen=True)
class Build:
    """One kernel as a launcher launches it: all that decides what the compiler makes of it.

    Attributes:
        arguments: what it was launched with, by name; tensors without data. Their values decide nothing.
        grid: number of programs along each dimension.
    """

    kernel: Any
    label: str
    arch: int
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict, compare=False)
    grid: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Kernel, launch, configuration and architecture; it does not depend on where the kernel lives."""
        named = {self.kernel.arg_names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}
        chosen = {name: value for name, value in named.items() if name.isupper()} | self.options
        return " ".join(
            [self.kernel.__name__, self.label, *(f"{name}={_text(chosen[name])}" for name in sorted(chosen)), f"sm_{self.arch}"]
        )

    @cached_property
    def digest(self) -> str:
        """Hash of the kernel's source with the functions it calls, its arguments and options, the architecture and Triton's version."""
        import triton
        from triton.runtime.jit import JITFunction

        functions = [self.kernel, *(value for value in self.constexprs.values() if isinstance(value, JITFunction))]
        chosen = [sorted((str(name), _text(value)) for name, value in part.items()) for part in (self.constexprs, self.attrs, self.options)]
        parts = [triton.__version__, self.arch, [sources(function) for function in functions], list(self.signature.items()), chosen]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def compile(self) -> Usage:
        return _usage(self._compiled(), self.kernel.__name__, self.label, self.arch)

    def disassembled(self) -> tuple[Usage, Assembly]:
        """What the kernel uses, and its machine code."""
        compiled = self._compiled()
        return _usage(compiled, self.kernel.__name__, self.label, self.arch), disassemble(compiled.asm["cubin"])

    def _compiled(self) -> Any:
        return _compiled(self.kernel, self.signature, self.constexprs, self.arch, self.attrs, self.options)


def _text(value: Any) -> str:
    """A function by its name, without its address in memory; anything else as Python writes it."""
    return str(getattr(value, "__name__", None) or value)


@cache
def sources(kernel: Any) -> list[str]:
    """Sources, without comments and docstrings, of a `@triton.jit` function and of those it calls, and the globals they read with values.

    Triton's own functions are left out: its version stands for them.
    """
    from triton.language import constexpr
    from triton.runtime.jit import JITFunction

    seen, found, open_ends = set(), set(), [kernel]
    while open_ends:
        function = open_ends.pop()
        if id(function) in seen or function.__module__.startswith("triton."):
            continue
        seen.add(id(function))
        tree = ast.parse(function.src)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        found.add(f"noinline={bool(function.noinline)}\n{ast.unparse(tree)}")
        scope = function.__globals__ | dict(inspect.getclosurevars(function.fn).nonlocals)
        for node in ast.walk(tree):
            value = _resolved(node, scope)
            if isinstance(value, JITFunction):
                open_ends.append(value)
            elif isinstance(value, constexpr) or not (value is None or isinstance(value, ModuleType) or callable(value)):
                found.add(f"{function.__name__}: {ast.unparse(node)} = {value}")
    return sorted(found)


def _resolved(node: ast.AST, scope: Mapping[str, Any]) -> Any:
    """The global that a name, or attributes of a name, mean; None for a local one."""
    if isinstance(node, ast.Attribute):
        return getattr(_resolved(node.value, scope), node.attr, None)
    return scope.get(node.id) if isinstance(node, ast.Name) else None


def builds_of(launch: Callable[[], object], arch: int, label: str = "") -> list[Build]:
    """Runs a launcher over tensors without data; each kernel it launches, specialised as a real launch would be. Nothing is compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    builds = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        _, signature, constexprs, attrs = self._pack_args(backend, kwargs, bound, specialization, options)
        options = {name: value for name, value in kwargs.items() if name not in signature}
        size = tuple(grid(bound)) if callable(grid) else tuple(grid)
        builds.append(Build(self, label, arch, signature, constexprs, attrs, options, dict(bound), size))

    original = JITFunction.run
    JITFunction.run = record
    try:
        launch()
    finally:
        JITFunction.run = original
    if not builds:
        raise RuntimeError(f"offered launch {label!r} must launch a kernel, got none.")
    return builds


def compile_launches(launch: Callable[[], object], arch: int, label: str = "") -> list[Usage]:
    """Runs a launcher over tensors without data and compiles, specialised as a real launch would be, each kernel it launches."""
    return [build.compile() for build in builds_of(launch, arch, label)]


def usages_of(module: str, arch: int | Sequence[int], cache: Path) -> list[Usage]:
    """Compiles what `module.offered(arch)` launches, in a fresh process without the interpreter; starting it takes seconds.

    Args:
        module: name of a module of kernels.
        arch: 80, 90 or 100, or several of them.
        cache: folder of Triton's cache.
    """
    archs = ",".join(map(str, [arch] if isinstance(arch, int) else arch))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import print_usages; print_usages({module!r}, [{archs}])"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} must compile for sm_{archs}, got:\n{done.stderr[-4000:]}")
    return [Usage(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


def print_usages(module: str, archs: Sequence[int]) -> None:
    """Compiles all that `module.offered(arch)` launches, and prints one JSON list; `usages_of` reads it."""
    offered = importlib.import_module(module).offered
    usages = [usage for arch in archs for label, launch in offered(arch).items() for usage in compile_launches(launch, arch, label)]
    print(json.dumps([asdict(usage) for usage in usages]))
