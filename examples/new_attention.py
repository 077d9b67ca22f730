"""Build a new attention out of tinyonn's parts and run SmolLM2-135M with it.

Attention to compressed keys rates blocks of 16 keys, and each query reads the blocks above a threshold. A tenth of the output comes
from a sliding window. The model was not trained for it; the table shows what each threshold costs. Takes half a minute on two CPU cores.
"""

import argparse
import inspect

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyonn.cli.demo import at_least, model_folder, prepare_smollm2
from tinyonn.hf import register_attention
from tinyonn.ops import block_sparse_attention, compressed_attention, select_blocks, sliding_window_attention

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", type=model_folder, help="folder or hub name of a model (default: SmolLM2-135M-Instruct)")
parser.add_argument("--tokens", type=at_least(16), default=1024, help="tokens of the text")
args = parser.parse_args()
BLOCK, WINDOW, WINDOW_SHARE = 16, 64, 0.1
threshold, counts = 0.0, []


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """For one text without padding or cache, whose mask is causal."""
    query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))  # (B, T, H, D); tinyonn's order
    means = [x[:, : x.shape[1] // BLOCK * BLOCK].unflatten(1, (-1, BLOCK)).mean(2) for x in (key, value)]  # (B, T // BLOCK, K, D)
    _, lse, _ = compressed_attention(query, *means, compress_size=BLOCK, scale=scaling)
    # Log of a block's share relative to a uniform share, one threshold per token and key head.
    thresholds = query.new_full((*query.shape[:2], key.shape[2]), threshold)
    sizes = {"block_size": BLOCK, "compress_size": BLOCK, "max_blocks": 64}
    chosen = select_blocks(query, means[0], lse, thresholds, importance="relative", scale=scaling, **sizes)
    far, _ = block_sparse_attention(query, key, value, chosen.indices, chosen.counts, chosen.bias, block_size=BLOCK, scale=scaling)
    near = sliding_window_attention(query, key, value, WINDOW, scale=scaling)
    counts.append(chosen.counts.float().mean().item())
    return (1 - WINDOW_SHARE) * far + WINDOW_SHARE * near, None


register_attention("my_attention", attention)
folder = args.model or prepare_smollm2()
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, : args.tokens]
with torch.no_grad():
    print(f"dense attention    loss {model(ids, labels=ids).loss:.3f}")
    model.set_attn_implementation("my_attention")
    for threshold in (-20.0, -1.0, 0.0, 1.0, 20.0):
        counts.clear()
        loss = model(ids, labels=ids).loss
        print(f"threshold {threshold:5.1f}    loss {loss:.3f}    blocks a query {sum(counts) / len(counts):.1f}")
