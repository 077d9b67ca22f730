"""Worker process of `gpu.py`: reads requests from standard input and writes replies to standard output, as JSON lines.

The first line describes the machine. A request names a function, `file.py:function`, and its arguments; the worker adds those named
`compare`, `device`, `report` and `peak_megabytes`. A reply is `{"record": ...}`. After every measurement the worker writes
`{"partial": ...}`, so that an interrupted question keeps its results so far. Output that questions print goes to standard error.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "transformers", "pytest", "fla-core", "liger-kernel", "flash-attn", "flash-attn-4")


def facts(device: str) -> dict[str, Any]:
    """Machine and package versions; `error` if the device cannot be used."""
    found: dict[str, Any] = {"python": platform.python_version(), "versions": {name: _version(name) for name in PACKAGES}}
    try:
        import torch

        from tinyonn.testing.timing import cpu_model

        found["cpu"], found["cpus"] = cpu_model(), len(os.sched_getaffinity(0))
        if device == "cuda":
            if not torch.cuda.is_available():
                return {**found, "error": "this machine has no CUDA device that torch can use; nothing was tested or measured."}
            properties = torch.cuda.get_device_properties(0)
            found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "processors": properties.multi_processor_count}
            found["cuda"] = torch.version.cuda
    except Exception as error:
        return {**found, "error": f"{type(error).__name__}: {error}"}
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def function_of(target: str) -> Callable[..., Any]:
    """Function named by `file.py:name`; files of this folder are imported by their stem, so that questions share the module."""
    file, _, name = target.partition(":")
    path = Path(file) if Path(file).is_absolute() else ROOT / file
    if path.parent == ROOT / "benchmarks":
        module = importlib.import_module(path.stem)
    else:
        spec = spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, name)


def answer(request: dict[str, Any], device: str, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Record of one question: status, reason and all results."""
    import torch

    from tinyonn.testing.timing import Comparison, last_line, measure, peak_megabytes

    record: dict[str, Any] = {"status": "ok", "comparisons": []}
    results: list[Comparison] = []

    def taken() -> dict[str, Any]:
        return {**record, "comparisons": [result.as_json() for result in results], "tiles": tiles()}

    def compare(*args: Any, **options: Any) -> Comparison:
        result = measure(*args, **{**options, **request["timing"]})
        results.append(result)
        send({"partial": taken()})
        return result

    torch.manual_seed(0)
    torch.set_num_threads(request["threads"])
    start = time.perf_counter()
    skips: tuple[type[BaseException], ...] = ()
    if find_spec("pytest"):
        import pytest

        skips = (pytest.skip.Exception,)
    try:
        function = function_of(request["target"])
        fixtures = {"compare": compare, "device": device, "report": record, "peak_megabytes": partial(peak_megabytes, device=device)}
        named = inspect.signature(function).parameters
        function(**{name: value for name, value in fixtures.items() if name in named} | request["arguments"])
    except skips as reason:
        record.update(status="skipped", reason=str(reason))
    except AssertionError as error:
        record.update(status="wrong", reason=last_line(error))
    except Exception as error:
        record.update(status="failed", reason=last_line(error), traceback=traceback.format_exc(limit=-8))
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        record.update(status="failed", reason=record.get("reason", last_line(error)), device_is_lost=True)
    record["seconds"] = round(time.perf_counter() - start, 2)
    found = taken()
    results.clear()
    if not record.get("device_is_lost"):
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def tiles() -> dict[str, dict[str, str]]:
    """Configurations that the autotuner has chosen in this process, by kernel, constants and size."""
    found: dict[str, dict[str, str]] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("tinyonn_kernels."):
            for kernel in list(vars(module).values()):
                for size, chosen in getattr(kernel, "caches", {}).items():
                    for key, configuration in chosen.items():
                        found.setdefault(kernel.base_fn.__name__, {})[f"size {size}, {key}"] = str(configuration)
    return found


def build(report: dict[str, Any]) -> None:
    """Builds the C++ extension, which tests need and kernels do not."""
    if any((ROOT / "tinyonn").glob(f"_C*{_suffix()}")):
        report["note"] = "it was there"
        return
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(_last(done.stderr or done.stdout))
    report["note"] = "built"


def _suffix() -> str:
    import sysconfig

    return str(sysconfig.get_config_var("EXT_SUFFIX") or ".so")


def run_tests(report: dict[str, Any], files: list[str], marker: str = "gpu") -> None:
    """Runs files of `tests/` with pytest in a separate process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-m", marker, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    report["summary"] = lines[-1] if lines else _last(done.stderr)
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 5 or (done.returncode == 0 and "passed" not in report["summary"]):
        report.update(status="skipped", reason=report["summary"])
    elif done.returncode:
        report["failures"] = failures
        raise AssertionError(f"{report['summary']}: {'; '.join(failures) or _last(done.stderr)}")


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"


def main() -> None:
    device = sys.argv[1]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output that questions print goes to standard error
    sys.path.insert(0, str(ROOT / "benchmarks"))
    if device == "cpu":
        sys.modules["fla"] = None  # type: ignore[assignment]  # transformers calls its kernels even without a GPU

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message, default=str) + "\n")

    send({"facts": facts(device)})
    for line in sys.stdin:
        record = answer(json.loads(line), device, send)
        send({"record": record})
        if record.get("device_is_lost"):
            return


if __name__ == "__main__":
    main()
