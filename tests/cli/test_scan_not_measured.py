"""What a scan cannot measure: told at its end, kept in the file, explained on the page; `--targets` leaves out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tinyonn.mscan import Integral, LayoutEntry, MscanReader, MscanWriter, SequenceRecord
from tinyonn.mscan.not_measured import short_list
from tinyonn.testing import save_tiny_model

from .conftest import Cli, one_line

WHY = "its weight is used without calling its module"
NAMES = [f"backbone.layers.{layer}.mixer.dt_proj.weight" for layer in range(2)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "cats_corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"s{i}", "text": "a cat sat on the mat"[: 6 + i]}) + "\n" for i in range(3)))
    return path


def test_a_weight_used_without_its_module_is_told_everywhere(cli: Cli, data: Path, tmp_path: Path) -> None:
    model, output, page = save_tiny_model(tmp_path / "m", "mamba"), tmp_path / "o.mscan", tmp_path / "o.html"
    ran = cli("scan", "-m", model, "-d", data, "-o", output)
    assert ran.code == 0, ran.err
    assert f"backbone.layers.*.mixer.dt_proj.weight (2):\n              {WHY}\n" in ran.out
    with MscanReader(output) as reader:
        assert reader.metadata["not_measured"][WHY] == NAMES
        assert not any("dt_proj" in entry.name for entry in reader.layout)
        for sequence in range(3):
            assert np.isfinite(reader.planes(sequence)[1][:-1]).all()
    assert cli("report", output, "-o", page, "--no-figures").code == 0
    text = page.read_text()
    assert f"Not measured: backbone.layers.*.mixer.dt_proj.weight (2): {WHY}." in text
    assert "routed" not in text.split("Layers and modules")[0]
    named = cli("scan", "-m", model, "-d", data, "-o", tmp_path / "n.mscan", "--targets", "in_proj,dt_proj")
    one_line(named, f"targets must leave out {NAMES[0]}: {WHY}", command="tinyonn scan")
    assert not (tmp_path / "n.mscan").exists()
    resumed = cli("scan", "-m", model, "-d", data, "-o", output)
    one_line(resumed, "complete", command="tinyonn scan")  # the note is no part of what a scan is compared by


def test_experts_that_no_token_reached_are_told(cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "abc_corpus.jsonl"
    data.write_text(json.dumps({"text": "ab"}) + "\n")  # one measured token: two of five experts in each layer
    model, output, page = save_tiny_model(tmp_path / "m", "qwen3_moe"), tmp_path / "o.mscan", tmp_path / "o.html"
    ran = cli("scan", "-m", model, "-d", data, "-o", output)
    assert ran.code == 0, ran.err
    parts = "model.layers.*.mlp.experts.gate_up_proj.* (9), model.layers.*.mlp.experts.down_proj.* (9)"
    assert f"{parts}:\n no token was routed to these experts\n".replace(", ", ",\n ").replace("\n ", "\n" + " " * 14) in ran.out
    router = "Qwen3MoeTopKRouter uses this parameter itself, not through a linear layer"
    assert f"not measured  model.layers.*.mlp.gate.weight (3):\n              {router}\n" in ran.out
    with MscanReader(output) as reader:
        total, activation = reader.integral(), reader.planes(0)[0]
    missing = np.isnan(activation[0])
    np.testing.assert_array_equal(np.isnan(total.sps), missing)
    np.testing.assert_array_equal(total.count, np.where(missing, 0, 1))
    assert cli("report", output, "-o", page, "--no-figures").code == 0
    assert f"Not measured: {parts}: no token was routed to these experts." in page.read_text()


def test_parts_of_a_converted_model_are_told_in_lines_that_fit(cli: Cli, model: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tinyonn.hf import convert_attention, convert_mlp_to_dynmoe

    folder = shutil.copytree(model, tmp_path / "converted")
    converted = convert_attention(AutoModelForCausalLM.from_pretrained(model), compress_size=16, block_size=16, window=32)
    convert_mlp_to_dynmoe(converted, num_experts=8).save_pretrained(folder)
    ran = cli("scan", "-m", folder, "-d", data, "-o", tmp_path / "o.mscan")
    assert ran.code == 0, ran.err
    lines = ran.out.split("not measured  ")[1].split("\nwritten")[0].splitlines()
    assert max(map(len, ran.out.split("\nwritten")[0].splitlines())) <= 100  # the path of the file is the test's
    parts = [f"model.layers.*.self_attn.dyn_nsa.compress_{kind}.{{position,up,down}} (9)" for kind in ("key", "value")]
    assert "\n".join(line.strip() for line in lines).count(f"{parts[0]},\n{parts[1]}:\nBlockCompression multiplies") == 1
    assert "              model.layers.*.mlp.{gate_up_proj,down_proj} (6):" in lines
    with MscanReader(tmp_path / "o.mscan") as reader:  # the file names each
        named = {name for names in reader.metadata["not_measured"].values() for name in names}
    assert "model.layers.2.self_attn.dyn_nsa.compress_value.down" in named


def test_many_parts_of_one_module_are_cut() -> None:
    names = [f"layers.{layer}.mlp.{part}" for part in ("a", "b", "c", "d", "e") for layer in range(2)]
    assert short_list([*names, "head"]) == "layers.*.mlp.{a,b,c,d,...} (10), head"
    assert short_list(["a.0", "a.1", "b.x"]) == "a.* (2), b.x"
    assert short_list(f"m{i}.w" for i in range(9)) == ", ".join(f"m{i}.w" for i in range(6)) + ", 3 more"


def test_a_dense_model_tells_nothing(cli: Cli, model: Path, data: Path, tmp_path: Path) -> None:
    ran = cli("scan", "-m", model, "-d", data, "-o", tmp_path / "o.mscan")
    assert ran.code == 0, ran.err
    assert "not measured" not in ran.out


def test_weights_are_left_out_by_hand(cli: Cli, model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.mscan"
    assert cli("scan", "-m", model, "-d", data, "-o", output, "--targets", "all,!lm_head,!re:layers\\.[0,2]\\.").code == 0
    with MscanReader(output) as reader:
        assert {entry.name.split(".")[2] for entry in reader.layout} == {"1"}
        assert reader.metadata["targets"] == "all,!lm_head,!re:layers\\.[0,2]\\."
    help_text = " ".join(cli("scan", "--help").out.replace("│", " ").split())
    assert "re:REGEX" in help_text
    assert "all,!lm_head" in help_text


def test_a_file_of_an_earlier_version_names_the_module_and_not_experts(cli: Cli, tmp_path: Path) -> None:
    layout = [LayoutEntry("layers.0.mixer.in_proj.weight", 128, 2, 0), LayoutEntry("layers.0.mixer.dt_proj.weight", 64, 1, 2)]
    path, page = tmp_path / "old.mscan", tmp_path / "old.html"
    planes = np.array([[1.0, 2.0, np.nan], [3.0, 1.0, np.nan]], np.float32)
    sums = Integral(np.zeros(3), np.array([2.0, 2.0, 0.0]), *(np.zeros(3) for _ in range(4)))
    with MscanWriter(path, {}, layout) as writer:
        writer.append(SequenceRecord("s", [1, 2], [1.0, 2.0], planes, planes, integral=sums))
    with MscanReader(path) as reader:
        assert np.isnan(reader.integral().sps).tolist() == [False, False, True]
        assert np.isnan(reader.sequence_integral(0).sps).tolist() == [False, False, True]
    assert cli("report", path, "-o", page, "--no-figures").code == 0
    text = page.read_text()
    assert "1 of 3 blocks were never recorded" in text
    assert "layers.0.mixer.dt_proj.weight: their module did not run" in text


def test_sums_of_sequences_count_a_block_where_it_was_recorded() -> None:
    ones, counts = np.ones(3), np.array([2.0, 0.0, 0.0])
    one = Integral(np.array([5.0, 0.0, 0.0]), counts, ones, ones, ones, ones)
    other = Integral(np.array([1.0, 4.0, 0.0]), np.array([1.0, 1.0, 0.0]), ones, ones, ones, ones)
    for total in (one + other, other + one, one + other + Integral.zeros(3)):
        np.testing.assert_array_equal(total.sps, [6.0, 4.0, np.nan])
    assert np.isnan(Integral.zeros(2).sps).all()
    assert one.planes()[0].tolist() == [5.0, 0.0, 0.0]  # as the file has it
