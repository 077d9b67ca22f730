"""EAVI: what is aligned with what, against steps written out by hand on a plain transformers model and on a TinyOnn model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from tinyonn.hf.tiny_onn import TinyOnnConfig, TinyOnnForCausalLM
from tinyonn.train import HyperStep, Ramp, alignment, eavi_batch, eavi_step, excursion

VOCABULARY, END, PAD = 16, 14, 15
IDS: dict[str, Any] = {"end_token_id": END, "pad_token_id": PAD}


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, attention_dropout=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # far from uniform, so that answers differ from prompt to prompt
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def tiny_onn(seed: int = 0) -> TinyOnnForCausalLM:
    torch.manual_seed(seed)
    return TinyOnnForCausalLM(TinyOnnConfig.bonsai("1m", vocab_size=VOCABULARY, num_hidden_layers=1, attention="full"))


def rows(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, END, (length,), generator=generator) for length in lengths]


def ended(answers: list[Tensor]) -> list[Tensor]:
    return [torch.cat([answer, torch.tensor([END])]) for answer in answers]


def greedy_by_hand(model: nn.Module, prompt: Tensor, most: int) -> Tensor:
    """One row, without a cache and without padding."""
    ids = prompt.clone()
    model.eval()
    with torch.no_grad():
        for _ in range(most):
            ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1].argmax().reshape(1)])
            if ids[-1] == END:
                break
    model.train()
    return ids[len(prompt) :]


# ---- the excursion ----


def test_greedy_answers_of_a_batch_are_those_of_each_row_alone() -> None:
    model = llama().train()
    prompts = rows(3, 9, 5, 1)
    expected = [greedy_by_hand(model, prompt, 8) for prompt in prompts]
    assert len({tuple(row.tolist()) for row in expected}) > 1
    found = excursion(model, prompts, max_new_tokens=8, **IDS)
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


def test_an_excursion_leaves_modes_gradients_and_random_state_alone() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    one = excursion(model, rows(3, 4), max_new_tokens=20, temperature=2.0, seed=5, **IDS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    two = excursion(model, rows(3, 4), max_new_tokens=20, temperature=2.0, seed=5, **IDS)
    other = excursion(model, rows(3, 4), max_new_tokens=20, temperature=2.0, seed=6, **IDS)
    assert [row.tolist() for row in one] == [row.tolist() for row in two] != [row.tolist() for row in other]
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sampling_follows_the_temperature_and_not_the_checkpoints_settings() -> None:
    model = llama()
    model.generation_config.top_k = 1
    prompt = rows(4)[0]
    with torch.no_grad():
        expected = (model.eval()(input_ids=prompt[None]).logits[0, -1] / 3.0).softmax(-1)
    drawn = torch.cat(excursion(model, [prompt] * 4000, max_new_tokens=1, temperature=3.0, seed=0, **IDS))
    assert (torch.bincount(drawn, minlength=VOCABULARY) / 4000 - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [15]}, {"min_new_tokens": 6}, {"stop_strings": ["a"]},
        {"num_return_sequences": 2}, {"return_dict_in_generate": True},
    ],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
def test_generation_settings_of_the_checkpoint_have_no_effect(setting: dict[str, Any]) -> None:
    model = llama()
    expected = [greedy_by_hand(model, prompt, 6).tolist() for prompt in rows(3, 5)]
    assert expected[0][0] == 15  # which is suppressed
    assert len(set(expected[0])) < 6  # with repeated tokens
    assert len(expected[1]) < 6
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    held = model.generation_config
    assert [row.tolist() for row in excursion(model, rows(3, 5), max_new_tokens=6, **IDS)] == expected
    assert model.generation_config is held
    assert held.to_dict().items() >= setting.items()


def test_processes_of_a_sharded_model_may_draw_different_rows(two_ranks: Callable[[Callable[[int], None]], None]) -> None:
    prompts, answers = rows(3), ended(rows(2))
    seeds = [3, 1]  # with which a share of 0.5 draws the row, and does not
    draws = [eavi_batch(llama().eval(), prompts, answers, share=0.5, seed=seed, **IDS) for seed in seeds]
    assert [batch.own[0] is None for batch in draws] == [False, True]

    def work(rank: int) -> None:
        model, mesh = llama().eval(), init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        batch = eavi_batch(model, prompts, answers, share=0.5, seed=seeds[rank], **IDS)
        model(**batch.inputs).loss.backward()
        assert torch.equal(batch.inputs["input_ids"], draws[rank].inputs["input_ids"])
        assert batch.generated_tokens == draws[rank].generated_tokens

    two_ranks(work)


# ---- the alignment ----


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_prompts_of_any_integers_have_no_targets(dtype: torch.dtype) -> None:
    prompts, answers = [[row.to(dtype) for row in made] for made in (rows(3, 2), ended(rows(2, 4, seed=1)))]
    found = alignment(prompts, answers, answers, **IDS)
    expected = alignment(rows(3, 2), ended(rows(2, 4, seed=1)), ended(rows(2, 4, seed=1)), **IDS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_smallest_temperatures_are_greedy() -> None:
    model, prompts = llama(), rows(3, 4)
    greedy = excursion(model, prompts, max_new_tokens=5, **IDS)
    drawn = excursion(model, prompts, max_new_tokens=5, temperature=1e-300, seed=0, **IDS)
    assert [row.tolist() for row in drawn] == [row.tolist() for row in greedy]


@pytest.mark.parametrize(
    ("own", "inputs", "targets"),
    [
        ([7, 8, END], [7, 8, END], [4, 5, END]),  # as long as the truth
        ([7, END], [7, END, END], [4, 5, END]),  # too short
        ([7, 8, 9, 6, END], [7, 8, 9, 6, END], [4, 5, END, END, END]),  # too long
        ([7, 8, 9, 6], [7, 8, 9, 6], [4, 5, END, END]),  # never ended
    ],
)
def test_lengths_that_differ_are_continued_with_the_end_token(own: list[int], inputs: list[int], targets: list[int]) -> None:
    batch = alignment([torch.tensor([1, 2])], [torch.tensor([4, 5, END])], [torch.tensor(own)], **IDS)
    assert batch["input_ids"].tolist() == [[1, 2, *inputs]]
    assert batch["labels"].tolist() == [[-100, -100, *targets]]
    assert batch["attention_mask"].tolist() == [[1] * (2 + len(inputs))]


def loss_by_hand(model: nn.Module, prompt: Tensor, true: Tensor, own: Tensor) -> tuple[Tensor, int]:
    """Sum of -log p(true token | prompt, own tokens before it), position by position."""
    total, length = torch.zeros(()), max(len(true), len(own))
    own = torch.cat([own, torch.full((length - len(own),), END)])
    true = torch.cat([true, torch.full((length - len(true),), END)])
    for place in range(length):
        logits = model(input_ids=torch.cat([prompt, own[:place]])[None]).logits[0, -1]
        total = total - F.log_softmax(logits, -1)[true[place]]
    return total, length


@pytest.mark.parametrize("mode", ["own", "super_batch"])
def test_gradients_are_those_of_a_step_written_out(mode: str) -> None:
    model = llama().eval()  # dropout would draw in another order
    prompts, answers = rows(3, 6, 4), ended(rows(2, 5, 3, seed=1))
    own = [greedy_by_hand(model, prompt, 6) for prompt in prompts]
    model.eval()
    pairs = list(zip(prompts, answers, own, strict=True))
    if mode == "super_batch":
        pairs += list(zip(prompts, answers, answers, strict=True))
    losses = [loss_by_hand(model, *pair) for pair in pairs]
    expected = sum(loss for loss, _ in losses) / sum(number for _, number in losses)
    expected.backward()
    by_hand = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    batch = eavi_batch(model, prompts, answers, mode=mode, **IDS)
    loss = model(**batch.inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, by_hand[name], rtol=1e-3, atol=1e-5)
    assert batch.generated_tokens == sum(len(prompt) + len(answer) for prompt, answer in zip(prompts, own, strict=True))
    assert batch.trained_tokens == sum(len(prompt) + number for (prompt, _, _), (_, number) in zip(pairs, losses, strict=True))


def test_a_model_that_writes_the_truth_is_trained_as_by_teacher_forcing() -> None:
    model = llama().eval()
    prompts = rows(3, 6)
    answers = [greedy_by_hand(model, prompt, 5) for prompt in prompts]
    model.eval()
    batch = eavi_batch(model, prompts, answers, max_new_tokens=5, **IDS)
    assert batch.exact.tolist() == [True, True]
    forced = alignment(prompts, answers, answers, **IDS)
    assert all(torch.equal(batch.inputs[name], forced[name]) for name in forced)


def test_rows_that_get_an_excursion_are_the_share() -> None:
    model = llama()
    prompts, answers = rows(*[2] * 40), ended(rows(*[2] * 40, seed=1))
    counts = [sum(one is not None for one in eavi_batch(model, prompts, answers, share=share, seed=3, **IDS).own) for share in (0, 0.5, 1)]
    assert counts[0] == 0
    assert 12 <= counts[1] <= 28
    assert counts[2] == 40
    none = eavi_batch(model, prompts, answers, share=0, mode="super_batch", **IDS)
    assert none.generated_tokens == 0
    assert not none.exact.any()
    assert torch.equal(none.inputs["input_ids"], alignment(prompts, answers, answers, **IDS)["input_ids"])


# ---- the step ----


@pytest.mark.parametrize("mode", ["own", "super_batch"])
def test_a_step_learns_to_write_what_it_could_not(mode: str) -> None:
    model = llama().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    prompts, answers = rows(3, 5, 4), ended(rows(3, 2, 4, seed=1))
    before = eavi_batch(model, prompts, answers, **IDS)
    assert not before.exact.any()
    for number in range(60):
        result = eavi_step(model, optimizer, prompts, answers, mode=mode, seed=number, **IDS)
    assert result.batch.exact.all()
    assert result.gating_loss is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_routers_learn_in_the_same_step() -> None:
    prompts, answers = rows(3, 6), ended(rows(4, 2, seed=1))
    found = []
    for by_hand in (False, True):
        model = tiny_onn().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = HyperStep(model, optimizer)
        if by_hand:
            own = excursion(model, prompts, max_new_tokens=5, **IDS)
            batch = alignment(prompts, answers, own, **IDS)
            step(lambda model=model, batch=batch: model(**batch).loss, token_mask=batch["attention_mask"])
        else:
            result = eavi_step(model, step, prompts, answers, **IDS)
            assert result.gating_loss is not None
        found.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    start = dict(tiny_onn().named_parameters())
    assert any("router" in name and not torch.equal(value, start[name]) for name, value in found[0].items())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_ramp_is_a_straight_line() -> None:
    ramp = Ramp(0.0, 1.0, 10, 20)
    assert [ramp(step) for step in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]
    assert [Ramp(1.0, 0.25, 5, 5)(step) for step in (4, 5)] == [1.0, 0.25]


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "both"}, ValueError, "mode must be one of own, super_batch"),
        ({"share": 1.5}, ValueError, "share must be at least 0 and at most 1"),
        ({"temperature": -1.0}, ValueError, "temperature must be at least 0"),
        ({"prompts": [torch.tensor([], dtype=torch.long)]}, ValueError, "prompts must be tensors .* in row 0"),
        ({"answers": rows(2, 2)}, ValueError, "answers must be as many as prompts, 1, got 2"),
        ({"answers": [torch.rand(3)]}, ValueError, "answers must be .* of float32 in row 0"),
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a causal language model of transformers"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be"),
        ({"prompts": [torch.tensor([True])]}, ValueError, "prompts must be .* of bool in row 0"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"end_token_id": [1, 2]}, TypeError, "end_token_id must be an int, got list"),
        ({"pad_token_id": None}, TypeError, "pad_token_id must be an int, got NoneType"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id must be at least 0, got -1"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model": llama(), "prompts": rows(3), "answers": ended(rows(2)), **IDS} | change
    with pytest.raises(error, match=message) as found:
        eavi_batch(given.pop("model"), given.pop("prompts"), given.pop("answers"), **given)
    assert "\n" not in str(found.value)


def test_own_answers_are_checked() -> None:
    with pytest.raises(ValueError, match=r"own must be tensors of shape \(tokens,\) of token ids, got None in row 0"):
        alignment(rows(3), ended(rows(2)), [None], **IDS)  # type: ignore[list-item]


def test_a_model_without_finite_logits_draws_nothing() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[2] = float("inf")
    with pytest.raises(ValueError, match="model must have finite logits to draw tokens from, got NaN or infinity"):
        excursion(model, rows(3), max_new_tokens=2, temperature=1.0, **IDS)


def test_a_ramp_with_bad_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="end must be at least 0 and at most 1"):
        Ramp(0, 2, 0, 1)
    with pytest.raises(ValueError, match="last must be"):
        Ramp(0, 1, 5, 4)
