"""`tinyonn scan`: every option is read, and every bad input of a scan is one line."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tinyonn.cli import screen
from tinyonn.cli.scan import show_progress
from tinyonn.mscan import MscanReader
from tinyonn.scan import ScanConfig, ScanProgress, runner
from tinyonn.testing import save_tiny_model

from .conftest import Cli, one_line, shell

# A value for every field of ScanConfig that is not its default, as it is typed.
VALUES: dict[str, Any] = {
    "model_path": "some/model",
    "dataset_path": "some_data.jsonl",
    "output_path": "some.mscan",
    "topic": "topic_1",
    "credit": "local",
    "targets": "attention",
    "dtype": "bf16",
    "device": "cuda:1",
    "batch_size": 7,
    "limit": 11,
    "max_length": 99,
    "store": "integral",
    "generate": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "text_field": "body_text",
    "skip_bad": True,
    "store_text": False,
    "codec": "f32",
    "compression": "zstd",
    "sync": "chunk",
    "seed": 3,
    "overwrite": True,
    "resume": False,
}


class Stop(Exception):
    pass


@pytest.fixture
def configured(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The ScanConfig that a command line leads to."""

    def capture(options: ScanConfig, **_: object) -> None:
        raise Stop(options)

    monkeypatch.setattr("tinyonn.scan.run_scan", capture)

    def parse(*arguments: object) -> ScanConfig:
        with pytest.raises(Stop) as caught:
            cli("scan", *arguments)
        options = caught.value.args[0]
        assert isinstance(options, ScanConfig)
        return options

    return parse


def typed(field: str, value: Any, spelling: str) -> list[str]:
    name = field.replace("_", spelling)
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no{spelling}{name}"]
    return [f"--{name}", str(value)]


def test_the_values_are_all_the_fields_and_no_defaults() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(ScanConfig)}
    assert set(VALUES) == set(fields)
    assert all(VALUES[name] != default for name, default in fields.items())


@pytest.mark.parametrize("spelling", ["-", "_"], ids=["hyphens", "underscores"])
def test_every_option_reaches_the_scan(configured: Any, spelling: str) -> None:
    arguments = [word for field, value in VALUES.items() for word in typed(field, value, spelling)]
    assert dataclasses.asdict(configured(*arguments)) == VALUES


def test_the_original_workflow_still_works(configured: Any) -> None:
    options = configured("--model_path", "my_model", "--dataset_path=data_set.jsonl", "--output_path", "out_put.mscan")
    assert (options.model_path, options.dataset_path, options.output_path) == ("my_model", "data_set.jsonl", "out_put.mscan")
    assert configured("-m", "a", "-d", "b", "--output", "c.mscan").output_path == "c.mscan"


def test_defaults_are_the_library_s(configured: Any) -> None:
    assert configured("-m", "a", "-d", "b") == ScanConfig("a", "b")


def test_a_config_file_gives_way_to_what_is_typed(configured: Any, tmp_path: Path) -> None:
    file = tmp_path / "scan.yaml"
    file.write_text("model_path: from_file\ndataset-path: d.jsonl\nbatch_size: 9\nskip_bad: true\nstore: integral\nseed: 4\n")
    options = configured("--config", file, "--model-path", "typed", "--no-skip-bad", "--batch-size", 4)
    assert (options.model_path, options.dataset_path) == ("typed", "d.jsonl")
    assert (options.skip_bad, options.batch_size) == (False, 4)  # also where what is typed is the default
    assert (options.store, options.seed) == ("integral", 4)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("modelpath: a\n", ["'modelpath'", "did you mean 'model_path'?"]),
        ("- a\n", ["config must be a YAML mapping", "list"]),
        ("a: [\n", ["config must be valid YAML"]),
        ("dataset_path: d\nmodel_path: m\nlimit: 1.5\n", ["limit must be a whole number of at least 1, got 1.5"]),
        ("dataset_path: d\nmodel_path: m\nstore: all\n", ["store must be one of records, integral, got 'all'"]),
        (None, ["config must be a readable file", "No such file"]),
    ],
    ids=["key", "list", "yaml", "number", "choice", "missing"],
)
def test_bad_config_files(cli: Cli, tmp_path: Path, content: str | None, parts: list[str]) -> None:
    file = tmp_path / "scan.yaml"
    if content is not None:
        file.write_text(content)
    one_line(cli("scan", "--config", file), *parts, command="tinyonn scan")


