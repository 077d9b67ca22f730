"""`tinyonn scan`, then `tinyonn report`, as commands on folders as they are published: the page shows words."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tinyonn.cli.app import run
from tinyonn.mscan import LayoutEntry, MscanReader, MscanWriter, SequenceRecord
from tinyonn.testing import tiny_causal_lm

TEXTS = [f"The naïve cat number {i} sat on the warm mat — and stayed there." for i in range(8)]
# Every file that transformers and the hub keep beside a vocabulary, in the order that the hash of a scan has always had.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def published(folder: Path) -> Path:
    """A tiny Llama with a byte-level BPE tokenizer trained on TEXTS, and all the files that come with one."""
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=["<eos>"], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    own.model.save(str(folder))  # vocab.json and merges.txt
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<eos>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<eos>": 0}))
    tiny_causal_lm("llama", vocab_size=384).save_pretrained(folder)
    return folder


def without_fast_tokenizer(folder: Path) -> Path:
    """The same, as folders were published before tokenizer.json: vocab.json, merges.txt and the class in tokenizer_config.json."""
    published(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<eos>"}))
    return folder


def word_pieces(folder: Path) -> Path:
    """A lower-casing WordPiece tokenizer."""
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    own.normalizer, own.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    own.decoder = decoders.WordPiece()
    own.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[PAD]"]))
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    tiny_causal_lm("llama").save_pretrained(folder)
    return folder


def scan_and_report(model: Path, tmp_path: Path, *options: object) -> Path:
    corpus, scan, page = tmp_path / "cats_corpus.jsonl", tmp_path / "cats.mscan", tmp_path / "cats.html"
    corpus.write_text("".join(json.dumps({"id": f"t{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    assert run(["scan", "-m", str(model), "-d", str(corpus), "-o", str(scan), "--limit", "3"]) == 0
    assert run(["report", str(scan), "-o", str(page), "--no-figures", "--replay-order", "first", *map(str, options)]) == 0
    return page


@pytest.mark.parametrize("make", [published, without_fast_tokenizer], ids=["tokenizer.json", "vocab.json and merges.txt"])
@pytest.mark.parametrize("named", [False, True], ids=["found", "--tokenizer"])
def test_a_report_of_a_scan_shows_the_words_that_were_scanned(
    make: Callable[[Path], Path], named: bool, tmp_path: Path, parse: Callable[[Path], Any]
) -> None:
    model = make(tmp_path / "model")
    page = parse(scan_and_report(model, tmp_path, *(["--tokenizer", model] if named else [])))
    sequences = page.data["replay-data"]["sequences"]
    assert ["".join(sequence["pieces"]) for sequence in sequences] == TEXTS[:3]
    assert "tokenizer was not found" not in page.text


def test_a_word_piece_tokenizer_shows_words(tmp_path: Path, parse: Callable[[Path], Any]) -> None:
    page = parse(scan_and_report(word_pieces(tmp_path / "model"), tmp_path))
    pieces = page.data["replay-data"]["sequences"][0]["pieces"]
    assert "".join(pieces).replace(" ", "") == TEXTS[0].lower().replace(" ", "")


def test_the_hash_in_a_file_is_that_of_all_tokenizer_files_as_it_has_always_been(tmp_path: Path) -> None:
    model = published(tmp_path / "model")
    scan_and_report(model, tmp_path)
    present = [model / name for name in FILES if (model / name).exists()]
    assert len(present) == 7
    digest = hashlib.sha256()
    for file in present:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    with MscanReader(tmp_path / "cats.mscan") as reader:
        assert reader.metadata["tokenizer_sha256"] == digest.hexdigest()


@pytest.mark.parametrize("name", FILES)
def test_another_tokenizer_is_not_used_whichever_file_differs(
    name: str, tmp_path: Path, parse: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = published(tmp_path / "model")
    page, scan = tmp_path / "page.html", tmp_path / "one.mscan"
    digest = hashlib.sha256()
    for file in (model / name for name in FILES if (model / name).exists()):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    layout = [LayoutEntry("model.layers.0.q_proj.weight", 64, 1, 0)]
    metadata = {"model": "model", "model_path": str(model), "tokenizer_sha256": digest.hexdigest()}
    with MscanWriter(scan, metadata, layout) as writer:
        writer.append(SequenceRecord("one", [1, 2, 3], [1.0, 1.0, float("nan")], text="abc"))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    with (other / name).open("a") as file:
        file.write("\n")
    command = ["report", str(scan), "-o", str(page), "--no-figures"]
    assert run([*command, "--tokenizer", str(model)]) == 0
    assert parse(page).data["replay-data"]["sequences"][0]["pieces"] is not None
    capsys.readouterr()
    assert run([*command, "--tokenizer", str(other)]) == 2
    assert "tokenizer must be the one that the scan used" in capsys.readouterr().err
    with (model / name).open("a") as file:
        file.write("\n")
    assert run(command) == 0
    assert parse(page).data["replay-data"]["sequences"][0]["pieces"] is None


def test_a_path_with_a_tilde_is_found_again(tmp_path: Path, parse: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    published(tmp_path / "model")
    page = parse(scan_and_report(Path("~/model"), tmp_path))
    assert page.data["replay-data"]["sequences"][0]["pieces"] is not None


def test_the_browser_shows_words_in_the_replay(tmp_path: Path, browser: Any) -> None:
    page = scan_and_report(published(tmp_path / "model"), tmp_path)
    browser.open(page)
    assert browser.console() == []
    shown = browser.run("return document.querySelector('[data-replay=tokens]').textContent")
    assert shown.replace("·", "") == TEXTS[0]
    browser.run("document.querySelector('[data-replay=tokens]').focus()")
    browser.press("ArrowRight")
    facts = browser.run("return [...document.querySelectorAll('[data-replay=facts] dd')].map(d => d.textContent)")
    assert json.loads(facts[0].partition(" (id")[0]) in TEXTS[0]
