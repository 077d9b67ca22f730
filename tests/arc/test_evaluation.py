"""Evaluation on ARC: candidates, votes and scores, with models whose answers are known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tinyonn.arc import Augmentation, Task, Vocabulary, aug_scores, check_submission, evaluate, generate, write_submission
from tinyonn.arc.evaluation import token_accuracy
from tinyonn.arc.evaluation_scores import score
from tinyonn.errors import InputError
from tinyonn.testing import tiny_causal_lm

VOCABULARY = Vocabulary()
COPIES = generate(3, 0, families=("copy",), largest=4)
INPUT, OUTPUT = 11, 12


class Copier(nn.Module):
    """Answers with the test input where `right` holds for it, otherwise with one row of 7s; what is drawn is the same."""

    def __init__(self, right=lambda grid: True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.right = right
        self.calls = []

    def generate(self, input_ids, attention_mask, generation_config, **others):
        self.calls.append(len(input_ids))
        answers = []
        for row in input_ids:
            begin = int((row == INPUT).nonzero()[-1])
            answer = torch.cat([row[begin + 1 : -1], torch.tensor([VOCABULARY.end])])
            wrong = torch.tensor(VOCABULARY.encode_answer(np.full((1, 3), 7)))
            answers.append(answer if self.right(VOCABULARY.decode(answer).grid) else wrong)
        padded = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=VOCABULARY.pad)
        return torch.cat([input_ids, padded], dim=1)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(VOCABULARY)))  # all tokens are as likely


def evaluated(model, tasks=COPIES, **options):
    return evaluate(model, VOCABULARY, tasks, **{"context": 400, "samples": 2, **options})


def test_a_model_that_is_right_solves_everything_by_every_method():
    result = evaluated(Copier(), views=11, samples=3)
    for record, task in zip(result.records, COPIES, strict=True):
        (pair,) = record["pairs"]
        (candidate,) = pair["candidates"]
        assert candidate["grid"] == task.test[0].output.tolist()
        assert (candidate["votes"], candidate["samples"]) == (11, 3)  # each view's answer is reverted
        tokens = task.test[0].output.size + len(task.test[0].output) + 1
        shifted = tokens + task.test[0].output.shape[1] - len(task.test[0].output)
        assert candidate["log_prob"] == pytest.approx(-4 * (tokens + shifted) * np.log(len(VOCABULARY)), rel=1e-5)
    assert result.scores["methods"] == {
        method: {f"attempts_{count}": {"test_pairs": 3, "tasks": 3, "score": 1.0} for count in (1, 2)}
        for method in ("greedy", "sampling", "voting", "augscore")
    }
    names = ("token_accuracy", "grid_accuracy", "cell_accuracy", "right_shape", "among_candidates")
    assert [result.scores[name] for name in names] == [1.0] * 5


def test_votes_of_other_views_mend_a_wrong_answer():
    task = Task("a", [([[1, 2, 3]], [[1, 2, 3]])], [([[4, 5, 6]], [[4, 5, 6]])])
    result = evaluated(Copier(lambda grid: len(grid) == 3), [task], views=8)  # right where the row stands upright
    (pair,) = result.records[0]["pairs"]
    assert [(one["grid"], one["votes"], one["samples"]) for one in pair["candidates"]] == [([[7, 7, 7]], 4, 2), ([[4, 5, 6]], 4, 0)]
    assert pair["attempts"] == {"greedy": [0], "sampling": [0], "voting": [0, 1], "augscore": [0, 1]}
    solved = {name: [found[f"attempts_{count}"]["tasks"] for count in (1, 2)] for name, found in result.scores["methods"].items()}
    assert solved == {"greedy": [0, 0], "sampling": [0, 0], "voting": [0, 1], "augscore": [0, 1]}
    assert result.scores["token_accuracy"] == 2 / 5  # the mark of the row and <end>
    assert (result.scores["cell_accuracy"], result.scores["right_shape"]) == (0, 1)
    assert [grid.tolist() for grid in result.attempts("voting")["a"][0]] == [[[7, 7, 7]], [[4, 5, 6]]]


def test_candidates_are_ranked_by_their_sum_over_eight_views():
    model = tiny_causal_lm("llama", max_position_embeddings=400)
    answers = iter([[[1, 2]], [[3, 3]], [[5]], [[2, 1]]] * 4)

    def generate_any(input_ids, attention_mask, generation_config, **others):
        rows = [torch.tensor(VOCABULARY.encode_answer(np.array(next(answers)))) for _ in input_ids]
        return torch.cat([input_ids, nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=VOCABULARY.pad)], dim=1)

    model.generate = generate_any
    (record,) = evaluated(model, COPIES[:1], views=1, samples=3, methods=["greedy", "augscore"]).records
    (pair,) = record["pairs"]
    grids = [np.array(one["grid"]) for one in pair["candidates"]]
    expected = aug_scores(model, VOCABULARY, COPIES[0], 0, grids)
    assert len(grids) == 4
    assert [one["log_prob"] for one in pair["candidates"]] == pytest.approx(expected, abs=1e-4)
    assert pair["attempts"] == {"greedy": [0], "augscore": np.argsort(expected)[::-1][:2].tolist()}


def candidates(*grids):
    return [{"grid": grid} for grid in grids]


def recorded(name, *pairs, seconds=30):
    return {"task": name, "seconds": seconds, "pairs": list(pairs)}


def answered(output, tried, *grids, token_accuracy=0.5):
    """A test pair of a record whose one method tries the grids with these numbers."""
    greedy = {"grid": grids[0] if grids else None, "token_accuracy": token_accuracy if output else None}
    return {"output": output, "greedy": greedy, "candidates": candidates(*grids), "attempts": {"voting": tried}}


def test_scores_are_those_of_arc_prize():
    one, two = [[1]], [[2, 2]]
    pair = ([[0]], one)
    tasks = [
        Task("first", [pair], [([[0]], one), ([[0]], two)]),
        Task("second", [pair], [([[0]], two)]),
        Task("half known", [pair], [([[0]], one), ([[0]], None)]),
        Task("too long", [pair], [([[0]], one)]),
    ]
    records = [
        recorded("first", answered(one, [0], one, token_accuracy=1.0), answered(two, [0, 1], [[2, 3]], two)),
        recorded("second", answered(two, [0, 1], one, [[4]], two)),
        recorded("half known", answered(one, [1], [[3]], one), answered(None, [0], one)),
    ]
    found = score(tasks, records, ["voting"])
    assert {name: found[name] for name in ("tasks", "test_pairs", "known_tasks", "known_test_pairs", "minutes")} == {
        "tasks": 4, "test_pairs": 6, "known_tasks": 3, "known_test_pairs": 5, "minutes": 1.5,
    }  # fmt: skip
    assert found["methods"] == {
        "voting": {
            "attempts_1": {"test_pairs": 2, "tasks": 0, "score": 0.5 / 3},
            "attempts_2": {"test_pairs": 3, "tasks": 1, "score": 1 / 3},
        }
    }
    assert found["token_accuracy"] == (1.0 + 0.5 + 0.5 + 0.5) / 4
    assert found["grid_accuracy"] == 1 / 4
    assert found["right_shape"] == 3 / 4
    assert found["cell_accuracy"] == (1.0 + 0.5 + 0.0) / 3
    assert found["among_candidates"] == 4 / 5


@pytest.mark.parametrize(
    ("answer", "truth", "share"),
    [([1, 2, 13], [1, 2, 13], 1), ([1, 13], [1, 2, 13], 1 / 3), ([1, 2, 13, 5], [1, 2, 13], 3 / 4), ([], [1, 13], 0)],
    ids=["equal", "short", "long", "empty"],
)
def test_tokens_are_compared_over_the_longer_answer(answer, truth, share):
    assert token_accuracy(np.array(answer), np.array(truth)) == share


def test_tasks_without_outputs_are_answered_and_not_scored(tmp_path):
    hidden = [Task(task.name, task.train, [(task.test[0].input, None)]) for task in COPIES]
    result = evaluated(Copier(), hidden)
    assert result.scores["methods"]["augscore"]["attempts_2"] == {"test_pairs": 0, "tasks": 0, "score": None}
    assert result.scores["token_accuracy"] is None
    write_submission(tmp_path / "submission.json", hidden, result.attempts())
    found = check_submission(tmp_path / "submission.json", hidden)
    assert all((found[task.name][0][0] == task.test[0].output).all() for task in COPIES)


def test_tasks_that_do_not_fit_are_unsolved():
    long = Task("long", [(np.ones((9, 9), int), np.ones((9, 9), int))], [([[1]], [[1]])])
    result = evaluated(Copier(), [*COPIES, long], context=150)
    assert result.scores["longer_than_context"] == {"long": VOCABULARY.length(long)}
    assert result.scores["methods"]["greedy"]["attempts_1"] == {"test_pairs": 3, "tasks": 3, "score": 0.75}
    assert "long" not in result.attempts()


def test_one_answer_is_enough_for_greedy():
    model = Copier()
    result = evaluated(model, methods=("greedy",))
    assert model.calls == [1, 1, 1]
    assert list(result.scores["methods"]) == ["greedy"]
    with pytest.raises(InputError, match="method must be one of greedy, got 'augscore'"):
        result.attempts()


def test_prompts_of_one_batch_have_one_length():
    task = COPIES[0]
    model = Copier()
    evaluated(model, [task], views=8, samples=3, batch_size=2, methods=("voting", "sampling"))
    lengths = [len(VOCABULARY.encode(Augmentation(way).task(task)).prompt) for way in range(8)]
    per_length = [lengths.count(length) for length in dict.fromkeys(lengths)]
    views = [size for count in per_length for size in [2] * (count // 2) + [1] * (count % 2)]
    assert model.calls == [*views, 2, 1]


def test_progress_ends_at_one():
    said = []
    evaluated(Copier(), progress=lambda fraction, text: said.append((fraction, text)))
    assert said[-1] == (pytest.approx(1.0), "3 of 3 tasks, 3 of 3 solved")
    assert [fraction for fraction, _ in said] == sorted(fraction for fraction, _ in said)
    assert len(said) == 12


def test_an_evaluation_that_was_stopped_goes_on(tmp_path):
    path = tmp_path / "predictions.jsonl"
    evaluated(Copier(), COPIES[:1], predictions=path)
    path.write_bytes(path.read_bytes() + b'{"task": "cut o')
    model = Copier()
    result = evaluated(model, predictions=path)
    assert model.calls == evaluated_calls(COPIES[1:])
    assert [record["task"] for record in result.records] == [task.name for task in COPIES]
    assert len(path.read_text().splitlines()) == 4
    alone = evaluated(Copier())
    assert [{**one, "seconds": 0} for one in result.records] == [{**one, "seconds": 0} for one in alone.records]


def evaluated_calls(tasks):
    model = Copier()
    evaluated(model, tasks)
    return model.calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 9}, "must be of the same model and options to go on, got views 16, now 9; delete it, or give another folder"),
        ({"seed": 1, "samples": 3}, "got samples 2, now 3, seed 0, now 1;"),
    ],
    ids=["views", "two"],
)
def test_other_options_do_not_mix_with_earlier_answers(options, message, tmp_path):
    path = tmp_path / "predictions.jsonl"
    evaluated(Copier(), COPIES[:1], predictions=path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        evaluated(Copier(), predictions=path, **options)
    model = Copier()
    nn.init.ones_(model.weight)
    with pytest.raises(InputError, match="got model '"):
        evaluated(model, predictions=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([COPIES[0]] * 2, {}, f"names of their own, got two tasks {COPIES[0].name}"),
        (COPIES, {"context": 20}, r"context must be at least \d+, the tokens of the shortest task, copy-\w+, got 20"),
        (COPIES, {"samples": 0}, "samples must be at least 1, got 0"),
        (COPIES, {"temperature": 0}, "temperature must be above 0 and finite, got 0"),
        (COPIES, {"temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
        (COPIES, {"methods": []}, "method must be one of greedy, sampling, voting, augscore, got ''"),
        (COPIES, {"methods": ["vote"]}, "method must be one of greedy, sampling, voting, augscore, got 'vote'"),
    ],
    ids=["twice", "context", "samples", "temperature", "no number", "no method", "method"],
)
def test_what_cannot_be_evaluated_is_refused(tasks, options, message):
    with pytest.raises(InputError, match=message):
        evaluated(Copier(), tasks, **options)


def test_a_context_beyond_the_positions_of_the_model_is_refused():
    model = tiny_causal_lm("llama", max_position_embeddings=160, vocab_size=16)
    with pytest.raises(InputError, match="context must be at most 160, the positions of the model, got 400"):
        evaluated(model)


def test_a_model_without_finite_logits_is_refused():
    model = tiny_causal_lm("llama", max_position_embeddings=400, vocab_size=16)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(InputError, match="model must have finite logits to draw tokens from, got NaN or infinity"):
        evaluated(model, max_new_tokens=2)


@pytest.mark.parametrize(
    ("content", "bad"),
    [
        (lambda lines: [lines[0], lines[1].replace(b'"pairs"', b'"qairs"'), lines[2]], 2),
        (lambda lines: [*lines[:2], lines[2].replace(b'"votes":16', b'"votes":15')], 3),
        (lambda lines: [*lines[:2], lines[2][:-9]], 3),
        (lambda lines: [*lines[:2], b"[" * 100_000], 3),
        (lambda lines: [*lines[:2], b"[1]"], 3),
    ],
    ids=["name", "number", "cut off", "deep", "list"],
)
def test_a_damaged_line_is_named_and_nothing_is_lost(content, bad, tmp_path):
    path = tmp_path / "predictions.jsonl"
    expected = evaluated(Copier(), COPIES[:2], predictions=path)
    lines = path.read_bytes().split(b"\n")[:-1]
    damaged = content(lines)
    assert damaged != lines
    path.write_bytes(b"\n".join([*damaged, b""]))
    with pytest.raises(InputError, match=f"predictions.jsonl must have whole lines, got a damaged line {bad}; delete it, and its task is"):
        evaluated(Copier(), COPIES[:2], predictions=path)
    assert path.read_bytes() == b"\n".join([*damaged, b""])
    path.write_bytes(b"\n".join([*(line for place, line in enumerate(damaged, start=1) if place != bad), b""]))
    again = evaluated(Copier(), COPIES[:2], predictions=path)
    assert [{**one, "seconds": 0} for one in again.records] == [{**one, "seconds": 0} for one in expected.records]


def test_records_without_a_checksum_are_read(tmp_path):
    """As an earlier version wrote them."""
    path = tmp_path / "predictions.jsonl"
    evaluated(Copier(), predictions=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.pop("crc") for row in rows[1:])
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    model = Copier()
    assert len(evaluated(model, predictions=path).records) == 3
    assert model.calls == []


@pytest.mark.parametrize("content", ["not records\n", "not records", '{"identity": 3}\n', '{"other": {}}\n[1]\n'])
def test_another_file_is_left_alone(content, tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="must be the predictions of an evaluation, got another file"):
        evaluated(Copier(), predictions=path)
    assert path.read_text() == content


def test_a_candidate_that_fits_no_context_comes_last():
    task = Task("a", [([[1, 2, 3]], [[1, 2, 3]])], [([[4, 5, 6]], [[4, 5, 6]])])
    context = max(VOCABULARY.length(task, turned=way) for way in (False, True))
    model = Copier()
    long, short = np.full((1, 5), 3), np.full((1, 1), 2)
    answers = iter([long, short])

    def generate_any(input_ids, attention_mask, generation_config, **others):
        return torch.cat([input_ids, torch.tensor(VOCABULARY.encode_answer(next(answers)))[None]], dim=1)

    model.generate = generate_any
    (record,) = evaluated(model, [task], views=1, samples=1, context=context, methods=["augscore"]).records
    (pair,) = record["pairs"]
    assert [one["log_prob"] is None for one in pair["candidates"]] == [True, False]
    assert pair["attempts"] == {"augscore": [1, 0]}