def test_a_scan_and_its_screen(cli: Cli, model: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mscan"
    ran = cli("scan", "--model_path", model, "--dataset_path", corpus, "--output_path", output, "--limit", 5)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0].startswith("scanned  5 sequences, ")
    assert f"written  {output}, " in ran.out
    assert max(map(len, ran.out.replace(str(output), "x").splitlines())) <= 80
    with MscanReader(output) as reader:
        assert sorted(reader.sequences[i].sequence_id for i in range(5)) == [f"s{i}" for i in range(5)]
        assert reader.metadata["topic"] == "cats"
        tokens = sum(reader.sequences[i].num_tokens for i in range(5))
    assert f"5 sequences, {tokens} tokens" in ran.out

    again = cli("scan", "-m", model, "-d", corpus, "-o", output, "--limit", 5)
    one_line(again, str(output), "complete", "--overwrite", command="tinyonn scan")
    more = cli("scan", "-m", model, "-d", corpus, "-o", output)
    assert more.code == 0, more.err
    assert more.out.splitlines()[0].startswith("scanned  7 sequences")
    assert "5 were there" in more.out
    other = cli("scan", "-m", model, "-d", corpus, "-o", output, "--max-length", 9)
    one_line(other, "same configuration", "max_length", command="tinyonn scan")
    assert cli("scan", "-m", model, "-d", corpus, "-o", output, "--max-length", 9, "--overwrite").code == 0


