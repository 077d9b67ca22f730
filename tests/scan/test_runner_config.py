"""Options of a scan: their ranges, their defaults, their file."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tinyonn.errors import InputError
from tinyonn.scan.config import RUN_ONLY, ScanConfig


def config(**options: object) -> ScanConfig:
    return ScanConfig(**{"model_path": "org/model", "dataset_path": "data/sft/python_corpus.jsonl", **options})


def test_default_output_is_named_for_model_and_topic():
    assert config().output == Path("data/scans/model_python.mscan")
    assert config(topic="finance").output == Path("data/scans/model_finance.mscan")
    assert config(output_path="x/y.mscan").output == Path("x/y.mscan")


@pytest.mark.parametrize(
    ("name", "topic"),
    [("python_corpus.jsonl", "python"), ("notes.jsonl", "notes"), ("a b&c.jsonl", "a-b-c"), ("math_corpus.v2.jsonl", "math")],
)
def test_topic_is_read_from_the_corpus_name(name, topic):
    assert config(dataset_path=f"/data/{name}").topic_name == topic


def test_model_name_is_the_folders_own_even_for_a_dot(tmp_path, monkeypatch):
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path / "my model")
    assert config(model_path=".").model_name == "my-model"
    assert config(model_path=f"{tmp_path}/my model/").model_name == "my-model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"credit": "ful"}, "credit must be one of full, local, got 'ful'; did you mean 'full'?"),
        ({"dtype": "int8"}, "dtype must be one of auto, fp32, bf16, fp16, got 'int8'."),
        ({"store": "all"}, "store must be one of records, integral, got 'all'."),
        ({"compression": "gzip"}, "compression must be one of None, zstd, got 'gzip'."),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0."),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, got True."),
        ({"max_length": 1}, "max_length must be a whole number of at least 2, got 1."),
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0."),
        ({"generate": -1}, "generate must be a whole number of at least 0, got -1."),
        ({"temperature": -0.5}, "temperature must be 0, or at least 0.001 and finite, got -0.5."),
        ({"temperature": 1e-40}, "temperature must be 0, or at least 0.001 and finite, got 1e-40."),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0."),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'."),
        ({"output_path": "scan.bin"}, "output_path must end in .mscan, got 'scan.bin'."),
        ({"dataset_path": "a\0b"}, "dataset_path must be Unicode text without NUL, got 'a\\x00b'."),
        ({"output_path": "\udcff.mscan"}, "output_path must be Unicode text without NUL, got '\\udcff.mscan'."),
        ({"model_path": ""}, "model_path must be a non-empty string, got ''."),
        ({"overwrite": "yes"}, "overwrite must be true or false, got 'yes'."),
        ({"topic": "a/b"}, "topic must be letters, digits, '.', '_' or '-', got 'a/b'."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(InputError) as raised:
        config(**options)
    assert str(raised.value) == message


def test_yaml_gives_options_and_overrides_win(tmp_path):
    file = tmp_path / "scan.yaml"
    file.write_text("model-path: m\ndataset_path: d.jsonl\nbatch-size: 8\nstore: integral\n")
    assert ScanConfig.from_yaml(file, batch_size=2, limit=None) == ScanConfig("m", "d.jsonl", batch_size=2, store="integral")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model_path: m\ndataset_path: d\nbatchsize: 3", "got 'batchsize'; did you mean 'batch_size'?"),
        ("model_path: m\ndataset_path: d\nqqq: 3", "got 'qqq'."),
        ("model_path: m", "dataset_path must be given, in .* or as --dataset-path."),
        ("- a\n- b", "config must be a YAML mapping of options, got list in"),
        ("a: [", "config must be valid YAML, got .*scan.yaml: "),
        ("topic: 2024-99-99", "config must be valid YAML, got .*scan.yaml: month must be in 1..12"),
        ("limit: " + "9" * 5000, "config must be valid YAML, got .*scan.yaml: "),
        ("topic: " + "[" * 3000, "config must be valid YAML, got .*scan.yaml: "),
    ],
    ids=["near-name", "far-name", "missing", "list", "malformed", "no-such-day", "endless-number", "endless-nesting"],
)
def test_bad_yaml_gets_one_line(tmp_path, content, message):
    file = tmp_path / "scan.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        ScanConfig.from_yaml(file)
    assert "\n" not in str(raised.value)


def test_missing_yaml_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config must be a readable file, got .*none\.yaml: No such file"):
        ScanConfig.from_yaml(tmp_path / "none.yaml")


def test_fields_that_only_say_how_to_run_exist():
    assert set(RUN_ONLY) < {field.name for field in dataclasses.fields(ScanConfig)}


def test_importing_the_package_and_its_options_loads_no_torch():
    code = "import sys, tinyonn.scan; from tinyonn.scan import ScanConfig; ScanConfig('m', 'd'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_exported_name_is_there():
    import tinyonn.scan

    for name in tinyonn.scan.__all__:
        assert getattr(tinyonn.scan, name).__module__.startswith("tinyonn.scan.")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tinyonn.scan.nothing
