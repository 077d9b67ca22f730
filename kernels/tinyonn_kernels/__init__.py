"""Triton kernels and launchers of tinyonn; private. Use `tinyonn.ops`.

Every kernel is named `_..._kernel`. Each subpackage has a module `launches` with `offered(arch)`, a dictionary of name -> launch over
tensors without data. Together they launch every kernel in every configuration that can run on that architecture (80, 90 or 100).
`make kernels` compiles exactly these launches.
"""

from triton import knobs

# Triton reads the variable when a kernel is defined, so the value is fixed at the first import.
INTERPRETED: bool = knobs.runtime.interpret
