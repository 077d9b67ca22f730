"""Importance of heads, against passes of models whose weights were cut by hand, and Taylor's against finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional
from transformers import BigBirdConfig, BigBirdForSequenceClassification
from transformers.pytorch_utils import Conv1D

from tinyonn.errors import InputError
from tinyonn.heads.capture.gates import head_gates
from tinyonn.heads.plasticity.ablation import ablate_heads, taylor_importance
from tinyonn.testing import dtype_id

TOKENS = torch.arange(33).view(3, 11) + 5
ARCHS = ["llama", "qwen3", "gpt2", "bert", "deberta-v2", "modernbert"]
# Output projections, written down by hand.
OUTPUT = {
    "llama": "model.layers.{}.self_attn.o_proj",
    "qwen3": "model.layers.{}.self_attn.o_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "bert": "bert.encoder.layer.{}.attention.output.dense",
    "deberta-v2": "deberta.encoder.layer.{}.attention.output.dense",
    "modernbert": "model.layers.{}.attn.Wo",
}


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def by_hand(model, arch, batches):
    """Loss increase and accuracy drop with each head's weights cut out of a copy."""
    size = 24 if arch == "qwen3" else 12
    labels = torch.cat([batch["labels"] for batch in batches])
    logits = torch.cat([logits_of(model, batch) for batch in batches])
    base = functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()
    rise, drop = torch.zeros(2, 3, 4, dtype=torch.float64)
    for layer in range(3):
        for head in range(4):
            cut = copy.deepcopy(model)
            projection = cut.get_submodule(OUTPUT[arch].format(layer))
            weight = projection.weight.data if isinstance(projection, Conv1D) else projection.weight.data.T
            weight[head * size : (head + 1) * size] = 0
            logits = torch.cat([logits_of(cut, batch) for batch in batches])
            rise[layer, head] = functional.cross_entropy(logits, labels).item() - base[0]
            drop[layer, head] = base[1] - (logits.argmax(1) == labels).double().mean().item()
    return base, rise, drop


