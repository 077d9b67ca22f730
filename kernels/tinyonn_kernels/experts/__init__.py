"""Kernels for routing and experts."""
