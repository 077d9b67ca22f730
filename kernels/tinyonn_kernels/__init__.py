"""Triton kernels and launchers of tinyonn; private. Use `tinyonn.ops`.

Every kernel is named `_..._kernel`. Each subpackage has a module `launches` with `offered(arch)`, a dictionary of name -> launch over
tensors without data. Together they launch every kernel in every configuration that can run on that architecture (80, 90 or 100).
`make kernels` compiles exactly these launches.

Most kernels with more than 20 parameters take the strides of a tensor as one plain tuple and unpack it in their first lines. Triton
specialises each stride in a tuple as it does a parameter of its own. A named tuple costs 1.4 µs more per tensor and launch.
"""

from importlib.metadata import version

import triton
from triton import knobs

# Triton reads the variable when a kernel is defined, so the value is fixed at the first import.
INTERPRETED: bool = knobs.runtime.interpret

if INTERPRETED and triton.__version__.startswith("3.6.") and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
    raise ImportError(f"the interpreter of triton {triton.__version__} needs numpy<2.4, got {version('numpy')}.")
