"""How many key blocks neighbouring queries share: length of the union of their lists, over the lists together.

    .venv/bin/python benchmarks/list_overlap.py    about three minutes on one core

SmolLM2-135M is converted and calibrated to a number of blocks per query, and reads prose and code of the standard library. Only queries of
the second half of a text count; every list begins with the same forced block. `kernel_work.py` takes its `UNION` from here.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "studies"))

from _study import module_text, prose_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyonn.cli.demo.smollm2 import prepare_smollm2
from tinyonn.hf.dyn_nsa import calibrate, convert_attention
from tinyonn.ops.nsa import _torch_dyn_nsa

TOKENS, BLOCK = 2048, 64
BUDGETS = (4.125, 8.0)
NEIGHBOURS = (2, 4)


def union_and_sum(indices: Tensor, counts: Tensor, neighbours: int) -> tuple[float, float]:
    """Lengths of the unions of neighbouring lists, and of the lists: indices (T, K, S), counts (T, K); the second half of the queries."""
    blocks = -(-len(indices) // BLOCK)
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    chosen = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool).scatter_(-1, indices.long().where(listed, blocks), value=True)
    tiles = chosen[len(indices) // 2 :, :, :blocks].unflatten(0, (-1, neighbours))
    return tiles.any(1).sum().item(), tiles.sum().item()


def main() -> None:
    base = prepare_smollm2()
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = convert_attention(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)).eval()
    prose = torch.tensor(tokenizer(prose_text())["input_ids"])
    code = [torch.tensor(tokenizer(module_text(name))["input_ids"])[:TOKENS] for name in ("inspect.py", "argparse.py")]
    sample = [prose[20_000 : 20_000 + TOKENS][None], code[0][None]]
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    forward = _torch_dyn_nsa.block_sparse_forward

    def watched(inputs: Any, *others: Any) -> Any:
        for neighbours in NEIGHBOURS:
            found[neighbours].append(union_and_sum(inputs.indices[0], inputs.counts[0], neighbours))
        return forward(inputs, *others)

    for budget in BUDGETS:
        calibrate(model, sample, budget)
        for name, text in (("prose", prose[60_000 : 60_000 + TOKENS]), ("code", code[1])):
            found.clear()
            _torch_dyn_nsa.block_sparse_forward = watched  # type: ignore[assignment]
            try:
                with torch.no_grad():
                    model(text[None], use_cache=False)
            finally:
                _torch_dyn_nsa.block_sparse_forward = forward
            shares = (f"{number} queries {sum(a for a, _ in of) / sum(b for _, b in of):.3f}" for number, of in found.items())
            print(f"{budget:g} blocks, {name}: {', '.join(shares)}", flush=True)


if __name__ == "__main__":
    main()
