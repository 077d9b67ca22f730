"""Kernels of the statistics."""
