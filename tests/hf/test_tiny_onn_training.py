"""Training of TinyOnn: checkpointing, compilation, Trainer, HyperStep, and two processes as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from tinyonn.train import HyperStep, HyperStepMixin

from .tiny_onn import KINDS, left_padded, model, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that share such small matrices mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def step(call: Callable[..., Any], ids: Tensor, mask: Tensor | None = None) -> Tensor:
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    loss = call(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.detach()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone() for name, grad in found.items()}
    return {name.replace("module.", "").replace("_orig_mod.", ""): grad for name, grad in whole.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["default", "non-reentrant", "reentrant"])
def test_checkpointed_steps_have_the_gradients_of_others(kind, reentrant):
    plain, checkpointed = model(kind).train(), model(kind).train()
    checkpointed.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing and layer.experts.checkpoint for layer in checkpointed.model.layers)
    for number in range(3):
        ids, mask = left_padded(280, 31, seed=number)
        losses = [step(built, ids, mask) for built in (plain, checkpointed)]
        assert torch.equal(*losses)
        for (name, a), b in zip(gradients(plain).items(), gradients(checkpointed).values(), strict=True):
            assert torch.equal(a, b), name
        for built in (plain, checkpointed):
            for parameter in built.parameters():
                parameter.data -= 0.05 * parameter.grad
            built.zero_grad()
    assert int(checkpointed.model.layers[0].experts.router.updates) == 2
    checkpointed.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing or layer.experts.checkpoint for layer in checkpointed.model.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_steps_have_the_gradients_of_others_under_autocast(kind):
    losses, grads = [], []
    for checkpointed in (False, True):
        built, ids = model(kind).train(), token_ids(2, 90)
        built._set_gradient_checkpointing(checkpointed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = built(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(built))
    with torch.no_grad():
        exact = model(kind)(ids, labels=ids).loss
    assert torch.equal(*losses)
    assert losses[0] != exact
    torch.testing.assert_close(losses[0], exact, rtol=0.02, atol=0)
    for name, grad in grads[0].items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, grads[1][name]), name


def test_every_second_layer_can_be_checkpointed():
    built = model(num_hidden_layers=4)
    built._set_gradient_checkpointing(True, every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in built.model.layers] == [True, False, True, False]


def test_a_checkpointed_model_makes_no_cache():
    built = model().train()
    built.gradient_checkpointing_enable()
    assert built(token_ids(1, 8), use_cache=True).past_key_values is None
    with torch.no_grad():
        assert built.eval()(token_ids(1, 8), use_cache=True).past_key_values is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_the_eager_one(kind, checkpointed):
    """Whole, without a graph break, with padding. Tracing takes seconds a layer: one of them is enough for the checkpointed."""
    eager, compiled = (model(kind, num_hidden_layers=1 if checkpointed else 2).train() for _ in range(2))
    for built in (eager, compiled):
        built._set_gradient_checkpointing(checkpointed)
    ids, mask = left_padded(80, 31)
    losses = [step(eager, ids, mask), step(torch.compile(compiled, fullgraph=True, backend="aot_eager"), ids, mask)]
    torch.testing.assert_close(*losses)
    for (name, a), b in zip(gradients(eager).items(), gradients(compiled).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_takes_packed_sequences_by_their_bounds_only():
    built, ids, bounds = model(num_hidden_layers=1).train(), token_ids(1, 60), torch.tensor([0, 25, 60])
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, cu_seq_lens_q=bounds).logits, built(ids, cu_seq_lens_q=bounds).logits)
    with pytest.raises(RuntimeError, match="takes packed sequences by cu_seq_lens_q only"):
        compiled(ids, position_ids=torch.arange(60)[None] % 25)


ROWS = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.arange(1, 41).repeat(8, 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", [Trainer, type("SurpriseTrainer", (HyperStepMixin, Trainer), {})], ids=["Trainer", "HyperStepMixin"])
def test_a_trainer_teaches_a_sequence(kind, trainer, tmp_path):
    built = model(kind, initializer_range=0.02)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1,
        gradient_checkpointing=True, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", per_device_eval_batch_size=4,
    )  # fmt: skip
    training = trainer(model=built, args=arguments, train_dataset=ROWS, eval_dataset=ROWS)
    training.train()
    losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    assert losses[0] > 3.5
    assert losses[-1] < 0.5
    assert training.evaluate()["eval_loss"] < 0.5
    for layer in built.model.layers:
        assert int(layer.experts.router.updates) == 29
    assert built.eval().generate(torch.arange(1, 10)[None], max_new_tokens=20, pad_token_id=0).tolist() == [list(range(1, 30))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hyper_step_trains_and_counts_what_its_mask_says(kind):
    built = model(kind, initializer_range=0.02).train()
    train = HyperStep(built, torch.optim.Adam(built.parameters(), lr=1e-2))
    ids, mask = left_padded(40, 33)
    results = [train(lambda: built(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss, mask) for _ in range(20)]
    assert results[-1].loss < 0.7 * results[0].loss
    half = mask.clone()
    half[1] = 0
    before = int(built.model.layers[0].experts.tokens_seen)
    train(lambda: built(ids, attention_mask=mask, labels=ids).loss, half)
    assert int(built.model.layers[0].experts.tokens_seen) - before == 40


def sharded(built: Any) -> Any:
    for layer in built.model.layers:
        fully_shard(layer)
    return fully_shard(built)


WRAPPED = {"DDP": DistributedDataParallel, "fully_shard": sharded}
CASES = [(kind, wrap, checkpointed) for kind in KINDS for wrap in WRAPPED for checkpointed in (False, True)]


def batch() -> tuple[Tensor, Tensor]:
    """Rows of equal lengths in both halves, so that the mean of both losses is the loss of all."""
    return left_padded(70, 31, 70, 31)


def work(folder: Path, rank: int) -> None:
    found = {}
    for kind, wrap, checkpointed in CASES:
        built = model(kind).double().train()
        built._set_gradient_checkpointing(checkpointed)
        wrapped = WRAPPED[wrap](built)
        ids, mask = (part[2 * rank : 2 * rank + 2] for part in batch())
        loss = step(wrapped, ids, mask)
        found[kind, wrap, checkpointed] = (loss, gradients(built))
        step(wrapped, ids, mask)  # and once more, after thresholds have moved
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, two_ranks: Callable[..., None]) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks(partial(work, folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}, {case[0]}{', checkpointed' if case[2] else ''}")
def test_two_processes_are_one(found, case):
    alone = model(case[0]).double().train()
    loss = step(alone, *batch())
    torch.testing.assert_close((found[0][case][0] + found[1][case][0]) / 2, loss, rtol=1e-6, atol=0)
    wanted = gradients(alone)
    for rank in range(2):
        assert found[rank][case][1].keys() == wanted.keys()
        for name, grad in found[rank][case][1].items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-8, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
