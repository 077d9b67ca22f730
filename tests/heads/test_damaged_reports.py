"""The report step over files that were edited, swapped, copied or damaged: one line that names the file and the step to run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.seeds import aggregate
from tinyonn.heads.plasticity.summary import summarise

DEEP = "[" * 100_000


@pytest.fixture
def seeds(make_seed: Callable[..., Any], tmp_path: Path) -> Path:
    """OUTPUT/TASK with two complete seeds."""
    for seed in (0, 1):
        make_seed(tmp_path / "boolq" / f"seed{seed}", 3, 10, seed)
        summarise(tmp_path / "boolq" / f"seed{seed}", top_k=5)
    return tmp_path / "boolq"


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "named", "step"),
    [
        (lambda own, other: swap(own / "importance_pre.jsonl", own / "importance_post.jsonl"), "importance_pre.jsonl", "measure"),
        (lambda own, other: shutil.copy(other / "update.jsonl", own), "update.jsonl", "measure"),
        (
            lambda own, other: (own / "gradfisher_pre.jsonl").write_text((other / "gradfisher_pre.jsonl").read_text()),
            "gradfisher_pre.jsonl",
            "measure",
        ),
        (lambda own, other: edit(own / "eval_subset.json", lambda subset: subset["indices"].pop()), "eval_subset.json", "measure"),
        (lambda own, other: edit(own / "train.json", lambda trained: trained.update(accuracy=0.99)), "train.json", "measure"),
        (
            lambda own, other: edit(own / "measure_parts.json", lambda it: it["parts"].pop("update.jsonl")),
            "update.jsonl",
            "measure",
        ),
        (lambda own, other: (own / "measure_parts.json").unlink(), "measure_parts.json", "measure"),
    ],
    ids=["swapped", "of another seed", "edited", "subset", "training", "no record of it", "no record"],
)
def test_files_that_measuring_did_not_leave_are_refused(seeds, spoil, named, step):
    own = seeds / "seed0"
    before = (own / "stats.json").read_bytes()
    spoil(own, seeds / "seed1")
    with pytest.raises(InputError) as raised:
        summarise(own, top_k=5)
    said = str(raised.value)
    assert said.startswith(f"{own / named} must ")
    assert f"; run tinyonn heads plasticity {step}" in said
    assert "\n" not in said
    assert (own / "stats.json").read_bytes() == before


def test_a_copy_of_a_seed_is_no_seed_of_its_own(seeds):
    shutil.copytree(seeds / "seed1", seeds / "seed3")
    with pytest.raises(InputError, match=r"train\.json must be of the seed that its folder seed3 names, got that of seed 1; run .* train"):
        summarise(seeds / "seed3")
    shutil.copytree(seeds / "seed1", seeds / "seed01")  # no folder that a step makes
    found = aggregate(seeds)
    assert [seed["seed"] for seed in found["seeds"]] == [0, 1]
    (left_out,) = found["incomplete"]
    assert left_out == {
        "folder": "seed3",
        "found": "train.json must be of the seed that its folder seed3 names, got that of seed 1",
        "step": "tinyonn heads plasticity train --overwrite",
    }


@pytest.mark.parametrize(
    ("name", "content", "step"),
    [
        ("train.json", "{}", "train --overwrite"),
        ("train.json", "[]", "train --overwrite"),
        ("train.json", DEEP, "train --overwrite"),
        ("measure.json", DEEP, "measure"),
        ("measure.json", json.dumps({"training_sha256": "0", "subset_sha256": "0"}), "measure"),
        ("eval_subset.json", DEEP, "measure --overwrite"),
        ("eval_subset.json", '{"indices": null}', "measure --overwrite"),
        ("measure_parts.json", DEEP, "measure"),
        ("measure_parts.json", '{"training_sha256": 1}', "measure"),
        ("update.jsonl", DEEP, "measure"),
    ],
)
def test_a_file_of_other_content_is_refused_with_the_step_to_run(seeds, name, content, step):
    own = seeds / "seed0"
    (own / name).write_text(content)
    with pytest.raises(InputError) as raised:
        summarise(own, top_k=5)
    assert str(raised.value).startswith(f"{own / name} must ")
    assert f"; run tinyonn heads plasticity {step}" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("train.json", {"options": None}, "have an object as options, got NoneType None"),
        ("train.json", {"options": {"seed": "0"}}, "have a whole number as seed, got str '0'"),
        ("train.json", {"losses": ["a"]}, "have numbers as losses, got str 'a'"),
        ("train.json", {"steps": 0}, "be of a training of at least one step, got 0"),
        ("train.json", {"seconds": True}, "have a number as seconds, got bool True"),
        ("measure.json", {"heads": "30"}, "have a whole number as heads, got str '30'"),
        ("measure.json", {"base_loss_pre": "0.5"}, "have a number as base_loss_pre, got str '0.5'"),
        ("measure.json", {"seconds": 10**400}, "have a number as seconds, got int 1000"),
    ],
)
def test_a_field_of_another_type_is_named(seeds, reseal, name, change, said):
    own = seeds / "seed0"
    edit(own / name, lambda record: record.update(change))
    reseal(own)
    with pytest.raises(InputError) as raised:
        summarise(own, top_k=5)
    assert str(raised.value).startswith(f"{own / name} must {said}")


def test_a_number_beyond_what_a_float_holds_is_refused(seeds, reseal):
    path = seeds / "seed0" / "update.jsonl"
    first, _, rest = path.read_text().partition("\n")
    path.write_text(json.dumps(json.loads(first) | {"U": 10**400}) + "\n" + rest)
    reseal(path.parent)
    with pytest.raises(InputError, match=r"update\.jsonl must have a finite number as U in every line, got line 1: 10+\.\.\.0+; run"):
        summarise(path.parent)


def change_pair(stats: dict[str, Any], **values: Any) -> None:
    stats["pairs"][0].update(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda stats: stats.update(inputs=None),
        lambda stats: stats.pop("high"),
        lambda stats: stats.update(high="90"),
        lambda stats: stats.update(high=120),
        lambda stats: stats.update(pairs=[]),
        lambda stats: stats.update(pairs=[1, 2, 3]),
        lambda stats: stats["taylor"].pop(),
        lambda stats: change_pair(stats, rho="0.5"),
        lambda stats: change_pair(stats, overlap=None),
        lambda stats: change_pair(stats, overlap={"k": 5, "share": "1"}),
        lambda stats: stats.update(options=None),
        lambda stats: stats.update(options={}),
        lambda stats: stats.update(model=3),
        lambda stats: stats.pop("top_k"),
        lambda stats: stats.clear(),
    ],
    ids=[
        "inputs",
        "no high",
        "text",
        "percentile",
        "no pairs",
        "numbers",
        "fewer pairs",
        "rho",
        "overlap",
        "share",
        "options",
        "no model",
        "model",
        "top_k",
        "all",
    ],
)
def test_damaged_statistics_of_another_seed_are_listed_with_the_step(seeds, change):
    edit(seeds / "seed1" / "stats.json", change)
    found = aggregate(seeds)
    assert [seed["seed"] for seed in found["seeds"]] == [0]
    (left_out,) = found["incomplete"]
    assert (left_out["folder"], left_out["step"]) == ("seed1", "tinyonn heads plasticity report")
    assert left_out["found"].startswith("stats.json must ")


def test_what_a_seed_meets_is_what_its_statistics_give(seeds):
    edit(seeds / "seed1" / "stats.json", lambda stats: stats.update(acceptance=None, counts={}))
    found = aggregate(seeds)
    rows = json.loads((seeds / "seed0" / "stats.json").read_text())["acceptance"]
    assert [(row["figure"], row["values"][0]) for row in found["acceptance"]] == [(row["figure"], row["value"]) for row in rows]
    assert len(found["seeds"]) == 2
