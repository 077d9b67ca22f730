"""`tinyonn demo` and `tinyonn heads demo`, and the models and data of their wheels."""

from .scan import demo

__all__ = ["demo"]
