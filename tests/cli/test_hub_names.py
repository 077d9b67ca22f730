"""Names of models and tokenizers that are no folders: one line says where they were looked for, and what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, errors

from tinyonn.testing import save_tiny_model

from .conftest import Cli, one_line, write

NAME = "no-such-owner/no-such-model"
NOWHERE = {
    "offline": "not in the hub's cache, and HF_HUB_OFFLINE forbids downloads; give a folder.",
    "unreachable": "not in the hub's cache, and the hub cannot be reached; give a folder.",
}


@pytest.fixture(params=NOWHERE)
def nowhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Where the hub cannot be had: by its own switch, or as nobody listens at its address. What the line says of it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return NOWHERE[request.param]


def test_every_command_says_why_a_name_cannot_be_had(cli: Cli, nowhere: str, corpus: Path, questions: Path, pairs: Path, tmp_path: Path):
    model = f"model_path must be an existing folder or a hub id, got {NAME}: {nowhere}"
    tokenizer = f"tokenizer must be a folder with a tokenizer or a name on the hub, got {NAME}: {nowhere}"
    commands: list[tuple[str, list[object], str]] = [
        ("scan", ["-m", NAME, "-d", corpus, "-o", tmp_path / "o.mscan"], model),
        ("scan", ["-m", NAME, "-d", corpus, "-o", tmp_path / "o.mscan", "--estimate"], model),
        ("heads score", ["-m", NAME, "-d", questions, "-o", tmp_path / "scores"], model),
        ("heads plasticity train", ["-m", NAME, "--task", "boolq", "-d", pairs, "-o", tmp_path / "run", "--eval-size", 8], model),
        ("corpus", [corpus, "-t", "python", "-o", tmp_path / "o.jsonl", "--tokenizer", NAME, "--max-tokens", 9], tokenizer),
    ]
    for command, arguments, line in commands:
        ran = cli(*command.split(), *arguments)
        one_line(ran, command=f"tinyonn {command}")
        assert ran.err == f"tinyonn {command}: {line}\n"
    assert not list(tmp_path.glob("o.*"))


def test_the_base_model_of_an_adapter_is_named(cli: Cli, nowhere: str, corpus: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write(adapter / "adapter_config.json", [{"peft_type": "LORA", "base_model_name_or_path": NAME, "target_modules": ["q_proj"], "r": 2}])
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    ran = cli("scan", "-m", adapter, "-d", corpus, "-o", tmp_path / "o.mscan")
    one_line(ran, "adapter adapter needs its base model: ", NAME, nowhere, command="tinyonn scan")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RepositoryNotFoundError, "no such folder, and none of that name on the hub (a private one needs `hf auth login`)."),
        (errors.GatedRepoError, "access requires accepting its terms on the hub; run `hf auth login`, or give a folder."),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(kind, words, cli: Cli, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(name, **options):
        response = SimpleNamespace(headers={}, request=None)
        raise kind("401 Client Error. (Request ID: x)\n\nRepository Not Found for url: y.\nPlease make sure", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    ran = cli("scan", "-m", NAME, "-d", corpus, "-o", tmp_path / "o.mscan")
    assert ran.err == f"tinyonn scan: model_path must be an existing folder or a hub id, got {NAME}: {words}\n"


def test_a_tokenizer_in_the_cache_is_taken_without_the_hub(cli: Cli, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, asked = save_tiny_model(tmp_path / "snapshot"), []

    def cached(name, *, allow_patterns, local_files_only):
        asked.append((name, local_files_only))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    arguments = [corpus, "-t", "t", "--everything", "--min-chars", 1, "-o", tmp_path / "o.jsonl", "--tokenizer", NAME, "--max-tokens", 30]
    assert cli("corpus", *arguments).code == 0
    assert asked == [(NAME, True)]


@pytest.mark.parametrize("name", ["a/b/c", "./x", "none/"])
def test_a_tokenizer_that_is_no_folder_and_no_name(name: str, cli: Cli, corpus: Path, tmp_path: Path):
    ran = cli("corpus", corpus, "-t", "python", "-o", tmp_path / "o.jsonl", "--tokenizer", name, "--max-tokens", 9)
    assert ran.err == f"tinyonn corpus: tokenizer must be a folder with a tokenizer or a name on the hub, got {name}.\n"


def test_a_folder_without_a_tokenizer_says_what_is_missing(cli: Cli, corpus: Path, tmp_path: Path):
    folder = save_tiny_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    what = "it has none of tokenizer.json, tokenizer.model, vocab.json, vocab.txt."
    one_line(cli("scan", "-m", folder, "-d", corpus, "-o", tmp_path / "o.mscan"), f"got m: {what}", command="tinyonn scan")
    ran = cli("corpus", corpus, "-t", "python", "-o", tmp_path / "o.jsonl", "--tokenizer", folder, "--max-tokens", 9)
    one_line(ran, what, command="tinyonn corpus")
