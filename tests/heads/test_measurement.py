"""The measure step: files of a trained classifier against weights cut by hand, what an interruption leaves, one line for bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tinyonn.errors import InputError
from tinyonn.heads import ablation, measurement
from tinyonn.heads.classification import load_task
from tinyonn.heads.measurement import measure
from tinyonn.heads.plasticity_config import PlasticityConfig
from tinyonn.heads.summary import summarise
from tinyonn.heads.training import train
from tinyonn.testing import save_tiny_model

KEYS = {
    "importance_pre.jsonl": ["layer", "head", "loss_increase", "accuracy_drop", "taylor", "taylor_abs"],
    "importance_post.jsonl": ["layer", "head", "loss_increase", "accuracy_drop", "taylor", "taylor_abs"],
    "gradfisher_pre.jsonl": ["layer", "head", "gradient_norm", "fisher"],
    "update.jsonl": ["layer", "head", "Uq", "Uk", "Uv", "Uo", "U", "Urel"],
}
WIDE = {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 48}
ROWS, MEASURED = 40, 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for n in range(ROWS):
            record = {"question": f"{'xyz'[n % 3] * 4} {n}", "passage": "ab" * (n % 7), "answer": n % 3 == 0}
            file.write(f"{json.dumps(record)}\n")
    return path


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PlasticityConfig]:
    """`trained(arch)`: the configuration of a training that is complete; one for each architecture."""
    made: dict[str, PlasticityConfig] = {}

    def make(arch: str = "bert", **sizes: Any) -> PlasticityConfig:
        if arch not in made:
            model = save_tiny_model(tmp_path_factory.mktemp("model") / arch, arch, initializer_range=0.1, **sizes)
            made[arch] = PlasticityConfig(
                model_path=str(model),
                task="boolq",
                data_path=str(data),
                output_dir=str(tmp_path_factory.mktemp("trained")),
                device="cpu",
                eval_size=MEASURED,
                max_length=32,
                batch_size=5,
                max_steps=4,
                learning_rate=3e-3,
            )
            train(made[arch])
        return made[arch]

    return make


@pytest.fixture
def study(trained: Callable[..., PlasticityConfig], tmp_path: Path) -> Callable[..., PlasticityConfig]:
    """`study(arch, name, **options)`: a copy of that training in a folder of this test's own."""

    def make(arch: str = "bert", name: str = "out", **options: Any) -> PlasticityConfig:
        source = trained(arch, **(WIDE if arch == "deberta-v2" else {}))
        values = {**vars(source), "output_dir": str(tmp_path / name), **options}
        config = PlasticityConfig(**values)
        if not config.folder.exists():
            shutil.copytree(source.folder, config.folder)
        return config

    return make


def lines(config: PlasticityConfig, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.folder / name).read_text().splitlines()]


def content(config: PlasticityConfig) -> dict[str, bytes]:
    return {name: (config.folder / name).read_bytes() for name in (*KEYS, "eval_subset.json")}


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


