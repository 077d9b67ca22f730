"""What an interrupted measurement leaves and goes on from, and what is made again."""

from __future__ import annotations

import shutil

import pytest

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.heads.plasticity.measurement import measure
from tinyonn.heads.plasticity.training import train

FILES = ("importance_pre.jsonl", "importance_post.jsonl", "gradfisher_pre.jsonl", "update.jsonl")
STAGES = ["importance before training", "first-order importance before training", "gradients before training", "importance after training"]


def content(config: PlasticityConfig) -> dict[str, bytes]:
    return {name: (config.folder / name).read_bytes() for name in (*FILES, "eval_subset.json")}


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


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
    done = [name for name in FILES if (config.folder / name).exists()]
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
    others = {other: (config.folder / other).stat().st_mtime_ns for other in FILES if other != name}
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
    for name in (*FILES, "eval_subset.json", "measure_parts.json", "measure.json"):
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
