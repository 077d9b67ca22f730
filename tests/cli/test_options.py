"""Options of a dataclass: named by its fields, with its defaults in the help, and given only where someone gave them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tinyonn.cli.options import Sync, config_option, field_defaults, given_options


@dataclass(frozen=True)
class Config:
    model_path: str
    rate: float = 2e-5
    most: int = 20
    limit: int | None = None
    keep_all: bool = True


@pytest.mark.parametrize(
    ("field", "flags", "text"),
    [
        ("model_path", ["--model-path", "-m"], "Help."),
        ("rate", ["--rate", "-m"], "Help. [default: 2e-05]"),
        ("most", ["--most", "-m"], "Help. [default: 20]"),
        ("limit", ["--limit", "-m"], "Help."),
        ("keep_all", ["--keep-all/--no-keep-all", "-m"], "Help. [default: yes]"),
    ],
)
def test_an_option_tells_the_default_and_has_none(field, flags, text):
    option = config_option(field_defaults(Config), field, "Help.", "VALUE", "-m")
    assert [option.default, *option.param_decls] == flags
    assert (option.help, option.metavar, option.show_default) == (text, "VALUE", False)


def test_a_field_that_is_not_there_has_no_option():
    with pytest.raises(KeyError, match="modle_path"):
        config_option(field_defaults(Config), "modle_path", "Help.")


def test_only_what_was_given_is_passed_on():
    values = {"model_path": "m", "rate": None, "keep_all": False, "limit": 0, "other": 3, "most": Sync.chunk}
    found = given_options(values, field_defaults(Config))
    assert found == {"model_path": "m", "keep_all": False, "limit": 0, "most": "chunk"}
    assert type(found["most"]) is str