def by_hand(config: PlasticityConfig, checkpoint: str, cut: tuple[str, int] | None) -> tuple[float, float]:
    """Mean loss and accuracy over the measured rows, one by one; without a head's columns of an output projection."""
    model = AutoModelForSequenceClassification.from_pretrained(config.folder / checkpoint).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(config.folder / checkpoint)
    if cut is not None:
        name, head = cut
        model.get_parameter(name).data[:, 12 * head : 12 * head + 12] = 0
    rows = [json.loads(line) for line in Path(config.data_path).read_text().splitlines()]
    losses, right = [], []
    for index in json.loads((config.folder / "eval_subset.json").read_text())["indices"]:
        encoded = tokenizer([rows[index]["question"]], [rows[index]["passage"]], truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits
        label = int(rows[index]["answer"])
        losses.append(functional.cross_entropy(logits, torch.tensor([label])).item())
        right.append(logits.argmax().item() == label)
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize(
    ("arch", "output"),
    [("bert", "bert.encoder.layer.{}.attention.output.dense.weight"), ("llama", "model.layers.{}.self_attn.o_proj.weight")],
    ids=["bert", "llama"],
)
def test_importance_is_what_the_loss_rises_by_when_the_head_is_cut_out(study, arch, output):
    config = study(arch)
    summary = measure(config).summary
    for when, checkpoint in (("pre", "ckpt_init"), ("post", "ckpt_final")):
        base = by_hand(config, checkpoint, None)
        assert (summary[f"base_loss_{when}"], summary[f"base_accuracy_{when}"]) == pytest.approx(base, rel=1e-5)
        found = {(row["layer"], row["head"]): row for row in lines(config, f"importance_{when}.jsonl")}
        for layer, head in [(0, 0), (1, 3), (2, 1)]:
            loss, accuracy = by_hand(config, checkpoint, (output.format(layer), head))
            assert found[layer, head]["loss_increase"] == pytest.approx(loss - base[0], abs=2e-6)
            assert found[layer, head]["accuracy_drop"] == pytest.approx(base[1] - accuracy)
    assert summary["replayed_pre"]
    assert summary["replayed_post"]
    assert summary["gate_check_pre"] > 0


def test_every_file_has_a_line_for_every_head(study):
    config = study()
    result = measure(config)
    assert not result.kept
    for name, keys in KEYS.items():
        assert [list(row) for row in lines(config, name)] == [keys] * 12
        assert [(row["layer"], row["head"]) for row in lines(config, name)] == [(layer, head) for layer in range(3) for head in range(4)]
    summary = json.loads((config.folder / "measure.json").read_text())
    assert summary == result.summary
    expected = {"task": "boolq", "seed": 42, "samples": MEASURED, "layers": 3, "heads": 12, "dtype": "fp32", "device": "cpu"}
    assert expected.items() <= summary.items()
    assert summary["seconds"] > 0


def test_a_deberta_of_twelve_by_twelve_gives_144_lines(study):
    config = study("deberta-v2", batch_size=MEASURED)
    measure(config)
    for name in KEYS:
        assert [(row["layer"], row["head"]) for row in lines(config, name)] == [(layer, head) for layer in range(12) for head in range(12)]
    before, after = (load_file(config.folder / name / "model.safetensors") for name in ("ckpt_init", "ckpt_final"))
    name = "deberta.encoder.layer.7.attention.self.value_proj.weight"
    moved = (after[name] - before[name])[4 * 5 : 4 * 6].double().norm().item()
    assert lines(config, "update.jsonl")[7 * 12 + 5]["Uv"] == pytest.approx(moved, rel=1e-6)
    assert all(row["gradient_norm"] > 0 and row["fisher"] >= row["gradient_norm"] ** 2 for row in lines(config, "gradfisher_pre.jsonl"))


def test_the_report_step_takes_what_measuring_writes(study):
    config = study()
    measure(config)
    summarise(config)
    header, *rows = (config.folder / "heads.csv").read_text().splitlines()
    assert len(rows) == 12
    first = dict(zip(header.split(","), rows[0].split(","), strict=True))
    assert float(first["I_pre"]) == pytest.approx(lines(config, "importance_pre.jsonl")[0]["loss_increase"], rel=1e-8)


def test_the_subset_names_the_rows_that_were_held_out(study):
    config = study()
    measure(config)
    subset = json.loads((config.folder / "eval_subset.json").read_text())
    held = load_task(config).evaluation
    assert subset == {
        "source": config.data_path,
        "seed": 999,
        "size": MEASURED,
        "indices": [example.row for example in held],
        "labels": [int(example.row % 3 == 0) for example in held],
    }


def test_two_measurements_write_the_same_bytes(study):
    first, second = study(name="a"), study(name="b")
    measure(first)
    measure(second)
    assert content(first) == content(second)


def test_batches_of_another_size_change_rounding_alone(study):
    first, second = study(name="a"), study(name="b", batch_size=3)
    measure(first)
    measure(second)
    for name in KEYS:
        for row, other in zip(lines(first, name), lines(second, name), strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-6)


STAGES = ["importance before training", "first-order importance before training", "gradients before training", "importance after training"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_measurement_goes_on_and_ends_in_the_same_files(study, stage):
    whole = study(name="whole")
    measure(whole)
    config = study()

    def kill(now):
        if now.stage == stage:
            raise Killed

    with pytest.raises(Killed):
        measure(config, kill)
    assert not (config.folder / "measure.json").exists()
    done = [name for name in KEYS if (config.folder / name).exists()]
    assert len(done) == {0: 1, 1: 1, 2: 2, 3: 3}[STAGES.index(stage)]
    times = {name: (config.folder / name).stat().st_mtime_ns for name in done}
    result = measure(config)
    assert not result.kept
    assert content(config) == content(whole)
    assert {name: (config.folder / name).stat().st_mtime_ns for name in done} == times
    ignored = {"seconds", "training_sha256"}
    assert {k: v for k, v in result.summary.items() if k not in ignored} == {
        k: v for k, v in measure(whole).summary.items() if k not in ignored
    }


def test_a_complete_measurement_is_kept(study):
    config = study()
    first = measure(config)
    times = {path: path.stat().st_mtime_ns for path in config.folder.iterdir()}
    again = measure(config)
    assert again.kept
    assert again.summary == first.summary
    assert {path: path.stat().st_mtime_ns for path in config.folder.iterdir()} == times


@pytest.mark.parametrize(
    "spoil",
    [lambda text: text[: text.rindex("{")], lambda text: text.replace("0.", "1.", 1), lambda text: ""],
    ids=["short", "foreign", "empty"],
)
@pytest.mark.parametrize("name", ["importance_pre.jsonl", "update.jsonl"])
def test_a_file_that_is_short_or_of_another_run_is_made_again(study, name, spoil):
    config = study()
    measure(config)
    expected = content(config)
    others = {other: (config.folder / other).stat().st_mtime_ns for other in KEYS if other != name}
    path = config.folder / name
    path.write_text(spoil(path.read_text()))
    assert path.read_bytes() != expected[name]
    assert not measure(config).kept
    assert content(config) == expected
    assert {other: (config.folder / other).stat().st_mtime_ns for other in others} == others


def test_while_a_file_is_made_again_the_measurement_is_not_complete(study):
    config = study()
    measure(config)
    (config.folder / "gradfisher_pre.jsonl").unlink()

    def kill(now):
        if now.stage == "gradients before training":
            raise Killed

    with pytest.raises(Killed):
        measure(config, kill)
    assert not (config.folder / "measure.json").exists()
    assert not measure(config).kept


def test_what_was_measured_of_another_training_is_made_again(study):
    config, other = study(), study(name="other")
    measure(config)
    expected = content(config)
    again = train(PlasticityConfig(**{**vars(other), "learning_rate": 1e-3, "overwrite": True}))
    other = PlasticityConfig(**{**vars(other), "learning_rate": 1e-3})
    for name in (*KEYS, "eval_subset.json", "measure_parts.json", "measure.json"):
        shutil.copy(config.folder / name, again.folder / name)
    assert not measure(other).kept
    assert content(other)["importance_pre.jsonl"] == expected["importance_pre.jsonl"]
    assert content(other)["importance_post.jsonl"] != expected["importance_post.jsonl"]
    assert content(other)["update.jsonl"] != expected["update.jsonl"]


def test_overwrite_measures_again(study):
    config = study()
    measure(config)
    expected = content(config)
    (config.folder / "eval_subset.json").write_text('{"indices": [1]}')
    with pytest.raises(
        InputError, match=r"eval_subset\.json must name the rows that eval_seed 999 gives, got others; --overwrite measures again"
    ):
        measure(config)
    assert not measure(PlasticityConfig(**{**vars(config), "overwrite": True})).kept
    assert content(config) == expected


def test_a_folder_without_a_complete_training_names_the_step(study):
    config = study()
    (config.folder / "train.json").unlink()
    with pytest.raises(InputError, match=r"train\.json must exist, got no such file; run tinyonn heads plasticity train"):
        measure(config)
    assert not (config.folder / "eval_subset.json").exists()


@pytest.mark.parametrize(
    "options", [{"eval_size": 10}, {"eval_seed": 7}, {"max_length": 16}, {"learning_rate": 1e-5}], ids=lambda o: next(iter(o))
)
def test_options_other_than_those_of_the_training_are_refused_by_name(study, options):
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=rf"where options differ from those of the training in .*, got {name} {value} \(there "):
        measure(study(**options))


def test_rows_that_have_changed_since_the_training_are_refused(study, data, tmp_path):
    config = study()
    text = data.read_text()
    try:
        data.write_text(text.replace("xxxx", "xxxy"))
        with pytest.raises(
            InputError, match=r"rows\.jsonl must hold the rows that the training in .* used, got others; run .* train --overwrite"
        ):
            measure(config)
    finally:
        data.write_text(text)


def edit(config: PlasticityConfig, checkpoint: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = config.folder / checkpoint / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("checkpoint", "change", "message"),
    [
        (
            "ckpt_final",
            lambda w: w["classifier.bias"].fill_(torch.nan),
            "loss of the evaluation samples must be finite, got nan with all heads on",
        ),
        (
            "ckpt_init",
            lambda w: w["classifier.bias"].fill_(torch.nan),
            "loss of the evaluation samples must be finite, got nan with all heads on",
        ),
        ("ckpt_final", lambda w: w.pop("classifier.bias"), "got classifier.bias in only one of them"),
        (
            "ckpt_init",
            lambda w: w["classifier.weight"].zero_(),
            "a closed gate must change the model's output, got the same with all heads",
        ),
    ],
    ids=["nan after", "nan before", "tensor missing", "gates do nothing"],
)
def test_models_that_cannot_be_measured_end_in_one_line(study, checkpoint, change, message):
    config = study()
    edit(config, checkpoint, change)
    with pytest.raises(InputError, match=message) as caught:
        measure(config)
    assert "\n" not in str(caught.value)
    assert not (config.folder / "measure.json").exists()


def test_memory_that_runs_out_names_the_option_to_lower(study, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measurement, "ablate_heads", full)
    with pytest.raises(InputError, match=r"memory ran out while measuring: lower --batch-size \(now 5\); what is measured already is kept"):
        measure(study())


def test_other_errors_pass(study, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(measurement, "ablate_heads", broken)
    with pytest.raises(RuntimeError, match="something else"):
        measure(study())


def test_full_passes_in_place_of_replays_are_said(study, monkeypatch):
    monkeypatch.setattr(ablation, "_replay_error", lambda *args: (0.5, False))
    said = []
    summary = measure(study(), said.append).summary
    assert (summary["replayed_pre"], summary["replay_error_pre"]) == (False, 0.5)
    assert [now.stage for now in said if now.text == "every pass was full: replays did not agree"] == [
        "importance before training",
        "importance after training",
    ]


def test_progress_counts_samples(study):
    said = []
    measure(study(), said.append)
    texts = [now.text for now in said if now.stage == "importance before training"]
    assert texts == ["5/12 samples", "10/12 samples", "12/12 samples"]
    assert [now.fraction for now in said if now.stage == "gradients before training"] == pytest.approx([5 / 12, 10 / 12, 1])
