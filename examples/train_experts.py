"""Split SmolLM2-135M's MLPs into 16 experts each and train the mixture; the experts' surprise teaches its routers.

The text is a module of Python's standard library. Takes about two minutes on two CPU cores.
"""

import argparse
import inspect

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyonn.cli.demo import at_least, model_folder, prepare_smollm2
from tinyonn.hf import calibrate_experts, convert_mlp_to_dynmoe, expert_statistics
from tinyonn.train import HyperStep

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", type=model_folder, help="folder or hub name of a model (default: SmolLM2-135M-Instruct)")
parser.add_argument("--steps", type=at_least(1), default=12, help="optimiser steps")
parser.add_argument("--tokens", type=at_least(2), default=256, help="tokens of a sequence")
args = parser.parse_args()

folder = args.model or prepare_smollm2()
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids
sample, *batches = ids.unfold(1, args.tokens, args.tokens)[0, : args.steps + 4].split([4] + [1] * args.steps)


@torch.no_grad()
def sample_loss():
    return model(sample, labels=sample).loss.item()


print(f"dense       loss {sample_loss():.3f}")
convert_mlp_to_dynmoe(model, num_experts=16, sample=sample)
print(f"converted   loss {sample_loss():.3f}, all 16 experts for every token")
calibrate_experts(model, sample, target_k=12)
print(f"calibrated  loss {sample_loss():.3f}, 12 experts a token on average")

routers = [parameter for name, parameter in model.named_parameters() if ".router." in name]
others = [parameter for name, parameter in model.named_parameters() if ".router." not in name]
step = HyperStep(model, torch.optim.AdamW([{"params": others, "lr": 3e-5}, {"params": routers, "lr": 3e-4}]))
for number, batch in enumerate(batches, 1):
    expert_statistics(model, reset=True)
    result = step(lambda batch=batch: model(batch, labels=batch).loss)
    mean_k = [layer["mean_k"] for layer in expert_statistics(model).values()]
    print(f"step {number:3}  loss {result.loss:.3f}  router loss {result.gating_loss:.3f}  experts a token {sum(mean_k) / len(mean_k):.2f}")
print(f"trained     loss {sample_loss():.3f}")
