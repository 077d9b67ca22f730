"""Several seeds as one: means and intervals by scipy, heads that are cases again and again, and seeds that do not belong together."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.seeds import SeedsDifferError, aggregate
from tinyonn.heads.plasticity.summary import summarise


@pytest.fixture
def make_seeds(make_seed, tmp_path):
    """Complete seeds under OUTPUT/TASK; returns the folder and each seed's columns."""

    def make(seeds=(0, 1, 2), layers=3, heads=10, **columns):
        folder = tmp_path / "out" / "boolq"
        drawn = []
        for seed in seeds:
            drawn.append(make_seed(folder / f"seed{seed}", layers, heads, seed, **columns))
            summarise(folder / f"seed{seed}", top_k=5)
        return folder, drawn

    return make


def test_means_and_intervals_over_seeds_are_scipys(make_seeds):
    folder, drawn = make_seeds((0, 3, 11))
    found = aggregate(folder)
    assert [seed["seed"] for seed in found["seeds"]] == [0, 3, 11]
    assert (found["task"], found["model"], found["counts"]) == ("boolq", "tiny-model", {"heads": 30, "layers": 3})
    for pair in found["pairs"]:
        rhos = [scipy_stats.spearmanr(columns[pair["x"]].ravel(), columns[pair["y"]].ravel()).statistic for columns in drawn]
        interval = scipy_stats.ttest_1samp(rhos, 0).confidence_interval(0.95)
        assert pair["rho"]["values"] == pytest.approx(rhos)
        assert (pair["rho"]["mean"], pair["rho"]["sd"]) == pytest.approx((np.mean(rhos), np.std(rhos, ddof=1)))
        assert (pair["rho"]["low"], pair["rho"]["high"]) == pytest.approx((max(interval.low, -1), min(interval.high, 1)))
        assert 0 <= pair["overlap"]["low"] <= pair["overlap"]["mean"] <= pair["overlap"]["high"] <= 1
    assert json.loads((folder / "aggregate.json").read_text()) == found


