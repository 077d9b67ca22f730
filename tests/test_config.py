"""Options as frozen dataclasses: what is wrong is named by field, and by the class it is looked for in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tinyonn._config import check_device, check_number, check_text, from_mapping, read_yaml
from tinyonn.errors import InputError


@dataclass(frozen=True)
class Options:
    model_path: str | Path | None = None
    rate: Any = 0.5


def refused(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(InputError) as raised:
        call(*args, **options)
    return str(raised.value)


def test_an_unknown_key_is_told_with_its_class_and_near_names():
    message = refused(from_mapping, Options, {"model_pth": "m"}, source="a.yaml", required=())
    assert message == "a.yaml: option must be one of Options's fields, got 'model_pth'; did you mean 'model_path'?"


def test_what_is_required_is_asked_for_by_its_option():
    assert from_mapping(Options, {"rate": 1}, source="a.yaml", required=()) == Options(rate=1)
    message = refused(from_mapping, Options, {"model_path": None}, source="a.yaml", required=("model_path",))
    assert message == "model_path must be given, in a.yaml or as --model-path."


def test_keys_of_yaml_are_read_with_underscores(tmp_path):
    (tmp_path / "a.yaml").write_text("model-path: m\nrate: 2.0e-5\n")
    assert read_yaml(tmp_path / "a.yaml") == {"model_path": "m", "rate": 2e-5}


def test_overrides_win_over_the_file_unless_they_are_none(tmp_path):
    (tmp_path / "a.yaml").write_text("model-path: m\nrate: 0.1\npath: of the file\n")
    assert read_yaml(tmp_path / "a.yaml", model_path="own", rate=None, path="given") == {"model_path": "own", "rate": 0.1, "path": "given"}


def test_numbers_of_yaml_may_have_an_exponent_without_a_point(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("a: 2e-5\nb: -3E2\nc: 1.5e3\nd: '2e-5'\ne: 2e5x\nf: 1e\n")
    assert read_yaml(path) == {"a": 2e-5, "b": -300.0, "c": 1500.0, "d": "2e-5", "e": "2e5x", "f": "1e"}


def test_a_path_becomes_text():
    options = Options(Path("a") / "b")
    check_text(options, "model_path")
    assert options == Options("a/b")
    assert refused(check_text, Options(), "model_path") == "model_path must be a non-empty string, got None."
    check_text(Options(), "model_path", optional=True)


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "rule"),
    [
        ({"minimum": 0}, [0, 0.0, 3, 1e300, 10**400], [-1e-9, float("nan"), float("inf")], "at least 0 and finite"),
        ({"above": 0}, [1e-30, 2], [0, -1, float("nan"), float("inf")], "above 0 and finite"),
        ({"maximum": 100}, [-5, 100], [100.5, float("-inf"), float("nan")], "at most 100"),
        ({"minimum": 0, "maximum": 0.5}, [0, 0.5], [-0.1, 0.6], "at least 0 and at most 0.5"),
    ],
    ids=["minimum", "above", "maximum", "both"],
)
def test_a_number_keeps_within_its_bounds(bounds, good, bad, rule):
    for value in good:
        check_number(Options(rate=value), "rate", **bounds)
    for value in bad:
        assert refused(check_number, Options(rate=value), "rate", **bounds) == f"rate must be {rule}, got {value}."


@pytest.mark.parametrize("value", ["1", True, None])
def test_a_number_is_no_text_and_no_truth_value(value):
    assert refused(check_number, Options(rate=value), "rate") == f"rate must be a number, got {value!r}."


@pytest.mark.parametrize("value", ["gpu", "cuda:", "cuda:one", "", 0])
def test_a_device_has_one_of_four_forms(value):
    for name in ("auto", "cpu", "cuda", "cuda:12"):
        check_device(Options(rate=name), "rate")
    assert refused(check_device, Options(rate=value), "rate") == f"rate must be auto, cpu, cuda or cuda:N, got {value!r}."
