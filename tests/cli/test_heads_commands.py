"""`tinyonn heads`: from a command line to the files and the page; what can be wrong is one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyonn.cli import heads_plasticity, screen
from tinyonn.heads.plasticity import measurement
from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.heads.plasticity.records import StepResult
from tinyonn.heads.score.config import ScoreConfig

from .conftest import Cli, one_line, study, write

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


def test_scores_are_written_with_their_page(cli: Cli, language_model: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    # Underscores are taken too, in names and in values.
    given = ["--model_path", language_model, "--data-path", questions, "--output_dir", out, "--max-samples", 8, "--top_k", 3]
    ran = cli("heads", "score", *given, "--score-query-mode", "all_tokens", "--norm-mode", "percentile")
    assert ran.code == 0, ran.err
    said = dict(line.split(maxsplit=1) for line in ran.out.splitlines() if not line.startswith("best"))
    assert said["scored"] == "12 heads in 3 layers of tiny-qwen3"
    assert said["over"].startswith("8 samples, ")
    assert said["page"] == str(out / "index.html")
    raw = (out / "scores_raw.csv").read_text().splitlines()
    assert raw[0] == "layer,head,out_raw,ent_raw,task_raw"
    assert [line.split(",")[:2] for line in raw[1:]] == [[str(layer), str(head)] for layer in range(3) for head in range(4)]
    best = json.loads((out / "topk_global.json").read_text())
    assert len(best) == 3
    assert ", ".join(f"{head['layer']}.{head['head']}" for head in best) in ran.out
    assert (out / "index.html").read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in out.glob("*.png"))


@pytest.mark.usefixtures("plain")
def test_one_head_is_told_as_one(cli: Cli, language_model: Path, questions: Path, tmp_path: Path) -> None:
    ran = cli("heads", "score", "-m", language_model, "-d", questions, "-o", tmp_path / "out", "--top-k", 1, "--max-samples", 1)
    assert ran.code == 0, ran.err
    page = (tmp_path / "out" / "index.html").read_text()
    assert "1 sample, 3 layers, 12 heads. Written by tinyonn." in page
    assert "Highest combined score, 1 head<" in page
    assert "The first head of each layer" in page


def test_a_config_file_is_read_and_options_win_over_it(cli: Cli, language_model: Path, questions: Path, tmp_path: Path) -> None:
    printed = cli("heads", "score", "--print-config").out
    config = tmp_path / "score.yaml"
    config.write_text(printed.replace("max_samples: ", "max_samples: 6 ").replace("top_k: 20", "top_k: 2"))
    out = tmp_path / "scores"
    ran = cli("heads", "score", "--config", config, "-m", language_model, "-d", questions, "-o", out, "--max-samples", 4)
    assert ran.code == 0, ran.err
    assert "4 samples" in ran.out
    used = ScoreConfig.from_yaml(out / "config.yaml")
    assert (used.max_samples, used.top_k, used.lambda_ent) == (4, 2, 0.5)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["model_path must be given", "--model-path"]),
        (["-m", "{model}", "-d", "{data}"], ["output_dir must be given"]),
        (["-m", "{model}", "-d", "{data}", "-o", "{out}", "--max-samples", "13"], ["max_samples", "12", "13"]),
        (["-m", "{model}", "-d", "{pairs}", "-o", "{out}"], ["title, body"]),
        (["-m", "{model}", "-d", "nowhere.jsonl", "-o", "{out}"], ["nowhere.jsonl"]),
        (["-m", "{model}", "-d", "{data}", "-o", "{out}", "--lambda-ent", "-1"], ["lambda_ent must be at least 0"]),
        (["-m", "{model}", "-d", "{data}", "-o", "{out}", "--score-query-mode", "first"], ["'first' is not one of"]),
        (["-m", "{model}", "-d", "{data}", "-o", "{out}", "--device", "gpu"], ["device must be auto, cpu, cuda or cuda:N"]),
    ],
    ids=["nothing", "no output", "too many", "fields", "no data", "weight", "mode", "device"],
)
def test_bad_scoring_is_one_line(
    cli: Cli, language_model: Path, questions: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    odd = write(tmp_path / "odd.jsonl", [{"title": "t", "body": "b"}])
    places = {"model": language_model, "data": questions, "out": tmp_path / "out", "pairs": odd}
    ran = cli("heads", "score", *(argument.format(**places) for argument in arguments))
    one_line(ran, *parts, command="tinyonn heads score")
    assert not list((tmp_path / "out").glob("*.csv"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "-m", "{here}", "-d", "{here}/nowhere.jsonl", "-o", "{here}/out"], "data_path must be an existing file"),
        (["score", "-m", "{here}/no/model", "-d", "{here}/data.jsonl", "-o", "{here}/out"], "model_path must be an existing folder"),
        (["plasticity", "run", "-t", "rte", "-m", "{here}/no/model", "-d", "{here}", "-o", "{here}/out"], "model_path must be an existing"),
        (["plasticity", "run", "-t", "rte", "-m", "{here}", "-d", "{here}/nowhere.jsonl", "-o", "{here}/out"], "data_path must be an"),
    ],
)  # fmt: skip
def test_a_mistyped_path_waits_for_no_library(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text("{}")
    code = (
        "import sys; from tinyonn.cli.app import run; run(['heads', *sys.argv[1:]]); "
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    given = [argument.format(here=tmp_path) for argument in arguments]
    ran = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=60, check=True)
    assert message in ran.stderr
    assert ran.stdout.strip() == "[]"
    assert not (tmp_path / "out").exists()


def test_a_study_runs_is_kept_and_joins_its_seeds(
    cli: Cli, encoder: Path, pairs: Path, tmp_path: Path, without_figures: Callable[[], None]
) -> None:
    out = tmp_path / "study"
    ran = cli("heads", "plasticity", "run", *study(encoder, pairs, out, "--seed", 1, "--seed", 2))
    assert ran.code == 0, ran.err
    folder = out / "boolq" / "seed1"
    for name in ("importance_pre", "importance_post", "gradfisher_pre", "update"):
        assert len((folder / f"{name}.jsonl").read_text().splitlines()) == 12
    for name in ("heads.csv", "stats.json", "cases.json", "fig_I_vs_U.png", "fig_I_vs_G.png", "fig_stats.png", "index.html"):
        assert (folder / name).stat().st_size
    assert [seed["seed"] for seed in json.loads((out / "boolq" / "aggregate.json").read_text())["seeds"]] == [1, 2]
    pages = [line.split()[-1] for line in ran.out.splitlines() if line.startswith("page")]
    assert pages == [str(folder / "index.html"), str(out / "boolq" / "seed2" / "index.html"), str(out / "boolq" / "index.html")]
    assert ran.out.count("expectations") == 2

    without_figures()
    before = (folder / "ckpt_final" / "model.safetensors").stat().st_mtime_ns
    again = cli("heads", "plasticity", "run", *study(encoder, pairs, out, "--seed", 1))
    assert again.code == 0, again.err
    assert again.out.count("kept from an earlier run") == 2
    assert (folder / "ckpt_final" / "model.safetensors").stat().st_mtime_ns == before


def test_a_study_of_an_earlier_version_is_kept(cli: Cli, encoder: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    assert cli("heads", "plasticity", "train", *study(encoder, pairs, out)).code == 0
    folder = out / "boolq" / "seed42"
    options = (folder / "train_config.yaml").read_text()
    assert "skip_unlabelled: false\n" in options
    (folder / "train_config.yaml").write_text(options.replace("skip_unlabelled: false\n", ""))
    trained = json.loads((folder / "train.json").read_text())
    del trained["options"]["skip_unlabelled"], trained["unlabelled_rows"]
    (folder / "train.json").write_text(json.dumps(trained))
    again = cli("heads", "plasticity", "train", *study(encoder, pairs, out))
    assert again.code == 0, again.err
    assert "kept from an earlier run" in again.out


@pytest.mark.usefixtures("plain")
def test_one_config_file_serves_every_step(cli: Cli, encoder: Path, pairs: Path, tmp_path: Path) -> None:
    printed = cli("heads", "plasticity", "run", "--print-config").out
    assert printed == cli("heads", "plasticity", "train", "--print-config").out
    config, out = tmp_path / "study.yaml", tmp_path / "study"
    values = {"model_path": encoder, "task": "boolq", "data_path": pairs, "output_dir": out, "eval_size": 8, "epochs": 1, "batch_size": 8}
    filled = printed
    for name, value in values.items():
        filled = re.sub(rf"(?m)^{name}:[^#\n]*", f"{name}: {value}  ", filled)
    config.write_text(filled)
    for step in ("train", "measure", "report"):
        ran = cli("heads", "plasticity", step, "--config", config)
        assert ran.code == 0, ran.err
    used = PlasticityConfig.from_yaml(out / "boolq" / "seed42" / "train_config.yaml")
    assert (used.epochs, used.eval_size, used.batch_size, used.learning_rate) == (1, 8, 8, 2e-5)
    assert (out / "boolq" / "seed42" / "index.html").is_file()


@pytest.mark.usefixtures("plain")
def test_later_steps_take_the_options_of_the_training(
    cli: Cli, encoder: Path, pairs: Path, tmp_path: Path, reseal: Callable[[Path], None]
) -> None:
    out = tmp_path / "study"
    folder = out / "boolq" / "seed42"
    place = ["--task", "boolq", "--output-dir", out]
    one_line(
        cli("heads", "plasticity", "measure", *place), "run tinyonn heads plasticity train", command="tinyonn heads plasticity measure"
    )
    assert cli("heads", "plasticity", "train", *study(encoder, pairs, out)).code == 0
    one_line(
        cli("heads", "plasticity", "report", *place), "run tinyonn heads plasticity measure", command="tinyonn heads plasticity report"
    )
    measured = cli("heads", "plasticity", "measure", *place)
    assert measured.code == 0, measured.err
    assert "12 heads over 8 samples" in measured.out
    # Heads that are all worth the same have no ranks: said, not a traceback.
    rows = [json.loads(line) for line in (folder / "importance_pre.jsonl").read_text().splitlines()]
    (tmp_path / "kept.jsonl").write_bytes((folder / "importance_pre.jsonl").read_bytes())
    write(folder / "importance_pre.jsonl", [{**row, "loss_increase": 0.0} for row in rows])
    kept = (folder / "measure_parts.json").read_bytes()
    edited = cli("heads", "plasticity", "report", *place)
    one_line(edited, "importance_pre.jsonl", "run tinyonn heads plasticity measure", command="tinyonn heads plasticity report")
    reseal(folder)
    flat = cli("heads", "plasticity", "report", *place)
    assert flat.code == 0, flat.err
    assert flat.out.count("overlap: I_pre ") == 3
    (folder / "importance_pre.jsonl").write_bytes((tmp_path / "kept.jsonl").read_bytes())
    (folder / "measure_parts.json").write_bytes(kept)
    reported = cli("heads", "plasticity", "report", *place, "--top-k", 3, "--high", 80, "--low", 40)
    assert reported.code == 0, reported.err
    assert "top-3 overlap: " in reported.out
    stats = json.loads((folder / "stats.json").read_text())
    assert (stats["top_k"], stats["high"], stats["low"]) == (3, 80, 40)
    for step in ("measure", "report"):
        other = cli("heads", "plasticity", step, *place, "--eval-size", 9)
        one_line(other, "eval_size 9 (there 8)", "options must be those of the training", command=f"tinyonn heads plasticity {step}")
        assert "--overwrite" not in other.err  # it would not help
    with (folder / "train_config.yaml").open("a") as file:
        file.write("learning_rat: 1\n")
    for step in ("measure", "report"):
        said = f"{folder / 'train_config.yaml'}: option must be a known one"
        one_line(cli("heads", "plasticity", step, *place), said, "'learning_rat'", command=f"tinyonn heads plasticity {step}")


@pytest.mark.usefixtures("plain")
def test_later_steps_take_the_seeds_that_are_there(cli: Cli, encoder: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    place = ["--task", "boolq", "--output-dir", out]
    assert cli("heads", "plasticity", "train", *study(encoder, pairs, out, "--seed", 1, "--seed", 2)).code == 0
    early = cli("heads", "plasticity", "report", *place)
    one_line(early, "must hold measure.json", "got none; run tinyonn heads plasticity measure.", command="tinyonn heads plasticity report")
    for step, mark in (("measure", "measure.json"), ("report", "stats.json")):
        other = cli("heads", "plasticity", step, *place, "--seed", 2, "--seed", 3)
        said = "must hold train.json of seed 3, got that of seeds 1, 2; run tinyonn heads plasticity train --seed 3."
        one_line(other, said, command=f"tinyonn heads plasticity {step}")
        # One set of options serves all steps.
        given = [
            "--model-path",
            encoder,
            "--data-path",
            pairs,
            "--eval-size",
            8,
            "--eval-seed",
            999,
            "--top-k",
            3,
            "--high",
            80,
            "--low",
            20,
        ]
        ran = cli("heads", "plasticity", step, *place, *given)
        assert ran.code == 0, ran.err
        assert sorted(path.parent.name for path in (out / "boolq").glob(f"*/{mark}")) == ["seed1", "seed2"]


def test_a_step_lists_the_options_that_matter_to_it(cli: Cli) -> None:
    def options(step: str) -> set[str]:
        return set(re.findall(r"--[a-z][\w-]*", cli("heads", "plasticity", step, "--help").out))

    everywhere = [
        "--model-path",
        "--task",
        "--data-path",
        "--seed",
        "--eval-size",
        "--eval-seed",
        "--top-k",
        "--high",
        "--low",
        "--output-dir",
        "--config",
    ]
    assert set(everywhere) <= options("report") < options("measure") < options("train") == options("run")
    assert not {"--overwrite", "--learning-rate", "--batch-size", "--device"} & options("report")
    assert "--learning-rate" not in options("measure")


@pytest.mark.usefixtures("plain")
def test_seeds_of_another_study_do_not_stop_a_report(cli: Cli, encoder: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    assert cli("heads", "plasticity", "run", *study(encoder, pairs, out, "--seed", 1)).code == 0
    other = cli("heads", "plasticity", "run", *study(encoder, pairs, out, "--seed", 3, "--learning-rate", 1e-4))
    assert "More than the seed differs in training: learning_rate is 2e-05 in seed1 and 0.0001 in seed3." in other.out
    ran = cli("heads", "plasticity", "run", *study(encoder, pairs, out, "--seed", 2, "--top-k", 3))
    assert ran.code == 0, ran.err
    assert "not joined" in ran.out
    assert str(out / "boolq" / "seed2" / "index.html") in ran.out


@pytest.mark.parametrize(("accuracy", "told"), [(0.4375, True), (0.5625, True), (0.75, False)])
def test_training_that_learned_nothing_is_told(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: float, told: bool
) -> None:
    facts = {"heads": 12, "samples": 16, "seconds": 1.0, "base_accuracy_post": accuracy, "commonest_class": 0.5625}
    result = StepResult(tmp_path, True, facts)
    monkeypatch.setattr(measurement, "measure", lambda *given: result)
    monkeypatch.setattr(heads_plasticity, "_later_seeds", lambda *given: [1])
    ran = cli("heads", "plasticity", "measure", "--task", "boolq", "-m", "m", "--output-dir", tmp_path)
    assert ran.code == 0, ran.err
    said = f"note      accuracy {accuracy:.2f}, commonest class 0.56: training did no better than a constant prediction of that class"
    assert (said in ran.out.splitlines()) == told


@pytest.mark.usefixtures("plain")
def test_progress_names_its_seed(cli: Cli, encoder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "PLAIN_EVERY", 0.0)
    ran = cli("heads", "plasticity", "run", *study(encoder, pairs, tmp_path / "study", "--seed", 5, "--seed", 6))
    assert ran.code == 0, ran.err
    for seed in (5, 6):
        assert re.search(rf"^training: 100 %, seed {seed}: step 2/2, loss ", ran.err, re.MULTILINE)
        assert re.search(rf"^importance before training: 100 %, seed {seed}: 8/8 samples, ", ran.err, re.MULTILINE)


@pytest.mark.usefixtures("plain")
def test_a_damaged_seed_is_left_out_of_the_report_over_all(cli: Cli, encoder: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    assert cli("heads", "plasticity", "run", *study(encoder, pairs, out, "--seed", 1, "--seed", 2)).code == 0
    damaged = out / "boolq" / "seed2" / "update.jsonl"
    damaged.write_text("".join(damaged.read_text().splitlines(keepends=True)[:5]))
    ran = cli("heads", "plasticity", "report", "-t", "boolq", "-o", out, "--seed", 1)
    assert ran.code == 0, ran.err
    joined = json.loads((out / "boolq" / "aggregate.json").read_text())
    assert [seed["seed"] for seed in joined["seeds"]] == [1]
    assert re.search(r"^left out +seed2: .*; run tinyonn heads plasticity measure", ran.out, re.MULTILINE)
    (left_out,) = joined["incomplete"]
    assert (left_out["folder"], left_out["step"]) == ("seed2", "tinyonn heads plasticity measure")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["-t", "boolq"], ["model_path must be given"]),
        (["-m", "{model}"], ["task must be given"]),
        (["-m", "{model}", "-t", "cola", "-d", "{data}"], ["task must be boolq, mnli, rte or the path of a YAML file, got 'cola'"]),
        (["-m", "{model}", "-t", "rte", "-d", "{data}", "-o", "{out}"], ["sentence1", "question, passage, answer"]),
        (["-m", "{model}", "-t", "boolq", "-d", "{data}", "-o", "{out}", "--eval-size", "41"], ["eval_size", "40"]),
        (["-m", "{model}", "-t", "boolq", "-d", "{data}", "-o", "{out}", "--high", "20"], ["low must be below high"]),
    ],
    ids=["no model", "no task", "unknown task", "fields", "too few rows", "percentiles"],
)
def test_a_bad_study_is_one_line(cli: Cli, encoder: Path, pairs: Path, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    places = {"model": encoder, "data": pairs, "out": tmp_path / "out"}
    ran = cli("heads", "plasticity", "run", *(argument.format(**places) for argument in arguments))
    one_line(ran, *parts, command="tinyonn heads plasticity run")
    assert not list((tmp_path / "out").rglob("train.json"))
