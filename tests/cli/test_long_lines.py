"""Whatever is pasted into a message, what a person reads is one line that fits on a screen and names what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from tinyonn.errors import LINE

from .conftest import Cli, one_line

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

QUESTION = {"question": "where do cats sleep?", "choices": {"text": ["mat", "hat"], "label": ["A", "B"]}, "answerKey": "A"}


@pytest.fixture(scope="module")
def mamba(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mamba, with the tokenizer of the tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "tiny-mamba"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-t5"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"question": f"is {n} odd", "passage": "p", "answer": bool(n % 2)} for n in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n")
    return path


def test_an_architecture_without_a_classifier_is_named_and_no_other(cli: Cli, mamba: Path, rows: Path, tmp_path: Path) -> None:
    given = ["-m", mamba, "-t", "boolq", "-d", rows, "-o", tmp_path / "out", "--eval-size", 8]
    ran = cli("heads", "plasticity", "run", *given)
    one_line(ran, "tiny-mamba: mamba has no sequence classifier in transformers.", command="tinyonn heads plasticity run")
    assert ran.err.count(",") <= 2
    assert not (tmp_path / "out" / "boolq" / "seed42").exists()


@pytest.mark.parametrize("estimate", [[], ["--estimate"]], ids=["scan", "estimate"])
def test_an_architecture_without_a_language_model_is_named_and_no_other(
    cli: Cli, t5: Path, corpus: Path, tmp_path: Path, estimate: list[str]
) -> None:
    ran = cli("scan", "-m", t5, "-d", corpus, "-o", tmp_path / "x.mscan", *estimate)
    one_line(ran, "t5 has no causal language model in transformers.", command="tinyonn scan")
    assert len(ran.err) <= 200 + len(str(t5))


def test_a_model_whose_heads_cannot_be_found_is_one_short_line(cli: Cli, mamba: Path, questions: Path, tmp_path: Path) -> None:
    ran = cli("heads", "score", "-m", mamba, "-d", questions, "-o", tmp_path / "out")
    one_line(ran, "model must have attention modules", "mamba has", command="tinyonn heads score")
    assert len(ran.err) <= LINE + 1


def many(folder: Path) -> dict[str, Path]:
    """Files with more names, or longer ones, than a line holds."""
    made = {
        "fields": {"".join(["field"] * 9) + str(n): n for n in range(300)},
        "options": {**QUESTION, "choices": {"text": ["mat"] * 300, "label": [f"label number {n}" for n in range(300)]}},
    }
    files = {}
    for name, record in made.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text(json.dumps(record) + "\n")
    made["options"]["answerKey"] = "none of " + "these " * 300  # type: ignore[index]
    files["options"].write_text(json.dumps(made["options"]) + "\n")
    files["yaml"] = folder / "broken.yaml"
    files["yaml"].write_text(f"a: [1, 2\n{'  b: c' * 90}\n")
    files["task"] = folder / "task.yaml"
    files["task"].write_text(json.dumps({"text": "question", "label": "answer", "labels": [f"intent number {n}" for n in range(150)]}))
    files["keys"] = folder / "keys.yaml"
    files["keys"].write_text(json.dumps({"unknown" * 60: 1}))
    files["folder"] = folder / "full"
    files["folder"].mkdir()
    for n in range(40):
        (files["folder"] / f"{'n' * 80}{n}").touch()
    deep = folder.joinpath(*["a-folder-with-a-long-name"] * 12)
    deep.mkdir(parents=True)
    files["deep"] = deep
    return files


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["heads", "score", "-m", "{model}", "-d", "{fields}", "-o", "{out}"], ["must have the fields of one of"]),
        (["heads", "score", "-m", "{model}", "-d", "{options}", "-o", "{out}"], ["answer must name a choice", "and 298 more"]),
        (["heads", "score", "-m", "{model}", "-d", "{deep}/rows.jsonl", "-o", "{out}"], ["data_path must be an existing", "rows.jsonl"]),
        (["heads", "score", "-m", "{folder}", "-d", "{options}", "-o", "{out}"], ["config.json", "and 38 more"]),
        (["heads", "score", "--config", "{yaml}"], ["config must be valid YAML", "in line"]),
        (["heads", "score", "--config", "{keys}"], ["option must be a known one", "and 15 more"]),
        (["heads", "score", "--field-map", "{yaml}", "-m", "{model}", "-d", "{options}", "-o", "{out}"], ["field_map must be valid YAML"]),
        (["heads", "plasticity", "run", "-m", "{model}", "-t", "{task}", "-d", "{rows}", "-o", "{out}"], ["and 148 more", "got bool"]),
        (["heads", "plasticity", "run", "-m", "{model}", "-t", "boolq", "-d", "{folder}", "-o", "{out}"], ["train.jsonl", "38 more"]),
        (["heads", "plasticity", "run", "-m", "{model}", "-t", "boolq", "-d", "{fields}", "-o", "{out}"], ["the field 'question'"]),
        (["scan", "-m", "{model}", "-d", "{deep}", "-o", "{out}.mscan"], ["dataset_path must be a file"]),
        (["scan", "--credit", "x" * 4000], ["is not one of 'full', 'local'"]),
        (["info", "{deep}/none.mscan"], ["none.mscan: No such file"]),
        (["corpus", "{deep}/none.jsonl", "--topic", "t" * 500, "-o", "{out}"], ["topic must be one of"]),
        (["nonsense" * 99], ["No such command"]),
    ],
)  # fmt: skip
def test_a_bad_input_is_a_line_that_fits_on_a_screen(
    cli: Cli, model: Path, rows: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    places = {"model": model, "rows": rows, "out": tmp_path / "out", **many(tmp_path)}
    ran = cli(*(argument.format(**places) for argument in arguments))
    named = arguments[: next(i for i, word in enumerate([*arguments, "-"]) if word.startswith(("-", "{")))]
    one_line(ran, *parts, command=" ".join(["tinyonn", *(named if parts != ["No such command"] else [])]))
    assert len(ran.err) <= LINE + 1, ran.err


def test_differing_options_are_counted_where_they_are_many(cli: Cli, rows: Path, tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "study" / "boolq" / "seed42"
    folder.mkdir(parents=True)
    (folder / "train_config.yaml").write_text(f"model_path: {'/other' * 40}\ntask: rte\nepochs: 9\nlearning_rate: 1\nmax_length: 7\n")
    ran = cli("heads", "plasticity", "train", "-m", model, "-t", "boolq", "-d", rows, "-o", tmp_path / "study")
    one_line(ran, "--overwrite", "model_path", "more", command="tinyonn heads plasticity train")
    assert len(ran.err) <= LINE + 1, ran.err
