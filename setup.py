"""Builds the C++ codec (tinyonn._C) and maps the private kernel package.

The kernels live under kernels/tinyonn_kernels, and kernels/ itself has no __init__.py: transformers probes for a package
called `kernels`, and ours must never answer.
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()

setup(
    packages=[*find_packages(include=["tinyonn", "tinyonn.*"]), *find_packages("kernels")],
    package_dir={"tinyonn": "tinyonn", "tinyonn_kernels": "kernels/tinyonn_kernels"},
    package_data={"tinyonn": ["py.typed", "_C.pyi", "scan/topics/*.yaml", "heads/*/*.yaml", "report/assets/*"]},
    ext_modules=[
        Pybind11Extension(
            "tinyonn._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.hpp")),
            include_dirs=["csrc"],
            cxx_std=17,
            # Without -ffp-contract=off, compilers for Arm (and -march=native) fuse multiply and add, and codes differ between machines.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
