"""Gradients per head, against one backward pass a sample and slices written down by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import LongformerConfig, LongformerForSequenceClassification

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.gradients import head_gradients

SIZE = 12


def rows(weight, head, first=0, size=SIZE):
    return weight[first + head * size : first + (head + 1) * size]


def columns(weight, head, size=SIZE):
    return weight[:, head * size : (head + 1) * size]


def of_llama(grad, layer, head, size=SIZE):
    prefix = f"model.layers.{layer}.self_attn."
    kv = head // 2  # four query heads share two key heads
    return [
        rows(grad(prefix + "q_proj.weight"), head, size=size),
        rows(grad(prefix + "k_proj.weight"), kv, size=size),
        rows(grad(prefix + "v_proj.weight"), kv, size=size),
        columns(grad(prefix + "o_proj.weight"), head, size=size),
    ]


def of_gpt2(grad, layer, head):
    prefix = f"transformer.h.{layer}.attn."
    fused, output = grad(prefix + "c_attn.weight").T, grad(prefix + "c_proj.weight").T  # Conv1D
    return [*(rows(fused, head, first) for first in (0, 48, 96)), columns(output, head)]


def of_bert(grad, layer, head, prefix="bert.encoder.layer.{}.attention.", names=("query", "key", "value")):
    prefix = prefix.format(layer)
    return [*(rows(grad(f"{prefix}self.{name}.weight"), head) for name in names), columns(grad(prefix + "output.dense.weight"), head)]


def of_deberta(grad, layer, head):
    return of_bert(grad, layer, head, "deberta.encoder.layer.{}.attention.", ("query_proj", "key_proj", "value_proj"))


def of_modernbert(grad, layer, head):
    prefix = f"model.layers.{layer}.attn."
    fused = grad(prefix + "Wqkv.weight")
    return [*(rows(fused, head, first) for first in (0, 48, 96)), columns(grad(prefix + "Wo.weight"), head)]


def of_longformer(grad, layer, head):
    prefix = f"longformer.encoder.layer.{layer}.attention."
    return [
        *(rows(grad(f"{prefix}self.{n}.weight"), head) for n in ("query", "key", "value")),
        columns(grad(prefix + "output.dense.weight"), head),
    ]


PARTS = {
    "longformer": of_longformer,
    "llama": of_llama,
    "qwen3": lambda grad, layer, head: of_llama(grad, layer, head, 24),
    "gpt2": of_gpt2,
    "bert": of_bert,
    "deberta-v2": of_deberta,
    "modernbert": of_modernbert,
}


def longformer():
    config = LongformerConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=40,
        attention_window=[8, 8, 8], pad_token_id=1, num_labels=3, initializer_range=0.25,
    )  # fmt: skip
    torch.manual_seed(0)
    return LongformerForSequenceClassification(config).eval().double()


def by_hand(model, arch, batches):
    """Norm of the mean gradient and mean squared norm, (3, 4) each, from whole gradients of one sample after another."""
    total, squares, samples = {}, torch.zeros(3, 4, dtype=torch.float64), 0
    for batch in batches:
        for row in range(len(batch["labels"])):
            model.zero_grad()
            inputs = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            functional.cross_entropy(model(**inputs).logits, batch["labels"][row : row + 1]).backward()
            grads = {name: parameter.grad.double().clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
            for layer in range(3):
                for head in range(4):
                    squares[layer, head] += sum(part.square().sum() for part in PARTS[arch](grads.__getitem__, layer, head))
            total = {name: total.get(name, 0) + grad for name, grad in grads.items()}
            samples += 1
    model.zero_grad()
    norms = torch.zeros(3, 4, dtype=torch.float64)
    for layer in range(3):
        for head in range(4):
            norms[layer, head] = sum((part / samples).square().sum() for part in PARTS[arch](total.__getitem__, layer, head)).sqrt()
    return norms, squares / samples


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("sizes", [(1,), (3, 2), (16, 3), (1, 16)], ids=str)
def test_longformer_has_tokens_before_samples_and_changes_its_queries_in_place(sizes, frozen):
    model = longformer()
    batches = [
        {
            "input_ids": torch.randint(5, 90, (size, 16), generator=torch.Generator().manual_seed(size)),
            "attention_mask": torch.ones(size, 16, dtype=torch.long),
            "labels": torch.arange(size) % 3,
        }
        for size in sizes
    ]
    norms, fisher = by_hand(model, "longformer", batches)
    assert norms.min() > 1e-4
    found = head_gradients(model.requires_grad_(not frozen), batches)
    torch.testing.assert_close(found.gradient_norm, norms)
    torch.testing.assert_close(found.fisher, fisher)


def test_a_weight_that_is_used_past_its_module_is_named(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    module = model.bert.encoder.layer[1].attention.output.dense
    own = module.forward
    module.forward = lambda x: own(x) + functional.linear(x.flip(1), module.weight)
    with pytest.raises(InputError, match=r"gradient of bert\.encoder\.layer\.1\.attention\.output\.dense\.weight by autograd differs"):
        head_gradients(model, labelled_batches((3,)))
    query = model.bert.encoder.layer[0].attention.self.query
    query.__class__ = type("Past", (torch.nn.Linear,), {"__call__": lambda self, x: functional.linear(x, self.weight, self.bias)})
    with pytest.raises(InputError, match=r"model did not call bert\.encoder\.layer\.0\.attention\.self\.query, whose gradient"):
        head_gradients(model, labelled_batches((3,)))


@pytest.mark.parametrize("arch", [arch for arch in PARTS if arch != "longformer"])
def test_gradients_equal_one_backward_pass_a_sample(tiny_classifier, labelled_batches, arch):
    model = tiny_classifier(arch, dtype=torch.float64)
    batches = labelled_batches((3, 2))
    norms, fisher = by_hand(model, arch, batches)
    assert norms.min() > 1e-4
    found = head_gradients(model, batches)
    tolerance = 1e-5 if arch in ("llama", "qwen3") else 1e-10  # their norms round to float32
    torch.testing.assert_close(found.gradient_norm, norms, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.fisher, fisher, rtol=tolerance, atol=tolerance)
    assert found.samples == 5


@pytest.mark.parametrize(("arch", "passes"), [("bert", 2), ("llama", 2), ("gpt2", 2), ("deberta-v2", 1 + 5)])
def test_samples_share_a_pass_where_they_can_be_told_apart(tiny_classifier, labelled_batches, arch, passes):
    model = tiny_classifier(arch)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    head_gradients(model, labelled_batches((3, 2)))
    assert len(seen) == passes


def test_deberta_with_keys_of_its_own_for_positions_shares_a_pass(tiny_classifier, labelled_batches):
    model = tiny_classifier("deberta-v2", dtype=torch.float64, share_att_key=False)
    batches = labelled_batches((3, 2))
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    found = head_gradients(model, batches)
    assert len(seen) == 2
    norms, fisher = by_hand(model, "deberta-v2", batches)
    torch.testing.assert_close(found.gradient_norm, norms)
    torch.testing.assert_close(found.fisher, fisher)


def test_frozen_models_give_the_same_and_gradients_stay_empty(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    batches = labelled_batches((3,))
    expected = head_gradients(model, batches)
    model.requires_grad_(False)
    with torch.no_grad():
        found = head_gradients(model, batches)
    torch.testing.assert_close(found.gradient_norm, expected.gradient_norm)
    torch.testing.assert_close(found.fisher, expected.fisher)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith(("query", "dense")))


def test_half_precision_is_summed_in_float32(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert", initializer_range=0.05)
    batches = labelled_batches((3, 2))
    expected = head_gradients(model, batches)
    found = head_gradients(model.to(torch.bfloat16), batches)
    torch.testing.assert_close(found.gradient_norm, expected.gradient_norm, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(found.fisher, expected.fisher, rtol=0.1, atol=1e-3)


def test_samples_done_are_counted(tiny_classifier, labelled_batches):
    counts = []
    head_gradients(tiny_classifier("bert"), labelled_batches((3, 2)), on_samples=counts.append)
    assert counts == [3, 5]


def test_what_is_not_finite_or_empty_is_refused(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    with pytest.raises(InputError, match="batches must hold at least one sample, got none"):
        head_gradients(model, [])
    handle = model.bert.encoder.layer[2].attention.self.value.register_full_backward_hook(
        lambda module, grad_in, grad_out: (grad_in[0] * torch.nan,)
    )
    with pytest.raises(InputError, match="the gradient of head 0 in layer 0 is not finite"):
        head_gradients(model, labelled_batches((3,)))
    handle.remove()
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(InputError, match="the loss of the evaluation samples is nan, which is not finite"):
        head_gradients(model, labelled_batches((3,)))
