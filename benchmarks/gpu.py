"""GPU tests, then GPU benchmarks; one JSON a run.

Run as `make gpu`. Other libraries that the benchmarks compare with are named first, with what is missing. The JSON goes to `$OUT` where
that is set, else to `benchmarks/results/`, named for the device. Only what this writes may stand in the README's GPU table.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = {  # package, and what is measured against it where it is installed
    "transformers": "mixtures of experts, eager and grouped_mm",
    "fla-core": "block-sparse attention",
    "liger-kernel": "mixtures of experts, fused",
}


def peers() -> dict[str, str | None]:
    """Version of each library that benchmarks compare with; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe(found: dict[str, str | None]) -> list[str]:
    """One line for each of `peers()`."""
    return [
        f"{name} {number}: {PEERS[name]}"
        if number
        else f"{name} is not installed, {PEERS[name]} will not be measured: pip install --no-deps {name}"
        for name, number in found.items()
    ]


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("make gpu: this machine has no CUDA device that torch can use; nothing was tested or measured.", file=sys.stderr)
        return 1
    import triton

    device = torch.cuda.get_device_name(0)
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}")
    found = peers()
    print("\n".join(describe(found)))
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    tested = subprocess.run([*pytest, "tests"], cwd=ROOT, env=environment).returncode
    if tested not in (0, 5):
        return tested

    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    measured = subprocess.run(
        [*pytest, "benchmarks", "--benchmark-only", f"--benchmark-json={result}"], cwd=ROOT, env=environment
    ).returncode
    if result.is_file() and result.stat().st_size:
        content = json.loads(result.read_text())
        content["gpu"] = {
            "name": device,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "peers": found,
        }
        result.write_text(json.dumps(content, indent=1))
        print(f"results: {result}")
    return measured


if __name__ == "__main__":
    raise SystemExit(main())
