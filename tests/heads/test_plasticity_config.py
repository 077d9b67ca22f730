"""Options of a plasticity study: defaults, YAML, and one line for each that is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from tinyonn._io.options import commented_yaml
from tinyonn.errors import InputError
from tinyonn.heads.plasticity.config import TRAINING, PlasticityConfig


def test_defaults_are_those_of_the_study():
    config = PlasticityConfig("m", "mnli")
    assert (config.eval_seed, config.top_k, config.high, config.low, config.dtype, config.device) == (999, 20, 90, 30, "auto", "auto")


def test_results_go_to_a_folder_of_task_and_seed():
    assert PlasticityConfig("m", "rte", output_dir="out", seed=7).folder == Path("out/rte/seed7")
    assert PlasticityConfig("m", "my/tasks/spam.yaml", output_dir="out", seed=0).folder == Path("out/spam/seed0")


def test_yaml_keys_may_have_hyphens_and_given_options_win(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("model-path: m\ntask: mnli\nlearning_rate: 1.0e-4\neval-size: 64\n")
    config = PlasticityConfig.from_yaml(file, eval_size=32, seed=None)
    assert (config.model_path, config.learning_rate, config.eval_size, config.seed) == ("m", 1e-4, 32, 42)


def test_the_commented_defaults_are_the_defaults(tmp_path):
    given = {"model_path": "m", "task": "rte"}
    (tmp_path / "study.yaml").write_text(commented_yaml(PlasticityConfig, "Header."))
    assert PlasticityConfig.from_yaml(tmp_path / "study.yaml", **given) == PlasticityConfig(**given)
    assert set(yaml.safe_load((tmp_path / "study.yaml").read_text())) == set(vars(PlasticityConfig(**given)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_path": ""}, "model_path must be a non-empty string, got ''."),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1."),
        ({"seed": [4, 5]}, "seed must be one whole number, got [4, 5]; for several, repeat --seed on the command line."),
        ({"seed": 2**64}, f"seed must be at most {2**63 - 1}, got {2**64}."),
        ({"eval_size": 0}, "eval_size must be a whole number of at least 1, got 0."),
        ({"train_size": 2.5}, "train_size must be a whole number of at least 1, got 2.5."),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, got True."),
        ({"learning_rate": 0}, "learning_rate must be above 0 and at most 1, got 0."),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0 and at most 1, got inf."),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be at least 0 and at most 1, got 1.5."),
        ({"high": 101}, "high must be at least 0 and at most 100, got 101."),
        ({"high": 30, "low": 30}, "low must be below high (30), got 30."),
        ({"dtype": "bf61"}, "dtype must be one of auto, fp32, bf16, fp16, got 'bf61'; did you mean 'bf16'?"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'."),
        ({"overwrite": "no"}, "overwrite must be true or false, got 'no'."),
        (
            {"task": "glue/mnli"},
            "task must be a name or a YAML file whose name is at most 200 letters, digits, '.', '_' or '-', got 'glue/mnli'.",
        ),
        ({"task": ".."}, "task must be a name or a YAML file whose name is at most 200 letters, digits, '.', '_' or '-', got '..'."),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(InputError) as raised:
        PlasticityConfig(**{"model_path": "m", "task": "mnli", **options})
    assert str(raised.value) == message


def test_unknown_and_missing_options_are_named():
    with pytest.raises(InputError, match="got 'batchsize'; did you mean 'batch_size'"):
        PlasticityConfig.from_mapping({"model_path": "m", "task": "mnli", "batchsize": 3})
    with pytest.raises(InputError, match="task must be given, in config or as --task"):
        PlasticityConfig.from_mapping({"model_path": "m"})


def test_every_option_is_of_training_or_known_not_to_be():
    # A new option must be placed: one that changes the weights but not the record of options would mix two trainings.
    others = {"output_dir", "top_k", "high", "low", "checkpoint_steps", "device", "overwrite"}
    assert {field.name for field in dataclasses.fields(PlasticityConfig)} == {*TRAINING, *others}
    assert not others & set(TRAINING)