@pytest.mark.parametrize("arch", ARCHS)
def test_replays_equal_models_that_lost_the_head(tiny_classifier, labelled_batches, arch):
    model = tiny_classifier(arch, dtype=torch.float64)
    batches = labelled_batches((3, 2, 4))
    base, rise, drop = by_hand(model, arch, batches)
    found = ablate_heads(model, batches)
    assert found.replayed
    assert found.samples == 9
    assert (found.base_loss, found.base_accuracy) == pytest.approx(base, rel=1e-6)
    assert rise.abs().max() > 1e-3
    # Norms of Llama and Qwen3 round to float32, whatever the model's dtype.
    torch.testing.assert_close(found.loss_increase, rise, rtol=1e-6, atol=1e-6 * base[0] if arch in ("llama", "qwen3") else 1e-10)
    torch.testing.assert_close(found.accuracy_drop, drop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("arch", ARCHS)
def test_replays_equal_full_passes(tiny_classifier, labelled_batches, arch, dtype):
    model = tiny_classifier(arch, dtype=dtype)
    batches = labelled_batches((3, 2))
    replayed, full = ablate_heads(model, batches), ablate_heads(model, batches, replay=False)
    assert (replayed.replayed, full.replayed) == (True, False)
    assert full.replay_error is None
    torch.testing.assert_close(replayed.loss_increase, full.loss_increase, rtol=1e-6, atol=1e-6 * full.base_loss)


def test_layers_without_attention_answer_from_the_record_too(tiny_classifier, labelled_batches):
    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(48, 48)

        def forward(self, hidden_states, **kwargs):
            return hidden_states + self.mix(hidden_states)

    model = tiny_classifier("llama")
    model.model.layers[0] = Convolution()
    model.model.layers[2] = Convolution()
    model.eval()
    batches = labelled_batches((3,))
    runs = []
    model.model.layers[0].mix.register_forward_hook(lambda *_: runs.append(1))
    replayed = ablate_heads(model, batches)
    # The records of the first sample and of the batch, and one full pass that a replay is compared with.
    assert len(runs) == 3
    full = ablate_heads(model, batches, replay=False)
    assert replayed.loss_increase.shape == (1, 4)
    torch.testing.assert_close(replayed.loss_increase, full.loss_increase, rtol=1e-6, atol=1e-6)


def test_layers_before_the_head_are_not_run_again(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    runs = dict.fromkeys(range(3), 0)
    attentions = dict.fromkeys(range(3), 0)
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.intermediate.register_forward_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
        layer.attention.self.query.register_forward_hook(lambda *_, number=number: attentions.__setitem__(number, attentions[number] + 1))
    first, second = labelled_batches((3, 2))
    ablate_heads(model, [first])
    before = dict(runs), dict(attentions)
    ablate_heads(model, [first, second])
    # What the second batch cost: one record, then four heads in each layer.
    again = {number: runs[number] - 2 * before[0][number] for number in range(3)}
    assert again == {0: 1 + 4, 1: 1 + 8, 2: 1 + 12}
    assert {number: attentions[number] - 2 * before[1][number] for number in range(3)} == {0: 1, 1: 1 + 4, 2: 1 + 8}


def test_a_model_that_replays_wrongly_is_run_in_full(tiny_classifier, labelled_batches):
    model = tiny_classifier("llama")
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: (own(*args, **kwargs)[0].tanh(), None)  # goes on after its output projection
    batches = labelled_batches((3, 2))
    found, full = ablate_heads(model, batches), ablate_heads(model, batches, replay=False)
    assert not found.replayed
    assert found.replay_error > 1e-3
    assert torch.equal(found.loss_increase, full.loss_increase)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_a_model_that_adds_the_residual_inside_its_attention_is_run_in_full_in_every_dtype(tiny_classifier, labelled_batches, dtype):
    model = tiny_classifier("bloom", dtype=dtype)
    batches = labelled_batches((3, 2))
    found, full = ablate_heads(model, batches), ablate_heads(model, batches, replay=False)
    assert not found.replayed
    assert torch.equal(found.loss_increase, full.loss_increase)


def test_attention_modules_that_a_model_swaps_as_it_runs_are_ablated_in_full():
    config = BigBirdConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        num_labels=3, initializer_range=0.25,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BigBirdForSequenceClassification(config).eval()
    batch = {"input_ids": TOKENS, "labels": torch.tensor([0, 1, 2])}
    found = ablate_heads(model, [batch])
    assert (found.replayed, found.replay_error) == (False, None)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    with torch.no_grad():
        base = functional.cross_entropy(model(TOKENS).logits, batch["labels"])
        for layer in range(2):
            for head in range(4):
                cut = copy.deepcopy(model)
                cut.bert.encoder.layer[layer].attention.output.dense.weight.data[:, head * 12 : (head + 1) * 12] = 0
                expected[layer, head] = functional.cross_entropy(cut(TOKENS).logits, batch["labels"]) - base
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.loss_increase, expected, rtol=1e-4, atol=1e-5)


def test_everything_is_restored_after_an_exception(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    (batch,) = labelled_batches((3,))
    expected = logits_of(model, batch)
    passes = []

    def fail(module, args, output):
        passes.append(1)
        if len(passes) == 20:
            raise RuntimeError("the twentieth pass")

    handle = model.classifier.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="the twentieth pass"):
        ablate_heads(model, [batch])
    handle.remove()
    assert torch.equal(logits_of(model, batch), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_of_the_modules_own_is_put_back(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    block = model.bert.encoder.layer[0]
    own = block.forward
    block.forward = own
    ablate_heads(model, labelled_batches((2,)))
    assert vars(block)["forward"] is own


def test_losses_that_are_not_finite_name_the_head(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    batches = labelled_batches((3,))

    def spoil(module, args, output):
        whole = (args[0].unflatten(-1, (4, 12)).abs().sum((0, 1, 3)) > 0).all()
        return output if whole else output * torch.nan

    handle = model.bert.encoder.layer[2].attention.output.dense.register_forward_hook(spoil)
    with pytest.raises(InputError, match="the loss of the evaluation samples is nan with head 0 of layer 2 off, which is not finite"):
        ablate_heads(model, batches)
    handle.remove()
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    for measure in (ablate_heads, taylor_importance):
        with pytest.raises(InputError, match="is nan with all heads on, which is not finite"):
            measure(model, batches)


def test_no_samples_are_refused(tiny_classifier):
    for measure in (ablate_heads, taylor_importance):
        with pytest.raises(InputError, match="batches must hold at least one sample, got none"):
            measure(tiny_classifier("bert"), [])


def test_batches_make_no_difference_and_are_counted(tiny_classifier, labelled_batches):
    model = tiny_classifier("deberta-v2", dtype=torch.float64)
    batches = labelled_batches((4, 3))
    rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for batch in batches for row in range(len(batch["labels"]))]
    counts, taylor_counts = [], []
    torch.testing.assert_close(
        ablate_heads(model, batches, on_samples=counts.append).loss_increase, ablate_heads(model, rows).loss_increase, rtol=1e-8, atol=1e-10
    )
    together = taylor_importance(model, batches, on_samples=taylor_counts.append)
    for actual, expected in zip(together, taylor_importance(model, rows), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # gates are float32
    assert counts == taylor_counts == [4, 7]


@pytest.mark.parametrize("arch", ["gpt2", "bert", "deberta-v2"])
def test_taylor_is_the_slope_of_each_samples_loss(tiny_classifier, labelled_batches, arch):
    model = tiny_classifier(arch, dtype=torch.float64)
    batches = labelled_batches((3, 2))
    step = 1e-4
    slopes = torch.zeros(5, 3, 4, dtype=torch.float64)
    for layer in range(3):
        for head in range(4):
            losses = []
            for gate in (1 + step, 1 - step):
                gates = torch.ones(3, 4, dtype=torch.float64)
                gates[layer, head] = gate
                with head_gates(model, gates):
                    losses.append(
                        torch.cat([functional.cross_entropy(logits_of(model, b), b["labels"], reduction="none") for b in batches])
                    )
            slopes[:, layer, head] = (losses[0] - losses[1]) / (2 * step)
    found = taylor_importance(model, batches)
    torch.testing.assert_close(found.taylor, -slopes.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.taylor_abs, slopes.abs().mean(0), rtol=1e-5, atol=1e-6)


def test_taylor_by_inputs_and_their_gradients(tiny_classifier, labelled_batches):
    """dL/dgate is the sum over tokens and features of x · dL/dx at the head's slice of the output projection's input."""
    model = tiny_classifier("llama")
    batches = labelled_batches((3, 2))
    products = []
    for batch in batches:
        inputs = []
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
            for layer in model.model.layers
        ]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        grads = torch.autograd.grad(functional.cross_entropy(logits, batch["labels"], reduction="sum"), inputs)
        for handle in handles:
            handle.remove()
        products.append(torch.stack([(x * g).unflatten(-1, (4, 12)).sum((1, 3)) for x, g in zip(inputs, grads, strict=True)], 1).double())
    per_sample = torch.cat(products).detach()
    found = taylor_importance(model, batches)
    torch.testing.assert_close(found.taylor, -per_sample.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.taylor_abs, per_sample.abs().mean(0), rtol=1e-4, atol=1e-5)


def test_taylor_leaves_no_gradients_in_the_model(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    taylor_importance(model, labelled_batches((2,)))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("function", [ablate_heads, taylor_importance])
def test_one_batch_in_place_of_a_list_is_told(tiny_classifier, labelled_batches, function):
    (batch,) = labelled_batches((3,))
    with pytest.raises(InputError, match=r"batches must hold mappings of .*, got str '.*'; one batch alone is a list of one"):
        function(tiny_classifier("bert"), batch)
    with pytest.raises(InputError, match='each batch must hold "labels", got '):
        function(tiny_classifier("bert"), [{name: tensor for name, tensor in batch.items() if name != "labels"}])
