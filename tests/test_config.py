"""Options as frozen dataclasses: what is wrong is named by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tinyonn._io import options as _options
from tinyonn._io.config import read_yaml
from tinyonn._io.options import (
    REQUIRED,
    commented_yaml,
    descriptions,
    device_name,
    integer,
    non_empty,
    number,
    one_of,
    option,
    true_or_false,
)
from tinyonn.errors import InputError


@dataclass(frozen=True)
class Options(_options.Options):
    model_path: str | None = option(None, non_empty)
    rate: float = option(0.5, number())


def refused(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(InputError) as raised:
        call(*args, **options)
    return str(raised.value)


def test_an_unknown_key_is_told_with_near_names_or_all():
    message = refused(Options.from_mapping, {"model_pth": "m"}, source="a.yaml")
    assert message == "a.yaml: option must be a known one, got 'model_pth'; did you mean 'model_path'?"
    message = refused(Options.from_mapping, {"colour": "m"}, source="a.yaml")
    assert message == "a.yaml: option must be a known one, got 'colour'; they are model_path, rate."


def test_what_is_required_is_asked_for_by_its_option():
    @dataclass(frozen=True)
    class Needy(_options.Options):
        model_path: str
        names: list[str] = field(default_factory=list)

    assert Needy.from_mapping({"model_path": "m"}) == Needy("m", [])
    message = refused(Needy.from_mapping, {"model_path": None}, source="a.yaml")
    assert message == "model_path must be given, in a.yaml or as --model-path."


def test_keys_of_yaml_are_read_with_underscores(tmp_path):
    (tmp_path / "a.yaml").write_text("model-path: m\nrate: 2.0e-5\n")
    assert read_yaml(tmp_path / "a.yaml") == {"model_path": "m", "rate": 2e-5}


def test_overrides_win_over_the_file_unless_they_are_none(tmp_path):
    (tmp_path / "a.yaml").write_text("model-path: m\nrate: 0.1\npath: of the file\n")
    assert read_yaml(tmp_path / "a.yaml", model_path="own", rate=None, path="given") == {"model_path": "own", "rate": 0.1, "path": "given"}


def test_an_option_given_twice_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("rate: 1\nmodel-path: m\nrate: 2\n")
    assert refused(read_yaml, path) == f"config must be valid YAML, got {path}: the key 'rate' is given twice in line 3, column 1."
    path.write_text("model-path: m\nmodel_path: n\n")
    assert refused(read_yaml, path) == f"config must give an option once, got 'model-path' and 'model_path' in {path}."


def test_numbers_of_yaml_may_have_an_exponent_without_a_point(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("a: 2e-5\nb: -3E2\nc: 1.5e3\nd: '2e-5'\ne: 2e5x\nf: 1e\n")
    assert read_yaml(path) == {"a": 2e-5, "b": -300.0, "c": 1500.0, "d": "2e-5", "e": "2e5x", "f": "1e"}


def test_each_field_is_checked_by_its_own_check():
    assert refused(Options, rate="fast") == "rate must be a number, got 'fast'."
    assert refused(Options, model_path="") == "model_path must be a non-empty string, got ''."
    assert refused(Options, rate=None) == "rate must be a number, got None."


def test_a_path_becomes_text_and_none_passes_where_it_is_the_default():
    assert Options(Path("a") / "b") == Options("a/b")
    assert Options().model_path is None
    assert refused(non_empty, None, "model_path") == "model_path must be a non-empty string, got None."
    assert refused(non_empty, "a\0", "model_path").startswith("model_path must be Unicode text without NUL, got ")


def test_a_config_file_has_every_option_with_its_words(tmp_path):
    @dataclass(frozen=True)
    class Config(_options.Options):
        """Options.

        Args:
            place: path of
                a `file`.
            rate: rate: how fast.
            mode: mode of work.
            limit: limit.

        Raises:
            InputError: a reason.
        """

        place: str = option(REQUIRED, non_empty, "PATH", section="Files")
        rate: float = option(2e-5, number(), "X", section="Work")
        mode: str = option("slow", one_of("slow", "fast"))
        limit: int | None = option(None, integer(1), "N", unset="none")
        names: Mapping[str, int] = option({}, lambda value, name: value)

    assert descriptions(Config) == {"place": "path of a file.", "rate": "rate: how fast.", "mode": "mode of work.", "limit": "limit."}
    (tmp_path / "a.yaml").write_text(commented_yaml(Config, "Header."))
    lines = [" ".join(line.split()) for line in (tmp_path / "a.yaml").read_text().splitlines()]
    assert lines == [
        *("# Header.", "", "# Files", "place: # path of a file; must be given"),
        *("", "# Work", "rate: 2.0e-05 # rate: how fast", "mode: slow # mode of work; slow or fast"),
        *("limit: # limit; empty: none", "names: {} #"),
    ]
    assert Config.from_yaml(tmp_path / "a.yaml", place="p") == Config("p")
    assert Config("p").names is not Config("p").names


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "rule"),
    [
        ({"minimum": 0}, [0, 0.0, 3, 1e300, 10**300], [-1e-9, float("nan"), float("inf")], "at least 0 and finite"),
        ({"above": 0}, [1e-30, 2], [0, -1, float("nan"), float("inf")], "above 0 and finite"),
        ({"maximum": 100}, [-5, 100], [100.5, float("-inf"), float("nan")], "at most 100"),
        ({"minimum": 0, "maximum": 0.5}, [0, 0.5], [-0.1, 0.6], "at least 0 and at most 0.5"),
    ],
    ids=["minimum", "above", "maximum", "both"],
)
def test_a_number_keeps_within_its_bounds(bounds, good, bad, rule):
    for value in good:
        number(**bounds)(value, "rate")
    for value in bad:
        assert refused(number(**bounds), value, "rate") == f"rate must be {rule}, got {value}."


def test_a_bound_is_written_in_full():
    message = refused(number(minimum=0, maximum=1e6), 2e6, "rate")
    assert message == "rate must be at least 0 and at most 1,000,000, got 2000000.0."


@pytest.mark.parametrize("bounds", [{}, {"minimum": 0}, {"above": 0, "maximum": 1}], ids=["none", "minimum", "both"])
def test_a_number_is_one_that_a_float_holds(bounds):
    message = refused(number(**bounds), 10**400, "rate")
    assert message.startswith("rate must be a number that a float holds, got 1000")
    assert len(message) < 140


def test_a_whole_number_keeps_within_what_the_libraries_take():
    for value in (1, 2**31 - 1):
        integer(1)(value, "rate")
    assert refused(integer(1), 2**31, "rate") == "rate must be at most 2147483647, got 2147483648."
    integer(0, 2**63 - 1)(2**63 - 1, "rate")
    assert refused(integer(1), 0, "rate") == "rate must be a whole number of at least 1, got 0."
    for value in (10**400, 10**5000):  # of the second Python cannot write the digits
        assert len(refused(integer(1), value, "rate")) < 140


DEEP: Any = "x"
for _ in range(9):
    DEEP = [DEEP] * 10


@pytest.mark.parametrize(
    "value", [DEEP, {"a": DEEP}, ["x" * 10**6] * 50, {f"key {n}": n for n in range(10**5)}], ids=["deep", "dict", "long", "wide"]
)
@pytest.mark.parametrize(
    "check",
    [non_empty, true_or_false, device_name, number(), integer(0), one_of("a", "b")],
    ids=["text", "bool", "device", "number", "int", "choice"],
)
def test_what_is_refused_is_short_in_the_message(check, value):
    """The first stands for 10**9 texts, more than a memory holds written out."""
    assert len(refused(check, value, "rate")) < 140


def test_an_alias_of_yaml_is_refused_before_it_is_followed(tmp_path):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    message = refused(read_yaml, tmp_path / "bomb.yaml")
    assert message.startswith(f"config must be valid YAML, got {tmp_path / 'bomb.yaml'}: the alias *a0 must be written out in ")
    assert "line 2, column 10" in message
    (tmp_path / "loop.yaml").write_text("a: &a [*a]")
    assert "the alias *a must be written out" in refused(read_yaml, tmp_path / "loop.yaml")
    (tmp_path / "anchor.yaml").write_text("a: &a [1]\nb: '*a'")
    assert read_yaml(tmp_path / "anchor.yaml") == {"a": [1], "b": "*a"}


def test_a_key_that_no_text_can_be_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(f"0x{'f' * 5000}: 1")  # Python writes no more than 4,300 digits
    assert refused(read_yaml, tmp_path / "a.yaml").startswith("config must be valid YAML, got ")


@pytest.mark.parametrize("value", ["1", True, None])
def test_a_number_is_no_text_and_no_truth_value(value):
    assert refused(number(), value, "rate") == f"rate must be a number, got {value!r}."


@pytest.mark.parametrize("value", ["gpu", "cuda:", "cuda:one", "", 0])
def test_a_device_has_one_of_four_forms(value):
    for name in ("auto", "cpu", "cuda", "cuda:12"):
        assert device_name(name, "rate") == name
    assert refused(device_name, value, "rate") == f"rate must be auto, cpu, cuda or cuda:N, got {value!r}."
