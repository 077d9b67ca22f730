"""`tinyonn heads`: rows without an answer or a label are counted, left out where asked, or refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cli, one_line, study, write

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


def test_scoring_tells_rows_without_an_answer_and_leaves_them_out_where_asked(
    cli: Cli, language_model: Path, questions: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for index, value in ((1, -1), (4, "-1"), (5, None), (9, "-")):
        rows[index]["answerKey"] = value
    del rows[11]["answerKey"]
    given = ["-m", language_model, "-d", write(questions, rows), "-o", tmp_path / "out"]
    ran = cli("heads", "score", *given)
    assert ran.code == 0, ran.err
    assert re.search(r"^no answer +in 5 rows, which are scored nevertheless; --skip-unlabelled leaves these out$", ran.out, re.MULTILINE)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["samples"], summary["answered"], summary["unlabelled"]) == (12, 7, 0)
    ran = cli("heads", "score", *given, "--skip-unlabelled")
    assert ran.code == 0, ran.err
    assert re.search(r"^left out +5 rows without an answer$", ran.out, re.MULTILINE)
    assert "replaces" in ran.out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rows"], summary["samples"], summary["answered"], summary["unlabelled"]) == (12, 7, 7, 5)
    assert "rows without an answer, left out" in (tmp_path / "out" / "index.html").read_text()
    kept = [row for row in rows if row.get("answerKey") == "A"]
    alone = cli("heads", "score", "-m", language_model, "-d", write(tmp_path / "kept.jsonl", kept), "-o", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert (tmp_path / "alone" / "scores_raw.csv").read_bytes() == (tmp_path / "out" / "scores_raw.csv").read_bytes()
    one_line(
        cli("heads", "score", *given, "--skip-unlabelled", "--max-samples", 8),
        "max_samples must be at most the 7 rows with an answer of",
        command="tinyonn heads score",
    )


@pytest.mark.usefixtures("plain")
def test_a_file_without_any_answer_is_scored_and_told(cli: Cli, language_model: Path, questions: Path, tmp_path: Path) -> None:
    rows = [{**json.loads(line), "answerKey": ""} for line in questions.read_text().splitlines()]
    ran = cli("heads", "score", "-m", language_model, "-d", write(questions, rows), "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert re.search(r"^no answer +in 12 rows, which are scored nevertheless$", ran.out, re.MULTILINE)  # --skip-unlabelled would leave none


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("answers", "count"),
    [([-1, 1, "-1", 1, -1.0, 1.0, None], 6), ([1, None, float("nan")], 1)],
    ids=["-1 stands for a choice", "a choice is called None"],
)
def test_an_answer_counts_where_the_field_map_knows_its_value(
    cli: Cli, language_model: Path, tmp_path: Path, answers: list[Any], count: int
) -> None:
    layout = tmp_path / "layout.yaml"
    layout.write_text('question: q\nchoices: {text: [a, b]}\nanswer: {field: y, values: {"-1": A, "1": B}}\n')
    rows = [{"q": f"question {n}", "a": "None", "b": "nan", "y": answer} for n, answer in enumerate(answers)]
    given = ["-m", language_model, "-d", write(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "out", "--field-map", layout]
    ran = cli("heads", "score", *given)
    assert ran.code == 0, ran.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["samples"], summary["answered"]) == (len(answers), count)
    ran = cli("heads", "score", *given, "--skip-unlabelled")
    assert ran.code == 0, ran.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["samples"], summary["unlabelled"]) == (count, len(answers) - count)


@pytest.mark.usefixtures("plain")
def test_a_study_leaves_out_rows_without_a_label_where_asked(cli: Cli, encoder: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    given = study(encoder, write(pairs, [*rows, *({**row, "answer": -1} for row in rows[:3])]), out)
    refused = cli("heads", "plasticity", "run", *given)
    said = "got int -1 in line 41 of", "; --skip-unlabelled leaves out rows without a label."
    one_line(refused, *said, command="tinyonn heads plasticity run")
    assert not list(out.rglob("train.json"))
    ran = cli("heads", "plasticity", "train", *given, "--skip-unlabelled")
    assert ran.code == 0, ran.err
    assert re.search(r"^left out +3 rows without a label$", ran.out, re.MULTILINE)
    folder = out / "boolq" / "seed42"
    trained = json.loads((folder / "train.json").read_text())
    assert (trained["train_rows"], trained["evaluation_rows"], trained["unlabelled_rows"]) == (32, 8, 3)
    for step in ("measure", "report"):  # as the training had it
        ran = cli("heads", "plasticity", step, "-t", "boolq", "-o", out)
        assert ran.code == 0, ran.err
    page = (folder / "index.html").read_text()
    assert re.search(r"rows without a label, left out</dt><dd>3<", page)
    taken = [json.loads((folder / name).read_text())["seconds"] for name in ("train.json", "measure.json")]
    assert f"training, measuring, seconds</dt><dd>{taken[0]:.1f} and {taken[1]:.1f}<" in page
    other = cli("heads", "plasticity", "train", *given)
    one_line(other, "skip_unlabelled False (there True)", command="tinyonn heads plasticity train")


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("names", "given", "other"),
    [
        (["-1", "1"], [-1, 1], 0),
        (["1.0", "2.0"], [1.0, 2.0], 0),
        (["0.5", "1"], [0.5, "1.0"], 0),
        (["2", "1"], [2.0, 1], 3),
        (["1", "0"], [True, False], 2),
    ],
    ids=["signs", "floats", "halves", "not in order", "truth"],
)
def test_labels_that_are_numbers_are_compared_as_numbers(
    cli: Cli, encoder: Path, pairs: Path, tmp_path: Path, names: list[str], given: list[Any], other: Any
) -> None:
    task = tmp_path / "own.yaml"
    task.write_text(f"text: question\nlabel: y\nlabels: {json.dumps(names)}\n")
    rows = [{"question": f"is {n} odd", "y": given[n % 2]} for n in range(40)]
    ran = cli("heads", "plasticity", "train", *study(encoder, write(pairs, rows), tmp_path / "out", "--task", task))
    assert ran.code == 0, ran.err
    assert cli("heads", "plasticity", "measure", "--task", task, "-o", tmp_path / "out").code == 0
    (subset,) = (tmp_path / "out").rglob("eval_subset.json")
    measured = json.loads(subset.read_text())
    assert measured["labels"] == [row % 2 for row in measured["indices"]]
    refused = cli("heads", "plasticity", "train", *study(encoder, write(pairs, [*rows, {**rows[0], "y": other}]), tmp_path, "-t", task))
    one_line(refused, f"y must be one of {', '.join(names)}, got int {other} in line 41 of", command="tinyonn heads plasticity train")


@pytest.mark.parametrize("field", ["answer", "label"])
def test_a_null_label_is_named_by_the_field_that_holds_it(cli: Cli, encoder: Path, pairs: Path, tmp_path: Path, field: str) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows = [
        {"question": row["question"], "passage": row["passage"], field: None if n == 0 else row["answer"]} for n, row in enumerate(rows)
    ]
    ran = cli("heads", "plasticity", "train", *study(encoder, write(pairs, rows), tmp_path / "study"))
    said = (
        f"must have a value in the field '{field}' of every row, got null in line 1 of",
        "--skip-unlabelled leaves out rows without a label",
    )
    one_line(ran, *said, command="tinyonn heads plasticity train")
