"""`tinyonn demo` and `tinyonn heads demo`, and the models and data of their wheels."""

from .scan import demo
from .smollm2 import prepare_smollm2

__all__ = ["demo", "prepare_smollm2"]