def test_time_includes_loading_and_speed_leaves_it_out(
    cli: Cli, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, busy = 0.5, [0.0]
    load, forward_and_backward = runner.load_model, runner.ScanEngine.scan

    def slow_load(*given: Any, **named: Any) -> Any:
        time.sleep(loading)
        return load(*given, **named)

    def slow_scan(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        time.sleep(0.1)
        try:
            return forward_and_backward(*given, **named)
        finally:
            busy[0] += time.perf_counter() - started

    monkeypatch.setattr(runner, "load_model", slow_load)
    monkeypatch.setattr(runner.ScanEngine, "scan", slow_scan)
    output = tmp_path / "out.mscan"
    ran = cli("scan", "-m", model, "-d", corpus, "-o", output, "--limit", 8, "--batch-size", 2)
    assert ran.code == 0, ran.err
    shown = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    seconds = re.fullmatch(r"(\d+\.\d) s, loading included", shown["time"])
    speed = re.fullmatch(r"([\d,]+) tokens/s, loading left out", shown["speed"])
    assert seconds is not None, ran.out
    assert speed is not None, ran.out
    with MscanReader(output) as reader:
        tokens = sum(len(reader.sequences[at].token_ids) for at in range(8))
    rate = float(speed[1].replace(",", ""))
    # What is shown is rounded: to a whole token a second, and to a tenth of a second.
    assert busy[0] >= 0.4
    assert tokens / (rate + 0.5) <= float(seconds[1]) + 0.05 - loading
    assert tokens / (rate - 0.5) >= busy[0]


def test_a_loss_that_is_not_finite_is_said(cli: Cli, model: Path, corpus: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "m"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    ran = cli("scan", "-m", broken, "-d", corpus, "-o", tmp_path / "o.mscan", "--limit", 3)
    assert ran.code == 0
    assert "not finite  loss and gradients in 3 of 3 sequences" in ran.out


def test_the_default_output_is_named_for_model_and_topic(
    cli: Cli, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("scan", "-m", model, "-d", corpus, "--limit", 1).code == 0
    assert (tmp_path / "data/scans/tiny_cats.mscan").is_file()


def test_the_estimate_is_close_and_writes_nothing(cli: Cli, model: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mscan"
    ran = cli("scan", "-m", model, "-d", corpus, "-o", output, "--estimate")
    assert ran.code == 0, ran.err
    assert not output.exists()
    values = {line[:16].strip(): line[16:] for line in ran.out.splitlines()}
    assert {"sequences", "tokens", "blocks a token", "bytes a token", "disk", "peak memory"} <= set(values)
    assert values["sequences"] == "12"
    assert cli("scan", "-m", model, "-d", corpus, "-o", output).code == 0
    number, unit = values["disk"].split(",")[0].split()
    estimated = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert 0.7 < estimated / output.stat().st_size < 1.4


def test_malformed_lines_are_named_or_counted(cli: Cli, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n{"text": "two"\n{"body": "three"}\n{"text": "four"}\n')
    output = tmp_path / "out.mscan"
    one_line(cli("scan", "-m", model, "-d", data, "-o", output), f"{data}, line 2", "malformed JSON", command="tinyonn scan")
    assert not output.exists()
    ran = cli("scan", "-m", model, "-d", data, "-o", output, "--skip-bad")
    assert ran.code == 0, ran.err
    assert "2 sequences" in ran.out
    assert "left out  2 malformed record" in ran.out


def test_a_field_that_is_not_there(cli: Cli, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"body": "some words", "label": 1}) + "\n")
    command = ("scan", "-m", model, "-d", data, "-o", tmp_path / "out.mscan")
    one_line(cli(*command), "line 1", "its fields are body, label", command="tinyonn scan")
    one_line(cli(*command, "--text-field", "txt"), "must have the field 'txt'", "body, label", command="tinyonn scan")
    assert cli(*command, "--text_field", "body").code == 0


def test_bad_data_sets(cli: Cli, model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    out = ("-o", tmp_path / "out.mscan")
    one_line(cli("scan", "-m", model, "-d", empty, *out), "dataset_path must", "empty", command="tinyonn scan")
    one_line(cli("scan", "-m", model, "-d", tmp_path / "none.jsonl", *out), "existing file", "none.jsonl", command="tinyonn scan")
    one_line(cli("scan", "-m", model, "-d", tmp_path, *out), "got the folder", "tinyonn corpus", command="tinyonn scan")
    one_line(cli("scan", "-m", model, *out), "dataset_path must be given", "--dataset-path", command="tinyonn scan")


def test_bad_models(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    out = ("-d", corpus, "-o", tmp_path / "out.mscan")
    one_line(cli("scan", "-m", tmp_path, *out), "model_path must", str(tmp_path), command="tinyonn scan")
    one_line(cli("scan", "-m", corpus, *out), "model_path must", command="tinyonn scan")
    no_padding = save_tiny_model(tmp_path / "unpadded", end_token=False)
    one_line(cli("scan", "-m", no_padding, *out), "batch_size must be 1", "tokenizer has no padding", command="tinyonn scan")
    assert cli("scan", "-m", no_padding, *out, "--batch-size", 1, "--limit", 2).code == 0


def test_bad_outputs(cli: Cli, model: Path, corpus: Path, tmp_path: Path) -> None:
    command = ("scan", "-m", model, "-d", corpus)
    one_line(cli(*command, "-o", tmp_path / "x.txt"), "output_path must end in .mscan", command="tinyonn scan")
    one_line(cli(*command, "-o", corpus / "x.mscan"), "output_path", str(corpus), command="tinyonn scan")
    (tmp_path / "folder.mscan").mkdir()
    one_line(cli(*command, "-o", tmp_path / "folder.mscan"), "folder.mscan", command="tinyonn scan")
    (tmp_path / "text.mscan").write_text("not a scan at all, only words")
    one_line(cli(*command, "-o", tmp_path / "text.mscan"), "text.mscan", command="tinyonn scan")


def test_bad_values_name_the_option(cli: Cli, model: Path, corpus: Path, tmp_path: Path) -> None:
    command = ("scan", "-m", model, "-d", corpus, "-o", tmp_path / "x.mscan")
    for arguments, parts in (
        (("--device", "tpu"), ("device must be auto, cpu, cuda or cuda:N, got 'tpu'",)),
        (("--device", "cuda:99"), ("device",)),
        (("--targets", "nowhere_at_all"), ("targets", "nowhere_at_all")),
        (("--limit", 0), ("limit must be a whole number of at least 1, got 0",)),
        (("--generate", -1), ("generate must be a whole number of at least 0, got -1",)),
        (("--temperature", "nan"), ("temperature",)),
        (("--generate", 4000), ("generate must leave room",)),
    ):
        one_line(cli(*command, *arguments), *parts, command="tinyonn scan")
    assert not (tmp_path / "x.mscan").exists()


def test_a_model_larger_than_memory(cli: Cli, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tinyonn.hf.loading as loading

    monkeypatch.setattr(loading, "available_memory", lambda device: 1000)
    ran = cli("scan", "-m", model, "-d", corpus, "-o", tmp_path / "x.mscan")
    one_line(ran, "memory", command="tinyonn scan")
    assert "--dtype bf16" in ran.err


def test_memory_that_runs_out_names_the_options_to_lower(
    cli: Cli, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyonn.scan import ScanEngine

    def full(*_: object, **__: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
        )

    monkeypatch.setattr(ScanEngine, "scan", full)
    ran = cli("scan", "-m", model, "-d", corpus, "-o", tmp_path / "x.mscan")
    one_line(ran, "--batch-size", "--max-length", "--dtype bf16", "--store integral", command="tinyonn scan")


def test_ctrl_c_leaves_a_readable_file_and_says_how_to_go_on(
    cli: Cli, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyonn.scan import ScanEngine

    scan, calls = ScanEngine.scan, []

    def interrupted(self: ScanEngine, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scan(self, *arguments, **options)

    output = tmp_path / "x.mscan"
    monkeypatch.setattr(ScanEngine, "scan", interrupted)
    ran = cli("scan", "-m", model, "-d", corpus, "-o", output, "--batch-size", 2)
    assert ran.code == 130
    assert ran.err.startswith("tinyonn scan: interrupted: ")
    assert "continues from there" in ran.err
    assert ran.err.count("\n") == 1
    monkeypatch.undo()
    with MscanReader(output) as reader:
        assert len(reader.sequences) == 4
    ran = cli("scan", "-m", model, "-d", corpus, "-o", output, "--batch-size", 2)
    assert ran.code == 0, ran.err
    assert "scanned  8 sequences" in ran.out
    assert "4 were there" in ran.out


def test_as_a_process_results_and_progress_part(model: Path, corpus: Path, tmp_path: Path) -> None:
    ran = shell("scan", "--model_path", model, "--dataset_path", corpus, "--output_path", tmp_path / "x.mscan")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("scanned ")
    assert ran.stderr == ""  # no bar, no warning, no chatter of a library
    assert "\x1b" not in ran.stdout


def test_generation_marks_the_answers(cli: Cli, model: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.mscan"
    assert cli("scan", "-m", model, "-d", corpus, "-o", output, "--limit", 2, "--generate", 4, "--credit", "local").code == 0
    with MscanReader(output) as reader:
        assert reader.metadata["credit"] == "local"
        assert 1 <= int(reader.sequences[0].mask.sum()) <= 4


def test_progress_names_what_is_scanned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "PLAIN_EVERY", 0.0)
    with screen.Progress("loading") as bar:
        for state in (ScanProgress("loading", 0, 8), ScanProgress("scanning", 2, 8, 512, 64.0, 2.5)):
            show_progress(bar, state, "python")
    loading, scanning = capsys.readouterr().err.splitlines()
    assert loading.startswith("loading: the model, for python, ")
    assert scanning.startswith("scanning python: 25 %, 2/8 texts, 64 tokens/s, loss 2.50, ")
