"""Custom kernels and instruments for sparse, self-organising transformers."""

from ._debug import debug

__version__ = "0.1.0"

__all__ = ["__version__", "debug"]
