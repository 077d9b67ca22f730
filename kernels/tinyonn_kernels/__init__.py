"""Triton kernels and launchers of tinyonn; private. Use `tinyonn.ops`.

Every kernel is called `_..._kernel`, and its module has `offered(arch)`: name -> a launch over tensors without data, one for each
configuration that users of that architecture (80, 90, 100) get. The cross-compile test compiles exactly what those launch.
"""

from triton import knobs

# Triton decides when a kernel is defined, so this is fixed at the first import.
INTERPRETED: bool = knobs.runtime.interpret
