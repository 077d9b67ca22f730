"""Kernels of routing and experts."""
