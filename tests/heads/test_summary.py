"""The report step: joined columns, statistics against scipy and by hand, cases by hand, and files that are not whole."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.cases import PLASTIC, STATIC, find_cases
from tinyonn.heads.plasticity.config import PlasticityConfig
from tinyonn.heads.plasticity.correlation import mean_interval, rank_correlation, top_overlap
from tinyonn.heads.plasticity.summary import summarise

COLUMNS = (
    "layer,head,I_pre,I_post,accuracy_drop_pre,accuracy_drop_post,taylor_pre,taylor_abs_pre,taylor_post,taylor_abs_post,"
    "G_pre,fisher_pre,Uq,Uk,Uv,Uo,U,Urel,kind"
)


def rows_of(folder):
    with (folder / "heads.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pair(stats, x, y, group="pairs"):
    return next(found for found in stats[group] if (found["x"], found["y"]) == (x, y))


# By hand: ranks of x are 1 2 3 4 5, of y 1 3 2 5 4; squared differences sum to 4; rho = 1 - 6 * 4 / (5 * 24) = 0.8.
def test_rho_of_five_heads_by_hand():
    found = rank_correlation(np.array([0.1, 0.2, 0.5, 0.9, 7.0]), np.array([-3.0, 1.0, 0.0, 9.0, 8.0]))
    assert found.rho == pytest.approx(0.8)
    assert found.p == pytest.approx(0.104088, abs=1e-6)  # t = 0.8 * sqrt(3 / 0.36), 3 degrees of freedom
    assert found.reason is None or "resample" in found.reason


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_interval_is_that_of_resampled_heads(ties):
    rng = np.random.default_rng(3)
    x = rng.normal(size=72)
    y = 0.5 * x + rng.normal(size=72)
    if ties:
        x, y = np.round(x, 1), np.round(y)
    found = rank_correlation(x, y)
    assert found.rho == pytest.approx(scipy_stats.spearmanr(x, y).statistic, abs=1e-12)
    draws = []
    for _ in range(3000):
        heads = rng.integers(0, 72, size=72)
        draws.append(scipy_stats.spearmanr(x[heads], y[heads]).statistic)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.03)
    assert found.low < found.rho < found.high
    assert rank_correlation(x, y) == found  # seeded


def test_perfect_agreement_has_an_interval_of_no_width():
    x = np.arange(40.0)
    found = rank_correlation(x, -np.exp(x / 9))
    assert (found.rho, found.low, found.high) == pytest.approx((-1.0, -1.0, -1.0))


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (np.zeros(9), np.arange(9.0), "I is the same for every head"),
        (np.zeros(9), np.ones(9), "I and U are the same for every head"),
        (np.arange(2.0), np.arange(2.0), "2 heads are too few for a rank correlation"),
    ],
    ids=["one constant", "both constant", "two heads"],
)
def test_rho_that_is_not_defined_is_none_with_the_reason(x, y, reason):
    found = rank_correlation(x, y, ("I", "U"))
    assert (found.rho, found.p, found.low, found.high, found.reason) == (None, None, None, None, reason)


def test_one_differing_head_has_rho_but_no_interval():
    x = np.zeros(12)
    x[4] = 1.0
    found = rank_correlation(x, np.arange(12.0))
    assert found.rho == pytest.approx(scipy_stats.spearmanr(x, np.arange(12.0)).statistic)
    assert (found.low, found.high, found.reason) == (None, None, "a resample holds one value only: no interval")


def test_overlap_counts_heads_that_are_high_in_both():
    x, y = np.array([9.0, 8, 7, 1, 2, 3]), np.array([9.0, 1, 8, 2, 7, 0])  # top 3: {0, 1, 2} and {0, 2, 4}
    found = top_overlap(x, y, 3)
    assert (found.k, found.shared, found.share, found.chance) == (3, 2, pytest.approx(2 / 3), 0.5)
    whole = top_overlap(x, y, 20)
    assert (whole.k, whole.share, whole.chance, whole.reason) == (6, 1.0, 1.0, "all 6 heads are among the highest")
    assert top_overlap(np.ones(6), y, 3, ("I", "U")).reason == "I is the same for every head"


def test_cases_by_hand():
    # Of 0 … 10 the 90th percentile is 9 and the 30th is 3: heads 9 and 10 are high, 0 to 3 low.
    importance = np.arange(11.0)
    change = np.array([10.0, 4, 5, 9, 6, 7, 8, 2, 1, 3.5, 0])  # sorted 0 1 2 3.5 4 … 10: percentile 30 is 3.5, 90 is 9
    found = find_cases(importance, change, 90, 30)
    assert found.kinds == [PLASTIC, "", "", PLASTIC, "", "", "", "", "", STATIC, STATIC]
    assert (found.thresholds["I_pre_high"], found.thresholds["I_pre_low"]) == (9, 3)
    assert (found.thresholds["Urel_high"], found.thresholds["Urel_low"]) == (9, 3.5)


def test_a_column_without_spread_makes_no_cases():
    found = find_cases(np.zeros(20), np.arange(20.0))
    assert found.kinds == [""] * 20
    assert found.reason == "I_pre has the same value at percentile 30 and at 90"


def test_interval_of_a_mean_over_seeds_is_students():
    values = np.array([0.1, 0.3, 0.2, 0.6])
    found = mean_interval(values)
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.3, expected.low, expected.high))
    assert mean_interval(values, lowest=0.2)["low"] == 0.2
    alone = mean_interval(np.array([0.4]))
    assert (alone["mean"], alone["low"], alone["reason"]) == (0.4, None, "one seed gives no interval")


def test_summary_joins_every_column_and_scipy_agrees(make_seed, tmp_path):
    folder = tmp_path / "boolq" / "seed3"
    columns = make_seed(folder, layers=6, heads=12, seed=3)
    found = summarise(folder, top_k=10)
    rows = rows_of(folder)
    assert (folder / "heads.csv").read_text().splitlines()[0] == COLUMNS
    assert [(int(row["layer"]), int(row["head"])) for row in rows] == [(layer, head) for layer in range(6) for head in range(12)]
    for name, values in columns.items():
        assert [float(row[name]) for row in rows] == pytest.approx(values.ravel().tolist(), rel=1e-8)
    stats = json.loads((folder / "stats.json").read_text())
    assert stats == found.stats
    assert [(p["x"], p["y"]) for p in stats["pairs"]] == [("I_pre", "U"), ("I_pre", "Urel"), ("I_pre", "G_pre")]
    for name in ("U", "Urel", "G_pre"):
        expected = scipy_stats.spearmanr(columns["I_pre"].ravel(), columns[name].ravel())
        its = pair(stats, "I_pre", name)
        assert (its["rho"], its["p"]) == pytest.approx((expected.statistic, expected.pvalue), abs=1e-12)
        tops = [set(np.argpartition(-columns[column].ravel(), 9)[:10].tolist()) for column in ("I_pre", name)]
        assert its["overlap"] | {"reason": 0} == {
            "k": 10, "shared": len(tops[0] & tops[1]), "share": len(tops[0] & tops[1]) / 10, "chance": 10 / 72, "reason": 0
        }  # fmt: skip
    expected = scipy_stats.spearmanr(columns["I_pre"].ravel(), columns["taylor_abs_pre"].ravel()).statistic
    assert pair(stats, "I_pre", "taylor_abs_pre", "taylor")["rho"] == pytest.approx(expected, abs=1e-12)
    assert stats["counts"]["heads"] == 72
    assert stats["counts"]["layers"] == 6
    assert (stats["model"], stats["task"], stats["seed"]) == ("tiny-model", "boolq", 3)


def test_summary_lists_cases_with_their_numbers(make_seed, tmp_path):
    importance, change = np.linspace(0, 1, 40).reshape(4, 10), np.linspace(1, 0, 40).reshape(4, 10)
    make_seed(tmp_path / "seed0", 4, 10, I_pre=importance, Urel=change)
    found = summarise(tmp_path / "seed0")
    # The four highest of I_pre are the four lowest of Urel, and the other way round.
    assert [(case["layer"], case["head"]) for case in found.cases["important_but_static"]] == [(3, 9), (3, 8), (3, 7), (3, 6)]
    assert [(case["layer"], case["head"]) for case in found.cases["plastic_but_unimportant"]] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert found.cases["important_but_static"][0]["I_pre"] == 1.0
    assert found.cases["important_but_static"][0]["Urel"] == 0.0
    assert json.loads((tmp_path / "seed0" / "cases.json").read_text()) == found.cases
    kinds = [row["kind"] for row in rows_of(tmp_path / "seed0")]
    assert kinds == [PLASTIC] * 4 + [""] * 32 + [STATIC] * 4
    assert [(row["figure"], row["met"]) for row in found.stats["acceptance"]] == [
        ("rho(I_pre, U)", found.stats["pairs"][0]["rho"] < 0.5),
        ("overlap(I_pre, U)", found.stats["pairs"][0]["overlap"]["share"] < 0.3),
        ("rho(I_pre, Urel)", True),
        ("overlap(I_pre, Urel)", True),
        ("important-but-static heads", True),
        ("plastic-but-unimportant heads", True),
    ]


def test_a_study_is_summarised_by_its_own_options(make_seed, tmp_path):
    study = PlasticityConfig("model", "boolq", output_dir=str(tmp_path), seed=5, top_k=7, high=80, low=20)
    make_seed(tmp_path / "boolq" / "seed5", seed=5)
    stats = summarise(study).stats
    assert (stats["top_k"], stats["high"], stats["low"], stats["pairs"][0]["overlap"]["k"]) == (7, 80, 20, 7)
    assert (tmp_path / "boolq" / "seed5" / "heads.csv").is_file()
    assert summarise(study, top_k=3).stats["top_k"] == 3


def test_acceptance_figures_carry_their_limits(make_seed, tmp_path):
    make_seed(tmp_path / "seed0")
    found = summarise(tmp_path / "seed0").stats["acceptance"]
    assert [(row["limit"], row["rule"]) for row in found] == [(0.5, "< 0.5"), (0.3, "< 0.3")] * 2 + [(3, ">= 3")] * 2


def test_acceptance_figures_are_shown_as_missed(make_seed, tmp_path):
    rising = np.linspace(0.1, 1, 40).reshape(4, 10)
    make_seed(tmp_path / "seed0", 4, 10, I_pre=rising, U=rising**2, Urel=np.full((4, 10), 0.5))
    found = summarise(tmp_path / "seed0").stats["acceptance"]
    assert {row["figure"]: row["met"] for row in found} == {
        "rho(I_pre, U)": False,
        "overlap(I_pre, U)": False,
        "rho(I_pre, Urel)": None,
        "overlap(I_pre, Urel)": None,
        "important-but-static heads": False,
        "plastic-but-unimportant heads": False,
    }


def test_the_overlap_of_all_heads_is_not_judged(make_seed, tmp_path):
    make_seed(tmp_path / "seed0", 2, 6)
    found = {row["figure"]: row for row in summarise(tmp_path / "seed0", top_k=12).stats["acceptance"]}
    assert (found["overlap(I_pre, U)"]["value"], found["overlap(I_pre, U)"]["met"]) == (None, None)
    found = {row["figure"]: row for row in summarise(tmp_path / "seed0", top_k=11).stats["acceptance"]}
    assert found["overlap(I_pre, U)"]["met"] is False  # of 12 heads 11 share 10 at least


def test_no_nan_in_the_files_of_a_constant_run(make_seed, tmp_path):
    flat = np.zeros((2, 3))
    make_seed(tmp_path / "seed0", 2, 3, I_pre=flat, U=flat, Urel=flat, G_pre=flat)
    summarise(tmp_path / "seed0")

    def refuse(token):
        raise AssertionError(token)

    stats = json.loads((tmp_path / "seed0" / "stats.json").read_text(), parse_constant=refuse)
    cases = json.loads((tmp_path / "seed0" / "cases.json").read_text(), parse_constant=refuse)
    assert pair(stats, "I_pre", "U")["reason"] == "I_pre and U are the same for every head"
    assert cases["important_but_static"] == []
    assert "same value" in cases["reason"]


def drop_line(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")


def repeat_line(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[0]]) + "\n")


def cut_line(path):
    path.write_text(path.read_text()[:-20])


def make_nan(path):
    first, _, rest = path.read_text().partition("\n")
    record = json.loads(first)
    path.write_text(json.dumps(record | {list(record)[-1]: math.nan}) + "\n" + rest)


def lose_field(path):
    rest = path.read_text().partition("\n")[2]
    path.write_text(json.dumps({"layer": 0, "head": 0, "other": 1}) + "\n" + rest)


@pytest.mark.parametrize("name", ["importance_pre.jsonl", "importance_post.jsonl", "gradfisher_pre.jsonl", "update.jsonl"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "must exist, got no such file"),
        (drop_line, r"must have one line for each of 6 heads, got 5 \(first missing: layer 1 head 2\)"),
        (repeat_line, "must name every head once, got layer 0 head 0 again in line 6"),
        (cut_line, "must hold one JSON object a line, got line 6"),
        (make_nan, "must have a finite number as .* got line 1: nan"),
        (lose_field, "must have the fields layer, head, .* got line 1: layer, head, other"),
        (lambda path: path.write_text(""), "must hold one JSON object a line, got line 1"),
    ],
    ids=["missing", "short", "duplicate", "not JSON", "NaN", "no field", "empty"],
)
def test_a_file_that_is_not_whole_stops_and_names_the_step(name, spoil, said, make_seed, tmp_path):
    folder = tmp_path / "seed0"
    make_seed(folder, 2, 3)
    spoil(folder / name)
    with pytest.raises(InputError, match=said) as caught:
        summarise(folder)
    line = str(caught.value)
    assert str(folder / name) in line
    assert "run tinyonn heads plasticity measure" in line
    assert "\n" not in line
    assert not (folder / "stats.json").exists()
    assert not (folder / "heads.csv").exists()


@pytest.mark.parametrize(("name", "step"), [("measure.json", "measure"), ("eval_subset.json", "measure"), ("train.json", "train")])
def test_a_step_that_did_not_end_is_named(name, step, make_seed, tmp_path):
    make_seed(tmp_path, 2, 3)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name} must exist, got no such file; run tinyonn heads plasticity {step}"):
        summarise(tmp_path)


def test_heads_that_all_files_lack_are_found(make_seed, tmp_path):
    make_seed(tmp_path, 2, 3)
    for path in tmp_path.glob("*.jsonl"):
        path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(InputError, match="must number layers and heads from 0 without a gap, got layer 0 head 1"):
        summarise(tmp_path)


def test_layers_that_all_files_lack_are_found_by_what_measure_says(make_seed, tmp_path):
    make_seed(tmp_path, 2, 3)
    for path in tmp_path.glob("*.jsonl"):
        path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    with pytest.raises(InputError, match=r"must have the 2 layers that measure\.json states, got 1; run tinyonn heads plasticity measure"):
        summarise(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"high": 30, "low": 30}, "got low 30 and high 30"),
        ({"high": 101}, "got low 30 and high 101"),
    ],
    ids=["top_k", "equal", "beyond"],
)
def test_options_are_checked(options, said, make_seed, tmp_path):
    make_seed(tmp_path, 2, 3)
    with pytest.raises(InputError, match=said):
        summarise(tmp_path, **options)
