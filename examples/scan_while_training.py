"""Scan a model inside its own training loop: activation and gradient norms of every block, before, during and after.

Fine-tunes SmolLM2-135M on a module of Python's standard library and scans one held-out text after every third step. The scans go
into one `.mscan` file, which is then read back. Takes about one minute on two CPU cores.
"""

import argparse
import inspect
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyonn.cli.demo import at_least, model_folder, prepare_smollm2
from tinyonn.mscan import MscanReader, MscanWriter, SequenceRecord
from tinyonn.scan import ScanEngine

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", type=model_folder, help="folder or hub name of a model (default: SmolLM2-135M-Instruct)")
parser.add_argument("--steps", type=at_least(1), default=9, help="optimiser steps")
parser.add_argument("--tokens", type=at_least(2), default=128, help="tokens of a sequence")
parser.add_argument("--output", type=Path, default=Path("data/training.mscan"))
args = parser.parse_args()

folder = args.model or prepare_smollm2()
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids
held_out, *batches = ids.unfold(1, args.tokens, args.tokens)[0, : args.steps + 1].split(1)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
args.output.parent.mkdir(parents=True, exist_ok=True)
with ScanEngine(model) as engine:
    writer = MscanWriter(args.output, {"model": str(folder)}, engine.layout, mode="w")
with writer:
    for step in range(args.steps + 1):
        if step % 3 == 0:
            with ScanEngine(model) as engine:  # leaves gradients, training mode and hooks as they were
                (scan,) = engine.scan(held_out)
            writer.append(SequenceRecord(f"step {step}", held_out[0].numpy(), scan.loss, scan.activation, scan.grad_norm))
        if step < args.steps:
            model.train()(batches[step], labels=batches[step]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

with MscanReader(args.output) as scans:
    for number, sequence in enumerate(scans.sequences):
        activation, grad_norm = scans.planes(number)  # (tokens, blocks); the last token, which predicts nothing, is NaN
        norms = f"activation norm {np.nanmean(activation):.3f}  gradient norm {np.nanmean(grad_norm):.4f}"
        print(f"{sequence.sequence_id:7}  loss {np.nanmean(sequence.loss):.3f}  mean {norms}")
    print(f"{args.output}: {len(scans)} scans of {activation.shape[0]} tokens and {activation.shape[1]:,} blocks")
