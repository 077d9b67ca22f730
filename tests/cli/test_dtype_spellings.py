"""`--dtype` takes what people type, in every command that has it, from a config file and from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.heads.score.config import ScoreConfig
from tinyonn.hf.loading import resolve_dtype
from tinyonn.mscan import MscanReader
from tinyonn.scan import ScanConfig

from .conftest import Cli, one_line

SPELLINGS = {
    "auto": ["auto", "AUTO"],
    "fp32": ["fp32", "float32", "torch.float32", "FP32", "Float32", "float", "torch.float", "f32", torch.float32],
    "bf16": ["bf16", "bfloat16", "torch.bfloat16", "BF16", torch.bfloat16],
    "fp16": ["fp16", "float16", "torch.float16", "half", "torch.half", "f16", torch.half],
}
PAIRS = [(spelling, name) for name, spellings in SPELLINGS.items() for spelling in spellings]
TYPED = [(spelling, name) for spelling, name in PAIRS if isinstance(spelling, str)]


@pytest.mark.parametrize(("spelling", "name"), PAIRS, ids=str)
def test_python_takes_every_spelling(spelling: Any, name: str) -> None:
    assert ScanConfig("m", "d", dtype=spelling).dtype == name
    assert ScoreConfig("m", "d", "o", dtype=spelling).dtype == name
    assert PlasticityConfig(model_path="m", task="boolq", dtype=spelling).dtype == name


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.float16", "float32"])
def test_a_scan_runs_in_the_precision_that_was_typed(cli: Cli, model: Path, corpus: Path, tmp_path: Path, spelling: str) -> None:
    out = tmp_path / "o.mscan"
    ran = cli("scan", "-m", model, "-d", corpus, "-o", out, "--limit", 1, "--dtype", spelling)
    assert ran.code == 0, ran.err
    with MscanReader(out) as reader:
        assert reader.metadata["dtype"] == spelling.removeprefix("torch.")
    again = cli("scan", "-m", model, "-d", corpus, "-o", out, "--limit", 2, "--dtype", spelling.removeprefix("torch."))
    assert again.code == 0, again.err  # the same scan, whatever it is called
    assert "1 was there" in again.out or "1 were there" in again.out


def test_a_config_file_takes_spellings(tmp_path: Path) -> None:
    file = tmp_path / "scan.yaml"
    file.write_text("model_path: m\ndataset_path: d\ndtype: torch.bfloat16\n")
    assert ScanConfig.from_yaml(file).dtype == "bf16"


@pytest.mark.parametrize(
    "command",
    [["scan", "-m", "m", "-d", "d"], ["heads", "score", "-m", "m", "-d", "d", "-o", "o"]],
    ids=["scan", "heads score"],
)
@pytest.mark.parametrize(
    ("typed", "end"), [("float64", "got 'float64'"), ("bfloat61", "did you mean 'bfloat16'?"), ("int8", "got 'int8'.")]
)
def test_others_are_refused_by_name(cli: Cli, command: list[str], typed: str, end: str) -> None:
    rule = "dtype must be one of auto, fp32, bf16, fp16"
    one_line(cli(*command, "--dtype", typed), rule, end, command="tinyonn " + " ".join(command[: command.index("-m")]))


@pytest.mark.parametrize(("spelling", "name"), TYPED, ids=str)
def test_a_precision_is_resolved_from_every_spelling(spelling: str, name: str) -> None:
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": torch.float32}[name]
    assert resolve_dtype(spelling, torch.device("cpu"), None) is wanted


@pytest.mark.parametrize("value", [16, None, torch.float64, [], True], ids=str)
def test_what_is_no_precision_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="dtype must be one of auto, fp32, bf16, fp16, got"):
        ScanConfig("m", "d", dtype=value)