def test_table_has_mean_and_spread_of_every_head(make_seeds):
    folder, drawn = make_seeds((0, 1, 2))
    aggregate(folder)
    with (folder / "aggregate.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["layer"]), int(row["head"])) for row in rows] == [(layer, head) for layer in range(3) for head in range(10)]
    for name in ("I_pre", "I_post", "Urel", "G_pre", "accuracy_drop_pre", "Uo"):
        stacked = np.stack([columns[name].ravel() for columns in drawn])
        assert [float(row[f"{name}_mean"]) for row in rows] == pytest.approx(stacked.mean(axis=0).tolist(), rel=1e-8)
        assert [float(row[f"{name}_sd"]) for row in rows] == pytest.approx(stacked.std(axis=0, ddof=1).tolist(), rel=1e-8)
    assert {row["seeds"] for row in rows} == {"3"}


def test_heads_that_are_cases_in_several_seeds_come_first(make_seed, tmp_path):
    folder = tmp_path / "boolq"
    order = np.arange(20.0)
    for seed, (top, second) in enumerate(((0, 1), (0, 2), (0, 1))):
        importance = np.where(order == top, 100.0, np.where(order == second, 50.0, order)).reshape(2, 10)
        change = np.where((order == top) | (order == second), -order, order + 1).reshape(2, 10)
        make_seed(folder / f"seed{seed}", 2, 10, seed, I_pre=importance, Urel=change)
        summarise(folder / f"seed{seed}")
    found = aggregate(folder)["cases"]["important_but_static"]
    assert [(head["layer"], head["head"], head["seeds"], head["share"]) for head in found] == [
        (0, 0, 3, 1.0), (0, 1, 2, pytest.approx(2 / 3)), (0, 2, 1, pytest.approx(1 / 3))
    ]  # fmt: skip
    with (folder / "aggregate.csv").open(newline="") as file:
        assert [int(row["important_but_static"]) for row in csv.DictReader(file)][:4] == [3, 2, 1, 0]


def test_agreement_between_seeds_is_the_mean_over_their_pairs(make_seeds):
    folder, drawn = make_seeds((0, 1, 2))
    found = {row["column"]: row for row in aggregate(folder)["agreement"]}
    flat = [columns["Urel"].ravel() for columns in drawn]
    rhos = [scipy_stats.spearmanr(flat[a], flat[b]).statistic for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found["Urel"]["rho"] == pytest.approx(np.mean(rhos))
    assert found["Urel"]["pairs"] == 3


def test_one_seed_has_means_and_says_that_it_gives_no_interval(make_seeds):
    folder, drawn = make_seeds((4,))
    found = aggregate(folder)
    rho = found["pairs"][0]["rho"]
    assert rho["mean"] == pytest.approx(scipy_stats.spearmanr(drawn[0]["I_pre"].ravel(), drawn[0]["U"].ravel()).statistic)
    assert (rho["low"], rho["high"], rho["reason"]) == (None, None, "one seed gives no interval")
    assert found["notes"] == ["One seed has no interval: run others to see the variation between runs."]
    with (folder / "aggregate.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["I_pre_sd"] == ""


def test_a_number_that_some_seeds_lack_is_averaged_over_the_others(make_seed, tmp_path):
    folder = tmp_path / "boolq"
    kept = make_seed(folder / "seed0", 2, 6, 0)
    make_seed(folder / "seed1", 2, 6, 1, U=np.ones((2, 6)))
    for seed in (0, 1):
        summarise(folder / f"seed{seed}")
    rho = aggregate(folder)["pairs"][0]["rho"]
    assert rho["n"] == 1
    assert rho["values"] == [pytest.approx(scipy_stats.spearmanr(kept["I_pre"].ravel(), kept["U"].ravel()).statistic), None]


@pytest.mark.parametrize(
    ("lose", "missing", "step"),
    [
        (["train.json", "measure.json", "stats.json"], "train.json", "train"),
        (["measure.json", "stats.json"], "measure.json", "measure"),
        (["stats.json"], "stats.json", "report"),
    ],
    ids=["not trained", "not measured", "not reported"],
)
def test_seeds_that_are_not_complete_are_listed_with_their_step(lose, missing, step, make_seeds):
    folder, _ = make_seeds((0, 1, 2))
    for name in lose:
        (folder / "seed1" / name).unlink()
    found = aggregate(folder)
    assert [seed["seed"] for seed in found["seeds"]] == [0, 2]
    assert found["incomplete"] == [{"folder": "seed1", "found": f"no {missing}", "step": f"tinyonn heads plasticity {step}"}]


def test_a_seed_measured_again_after_its_report_is_not_counted(make_seeds, make_seed):
    folder, _ = make_seeds((0, 1))
    make_seed(folder / "seed1", 3, 10, seed=1, I_pre=np.ones((3, 10)))
    found = aggregate(folder)
    assert [seed["seed"] for seed in found["seeds"]] == [0]
    assert found["incomplete"][0]["found"] == "importance_pre.jsonl must be the file that stats.json was made from, got another"
    assert found["incomplete"][0]["step"] == "tinyonn heads plasticity report"


def test_seeds_of_two_models_are_refused_by_name(make_seeds, make_seed):
    folder, _ = make_seeds((0, 1))
    make_seed(folder / "seed2", 3, 10, seed=2, model="other-model")
    summarise(folder / "seed2", top_k=5)
    with pytest.raises(InputError, match=r"must have one model in all seeds, got tiny-model in seed0 and other-model in seed2\.$"):
        aggregate(folder)
    assert not (folder / "aggregate.json").exists()


def test_seeds_of_different_heads_are_refused_by_name(make_seeds, make_seed):
    folder, _ = make_seeds((0,))
    make_seed(folder / "seed1", 2, 15, seed=1)
    summarise(folder / "seed1", top_k=5)
    with pytest.raises(
        InputError, match="must have the same heads in all seeds, got 3 layers and 30 heads in seed0 and 2 layers and 30 heads"
    ):
        aggregate(folder)


def test_seeds_summarised_with_different_options_are_refused_by_name(make_seeds):
    folder, _ = make_seeds((0, 1))
    summarise(folder / "seed1", top_k=7)
    with pytest.raises(InputError, match="must have one top_k in all seeds, got 5 in seed0 and 7 in seed1"):
        aggregate(folder)


def test_seeds_that_differ_are_told_from_seeds_that_are_damaged(make_seeds):
    folder, _ = make_seeds((0, 1))
    summarise(folder / "seed1", top_k=7)
    with pytest.raises(SeedsDifferError):
        aggregate(folder)
    summarise(folder / "seed1", top_k=5)
    path = folder / "seed1" / "update.jsonl"
    path.write_text(path.read_text()[:-9])
    found = aggregate(folder)
    assert [seed["seed"] for seed in found["seeds"]] == [0]
    (left_out,) = found["incomplete"]
    assert left_out["found"].startswith("update.jsonl must hold one JSON object a line, got line 30: ")
    assert (left_out["folder"], left_out["step"]) == ("seed1", "tinyonn heads plasticity measure")


def test_nothing_of_an_earlier_join_is_left_where_seeds_cannot_be_joined(make_seeds):
    folder, _ = make_seeds((0, 1))
    old = [folder / name for name in ("aggregate.json", "aggregate.csv", "index.html")]
    aggregate(folder)
    for path in old:
        path.write_text("old")
    summarise(folder / "seed1", top_k=7)
    with pytest.raises(SeedsDifferError):
        aggregate(folder)
    assert not [path for path in old if path.exists()]
    assert (folder / "seed1" / "stats.json").exists()


def test_a_subset_that_differs_between_seeds_is_noted(make_seeds):
    folder, _ = make_seeds((0, 1))
    path = folder / "seed1" / "eval_subset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"indices": [1, 2, 3]}))
    assert aggregate(folder)["notes"] == ["The seeds were measured on different rows (eval_subset.json): seed0 and seed1."]


def test_options_of_training_that_differ_between_seeds_are_noted(make_seeds, reseal):
    folder, _ = make_seeds((0, 1))
    path = folder / "seed1" / "train.json"
    trained = json.loads(path.read_text())
    path.write_text(json.dumps(trained | {"options": trained["options"] | {"learning_rate": 5e-5}}))
    reseal(folder / "seed1")
    summarise(folder / "seed1", top_k=5)
    note = "More than the seed differs in training: learning_rate is 2e-05 in seed0 and 5e-05 in seed1."
    assert aggregate(folder)["notes"] == [note]


def test_a_folder_without_a_complete_seed_says_what_it_holds(make_seeds, tmp_path):
    with pytest.raises(InputError, match="must hold at least one complete seed, got no folder seed0, seed1 …"):
        aggregate(tmp_path)
    folder, _ = make_seeds((0,))
    (folder / "seed0" / "stats.json").unlink()
    with pytest.raises(InputError, match=r"got seed0: no stats\.json; run tinyonn heads plasticity report"):
        aggregate(folder)
