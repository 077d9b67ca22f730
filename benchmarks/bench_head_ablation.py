"""Head ablation by replay from the gated layer, against one full pass of the model for each head.

The benchmark runs `ablate_heads` on a classifier with 12 layers of 12 heads, including its check against full passes. The peer closes
one gate after another by a hook and runs the whole model. On average, half of the blocks follow the gated layer, so the speedup of a model
that consists of blocks is at most 2; the gated layer's feed-forward and the embeddings lower this to about 1.9.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from tinyonn.heads.capture.gates import head_gates
from tinyonn.heads.plasticity.ablation import ablate_heads

LAYERS = HEADS = 12
HIDDEN, TOKENS, BATCH, CLASSES = 384, 128, 4, 3
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": 4096,
    "num_labels": CLASSES,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "llama": {"num_key_value_heads": 4, "intermediate_size": 1024, "pad_token_id": 0},
}


def classifier(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    return AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)


def samples() -> dict[str, Tensor]:
    ids = torch.randint(1, SIZES["vocab_size"], (BATCH, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, CLASSES, (BATCH,))}


@torch.inference_mode()
def full_passes(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """(layers, heads) loss increase; every pass starts from the input."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def loss() -> Tensor:
        return functional.cross_entropy(model(**inputs).logits, batch["labels"])

    base, rise = loss(), torch.empty(LAYERS, HEADS)
    with head_gates(model) as gates:
        for layer in range(LAYERS):
            for head in range(HEADS):
                gates[layer, head] = 0
                rise[layer, head] = loss() - base
                gates[layer, head] = 1
    return rise


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_of_every_head_against_full_passes(compare, family):
    model, batch = classifier(family), samples()

    def check(outputs: dict[str, Tensor]) -> None:
        expected = outputs["full passes, gate hook"].double()
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(outputs["tinyonn ablate_heads"], expected, rtol=1e-3, atol=2e-6)

    compare(
        f"ablation of {LAYERS} x {HEADS} heads, {family}, hidden {HIDDEN}, {BATCH} x {TOKENS} tokens",
        {
            "tinyonn ablate_heads": lambda: ablate_heads(model, [batch]).loss_increase,
            "full passes, gate hook": lambda: full_passes(model, batch),
        },
        check,
        rounds=3,
        info={
            "goal": "full passes >= 1.6x",
            "heads": LAYERS * HEADS,
            "blocks run": f"{LAYERS * HEADS * (LAYERS + 1) // 2} of {LAYERS**2 * HEADS}",
        },
    )
