"""Batches: labels on answers, orders that go on after a stop, padding, and coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyonn.arc import Task, TaskBatches, Vocabulary, coordinates, generate, pad_examples, pad_prompts
from tinyonn.errors import InputError
from tinyonn.hf import TinyOnnConfig, TinyOnnForCausalLM

VOCABULARY = Vocabulary()
TASKS = generate(10, 0, largest=5)


def batches(**options):
    return TaskBatches(TASKS, VOCABULARY, **{"context": 400, "batch_size": 4, **options})


def same(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


def test_answers_have_labels_and_nothing_else_has():
    examples = [VOCABULARY.encode(task) for task in TASKS]
    batch = pad_examples(examples)
    for row, example in enumerate(examples):
        begin, end = len(example.prompt), len(example.prompt) + len(example.answer)
        assert batch["input_ids"][row, :end].tolist() == [*example.prompt, *example.answer]
        assert (batch["input_ids"][row, end:] == VOCABULARY.pad).all()
        assert batch["attention_mask"][row].tolist() == [1] * end + [0] * (batch["input_ids"].shape[1] - end)
        assert batch["labels"][row, begin:end].tolist() == example.answer.tolist()
        assert (batch["labels"][row, :begin] == -100).all()
        assert (batch["labels"][row, end:] == -100).all()


def test_all_outputs_may_have_labels():
    labels = pad_examples([VOCABULARY.encode(TASKS[1])], all_outputs=True)["labels"][0].numpy()
    kept = labels[labels != -100]
    outputs = [VOCABULARY.decode(part).grid.tolist() for part in np.split(kept, np.flatnonzero(kept == VOCABULARY.end) + 1)[:-1]]
    assert outputs == [pair.output.tolist() for pair in (*TASKS[1].train, *TASKS[1].test)]


def test_a_pass_has_every_task_once_and_the_next_another_order():
    order = [example.task for step in range(5) for example in batches(augment=False).examples(step)]
    assert sorted(order[:10]) == sorted(order[10:]) == sorted(task.name for task in TASKS)
    assert order[:10] != order[10:]
    assert len(batches()) == 3


def test_training_goes_on_where_it_stopped():
    first, resumed = batches(seed=5), batches(seed=5)
    [first.batch(step) for step in range(3)]
    assert all(same(first.batch(step), resumed.batch(step)) for step in (3, 4, 70))
    assert not torch.equal(first.batch(0)["input_ids"], batches(seed=6).batch(0)["input_ids"])


def test_no_order_shares_random_numbers_with_an_augmentation(monkeypatch):
    drawn, make = [], np.random.default_rng

    def kept(seed):
        rng = make(seed)
        if seed is not rng:  # a generator as it is
            drawn.append(rng.bit_generator.state["state"]["state"])
        return rng

    monkeypatch.setattr(np.random, "default_rng", kept)
    single = TaskBatches(TASKS[:2], VOCABULARY, context=400, batch_size=1, seed=3)
    [single.batch(step) for step in range(8)]
    monkeypatch.undo()
    orders, augmentations = drawn[::2], drawn[1::2]
    assert len(set(orders)) == 4  # of two examples each
    assert len(set(augmentations)) == 8
    assert not set(orders) & set(augmentations)


def test_each_pass_has_its_own_augmentations():
    single = TaskBatches(TASKS[1:2], VOCABULARY, context=400, batch_size=1)
    seen = {tuple(single.examples(step)[0].prompt) for step in range(12)}
    assert len(seen) == 12
    plain = TaskBatches(TASKS[1:2], VOCABULARY, context=400, batch_size=1, augment=False)
    assert {tuple(plain.examples(step)[0].prompt) for step in range(3)} == {tuple(VOCABULARY.encode(TASKS[1]).prompt)}


def test_no_augmentation_is_longer_than_the_context():
    wide = Task("wide", ((np.ones((1, 9), dtype=int),) * 2,), ((np.ones((1, 9), dtype=int),) * 2,))
    small = Task("small", ((np.ones((1, 2), dtype=int),) * 2,), ((np.ones((1, 2), dtype=int),) * 2,))
    both = TaskBatches([wide, small], VOCABULARY, context=50, batch_size=1)
    assert both.fitting.longer == {"wide": 79}
    assert {both.examples(step)[0].task for step in range(4)} == {"small"}
    assert TaskBatches([wide, small], VOCABULARY, context=50, batch_size=1, augment=False).fitting.longer == {}


def test_tests_without_an_output_are_left_out_of_training():
    unknown = Task("unknown", TASKS[0].train, ((TASKS[0].test[0].input, None),))
    found = TaskBatches([unknown, TASKS[1]], VOCABULARY, context=400, batch_size=2)
    assert {example.task for example in found.examples(0)} == {TASKS[1].name}
    with pytest.raises(InputError, match="tasks must have a test pair with an output that fits the context, got none"):
        TaskBatches([unknown], VOCABULARY, context=400, batch_size=2)
    with pytest.raises(InputError, match="task unknown must have an output for test pair 1, got none"):
        pad_examples([VOCABULARY.encode(unknown)])
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        batches(batch_size=0)


def test_prompts_end_together():
    examples = [VOCABULARY.encode(task) for task in TASKS[:4]]
    batch = pad_prompts(examples)
    for row, example in enumerate(examples):
        assert batch["input_ids"][row, -len(example.prompt) :].tolist() == example.prompt.tolist()
        assert batch["attention_mask"][row].sum() == len(example.prompt)
        assert batch["attention_mask"][row, -len(example.prompt) :].all()


@pytest.mark.parametrize("vocabulary", [VOCABULARY, Vocabulary(numbered_rows=True)], ids=["plain", "numbered"])
def test_coordinates_are_those_of_the_cells(vocabulary):
    examples = [vocabulary.encode(task) for task in TASKS[:4]]
    for batch in (pad_examples(examples)["input_ids"], pad_prompts(examples)["input_ids"]):
        rows, columns = coordinates(batch)
        for ids, row, column in zip(batch.tolist(), rows.tolist(), columns.tolist(), strict=True):
            expected, place = [], (0, 0)
            for token in ids:  # one token at a time
                name = vocabulary.tokens[token]
                place = (place[0] + 1, 0) if "row" in name else (0, 0) if name.startswith("<") else (place[0], place[1] + 1)
                expected.append(place)
            assert list(zip(row, column, strict=True)) == expected


def test_a_model_of_transformers_takes_a_batch_and_continues_prompts():
    torch.manual_seed(0)
    size = TinyOnnConfig.bonsai("1m").to_dict()
    model = TinyOnnForCausalLM(TinyOnnConfig(**{**size, "vocab_size": len(VOCABULARY), "num_hidden_layers": 1}))
    assert torch.isfinite(model(**batches(batch_size=2).batch(0)).loss)
    examples = batches(batch_size=2).examples(0)
    written = model.eval().generate(
        **pad_prompts(examples), max_new_tokens=3, do_sample=False, pad_token_id=VOCABULARY.pad, eos_token_id=VOCABULARY.end
    )
    assert written.shape[0] == 2
    assert written.max() < len(VOCABULARY)


@pytest.mark.parametrize("pad", [pad_examples, pad_prompts])
def test_no_examples_are_refused(pad):
    with pytest.raises(InputError, match="examples must have at least one example, got none"):
        pad([])


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed must be at least 0, got -1"):
        batches(seed=-1)
