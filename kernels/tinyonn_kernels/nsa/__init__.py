"""Kernels of DynNSA and its branches."""
