"""What is known of a model before it is loaded, and what may be missing from the files that it is loaded from."""

from __future__ import annotations

import json
import shutil
from logging import Handler, LogRecord
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from tinyonn._io.units import readable_bytes
from tinyonn.errors import InputError
from tinyonn.hf import loading, memory
from tinyonn.hf.loading import check_fits, load_model, resolve_device, resolve_dtype, usable_positions, weights_of
from tinyonn.testing import save_tiny_model, tiny_causal_lm, tiny_encoder

CPU = torch.device("cpu")
CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")


def test_a_causal_language_model_is_loaded_with_its_weights_in_eval_mode(tiny_model):
    model = load_model(tiny_model, torch.float32, CPU)
    expected = load_file(tiny_model / "model.safetensors")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert {name for name, value in model.state_dict().items() if torch.equal(value, expected[name])} == set(expected)


def test_weights_that_may_be_missing_are_named_by_the_caller(tiny_model):
    with pytest.raises(InputError) as raised:
        load_model(tiny_model, torch.float32, CPU, CLASSIFIER)
    assert str(raised.value) == "model_path must hold all weights of the model, got tiny-llama without score.weight."
    model = load_model(tiny_model, torch.bfloat16, CPU, CLASSIFIER, [r"^score\."], num_labels=3)
    assert model.get_parameter("score.weight").shape == (3, 48)
    assert model.get_parameter("score.weight").dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"without score\.weight\.$"):
        load_model(tiny_model, torch.float32, CPU, CLASSIFIER, ["pooler"])


def test_weights_of_another_shape_are_not_made_up(tiny_model, tmp_path):
    trained = load_model(tiny_model, torch.float32, CPU, CLASSIFIER, ["score"], num_labels=3)
    trained.save_pretrained(tmp_path / "m")
    other = {"num_labels": 5, "ignore_mismatched_sizes": True}
    with pytest.raises(InputError, match=r"all weights of the model, got m without score\.weight\.$"):
        load_model(tmp_path / "m", torch.float32, CPU, CLASSIFIER, **other)
    assert load_model(tmp_path / "m", torch.float32, CPU, CLASSIFIER, ["score"], **other).get_parameter("score.weight").shape == (5, 48)


@pytest.mark.parametrize(
    ("auto_class", "wanted"),
    [
        ("AutoModelForCausalLM", "a causal language model"),
        (CLASSIFIER, "a sequence classifier"),
        ("AutoModelForMaskedLM", "a model transformers knows"),
    ],
)
def test_a_model_of_another_kind_is_refused_in_one_line(tiny_model, tmp_path, auto_class, wanted):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError) as raised:
        load_model(folder, torch.float32, CPU, auto_class)
    assert str(raised.value).startswith(f"model_path must hold {wanted}, got m: ")
    assert "\n" not in str(raised.value)


def test_a_pattern_excuses_only_the_weights_it_is_found_in(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    for name in ("mlp.up_proj", "mlp.down_proj"):
        del weights[f"model.layers.1.{name}.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"got m without model\.layers\.1\.mlp\.down_proj\.weight\.$"):
        load_model(folder, torch.float32, CPU, may_lack=["up_proj"])


def test_weights_are_counted_from_headers(tiny_model):
    model = tiny_causal_lm("llama")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert weights_of(tiny_model) == count


def test_only_the_files_that_are_loaded_count(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "both")
    expected = weights_of(folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert weights_of(folder) == expected
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-1.safetensors"}}))
    assert weights_of(folder) == expected
    index.write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))
    with pytest.raises(InputError, match=r"all files that model\.safetensors\.index\.json names, got none called part-2\.safetensors"):
        weights_of(folder)
    index.write_text("{")
    with pytest.raises(InputError, match=r"got a damaged model\.safetensors\.index\.json"):
        weights_of(folder)


@pytest.mark.parametrize(("named", "width"), [("float32", 4), ("bfloat16", 2), (None, 4)])
def test_pytorch_files_count_by_the_configured_precision(tmp_path, named, width):
    (tmp_path / "config.json").write_text(json.dumps({} if named is None else {"torch_dtype": named}))
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(4000))
    assert weights_of(tmp_path) == 4000 // width


