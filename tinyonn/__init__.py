"""Custom kernels and instruments for sparse, self-organising transformers."""

__version__ = "0.1.0"
