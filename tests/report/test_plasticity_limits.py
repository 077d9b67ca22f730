"""What a plasticity page says before its verdict: when the model learnt nothing, when rows or heads are too few."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from scipy.stats import hypergeom

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.seeds import aggregate
from tinyonn.report import write_plasticity_aggregate, write_plasticity_page
from tinyonn.report.heads.plasticity_limits import chance_of_missing

NO_BETTER, HARDLY = "does not beat always predicting the commonest class", "hardly beats always predicting the commonest class"


def measured_on(folder, ones, zeros, accuracy):
    """Makes the folder one whose heads were measured on so many rows of either class."""
    subset = json.loads((folder / "eval_subset.json").read_text())
    subset |= {"labels": [1] * ones + [0] * zeros, "indices": list(range(ones + zeros)), "size": ones + zeros}
    (folder / "eval_subset.json").write_text(json.dumps(subset))
    measured = json.loads((folder / "measure.json").read_text())
    (folder / "measure.json").write_text(json.dumps(measured | {"samples": ones + zeros, "base_accuracy_post": accuracy}))


def page_of(folder, parse):
    return parse(write_plasticity_page(folder, figures_too=False).html).text


@pytest.mark.parametrize(
    ("right", "said", "not_said"),
    [(175, NO_BETTER, HARDLY), (240, NO_BETTER, HARDLY), (248, HARDLY, NO_BETTER), (320, None, "always predicting")],
    ids=["below", "the same", "within its error", "above"],
)
def test_a_model_is_held_against_its_commonest_class_before_anything_else(right, said, not_said, make_run, parse):
    folder, _ = make_run()
    measured_on(folder, 240, 160, right / 400)
    text = page_of(folder, parse)
    assert not_said not in text
    if said is not None:
        assert text.index(said) < text.index("The rank correlation of importance")
        error = ", with a standard error of 2.4%" if said == HARDLY else ""  # sqrt(0.62 · 0.38 / 400)
        assert f"It is right on {right} of 400 measured rows ({right / 4:.1f}%{error}), the constant answer “true” on 240 (60.0%)." in text
    assert "true: 0.6000 (240 of 400)" in text
    assert "rows were measured" not in text


def test_lists_of_all_heads_are_said_to_tell_nothing(make_run, parse):
    folder, _ = make_run(layers=2, heads=4)
    text = page_of(folder, parse)
    said = "The lists of highest heads hold all 8 heads, so every overlap is 1 and means nothing. Lower --top-k."
    assert text.index(said) < text.index("The rank correlation of importance")
    assert "random lists" not in text
    aggregate(folder.parent)
    html = write_plasticity_aggregate(folder.parent).html.read_text()
    assert said in html
    assert "<dt>highest heads compared</dt><dd>8<" in html


def test_few_rows_are_said_before_the_verdict(make_run, parse):
    folder, _ = make_run()
    measured_on(folder, 7, 9, 0.9)
    text = page_of(folder, parse)
    assert text.index("Only 16 rows were measured: one row changes an accuracy by 0.062") < text.index("The rank correlation of importance")


@pytest.mark.parametrize(("heads", "k", "limit"), [(72, 20, 0.3), (144, 20, 0.3), (6, 5, 0.3), (4, 4, 0.3), (40, 7, 0.5)])
def test_chance_of_missing_is_hypergeometric(heads, k, limit):
    expected = hypergeom.sf(np.ceil(limit * k - 1e-9) - 1, heads, k, k)
    assert chance_of_missing(heads, k, limit) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("layers", "heads", "said"), [(6, 12, True), (16, 16, False)], ids=["72 heads", "256 heads"])
def test_overlaps_that_chance_decides_are_said_before_the_verdict(layers, heads, said, make_run, parse):
    text = page_of(make_run(layers=layers, heads=heads)[0], parse)
    assert ("two random lists of 20 share 28% of their heads on average" in text.partition("The rank correlation")[0]) == said
    assert ("two random lists" in text) == said


def test_an_interval_that_holds_the_limit_is_said(make_run, parse):
    importance = np.linspace(0, 1, 40)
    noise = np.random.default_rng(3).normal(size=40)
    folder, _ = make_run(I_pre=importance.reshape(4, 10), U=(importance + 0.45 * noise + 3).reshape(4, 10))
    pair = json.loads((folder / "stats.json").read_text())["pairs"][0]
    assert pair["low"] < 0.5 < pair["high"]
    text = page_of(folder, parse)
    assert f"The interval of ρ(I_pre, U), {pair['low']:.2f} to {pair['high']:.2f}, contains the figure of 0.5" in text
    assert "The interval of ρ(I_pre, G_pre)" not in text


def test_acceptance_figures_stand_beside_what_unrelated_heads_would_give(make_run, parse):
    folder, _ = make_run(layers=6, heads=12)
    parser = parse(write_plasticity_page(folder, figures_too=False).html)
    (rows,) = (table for table in parser.tables if "if unrelated" in table[0])
    given = {row[0]: row[rows[0].index("if unrelated")] for row in rows[1:]}
    assert given["ρ(I_pre, U)"] == "0"
    assert float(given["overlap(I_pre, Urel)"]) == pytest.approx(20 / 72, abs=1e-3)
    assert float(given["important-but-static heads"]) == pytest.approx(72 * 0.1 * 0.3, abs=0.05)


def test_the_verdict_counts_the_expectations_soberly(make_run, parse):
    folder, _ = make_run()
    met = sum(row["met"] is True for row in json.loads((folder / "stats.json").read_text())["acceptance"])
    assert re.search(rf"\b{met} of the 6 expectations (is|are) met\.", page_of(folder, parse))


def test_aggregate_page_names_the_seeds_whose_model_does_not_beat_its_commonest_class(make_run, parse):
    for seed, accuracy in ((0, 0.9), (1, 0.5), (2, 0.55)):
        folder, _ = make_run(seed)
        measured_on(folder, 240, 160, accuracy)
    aggregate(folder.parent)
    text = parse(write_plasticity_aggregate(folder.parent).html).text
    line = next(part for part in text.split("The trained model") if part.startswith(f" {NO_BETTER}"))
    assert line.startswith(
        f" {NO_BETTER} in 2 of 3 seeds. seed1 is right on 200 of 400 measured rows (50.0%), the constant answer “true” on 240 (60.0%);"
    )
    assert "seed2 is right on 220 of 400 measured rows (55.0%), the constant answer “true” on 240 (60.0%)." in line
    assert "seed0" not in line.partition("The importance and the change")[0]
    assert "0.900, 0.500, 0.550" in text
    assert "true: 0.6000 (240 of 400)" in text


@pytest.mark.parametrize("labels", [[], [0, 2], [0, "true"], "none"], ids=["empty", "no class", "text", "no list"])
def test_labels_that_are_no_classes_are_refused(labels, make_run):
    folder, _ = make_run()
    (folder / "eval_subset.json").write_text(json.dumps({"indices": [1, 2], "labels": labels}))
    with pytest.raises(InputError, match=r"eval_subset\.json must have .* as labels, got .*; run tinyonn heads plasticity measure"):
        write_plasticity_page(folder, figures_too=False)
