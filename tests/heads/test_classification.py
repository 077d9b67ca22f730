"""Tasks and their rows: what is read, what is refused, and that no row both trains and is measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.classification import TASKS, Example, Task, TaskData, batches, find_task, fixed_order, load_task
from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.testing import save_tiny_model


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"sentence1": f"text {n}", "sentence2": f"pair {n}", "label": ("entailment", "not_entailment")[n % 2]}
        for n in range(start, start + count)
    ]


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def load(data_path: Path | None, task: str = "rte", **options: Any) -> TaskData:
    given = {"eval_size": 10, **options}
    return load_task(PlasticityConfig("m", task, data_path=None if data_path is None else str(data_path), **given))


def numbers(examples: list[Example]) -> list[int]:
    return [example.row for example in examples]


@pytest.mark.parametrize("name", sorted(path.stem for path in TASKS.glob("*.yaml")))
def test_a_shipped_task_is_well_formed(name):
    task = find_task(name)
    assert task.pair is not None
    assert task.dataset is not None


def test_mnli_is_measured_on_the_genres_it_is_trained_on_and_rte_on_all_its_rows():
    assert find_task("mnli").evaluation == "validation_matched"
    assert find_task("mnli").labels == ("entailment", "neutral", "contradiction")
    assert (find_task("rte").eval_size, find_task("mnli").eval_size) == (277, 1024)


def test_one_file_is_split_into_rows_that_train_and_rows_that_are_measured(tmp_path):
    data = load(write(tmp_path / "rte.jsonl", rows(40)))
    assert len(data.evaluation) == 10
    assert sorted(numbers(data.train) + numbers(data.evaluation)) == list(range(40))
    for example in data.train + data.evaluation:
        assert (example.text, example.pair, example.label) == (f"text {example.row}", f"pair {example.row}", example.row % 2)
    assert data.labels == ("entailment", "not_entailment")
    assert data.source == str(tmp_path / "rte.jsonl")


def test_what_is_measured_depends_on_eval_seed_alone(tmp_path):
    file = write(tmp_path / "rte.jsonl", rows(40))
    first = load(file)
    assert load(file, seed=7, batch_size=3, train_size=20).evaluation == first.evaluation
    assert load(file, eval_seed=1000).evaluation != first.evaluation
    assert set(numbers(load(file, eval_size=5).evaluation)) < set(numbers(first.evaluation))


def test_the_order_of_rows_is_the_same_on_every_machine_and_version():
    # Sorted by the first 8 bytes of blake2b("SEED ROW"), as `b2sum -l 64` gives them.
    keys = {0: "cc30", 1: "8020", 2: "362c", 3: "f309", 4: "2f44"}
    assert fixed_order(5, 999) == sorted(keys, key=lambda row: keys[row])


def test_a_folder_gives_both_parts_and_train_size_is_part_of_the_whole(tmp_path):
    write(tmp_path / "train.jsonl", rows(30))
    write(tmp_path / "validation.jsonl", rows(12, start=100))
    data, less = load(tmp_path), load(tmp_path, train_size=8)
    assert numbers(data.train) == list(range(30))
    assert {example.text for example in data.evaluation} <= {f"text {n}" for n in range(100, 112)}
    assert len(less.train) == 8
    assert set(numbers(less.train)) < set(numbers(data.train))
    assert less.evaluation == data.evaluation
    assert data.source == str(tmp_path / "validation.jsonl")


def test_a_folder_of_mnli_is_measured_on_its_matched_split(tmp_path):
    record = {"premise": "a", "hypothesis": "b"}
    write(tmp_path / "train.jsonl", [record | {"label": n % 3, "premise": f"t{n}"} for n in range(6)])
    write(tmp_path / "validation_matched.jsonl", [record | {"label": n % 3, "premise": f"m{n}"} for n in range(6)])
    write(tmp_path / "validation_mismatched.jsonl", [record | {"label": 0}])
    assert {example.text for example in load(tmp_path, "mnli", eval_size=6).evaluation} == {f"m{n}" for n in range(6)}


def test_training_rows_that_repeat_what_is_measured_are_left_out_and_counted(tmp_path):
    write(tmp_path / "validation.jsonl", rows(10))
    write(tmp_path / "train.jsonl", rows(4) + rows(6, start=50))
    data = load(tmp_path)
    assert numbers(data.train) == [4, 5, 6, 7, 8, 9]
    assert data.repeated == 4


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_json_list_and_parquet_give_the_same_rows_as_json_lines(tmp_path, suffix):
    expected = load(write(tmp_path / "a.jsonl", rows(20)))
    file = tmp_path / f"b.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(rows(20), indent=2))
    else:
        pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows(20)), file)
    found = load(file)
    assert (found.train, found.evaluation) == (expected.train, expected.evaluation)
    assert found.digest() == expected.digest()


def test_the_digest_follows_every_row(tmp_path):
    first = load(write(tmp_path / "a.jsonl", rows(20))).digest()
    for change in ({"sentence1": "other"}, {"label": "entailment"}, {"sentence2": ""}):
        records = rows(20)
        records[7] |= change
        assert load(write(tmp_path / "a.jsonl", records)).digest() != first


@pytest.mark.parametrize(
    ("labels", "value", "number"),
    [
        (("false", "true"), True, 1),
        (("false", "true"), "False", 0),
        (("false", "true"), " TRUE ", 1),
        (("no", "yes"), False, 0),
        (("a", "b", "c"), True, None),
        (("a", "b", "c"), 2, 2),
        (("a", "b", "c"), "2", 2),
        (("a", "b", "c"), 3, None),
        (("a", "b", "c"), -1, None),
        (("a", "b", "c"), "C", 2),
        (("a", "b", "c"), 1.0, 1),
        (("a", "b", "c"), 1.5, None),
        (("a", "b", "c"), float("nan"), None),
        (("-1", "0", "1"), -1, 0),
        (("a", "b", "c"), ["a"], None),
        (("1", "2", "3"), 1, 0),
        (("1", "2", "3"), "3", 2),
        (("1", "2", "3"), 0, None),
    ],
    ids=str,
)
def test_labels_are_names_numbers_or_truth_values(labels, value, number):
    assert Task("text", "label", labels).number(value) == number


def test_a_task_of_ones_own_comes_from_a_yaml_file(tmp_path):
    (tmp_path / "spam.yaml").write_text("text: body\nlabel: kind\nlabels: [ham, spam]\neval-size: 3\n")
    file = write(tmp_path / "mail.jsonl", [{"body": f"mail {n}", "kind": ("ham", "spam")[n % 2]} for n in range(30)])
    data = load(file, str(tmp_path / "spam.yaml"), eval_size=None, eval_seed=1)
    assert len(data.evaluation) == 3
    assert all(example.pair is None for example in data.train)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text: a\nlabel: b\n", "labels must be given in a task's YAML file, got text, label in {path}."),
        ("text: a\nlabel: b\nlabels: [x]\n", "labels must be at least two different names, got x."),
        ("text: a\nlabel: b\nlabels: [x, X]\n", "labels must be at least two different names, got x, X."),
        ("text: a\nlabel: b\nlabels: ['1', x, '1.0']\n", "labels must differ as numbers, got 1, x, 1.0."),
        (
            "text: a\nlabel: b\nlabel: c\nlabels: [x, y]\n",
            "task must be valid YAML, got {path}: the key 'label' is given twice in line 3, column 1.",
        ),
        (
            "text: a\nlabel: b\nlabels: [no, yes]\n",
            "labels must be a list of names, in quotation marks where YAML reads them as something else, got [False, True].",
        ),
        ("text: a\nlabel: b\nlabels: [x, y]\npairs: c\n", "{path}: option must be a known one, got 'pairs'; did you mean 'pair'?"),
    ],
    ids=["no labels", "one", "the same", "the same number", "a key twice", "YAML's no", "unknown"],
)
def test_a_wrong_task_file_is_named(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as raised:
        find_task(str(path))
    assert str(raised.value) == message.format(path=path)


def test_an_unknown_task_is_named_with_those_there_are():
    with pytest.raises(InputError) as raised:
        find_task("mlni")
    assert str(raised.value) == "task must be boolq, mnli, rte or the path of a YAML file, got 'mlni'; did you mean 'mnli'?"
    with pytest.raises(InputError, match=r"got 'none\.yaml', which is no file"):
        find_task("none.yaml")


def changed(index: int, change: dict[str, Any]) -> list[Any]:
    records = rows(40)
    records[index] = {name: value for name, value in {**records[index], **change}.items() if value != "absent"}
    return records


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (changed(3, {"sentence2": "absent"}), "must have the field 'sentence2' in every row, got sentence1, label in line 4 of {path}."),
        (changed(3, {"label": None}), "must have a value in the field 'label' of every row, got null in line 4 of {path}{skip}."),
        (
            changed(0, {"label": "neutral"}),
            "label must be one of entailment, not_entailment or a number from 0 to 1, got str 'neutral' in line 1 of {path}.",
        ),
        (
            changed(0, {"label": -1}),
            "label must be one of entailment, not_entailment or a number from 0 to 1, got int -1 in line 1 of {path}{skip}.",
        ),
        (changed(5, {"sentence1": 7}), "sentence1 must be text, got int 7 in line 6 of {path}."),
        (changed(5, {"sentence1": " ", "sentence2": ""}), "sentence1 must not be empty, got a blank one in line 6 of {path}."),
        (changed(5, {"sentence1": "\ud800"}), "sentence1 must be valid Unicode, got a lone surrogate in line 6 of {path}."),
        ([*rows(20), ["a list"]], "line 21 of {path} must be one JSON object, got a list."),
        (rows(10), "eval_size must be less than the 10 rows of {path}, got 10; the rest is trained on."),
        ([row | {"label": 0} for row in rows(40)], "{path} must hold train rows of at least two classes, got only 'entailment' in 30."),
        ([], "data_path must be a file of records, got an empty file: {path}."),
    ],
    ids=["no field", "null", "class", "unlabelled", "number", "blank", "surrogate", "list", "few", "one class", "empty"],
)
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(tmp_path, records, message):
    path = write(tmp_path / "rte.jsonl", records)
    with pytest.raises(InputError) as raised:
        load(path)
    text = message.format(path=path, skip="; --skip-unlabelled leaves out rows without a label")
    assert str(raised.value) in (text, f"data_path {text}")


MISSING = {"int": -1, "text": "-1", "dash": "-", "null": None, "blank": " ", "float": -1.0, "nan": float("nan"), "absent": "absent"}


@pytest.mark.parametrize("value", MISSING.values(), ids=list(MISSING))
def test_rows_without_a_label_are_left_out_and_counted(tmp_path, value):
    records = rows(40)
    for index in (3, 17, 31):
        records[index] = {name: field for name, field in {**records[index], "label": value}.items() if field != "absent"}
    path = write(tmp_path / "rte.jsonl", records)
    with pytest.raises(InputError, match=r"in line 4 of .*rte\.jsonl; --skip-unlabelled leaves out rows without a label\.$"):
        load(path)
    data = load(path, skip_unlabelled=True)
    assert data.unlabelled == 3
    assert sorted(numbers(data.train) + numbers(data.evaluation)) == [n for n in range(40) if n not in (3, 17, 31)]
    assert all(example.label == example.row % 2 for example in [*data.train, *data.evaluation])


def test_training_rows_that_all_repeat_what_is_measured_are_told(tmp_path):
    path = write(tmp_path / "rte.jsonl", rows(2) * 20)
    with pytest.raises(InputError, match=r"must hold train rows of at least two classes, got none: all 30 repeat what is measured\.$"):
        load(path)
    with pytest.raises(InputError, match=r"eval_size must be less than the 1 row of .*rte\.jsonl, got 10"):
        load(write(tmp_path / "rte.jsonl", rows(1)))


def test_a_label_that_is_wrong_is_not_one_that_is_missing(tmp_path):
    for value in ("neutral", 2, -2, 0.5):
        path = write(tmp_path / "rte.jsonl", changed(3, {"label": value}))
        with pytest.raises(InputError, match=r"label must be one of .* in line 4 of .*rte\.jsonl\.$"):
            load(path, skip_unlabelled=True)


def test_labels_that_pandas_made_floats_are_read(tmp_path):
    records = [row | {"label": float(n % 2)} for n, row in enumerate(rows(40))]
    data = load(write(tmp_path / "rte.jsonl", records))
    assert all(example.label == example.row % 2 for example in [*data.train, *data.evaluation])


def test_rows_of_a_folder_and_of_the_hub_are_left_out_too(tmp_path, fake_datasets):
    train, held = (
        [*rows(30), *(row | {"label": -1} for row in rows(4, start=70))],
        [*rows(12, start=100), rows(1, start=300)[0] | {"label": -1}],
    )
    write(tmp_path / "train.jsonl", train)
    write(tmp_path / "validation.jsonl", held)
    fake_datasets(lambda name, subset, *, split: train if split == "train" else held)
    for data in (load(tmp_path, skip_unlabelled=True), load(None, skip_unlabelled=True)):
        assert (len(data.train), len(data.evaluation), data.unlabelled) == (30, 10, 5)


def test_data_without_any_label_are_refused(tmp_path):
    path = write(tmp_path / "rte.jsonl", [row | {"label": -1} for row in rows(40)])
    with pytest.raises(InputError, match=r"data_path must hold rows with a label in 'label', got 40 without in .*rte\.jsonl\.$"):
        load(path, skip_unlabelled=True)
    path = write(tmp_path / "rte.jsonl", [*rows(9), *(row | {"label": -1} for row in rows(31, start=50))])
    with pytest.raises(InputError, match=r"eval_size must be less than the 9 rows with a label of "):
        load(path, skip_unlabelled=True)


def test_sizes_that_do_not_fit_name_the_option(tmp_path):
    path = write(tmp_path / "rte.jsonl", rows(40))
    with pytest.raises(InputError, match=r"less than the 40 rows of .*, got none, which means 277 \(--eval-size\); the rest is trained on"):
        load(path, eval_size=None)
    with pytest.raises(InputError, match=r"evaluation rows of at least two classes, got only '\w+' in 1; raise --eval-size\."):
        load(path, eval_size=1)
    with pytest.raises(InputError, match=r"train rows of at least two classes, got only '\w+' in 1; raise --train-size\."):
        load(path, train_size=1)


SPELLINGS = [({"answer": True}, {"answer": False}), ({"label": 1}, {"label": 0}), ({"answer": None, "label": 1}, {"label": 0})]


@pytest.mark.parametrize(("yes", "no"), SPELLINGS, ids=["answer", "label", "null beside label"])
def test_boolq_is_read_as_it_is_and_as_superglue_has_it(tmp_path, yes, no):
    records = [{"question": f"{n}?", "passage": "p", **(yes if n % 2 else no)} for n in range(40)]
    data = load(write(tmp_path / "boolq.jsonl", records), "boolq")
    assert data.labels == ("false", "true")
    assert all(example.label == example.row % 2 for example in [*data.train, *data.evaluation])
    with pytest.raises(InputError, match=r"must have the field 'answer' or 'label' in every row, got question, passage in line 1"):
        load(write(tmp_path / "boolq.jsonl", [{"question": "?", "passage": "p"}]), "boolq")


def test_a_file_of_blank_lines_holds_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match=r"data_path must be a file of records, got none in .*a\.jsonl\."):
        load(tmp_path / "a.jsonl")


def test_fewer_rows_than_asked_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", rows(6))
    write(tmp_path / "validation.jsonl", rows(12, start=100))
    with pytest.raises(InputError, match=r"eval_size must be at most the 12 rows of .*validation\.jsonl, got 1,024\."):
        load(tmp_path, eval_size=1024)
    with pytest.raises(InputError, match="train_size must be at most the 6 rows there are to train on, got 7"):
        load(tmp_path, train_size=7)


def test_a_folder_without_its_files_says_what_it_holds(tmp_path):
    write(tmp_path / "train.jsonl", rows(3))
    with pytest.raises(InputError) as raised:
        load(tmp_path)
    wanted = "validation.jsonl or dev.jsonl"
    assert str(raised.value) == f"data_path must be a file, or a folder with {wanted}, got {tmp_path} (holds train.jsonl)."
    write(tmp_path / "train.json", rows(3))
    with pytest.raises(InputError, match=r"must hold one file called train, got train\.jsonl, train\.json in"):
        load(tmp_path)


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Puts a `datasets` package in place whose `load_dataset` is the given function."""

    def install(load_dataset: Callable[..., Any]) -> None:
        module = ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)

    return install


