"""What can be wrong with a model, a tokenizer or a corpus gets one line."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyonn._io.units import readable_bytes
from tinyonn.errors import InputError
from tinyonn.hf import loading
from tinyonn.hf.loading import resolve_device
from tinyonn.scan import ScanConfig, run_scan
from tinyonn.testing import save_tiny_model, tiny_causal_lm


@pytest.fixture
def config(tmp_path, tiny_model, write_corpus):
    return ScanConfig(str(tiny_model), str(write_corpus(["hello", "world, hello"])), output_path=str(tmp_path / "o.mscan"))


def refused(config: ScanConfig, **options: object) -> str:
    with pytest.raises(InputError) as raised:
        run_scan(dataclasses.replace(config, **options))
    message = str(raised.value)
    assert "\n" not in message
    return message


def copy_of(model, target):
    shutil.copytree(model, target)
    return target


def test_a_missing_folder(config, tmp_path):
    path = tmp_path / "none" / "of" / "these"
    assert refused(config, model_path=str(path)) == f"model_path must be an existing folder or a hub id, got {path}."


def test_a_hub_id_that_cannot_be_had(config, monkeypatch):
    def unreachable(name, **options):
        raise OSError(f"cannot\nreach {name}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = refused(config, model_path="some-org/some-model")
    rule = "model_path must be an existing folder or a hub id"
    assert message == f"{rule}, got some-org/some-model: cannot reach some-org/some-model"


def test_a_hub_snapshot_is_scanned_under_its_id(config, tiny_model, monkeypatch):
    from tinyonn.mscan import MscanReader

    asked = []

    def cached(name, *, allow_patterns, local_files_only):
        asked.append((name, local_files_only))
        return str(tiny_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    run_scan(dataclasses.replace(config, model_path="some-org/some-model"))
    with MscanReader(config.output) as reader:
        assert reader.metadata["model"] == "some-org/some-model"
    assert asked == [("some-org/some-model", True)]


def test_a_folder_without_a_model(config, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    assert "model_path must be a folder with config.json, got" in refused(config, model_path=str(tmp_path / "notes"))
    assert "(holds todo.txt)" in refused(config, model_path=str(tmp_path / "notes"))


def test_a_model_without_weights(config, tiny_model, tmp_path):
    folder = copy_of(tiny_model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "model_path must hold weights (*.safetensors or *.bin), got" in refused(config, model_path=str(folder))


def test_an_unknown_architecture(config, tiny_model, tmp_path):
    folder = copy_of(tiny_model, tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    assert "model_path must hold a model that transformers knows, got m: " in refused(config, model_path=str(folder))


def test_a_model_that_is_no_causal_language_model(config, tiny_model, tmp_path):
    folder = copy_of(tiny_model, tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    assert "causal language model" in refused(config, model_path=str(folder))


@pytest.mark.parametrize(("kept", "words"), [(200, "invalid header length"), (None, "invalid UTF-8 in header")])
def test_damaged_weights(config, tiny_model, tmp_path, kept, words):
    folder = copy_of(tiny_model, tmp_path / "m")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[9] ^= 0x80
    weights.write_bytes(bytes(content[:kept]))
    assert words in refused(config, model_path=str(folder))


def test_weights_cut_behind_a_good_header(config, tiny_model, tmp_path):
    folder = copy_of(tiny_model, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model_path must hold whole safetensors files, got model.safetensors" in refused(config, model_path=str(folder))


@pytest.mark.parametrize("header", [b"[]", b'{"a": null}', b'{"a": {"dtype": 5, "shape": "x"}}'], ids=["list", "null", "shape"])
def test_a_header_of_another_kind(config, tiny_model, tmp_path, header):
    folder = copy_of(tiny_model, tmp_path / "m")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    expected = "model_path must hold whole safetensors files, got model.safetensors: Error while deserializing header: "
    assert refused(config, model_path=str(folder)).startswith(expected)


def test_weights_that_are_missing_are_not_made_up(config, tiny_model, tmp_path):
    folder = copy_of(tiny_model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    expected = "model_path must hold all weights of the model, got m without model.layers.1.mlp.up_proj.weight."
    assert refused(config, model_path=str(folder)) == expected


def test_weights_that_share_another_are_not_missing(config, tmp_path):
    folder = save_tiny_model(tmp_path / "m", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert run_scan(dataclasses.replace(config, model_path=str(folder))).sequences == 2


def test_pytorch_weights_that_are_none(config, tiny_model, tmp_path):
    folder = copy_of(tiny_model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    assert "model_path must hold a causal language model, got m: " in refused(config, model_path=str(folder))


@pytest.mark.parametrize("change", [{"num_attention_heads": "four"}, {"dtype": "nonesuch"}], ids=["heads", "dtype"])
def test_a_configuration_with_a_false_value(config, tiny_model, tmp_path, change):
    folder = copy_of(tiny_model, tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    assert "model_path must hold a model that transformers knows, got m: " in refused(config, model_path=str(folder))


def test_a_tokenizer_configuration_of_another_kind(config, tiny_model, tmp_path):
    folder = copy_of(tiny_model, tmp_path / "m")
    (folder / "tokenizer_config.json").write_text("[]")
    assert "model_path must hold a tokenizer, got m: " in refused(config, model_path=str(folder))


def test_a_model_without_tokenizer(config, tiny_model, tmp_path):
    folder = copy_of(tiny_model, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "model_path must hold a tokenizer, got m: " in refused(config, model_path=str(folder))


def test_a_tokenizer_without_padding_scans_one_text_at_a_time(config, tmp_path):
    folder = save_tiny_model(tmp_path / "m", end_token=False)
    message = refused(config, model_path=str(folder), batch_size=4)
    assert message == "batch_size must be 1 where the tokenizer has no padding and no end-of-text token, got 4."
    assert run_scan(dataclasses.replace(config, model_path=str(folder), batch_size=1)).sequences == 2


def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(config, tiny_model, monkeypatch):
    import transformers

    monkeypatch.setattr(loading, "available_memory", lambda device: 200_000)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded"))
    message = refused(config)
    count = sum(parameter.numel() for parameter in tiny_causal_lm("llama").parameters())
    size = readable_bytes(4 * count)
    assert message == (f"model_path must fit in memory: its weights take {size} in float32, cpu has 200 kB free; use --dtype bf16.")


def test_an_empty_corpus_of_short_texts(config, write_corpus):
    write_corpus(["a", "b"])
    assert "dataset_path must hold a text to scan, got none in" in refused(config)
    assert "(2 shorter than 2 tokens)" in refused(config)


def test_a_gpu_that_is_not_there(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(config, device="cuda") == "device must be cpu where torch finds no GPU, got cuda."
    assert resolve_device("auto") == torch.device("cpu")
    assert refused(config, device=f"cuda:{10**20}") == f"device must be auto, cpu, cuda or cuda:N, got cuda:{10**20}."


def test_a_tokenizer_of_another_model_names_the_text(config, tmp_path, write_corpus):
    folder = save_tiny_model(tmp_path / "m", vocab_size=60)
    write_corpus(["A B", "A B~"])  # a token for each character from 32 on: B is 34, ~ is 94
    wanted = f"model_path must hold a tokenizer of the model's 60 tokens, got {folder}, whose tokenizer has the token id 94 for t1."
    assert refused(config, model_path=str(folder)) == wanted
