"""`tinyonn report` and `tinyonn compare`: their options reach the library, their pages are written, their bad input is one line."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from tinyonn.cli.compare import compare
from tinyonn.cli.report import report
from tinyonn.report import write_comparison, write_report

from .conftest import Cli, one_line


class Stop(Exception):
    pass


def capture(target: str, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = inspect.signature(function)

    def stand_in(*arguments: Any, **options: Any) -> None:
        raise Stop(signature.bind(*arguments, **options).arguments)

    monkeypatch.setattr(target, stand_in)


def asked(cli: Cli, *arguments: object) -> dict[str, Any]:
    with pytest.raises(Stop) as caught:
        cli(*arguments)
    found = caught.value.args[0]
    assert isinstance(found, dict)
    return found


def test_every_option_of_the_library_is_offered() -> None:
    renamed = {"file": "path", "output_path": "output", "figures": "figures_too"}
    for ours, theirs in ((report, write_report), (compare, write_comparison)):
        names = {renamed.get(name, name) for name in inspect.signature(ours).parameters}
        assert names == set(inspect.signature(theirs).parameters)


@pytest.mark.parametrize("spelling", ["-", "_"], ids=["hyphens", "underscores"])
def test_report_options_reach_the_library(cli: Cli, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capture("tinyonn.report.write_report", write_report, monkeypatch)
    words = [
        "--normalise", "global", "--top", 7, "--replay", 3, f"--replay{spelling}order", "first", "--tokenizer", "a_b",
        f"--no{spelling}figures", f"--output{spelling}path", "p_q.html",
    ]  # fmt: skip
    assert asked(cli, "report", "a_b.mscan", *words) == {
        "path": Path("a_b.mscan"), "output": Path("p_q.html"), "normalise": "global", "top": 7, "replay": 3, "replay_order": "first",
        "tokenizer": "a_b", "figures_too": False,
    }  # fmt: skip
    assert asked(cli, "report", "dir/a.mscan")["output"] == Path("dir/a.html")


def test_compare_options_reach_the_library(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    capture("tinyonn.report.write_comparison", write_comparison, monkeypatch)
    words = ["--top", 7, "--resamples", 300, "--confidence", 0.9, "--seed", 4, "--no-figures", "-o", "c.html"]
    assert asked(cli, "compare", "a.mscan", "b.mscan", *words) == {
        "a": Path("a.mscan"), "b": Path("b.mscan"), "output": Path("c.html"), "top": 7, "resamples": 300, "confidence": 0.9, "seed": 4,
        "figures_too": False,
    }  # fmt: skip


@pytest.mark.parametrize("arguments", [["report", "a.mscan"], ["compare", "a.mscan", "b.mscan"]], ids=["report", "compare"])
def test_missing_matplotlib_names_the_option_of_the_command(cli: Cli, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *package: None if name == "matplotlib" else real(name, *package))
    ran = cli(*arguments)
    one_line(ran, "needs matplotlib: pip install matplotlib, or use --no-figures.", command=f"tinyonn {arguments[0]}")


def test_pages_of_two_real_scans(cli: Cli, model: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "dogs_corpus.jsonl"
    other.write_text("".join(json.dumps({"text": f"{i} DOGS? {'BARK! ' * (1 + i % 4)}"}) + "\n" for i in range(12)))
    for data in (corpus, other):
        assert cli("scan", "-m", model, "-d", data, "-o", tmp_path / f"{data.stem}.mscan").code == 0
    a, b = tmp_path / "cats_corpus.mscan", tmp_path / "dogs_corpus.mscan"

    ran = cli("report", a, "--no-figures")
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"page  {a.with_suffix('.html')}, ")
    assert "<html" in a.with_suffix(".html").read_text(encoding="utf-8")[:200].lower()

    ran = cli("compare", a, b, "-o", tmp_path / "c.html", "--no-figures", "--resamples", 200)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0] == "compared          12 and 12 sequences"
    assert "rank correlation" in ran.out
    assert (tmp_path / "c.html").is_file()

    for arguments, parts in (
        (("report", a, "-o", tmp_path / "x.pdf"), ("output must end in .html",)),
        (("report", a, "--normalise", "loud", "-o", tmp_path / "x.html"), ("normalise must be one of", "'loud'.")),
        (("report", a, "--normalise", "layers", "-o", tmp_path / "x.html"), ("got 'layers'; did you mean 'layer'?",)),
        (("report", tmp_path / "none.mscan"), ("none.mscan",)),
        (("report", corpus, "-o", tmp_path / "x.html"), (str(corpus),)),
        (("compare", a, a), ("must be different files",)),
        (("compare", a, b, "--resamples", 5), ("resamples must be at least 200, got 5",)),
    ):
        one_line(cli(*arguments), *parts, command=f"tinyonn {arguments[0]}")
    assert not (tmp_path / "x.html").exists()
