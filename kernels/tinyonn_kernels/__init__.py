"""Triton kernels and launchers of tinyonn; private. Use `tinyonn.ops`."""
