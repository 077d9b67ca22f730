"""`kernels/resources.json` says what the compiler says, and a file that does not is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
FILE = ROOT / "kernels" / "resources.json"


def resources(*arguments: object, folder: Path | None = None, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    if folder:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tinyonn.testing.resources", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def git(*arguments: str) -> str:
    """Empty without git, outside a checkout, and where there is no such commit or file."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""


def test_the_file_agrees_with_the_compiler(tmp_path):
    """Every line's hash, spills and shared memory; the compiler's word on what the last commit changed, and on a sample drawn by it."""
    before = tmp_path / "before.json"
    before.write_text(git("show", "HEAD^:kernels/resources.json") or FILE.read_text())
    seed = git("rev-parse", "HEAD").strip()
    done = resources(
        "check", "--before", before, "--seed", seed, "--changed", 16, "--sample", 6, FILE, "tinyonn_kernels", cache=tmp_path / "cache"
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("compiled: ") >= 6


KERNELS = """
import torch, triton
import triton.language as tl

LIMIT: tl.constexpr = tl.constexpr(4)

@triton.jit
def helper(values):
    "A docstring decides nothing."
    # A comment decides nothing.
    return values + 1.0

@triton.jit
def passed(values):
    return values * LIMIT

@triton.jit
def _calling_kernel(x_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(x_ptr + lane, helper(tl.load(x_ptr + lane)))

@triton.jit
def _plain_kernel(x_ptr, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(x_ptr + lane, FUNCTION(lane))

def offered(arch):
    x = torch.empty(1 << 14, device="meta")
    return {
        "calling": lambda: _calling_kernel[(1,)](x, SIZE=128, num_warps=1),
        **{f"plain{size}": lambda size=size: _plain_kernel[(1,)](x, passed, SIZE=size, num_warps=1) for size in (64, 256)},
    }
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with `some.py`, its file of resources, and a cache of what was compiled."""
    folder = tmp_path_factory.mktemp("resources")
    (folder / "some.py").write_text(KERNELS)
    done = resources("refresh", folder / "resources.json", "some", folder=folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("resources.json: 9 lines compiled\n")
    return folder


def test_a_file_is_sorted_with_one_line_an_entry(written):
    text = (written / "resources.json").read_text()
    entries = json.loads(text)
    assert list(entries) == sorted(entries)
    assert len(text.splitlines()) == len(entries) + 2 == 11
    assert "_calling_kernel calling SIZE=128 num_warps=1 sm_90" in entries
    assert all(set(entry) == {"duplicated", "hash", "local", "looped", "registers", "shared", "stack"} for entry in entries.values())


def altered(written: Path, tmp_path: Path, source: str = KERNELS, changes: dict[str, dict[str, object] | None] | None = None) -> list[str]:
    """What `check` says of a file with some lines changed (None: left out); every line is compiled."""
    entries = json.loads((written / "resources.json").read_text())
    for key, change in (changes or {}).items():
        entries[key] = entries.get(key, {}) | (change or {})
        if change is None:
            del entries[key]
    (tmp_path / "some.py").write_text(source)
    (tmp_path / "resources.json").write_text(json.dumps(entries))
    done = resources("check", "--sample", 99, tmp_path / "resources.json", "some", folder=tmp_path, cache=written / "cache")
    assert done.stderr == "" or "Traceback" not in done.stderr
    complaints = [line for line in done.stdout.splitlines() if not line.startswith("compiled: ")]
    assert done.returncode == bool(complaints)
    return complaints


def test_wrong_lines_are_found(written, tmp_path):
    gone = {"hash": "0" * 16, "registers": 8, "stack": 0, "local": 0, "looped": 0, "duplicated": 1.0, "shared": 0}
    entries = {
        "_plain_kernel plain64 FUNCTION=passed SIZE=64 num_warps=1 sm_80": {"registers": 9999},
        "_plain_kernel plain64 FUNCTION=passed SIZE=64 num_warps=1 sm_90": None,
        "_plain_kernel plain32 SIZE=32 num_warps=1 sm_90": gone,
        "_plain_kernel plain256 FUNCTION=passed SIZE=256 num_warps=1 sm_80": {"stack": 168, "looped": 9, "duplicated": 1.5},
        "_plain_kernel plain256 FUNCTION=passed SIZE=256 num_warps=1 sm_90": {"shared": 1 << 20},
    }
    complaints = altered(written, tmp_path, changes=entries)
    assert [line.split("; ")[0] for line in complaints[:2]] == [
        "_plain_kernel plain64 FUNCTION=passed SIZE=64 num_warps=1 sm_90 is missing",
        "_plain_kernel plain32 SIZE=32 num_warps=1 sm_90 is a line of the file, but nothing launches it",
    ]
    text = "\n".join(complaints)
    assert "must spill at most 160 bytes on sm_80, got 168 stack and 0 local bytes, with 9 instructions in loops." in text
    assert "must compute each product once on sm_80, got 1.5 times." in text
    assert "must use at most 232448 bytes of shared memory on sm_90, got 1048576." in text
    for figure, value in (("registers", 9999), ("stack", 168), ("looped", 9), ("duplicated", 1.5), ("shared", 1 << 20)):
        assert any(f" must have {figure} " in line and f"the file has {value}." in line for line in complaints)
    assert len(complaints) == 10


def test_a_changed_kernel_is_found(written, tmp_path):
    """A function that one kernel calls has changed, and a global that a function reads which the other kernel is given."""
    complaints = altered(written, tmp_path, KERNELS.replace("values + 1.0", "values * 2.0").replace("constexpr(4)", "constexpr(5)"))
    entries = json.loads((written / "resources.json").read_text())
    assert complaints == [f"{key} has changed since the file was written; run `make kernels`." for key in entries]


def test_comments_docstrings_and_places_change_nothing(written, tmp_path):
    source = KERNELS.replace("# A comment decides nothing.", "# Another.").replace("A docstring decides nothing.", "Another.")
    source = source.replace("def passed(values):\n", 'def passed(values):\n    "One more."\n')
    assert altered(written, tmp_path, "# One more line\n" + source) == []
