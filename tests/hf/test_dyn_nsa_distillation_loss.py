"""The distillation loss in a converted model that trains: through its own loss, a loop, a Trainer and PEFT."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache, Trainer, TrainingArguments

from tinyonn.errors import InputError
from tinyonn.hf import BudgetSchedule, convert_attention
from tinyonn.hf.dyn_nsa import collected_budget_loss, cores
from tinyonn.testing import left_padding, tiny_causal_lm, token_ids

SMALL: dict[str, Any] = {"compress_size": 16, "block_size": 16, "window": 20}


def converted(seed: int = 0, layers: int = 2) -> PreTrainedModel:
    model = tiny_causal_lm("llama", max_position_embeddings=512, num_hidden_layers=layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(3)  # far from what the mean of a block tells
    torch.manual_seed(seed)
    return convert_attention(model, **SMALL).train()


def with_weight(model: PreTrainedModel, weight: float, queries: int = 16) -> PreTrainedModel:
    options = next(cores(model)).options  # which all layers share
    options.distil_weight, options.distil_queries = weight, queries
    return model


def divergence(model: PreTrainedModel, row: Tensor, start: int = 0) -> float:
    """Mean over layers, heads and queries, written out: KL of true shares of far blocks, and of the rest as one, to estimated ones."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        core.register_forward_hook(lambda module, args, out: seen.append((args[0].detach().double(), args[1].detach().double())))
        for core in cores(model)
    ]
    with torch.no_grad():
        model(row[None, start:], use_cache=False)
    for hook in hooks:
        hook.remove()
    total, number = 0.0, 0
    for core, (query, key) in zip(cores(model), seen, strict=True):
        query, short = query[0], core.compress_key(key.float())[0].detach().double()
        mapped, key = torch.einsum("thd,hde->the", query, core.query_map.detach().double()), key[0]
        for t in range(48, len(query)):
            far = range(1, t // 16 - 1)
            for head in range(4):
                true = (key[: t + 1, head // 2] @ query[t, head] / math.sqrt(12)).softmax(0)
                own = (short[: (t + 1) // 16, head // 2] @ mapped[t, head] / math.sqrt(12)).softmax(0)
                p, q = [float(true[16 * b : 16 * b + 16].sum()) for b in far], [float(own[b]) for b in far]
                pairs = [*zip(p, q, strict=True), (1 - sum(p), 1 - sum(q))]
                total += sum(a * math.log(max(a, 1e-12) / max(b, 1e-12)) for a, b in pairs)
                number += 1
    return total / number


def test_the_model_adds_it_to_its_own_loss():
    x = token_ids(200, 1)
    plain = converted()(x, labels=x).loss
    model = with_weight(converted(), 0.5, queries=200)
    expected = 0.5 * divergence(model, x[0])
    loss = model(x, labels=x).loss
    assert expected > 0.005
    assert (loss - plain).item() == pytest.approx(expected, rel=1e-3)
    model(x)
    assert collected_budget_loss(model).item() == pytest.approx(expected, rel=1e-3)
    assert model.eval()(x, labels=x).loss.item() == pytest.approx(plain.item(), rel=1e-5)


def test_padding_does_not_count():
    x, mask = token_ids(200, 1), torch.ones(1, 200, dtype=torch.long)
    mask[0, :37] = 0
    model = with_weight(converted(), 1.0, queries=200)
    model(x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    assert collected_budget_loss(model).item() == pytest.approx(divergence(model, x[0], 37), rel=1e-3)


def test_both_losses_add_up():
    x = token_ids(200, 1)
    losses = []
    for budget, distil in ((0.4, 0.0), (0.0, 0.5), (0.4, 0.5)):
        model = with_weight(converted(), distil, queries=200)
        next(cores(model)).options.budget_weight = budget
        model(x)
        losses.append(collected_budget_loss(model))
    torch.testing.assert_close(losses[0] + losses[1], losses[2])


def gradients(model: PreTrainedModel, x: Tensor, **inputs: Any) -> dict[str, Tensor | None]:
    torch.manual_seed(3)  # of the places that are drawn
    model(x, labels=x, **inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("cache", ["dynamic", "static", "after a prefix"])
def test_a_cache_in_training_keeps_the_loss(cache):
    x = token_ids(200, 1)
    model = with_weight(converted(), 0.5, queries=180 if cache == "after a prefix" else 200)  # all that a call has
    if cache == "after a prefix":
        model.eval()
        before = model(x[:, :20], use_cache=True).past_key_values
        model.train()
        model(x[:, 20:], past_key_values=before)
    else:
        kept = StaticCache(config=model.config, max_cache_len=256) if cache == "static" else DynamicCache(config=model.config)
        model(x, past_key_values=kept, use_cache=True)
    # Queries of the first three blocks read all of them, so the prefix has none that counts.
    assert collected_budget_loss(model).item() == pytest.approx(0.5 * divergence(model, x[0]), rel=1e-3)


def test_a_copy_has_no_losses_of_the_last_forward():
    model, x = with_weight(converted(), 0.5), token_ids(200, 1)
    model(x)
    other = copy.deepcopy(model)
    assert [core.collected for core in cores(other)] == [[], []]
    assert collected_budget_loss(model) > 0


def test_reentrant_checkpointing_would_lose_it_in_any_layer_and_is_refused():
    model, x = with_weight(converted(), 0.5), token_ids(200, 1)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    for parameter in next(cores(model)).parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match="the distillation loss has no gradient; gradient checkpointing needs use_reentrant=False"):
        model(x, labels=x)


def test_only_the_estimate_learns_from_it():
    x = token_ids(200, 1)
    without, got = gradients(converted(), x), gradients(with_weight(converted(), 5.0), x)
    for name, grad in got.items():
        assert grad is not None
        changed = not torch.allclose(grad, without[name], rtol=1e-3, atol=1e-7)
        assert changed == any(part in name for part in ("compress_key.down", "query_map")), (
            name
        )  # `up` and `position` have no effect at first


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_gradients_stay_the_same(how):
    # Every four queries are traced anew, so a text to compile is short.
    x = token_ids(200, 1) if how == "checkpointed" else token_ids(78)
    inputs = {} if how == "checkpointed" else {"attention_mask": left_padding(78, 11)}
    # A compiled model draws other queries than an eager one, so it takes all; a recomputation must draw the same ones again.
    queries, layers = (16, 2) if how == "checkpointed" else (x.shape[1], 1)
    without, plain, model = (with_weight(converted(layers=layers), weight, queries) for weight in (0.0, 5.0, 5.0))
    expected, other = (gradients(one, x, **inputs) for one in (plain, without))
    learned = [name for name in expected if "query_map" in name]
    assert learned
    assert not any(torch.allclose(expected[name], other[name], rtol=1e-2) for name in learned)
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
        got = gradients(model, x, **inputs)
    else:
        torch._dynamo.reset()
        compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x, **inputs)
        got = {name.removeprefix("_orig_mod."): grad for name, grad in compiled.items()}
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, number: int = 40) -> None:
        self.rows = torch.randint(90, (number, 200), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trained(model: PreTrainedModel, folder: Any, weight: float, steps: int, **arguments: Any) -> None:
    schedule = BudgetSchedule(8.0, steps, distil_weight=weight)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=3e-2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=0, **arguments,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the budget is not the point
        Trainer(model, args, train_dataset=Rows(), callbacks=[schedule]).train()


def test_a_trainer_teaches_the_estimate(tmp_path):
    row = token_ids(200, 1)[0]
    after = []
    for weight in (0.0, 1.0):
        model = converted()
        model.requires_grad_(False)
        for core in cores(model):
            for parameter in core.estimate_parameters().values():
                parameter.requires_grad_(True)
        before = divergence(model, row)
        trained(model, tmp_path, weight, 40)
        after.append(divergence(model.eval(), row))
    assert after[1] < 0.8 * min(before, after[0])


def test_a_trainer_whose_loss_lacks_it_is_stopped(tmp_path):
    with pytest.raises(RuntimeError, match="does not include the distillation loss"):
        trained(converted(), tmp_path, 1.0, 3, label_smoothing_factor=0.1)


def test_the_weight_is_saved_with_the_model(tmp_path):
    model = converted()
    BudgetSchedule(8.0, 10, distil_weight=0.25).apply(model, 0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [core.options.distil_weight for core in cores(loaded)] == [0.25, 0.25]
    BudgetSchedule(8.0, 10).apply(loaded, 0)  # a second training keeps it
    assert [core.options.distil_weight for core in cores(loaded)] == [0.25, 0.25]
    BudgetSchedule(8.0, 10, distil_weight=0, distil_queries=5).apply(loaded, 0)
    assert [(core.options.distil_weight, core.options.distil_queries) for core in cores(loaded)] == [(0, 5), (0, 5)]


def test_an_adapter_that_does_not_train_the_estimate_is_told():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(converted(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match=r"compressed keys of 2 of 2 layers require no gradient.*modules_to_save=\['dyn_nsa'\]"):
        BudgetSchedule(8.0, 10, distil_weight=0.25).apply(model, 0)
    x = token_ids(200, 1)
    assert model(input_ids=x, labels=x).loss.requires_grad


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match=r"distil_weight must be at least 0, got -0\.1"):
        BudgetSchedule(8.0, 10, distil_weight=-0.1)
    fixed = convert_attention(tiny_causal_lm("llama"), **SMALL, learnable_compression=False, compress_query=False)
    before = next(cores(fixed)).budget_target.clone()
    with pytest.raises(InputError, match=r"must be 0 for a model without learnable_compression or compress_query, got 0\.1"):
        BudgetSchedule(8.0, 10, distil_weight=0.1).apply(fixed, 0)
    assert next(cores(fixed)).options.distil_weight == 0
    assert torch.equal(next(cores(fixed)).budget_target, before)