def test_a_glue_name_is_loaded_by_the_datasets_package(fake_datasets):
    asked = []

    def load_dataset(name: str, subset: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, subset, split))
        return [row | {"label": n % 2} for n, row in enumerate(rows(20, start=50 if split == "train" else 0))]

    fake_datasets(load_dataset)
    data = load(None)
    assert asked == [("nyu-mll/glue", "rte", "train"), ("nyu-mll/glue", "rte", "validation")]
    assert (len(data.train), len(data.evaluation), data.source) == (20, 10, "nyu-mll/glue/rte (validation)")


def test_without_a_network_or_the_package_one_line_asks_for_a_file(fake_datasets, monkeypatch):
    def load_dataset(name: str, subset: str, *, split: str) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    fake_datasets(load_dataset)
    with pytest.raises(InputError) as raised:
        load(None)
    assert str(raised.value) == (
        "data_path must be given where nyu-mll/glue/rte (train) cannot be downloaded, got none: Couldn't reach the hub"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"^without data_path, a task of the hub needs datasets: pip install datasets\.$"):
        load(None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token a character: its code less 32; [CLS] 93, [SEP] 94, [PAD] 95."""
    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert"))


def test_batches_pair_the_texts_and_pad_to_the_longest_row(tokenizer):
    examples = [Example(0, "!!", '"', 1), Example(1, "!", "", 0), Example(2, "#" * 9, "$", 2)]
    first, second = batches(examples, tokenizer, 2, 16, "cpu")
    assert first["input_ids"].tolist() == [[93, 1, 1, 94, 2, 94], [93, 1, 94, 94, 95, 95]]
    assert first["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]]
    assert first["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert first["labels"].tolist() == [1, 0]
    assert second["input_ids"].shape == (1, 13)
    assert second["labels"].tolist() == [2]


def test_batches_cut_the_longer_text_first(tokenizer):
    (batch,) = batches([Example(0, "!" * 20, '"' * 3, 0)], tokenizer, 4, 10, "cpu")
    assert batch["input_ids"].tolist() == [[93, 1, 1, 1, 1, 94, 2, 2, 2, 94]]


def test_batches_of_single_texts_pad_on_the_right_whatever_the_tokenizer_does(tmp_path):
    left = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "gpt2", "gpt2"), padding_side="left", pad_token="<eos>")
    (batch,) = batches([Example(0, "!", None, 0), Example(1, '""', None, 1)], left, 2, 8, "cpu")
    assert batch["input_ids"].tolist() == [[1, 95], [2, 2]]