@pytest.mark.parametrize(
    ("arch", "options", "limit"),
    [("bert", {}, 128), ("roberta", {"pad_token_id": 1}, 126), ("roberta", {"pad_token_id": 95}, 32), ("distilbert", {}, 128)],
    ids=["bert", "roberta", "roberta padded with 95", "distilbert"],
)
def test_the_longest_sequence_that_an_encoder_takes_is_found(arch, options, limit):
    model = tiny_encoder(arch, **options)
    assert usable_positions(model) == limit
    ids = torch.full((1, limit + 1), 7)
    assert model(input_ids=ids[:, :-1]).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


def test_a_model_without_positions_of_its_own_has_the_limit_of_its_configuration():
    assert usable_positions(tiny_causal_lm("llama")) == 128
    assert usable_positions(tiny_causal_lm("bloom")) is None


@pytest.mark.parametrize(
    ("options", "copies", "needs", "remedy"),
    [
        ({}, 1, "its weights take {} in float32", "--dtype bf16"),
        ({"remedy": "a smaller model"}, 1, "its weights take {} in float32", "a smaller model"),
        (
            {"training": True, "remedy": "a smaller model"},
            4,
            "to train it takes {} in float32 (weights, gradients, two moments)",
            "a smaller model",
        ),
    ],
    ids=["precision", "caller's", "training"],
)
def test_memory_that_does_not_suffice_is_told_with_the_callers_remedy(tiny_model, monkeypatch, options, copies, needs, remedy):
    size = 4 * copies * sum(parameter.numel() for parameter in tiny_causal_lm("llama").parameters())
    monkeypatch.setattr(loading, "available_memory", lambda device: size)
    check_fits(tiny_model, torch.float32, CPU, **options)
    monkeypatch.setattr(loading, "available_memory", lambda device: size - 1)
    with pytest.raises(InputError) as raised:
        load_model(tiny_model, torch.float32, CPU, **options)
    shown = readable_bytes(size - 1)
    assert str(raised.value) == f"model_path must fit in memory: {needs.format(readable_bytes(size))}, cpu has {shown} free; use {remedy}."


@pytest.mark.parametrize(("arch", "auto_class"), [("gpt_oss", "AutoModel"), ("llama", "AutoModel"), ("llama", CLASSIFIER)])
def test_loading_is_silent_and_leaves_the_settings_of_transformers(tmp_path, monkeypatch, capfd, arch, auto_class):
    folder = save_tiny_model(tmp_path / arch, arch, **({} if arch == "gpt_oss" else {"tie_word_embeddings": False}))
    said: list[LogRecord] = []
    handler = Handler()
    monkeypatch.setattr(handler, "emit", said.append)
    monkeypatch.setattr(logging.get_logger("transformers"), "handlers", [handler])
    capfd.readouterr()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(folder, torch.float32, CPU, auto_class, [r"^score\."])
    assert said == []
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    shutil.copy(folder / "config.json", folder / "model.safetensors")
    with pytest.raises(InputError):
        load_model(folder, torch.float32, CPU, auto_class)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device("auto", 3) == torch.device("cuda", 3)
    assert resolve_device("cuda", 2) == torch.device("cuda", 2)
    assert resolve_device("cuda:1", 2) == torch.device("cuda", 1)
    with pytest.raises(InputError, match="device must be one of the 4 GPUs here, got cuda:7"):
        resolve_device("cuda:7")


def test_auto_precision_is_the_checkpoints_own_on_a_gpu_alone(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    content = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content))
    stored = loading.load_config(folder)
    assert resolve_dtype("auto", torch.device("cpu"), stored) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda", 0), stored) == torch.bfloat16
    assert resolve_dtype("fp16", torch.device("cpu"), stored) == torch.float16


def test_memory_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\nactive_file 50000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_memory(torch.device("cpu")) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory(torch.device("cpu")) > 10_000_000
