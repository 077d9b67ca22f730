"""What the package gives is what its names say, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_no_public_name_is_a_module():
    program = """
import importlib, pkgutil, types, tinyonn.heads as heads
def modules():
    return [name for name in heads.__all__ if isinstance(getattr(heads, name), types.ModuleType)]
assert not modules(), modules()
for module in pkgutil.walk_packages(heads.__path__, "tinyonn.heads."):  # importing one puts it into the package under its own name
    importlib.import_module(module.name)
assert not modules(), modules()
print(len(heads.__all__))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


@pytest.mark.parametrize("package", ["heads", "scan"])
def test_what_is_loaded_when_asked_for_is_listed_before(package):
    program = f"import sys, tinyonn.{package} as it; print(set(it.__all__) <= set(dir(it)), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
