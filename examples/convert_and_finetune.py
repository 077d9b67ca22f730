"""Convert SmolLM2-135M's attention to DynNSA, calibrate it to 8 key blocks per query, fine-tune it: two minutes on two CPU cores."""

import argparse
import inspect

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import tinyonn.hf
from tinyonn.cli.demo import at_least, model_folder, prepare_smollm2

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", type=model_folder, help="folder or hub name of a model (default: SmolLM2-135M-Instruct)")
parser.add_argument("--steps", type=at_least(1), default=12, help="optimiser steps")
parser.add_argument("--tokens", type=at_least(2), default=512, help="tokens of a sequence")
parser.add_argument("--output", default="data/finetuned", help="folder for the fine-tuned model")
args = parser.parse_args()

folder = args.model or prepare_smollm2()
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[0]
held_out, *texts = ids.unfold(0, args.tokens, args.tokens)[: args.steps + 1]


@torch.no_grad()
def held_out_loss(model):
    return model.eval()(held_out[None].to(model.device), labels=held_out[None].to(model.device)).loss.item()


print(f"dense      loss {held_out_loss(model):.3f} on a held-out text")
tinyonn.hf.convert_attention(model, compress_size=16, block_size=16, window=64)
print(f"converted  loss {held_out_loss(model):.3f}, with all key blocks selected")
blocks = tinyonn.hf.calibrate(model, [text[None] for text in texts[:2]], target=8)
print(f"calibrated loss {held_out_loss(model):.3f}, {blocks:.1f} key blocks per query on two of the other texts")

settings = TrainingArguments(
    args.output, max_steps=args.steps, per_device_train_batch_size=1, logging_steps=3, save_strategy="no", report_to=[], disable_tqdm=True
)
trainer = Trainer(
    model,
    settings,
    train_dataset=[{"input_ids": text, "labels": text} for text in texts],
    optimizers=(torch.optim.AdamW(tinyonn.hf.parameter_groups(model, lr=2e-5)), None),
    callbacks=[tinyonn.hf.BudgetSchedule(target=8, steps=args.steps)],
)
trainer.train()  # logs key_blocks, the mean number that a query reads, beside the loss
print(f"fine-tuned loss {held_out_loss(model):.3f}")
trainer.save_model()
print(f"saved {args.output}; after `import tinyonn.hf`, AutoModelForCausalLM.from_pretrained opens it")
