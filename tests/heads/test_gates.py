"""Gates on heads, against models whose weights were cut by hand."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from tinyonn.errors import InputError
from tinyonn.heads.capture.gates import check_gates, class_logits, head_gates, heads_shape, sample_losses
from tinyonn.heads.capture.layers import attention_layers
from tinyonn.heads.plasticity.ablation import ablate_heads, taylor_importance
from tinyonn.heads.plasticity.gradients import head_gradients
from tinyonn.testing import tiny_causal_lm

ARCHS = ["llama", "qwen3", "gpt2", "bert", "deberta-v2", "distilbert", "modernbert"]
# Output projection of layer 1, written down by hand.
OUTPUT = {
    "llama": "model.layers.1.self_attn.o_proj",
    "qwen3": "model.layers.1.self_attn.o_proj",
    "gpt2": "transformer.h.1.attn.c_proj",
    "bert": "bert.encoder.layer.1.attention.output.dense",
    "deberta-v2": "deberta.encoder.layer.1.attention.output.dense",
    "distilbert": "distilbert.transformer.layer.1.attention.out_lin",
    "modernbert": "model.layers.1.attn.Wo",
}


def without_head(model, arch, head, size):
    """A copy whose output projection of layer 1 has lost what it takes from one head."""
    cut = copy.deepcopy(model)
    projection = cut.get_submodule(OUTPUT[arch])
    rows = slice(head * size, (head + 1) * size)
    with torch.no_grad():
        if isinstance(projection, Conv1D):
            projection.weight[rows] = 0
        else:
            projection.weight[:, rows] = 0
    return cut


@pytest.mark.parametrize("arch", ARCHS)
def test_a_closed_gate_takes_its_head_out(tiny_classifier, labelled_batches, arch):
    model = tiny_classifier(arch, dtype=torch.float64)
    (batch,) = labelled_batches((3,))
    gates = torch.ones(3, 4)
    gates[1, 2] = 0
    with torch.no_grad():
        expected = class_logits(without_head(model, arch, 2, 24 if arch == "qwen3" else 12), batch)
        with head_gates(model, gates):
            actual = class_logits(model, batch)
        assert (expected - class_logits(model, batch)).abs().max() > 1e-3
    tolerance = 1e-5 if arch in ("llama", "qwen3") else 1e-10  # their norms round to float32
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("arch", ARCHS)
def test_open_gates_change_no_bit_and_leave_nothing_behind(tiny_classifier, labelled_batches, arch):
    model = tiny_classifier(arch)
    (batch,) = labelled_batches((3,))
    with torch.no_grad():
        expected = class_logits(model, batch)
        with head_gates(model) as gates:
            assert torch.equal(gates, torch.ones(3, 4))
            assert torch.equal(class_logits(model, batch), expected)
            gates.zero_()
            assert not torch.equal(class_logits(model, batch), expected)
        assert torch.equal(class_logits(model, batch), expected)


def test_gates_are_removed_after_an_error(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    (batch,) = labelled_batches((3,))
    with torch.no_grad():
        expected = class_logits(model, batch)
        with pytest.raises(KeyError), head_gates(model, torch.zeros(3, 4)):
            raise KeyError
        assert torch.equal(class_logits(model, batch), expected)


@pytest.mark.parametrize("arch", ["gpt2", "bert", "deberta-v2"])  # Llama's norms round to float32: no slope to 1e-5
def test_gradient_in_the_gates_is_the_slope_of_the_loss(tiny_classifier, labelled_batches, arch):
    model = tiny_classifier(arch, dtype=torch.float64)
    (batch,) = labelled_batches((3,))
    gates = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss(values):
        with head_gates(model, values):
            return sample_losses(class_logits(model, batch), batch["labels"]).sum()

    (actual,) = torch.autograd.grad(loss(gates), gates)
    step = 1e-5
    with torch.no_grad():
        for layer, head in [(0, 0), (1, 3), (2, 1)]:
            nudge = torch.zeros(3, 4, dtype=torch.float64)
            nudge[layer, head] = step
            slope = (loss(gates + nudge) - loss(gates - nudge)) / (2 * step)
            assert actual[layer, head].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def test_each_sample_may_have_gates_of_its_own(tiny_classifier, labelled_batches):
    model = tiny_classifier("llama", dtype=torch.float64)
    (batch,) = labelled_batches((3,))
    gates = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with head_gates(model, gates):
            together = class_logits(model, batch)
        for row in range(3):
            with head_gates(model, gates[row]):
                torch.testing.assert_close(class_logits(model, batch)[row], together[row])


def compiled(model, way):
    """What a user calls, after one call: the model compiled in one of three ways."""
    caller = model
    match way:
        case "wrapped":
            caller = torch.compile(model, backend="eager")
        case "in place":
            model.compile(backend="eager")
        case "forward":
            model.forward = torch.compile(model.forward, backend="eager")
    return caller


@pytest.mark.parametrize("way", ["wrapped", "in place", "forward"])
@torch.no_grad()
def test_gates_reach_a_model_that_was_compiled_before(tiny_classifier, labelled_batches, way):
    torch._dynamo.reset()
    model = tiny_classifier("llama")
    (batch,) = labelled_batches((3,))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    expected = []
    with head_gates(model) as gates:
        for gates[1, 2] in (1, 0):
            expected.append(model(**inputs).logits)
    call = compiled(model, way)
    stock = call(**inputs).logits
    with head_gates(model) as gates:
        for gates[1, 2], logits in zip((1, 0), expected, strict=True):
            torch.testing.assert_close(call(**inputs).logits, logits)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    passes = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda *_: passes.append(1))
    assert torch.equal(call(**inputs).logits, stock)
    assert not passes  # compiled as before: later hooks are not seen


@torch.no_grad()
def test_models_are_compiled_again_after_blocks_that_overlap(tiny_classifier):
    torch._dynamo.reset()
    runs = []

    def backend(graph, inputs):
        runs.append(1)
        return graph

    double = torch.compile(lambda x: x * 2, backend=backend)
    first, second = head_gates(tiny_classifier("bert")), head_gates(tiny_classifier("gpt2"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    double(torch.ones(2))
    assert not runs
    second.__exit__(None, None, None)
    double(torch.ones(2))
    assert runs


@pytest.mark.parametrize("measure", [ablate_heads, taylor_importance, head_gradients])
def test_what_is_measured_of_a_compiled_model_is_of_the_model(tiny_classifier, labelled_batches, measure):
    torch._dynamo.reset()
    model, batches = tiny_classifier("bert"), labelled_batches((3, 3))
    expected = measure(model, batches)
    model.compile(backend="eager")
    model(input_ids=batches[0]["input_ids"], attention_mask=batches[0]["attention_mask"])
    found = measure(model, batches)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    with pytest.raises(InputError, match=r"model must not be a wrapper of torch\.compile; pass the wrapped module _orig_mod"):
        measure(torch.compile(tiny_classifier("bert"), backend="eager"), batches)


def test_gates_of_another_shape_are_refused(tiny_classifier):
    with (
        pytest.raises(ValueError, match=r"gates must have shape \(3, 4\) or \(B, 3, 4\), got \(4, 3\)"),
        head_gates(tiny_classifier("bert"), torch.ones(4, 3)),
    ):
        pass


def test_check_gives_the_change_of_each_layer(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    (batch,) = labelled_batches((3,))
    changes = check_gates(model, batch)
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.bert.encoder.layer[1].attention.output.dense.weight.zero_()
        expected = (class_logits(cut, batch) - class_logits(model, batch)).abs().max().item()
    assert len(changes) == 3
    assert changes[1] == pytest.approx(expected, rel=1e-5)


def test_check_names_the_layer_whose_gates_do_nothing(tiny_classifier, labelled_batches):
    model = tiny_classifier("llama")
    attention = model.model.layers[1].self_attn
    own = attention.o_proj
    # A layer that reads its output projection's weight instead of calling it: no hook sees that.
    own.__class__ = type("Fused", (torch.nn.Linear,), {"__call__": lambda self, x: torch.nn.functional.linear(x, self.weight, self.bias)})
    with pytest.raises(InputError, match=r"does not change when all heads of layer 1 \(model\.layers\.1\.self_attn\) are off"):
        check_gates(model, labelled_batches((3,))[0])


def test_a_model_whose_layers_differ_in_heads_is_refused(tiny_classifier):
    layers = attention_layers(tiny_classifier("bert"))
    assert heads_shape(layers) == (3, 4)
    with pytest.raises(InputError, match=r"model must have 4 heads in each layer as in .*layer\.0.*, got 6 in .*layer\.2"):
        heads_shape([*layers[:2], dataclasses.replace(layers[2], num_heads=6)])


@pytest.mark.parametrize("wrong", [-100, 3], ids=["below", "above"])
def test_labels_that_are_no_class_are_refused(wrong):
    with pytest.raises(InputError, match=rf"labels must lie between 0 and 2, got {wrong}\."):
        sample_losses(torch.zeros(3, 3), torch.tensor([0, 1, wrong]))


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(3, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long)], ids=str)
def test_labels_that_are_not_one_integer_a_sample_are_refused(labels):
    with pytest.raises(InputError, match=r"labels must be 3 integers, one a sample, got torch\.\w+ of shape"):
        sample_losses(torch.zeros(3, 3), labels)


@pytest.mark.parametrize("measure", [ablate_heads, taylor_importance, head_gradients])
def test_batches_without_samples_or_labels_are_refused_and_nothing_is_passed_for_none(tiny_classifier, labelled_batches, measure):
    model = tiny_classifier("bert")
    (batch,) = labelled_batches((3,))
    with pytest.raises(InputError, match="each batch must hold at least one sample, got none"):
        measure(model, [batch, {name: tensor[:0] for name, tensor in batch.items()}])
    with pytest.raises(InputError, match=r'each batch must hold "labels", got input_ids, attention_mask'):
        measure(model, [{name: tensor for name, tensor in batch.items() if name != "labels"}])
    expected = measure(model, [batch])
    found = measure(model, [{**batch, "token_type_ids": None, "position_ids": torch.arange(11)[None]}])
    torch.testing.assert_close(found[0], expected[0])
    found = measure(tiny_classifier("deberta-v2"), [{**batch, "position_ids": torch.arange(11)[None]}])  # takes samples one by one
    torch.testing.assert_close(found[0], measure(tiny_classifier("deberta-v2"), [batch])[0])


def test_a_part_in_training_mode_is_named(tiny_classifier, labelled_batches):
    model = tiny_classifier("bert")
    model.bert.encoder.layer[1].train()
    with pytest.raises(ValueError, match=r"model must be in eval mode, got bert\.encoder\.layer\.1 in training mode"):
        class_logits(model, labelled_batches((3,))[0])


def test_training_mode_and_other_models_are_refused(tiny_classifier, labelled_batches):
    (batch,) = labelled_batches((3,))
    with pytest.raises(ValueError, match="model must be in eval mode, got training mode"):
        class_logits(tiny_classifier("bert").train(), batch)
    with pytest.raises(ValueError, match=r"model must return logits of shape \(B, classes\), got \(3, 11, 97\)"):
        class_logits(tiny_causal_lm("llama"), batch)
