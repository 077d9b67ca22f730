"""Files cut at every byte and files with every byte changed: what is read is right, or it is refused."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("faults.py")
SPEC = spec_from_file_location("mscan_faults", SCRIPT)
faults = module_from_spec(SPEC)
SPEC.loader.exec_module(faults)


def run(*arguments: object) -> str:
    """Runs a command of faults.py in a process of its own: a crash fails the test and names the case it happened in."""
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout


def test_a_file_cut_at_any_byte_keeps_every_whole_sequence_and_takes_more(tmp_path: Path) -> None:
    source = tmp_path / "whole.mscan"
    faults.write(source, 3)
    assert run("truncate", source, tmp_path / "cut.mscan") == f"truncated {source.stat().st_size}\n"


@pytest.mark.parametrize(("codec", "width"), [("f32", 8), ("log2u16", 1)], ids=["a byte, f32", "a bit, log2u16"])
def test_a_changed_byte_is_noticed_or_does_not_matter(tmp_path: Path, codec: str, width: int) -> None:
    source = tmp_path / "whole.mscan"
    faults.write(source, 2, codec=codec)
    outcomes = ast.literal_eval(run("flip", source, tmp_path / "flipped.mscan", width))
    assert set(outcomes) == {"refused", "reported", "right"}
    assert sum(outcomes.values()) == source.stat().st_size * len(faults.MODES)
    assert outcomes["refused"] > outcomes["reported"] > outcomes["right"] > 0
