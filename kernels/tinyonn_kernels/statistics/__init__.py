"""Kernels for statistics."""
