"""`tinyonn demo` and `tinyonn heads demo`, and the models and data of their wheels."""

from .arguments import at_least, model_folder
from .scan import demo
from .smollm2 import prepare_smollm2

__all__ = ["at_least", "demo", "model_folder", "prepare_smollm2"]
