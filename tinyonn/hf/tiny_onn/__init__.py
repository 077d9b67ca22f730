"""TinyOnn, a causal language model of `nn.DynONNBlock`s, registered with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import TinyOnnConfig
from .modeling import TinyOnnForCausalLM, TinyOnnModel, TinyOnnPreTrainedModel

AutoConfig.register(TinyOnnConfig.model_type, TinyOnnConfig, exist_ok=True)
AutoModel.register(TinyOnnConfig, TinyOnnModel, exist_ok=True)
AutoModelForCausalLM.register(TinyOnnConfig, TinyOnnForCausalLM, exist_ok=True)

__all__ = ["TinyOnnConfig", "TinyOnnForCausalLM", "TinyOnnModel", "TinyOnnPreTrainedModel"]
