"""Pages of the head laboratory: numbers of the files, figures that show something, hostile text, files that are not whole."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.seeds import aggregate
from tinyonn.report import write_plasticity_aggregate, write_plasticity_page, write_scores_page
from tinyonn.report.heads import figures as head_figures
from tinyonn.report.html import charts
from tinyonn.report.html.maps import choose_scale


def colours(path):
    """Different colours of a PNG."""
    from matplotlib.image import imread

    return len(np.unique((imread(path)[..., :3] * 255).astype(int).reshape(-1, 3), axis=0))


def rows_of(parser, caption):
    """Body of the table with this beginning of its caption or of its header."""
    return next(table[1:] for table in parser.tables if table and caption in table[0])


def test_score_maps_hold_the_values_of_the_files(make_scores, parse):
    folder, raw, norm, combined = make_scores()
    written = write_scores_page(folder)
    maps = {entry["key"]: entry for entry in parse(written.html).data["maps-data"]}
    assert list(maps) == ["out", "ent", "task", "combined"]
    for key in ("out", "ent", "task"):
        np.testing.assert_allclose(np.array(maps[key]["values"]), raw[key], rtol=1e-5)
        np.testing.assert_allclose(np.array(maps[key]["views"]["layer"]["values"]), norm[key], rtol=1e-5, atol=1e-6)
        assert maps[key]["views"]["layer"]["kind"] == "diverging"
    np.testing.assert_allclose(np.array(maps["combined"]["views"]["none"]["values"]), combined, rtol=1e-5)
    assert [path.name for path in written.pngs] == ["map_out.png", "map_ent.png", "map_task.png", "map_combined.png"]
    assert all(colours(path) > 50 for path in written.pngs)


@pytest.mark.parametrize("ending", ["percentile", "z"], ids=["now", "earlier versions"])
def test_percentiles_are_drawn_from_0_to_1_and_explained(make_scores, parse, ending):
    folder, _, norm, _ = make_scores(mode="percentile", ending=ending)
    page = parse(write_scores_page(folder, figures_too=False).html)
    assert "share of the layer's other heads with a lower score (equal scores count half), (rank − 1) / (heads − 1)" in page.text
    maps = {entry["key"]: entry for entry in page.data["maps-data"]}
    view = maps["ent"]["views"]["layer"]
    assert (view["kind"], view["low"], view["high"]) == ("sequential", 0, 1)
    np.testing.assert_allclose(np.array(view["values"]), norm["ent"], rtol=1e-5)


def test_z_scores_are_not_read_from_columns_of_percentiles(make_scores, parse):
    folder, _, _, _ = make_scores(mode="zscore", ending="percentile")
    with pytest.raises(
        InputError, match=r"scores_norm\.csv must have the columns layer, head, out_z, ent_z, task_z, got layer, head, out_per"
    ):
        write_scores_page(folder, figures_too=False)
    folder, *_ = make_scores()
    assert "standard deviations from the layer's mean" in parse(write_scores_page(folder, figures_too=False).html).text


def test_score_tables_list_the_first_heads_with_their_scores(make_scores, parse):
    folder, raw, norm, combined = make_scores()
    parser = parse(write_scores_page(folder, figures_too=False).html)
    listed = rows_of(parser, "combined")
    best = np.unravel_index(np.argmax(combined), combined.shape)
    assert [int(cell) for cell in listed[0][:3]] == [1, *best]
    assert [float(cell) for cell in listed[0][3:6]] == pytest.approx([combined[best], raw["out"][best], norm["out"][best]], rel=1e-3)
    per_layer = rows_of(parser, "#1")
    assert [row[1].split()[0] for row in per_layer] == [str(head) for head in combined.argmax(axis=1)]


def test_scores_of_ones_own_have_a_map(make_scores, parse):
    folder, raw, _, _ = make_scores(extra=True)
    maps = {entry["key"]: entry for entry in parse(write_scores_page(folder, figures_too=False).html).data["maps-data"]}
    np.testing.assert_allclose(np.array(maps["peak"]["values"]), raw["peak"], rtol=1e-5)


@pytest.mark.parametrize("name", ["scores_raw.csv", "scores_norm.csv", "scores_combined.csv", "summary.json", "topk_global.json"])
def test_a_missing_file_of_scores_is_named_with_its_command(name, make_scores):
    folder = make_scores()[0]
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name} must exist, got no such file; run tinyonn heads score\."):
        write_scores_page(folder, figures_too=False)
    assert not (folder / "index.html").exists()


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("scores_raw.csv", lambda content: content.replace("task_raw", "other"), "must have the columns layer, head, out_raw"),
        ("scores_raw.csv", lambda content: content.partition("\n")[0], "must have a line for every head, got no lines"),
        ("scores_raw.csv", lambda content: content.replace("\n0,1,", "\n0,x,"), "must hold numbers"),
        ("scores_raw.csv", lambda content: content.replace("\n0,1,", "\n0,0,"), "must list each head once"),
        ("scores_norm.csv", lambda content: content.rpartition("\n3,5,")[0], "must have the heads of scores_raw.csv in its order"),
        ("topk_global.json", lambda content: content.replace('"layer": ', '"layer": 9'), "must be heads of scores_raw.csv"),
        ("summary.json", lambda content: "[]", "must be a JSON object, got list"),
        ("summary.json", lambda content: content[:9], "must be valid JSON"),
    ],
    ids=["column", "empty", "no number", "twice", "short", "unknown head", "list", "cut"],
)
def test_files_of_scores_that_are_not_whole_are_refused_in_one_line(name, spoil, said, make_scores):
    folder = make_scores()[0]
    (folder / name).write_text(spoil((folder / name).read_text()))
    with pytest.raises(InputError, match=said) as caught:
        write_scores_page(folder, figures_too=False)
    assert "\n" not in str(caught.value)
    assert not (folder / "index.html").exists()


def test_plasticity_page_shows_cases_and_statistics(make_run, parse):
    importance = np.linspace(0, 1, 40).reshape(4, 10)
    folder, columns = make_run(I_pre=importance, Urel=1 - importance)
    written = write_plasticity_page(folder)
    parser = parse(written.html)
    stats = json.loads((folder / "stats.json").read_text())
    accepted = {row[0]: row[1:] for row in rows_of(parser, "verdict")}
    assert accepted["ρ(I_pre, Urel)"] == ["✓ met", "< 0.5", "-1.000", "0"]
    assert accepted["important-but-static heads"] == ["✓ met", "≥ 3", "4", "1.2"]
    pairs = {row[0]: row for row in rows_of(parser, "by chance")}
    assert float(pairs["I_pre, U"][1]) == pytest.approx(stats["pairs"][0]["rho"], abs=6e-4)
    assert [float(cell) for cell in pairs["I_pre, taylor_pre"][2:4]] == pytest.approx(
        [stats["taylor"][0]["low"], stats["taylor"][0]["high"]], abs=6e-4
    )
    case_tables = [table[1:] for table in parser.tables if table[0] == ["layer", "head", "I_pre", "I_post", "U", "Urel", "G_pre"]]
    assert [[(int(row[0]), int(row[1])) for row in rows] for rows in case_tables] == [
        [(3, 9), (3, 8), (3, 7), (3, 6)],
        [(0, 0), (0, 1), (0, 2), (0, 3)],
    ]
    maps = {entry["key"]: entry for entry in parser.data["maps-data"]}
    np.testing.assert_allclose(np.array(maps["I_post"]["values"]), columns["I_post"], rtol=1e-5)
    assert {path.name for path in written.pngs} >= {"fig_I_vs_U.png", "fig_I_vs_G.png", "fig_stats.png"}
    assert all(colours(path) > 20 for path in written.pngs)


def test_each_table_of_first_heads_shows_the_accuracy_drop_that_belongs_to_it(make_run, parse):
    folder, columns = make_run()
    tables = [table for table in parse(write_plasticity_page(folder, figures_too=False).html).tables if table[0][0] == "#"]
    for table, column, when in zip(tables, ("I_pre", "I_post", "Urel"), ("pre", "post", "post"), strict=True):
        named = "accuracy drop " + {"pre": "before", "post": "after"}[when]
        first = dict(zip(table[0], table[1], strict=True))
        best = np.unravel_index(np.argmax(columns[column]), columns[column].shape)
        assert (int(first["layer"]), int(first["head"])) == best
        assert float(first[named]) == pytest.approx(columns[f"accuracy_drop_{when}"][best], rel=1e-3)
        assert [name for name in table[0] if name.startswith("accuracy")] == [named]


def test_plasticity_figures_without_spread_say_not_defined(make_run, parse):
    folder, _ = make_run(U=np.zeros((4, 10)), Urel=np.full((4, 10), 0.5))
    written = write_plasticity_page(folder)
    parser = parse(written.html)
    accepted = {row[0]: row[1:] for row in rows_of(parser, "verdict")}
    assert accepted["ρ(I_pre, U)"] == ["not defined", "< 0.5", "–", "0"]
    assert accepted["plastic-but-unimportant heads"] == ["✗ not met", "≥ 3", "0", "1.2"]
    assert "There are no cases: Urel has the same value at percentile 30 and at 90." in parser.text
    assert "U is the same for every head" in parser.text
    assert "nan" not in parser.text.lower().split()


@pytest.mark.parametrize(
    ("name", "step"),
    [("heads.csv", "report"), ("stats.json", "report"), ("cases.json", "report"), ("measure.json", "measure"), ("train.json", "train")],
)
def test_a_missing_file_of_plasticity_is_named_with_its_step(name, step, make_run):
    folder, _ = make_run()
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name} must exist, got no such file; run tinyonn heads plasticity {step}\."):
        write_plasticity_page(folder)
    assert not list(folder.glob("*.png"))
    assert not (folder / "index.html").exists()


def test_statistics_that_are_not_whole_are_refused(make_run):
    folder, _ = make_run()
    (folder / "stats.json").write_text('{"pairs": []}')
    with pytest.raises(InputError, match=r"must hold stats\.json and cases\.json as the report step writes them, got KeyError"):
        write_plasticity_page(folder, figures_too=False)


def test_aggregate_page_has_seeds_intervals_and_what_is_left_out(make_run, parse):
    for seed in (0, 1, 2):
        folder, _ = make_run(seed)
    (folder.parent / "seed7").mkdir()
    found = aggregate(folder.parent)
    parser = parse(write_plasticity_aggregate(folder.parent).html)
    assert "seed7 is left out: no train.json; run tinyonn heads plasticity train." in parser.text
    row = next(row for row in rows_of(parser, "by chance") if row[0] == "I_pre, Urel")
    rho = found["pairs"][1]["rho"]
    assert [float(cell) for cell in row[1:6]] == pytest.approx([3, rho["mean"], rho["sd"], rho["low"], rho["high"]], abs=6e-4)
    accepted = {row[0]: row[1:] for row in rows_of(parser, "seeds that meet it")}
    assert accepted["ρ(I_pre, U)"][1] == f"{found['acceptance'][0]['met']} of 3"
    assert [entry["key"] for entry in parser.data["maps-data"]] == ["I_pre", "I_post", "Urel", "G_pre", "I_pre_sd", "Urel_sd"]


def test_aggregate_page_of_one_seed_says_that_it_gives_no_interval(make_run, parse):
    folder, _ = make_run(4)
    aggregate(folder.parent)
    parser = parse(write_plasticity_aggregate(folder.parent).html)
    assert "One seed has no interval" in parser.text
    assert [entry["key"] for entry in parser.data["maps-data"]] == ["I_pre", "I_post", "Urel", "G_pre"]
    row = next(row for row in rows_of(parser, "by chance") if row[0] == "I_pre, U")
    assert row[3:6] == ["–", "–", "–"]


def test_hostile_names_stay_text(make_scores, make_run, parse, hostile):
    folder, _ = make_run()
    aggregate(folder.parent)
    pages = [
        write_plasticity_page(folder),
        write_plasticity_aggregate(folder.parent),
        write_scores_page(make_scores()[0], figures_too=False),
    ]
    for written in pages:
        parser = parse(written.html)
        assert "img" not in parser.tags
        assert hostile.partition("/")[2] in parser.text  # of a path the last part is shown
        assert not [value for _, name, value in parser.attributes if name == "src" or (name == "href" and value != "data:,")]


def circles(svg):
    return [
        (float(x), float(y)) for x, y in re.findall(r'<circle class="point"[^>]* cx="([\d.]+)" cy="([\d.]+)"', svg.partition("</svg>")[0])
    ]


def points(x, y, shape="circle"):
    return charts.Points("heads", np.array(x, dtype=float), np.array(y, dtype=float), ["a"] * len(x), shape)


def test_scatter_puts_points_where_their_values_are():
    svg = charts.scatter("t", [points([0, 1, 4], [10, 30, 20])], x_title="x", y_title="y", x_marks=[("p90", 4.0)])
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)
    assert (x2 - x0) == pytest.approx(4 * (x1 - x0), abs=0.5)
    assert (y0 - y1) == pytest.approx(2 * (y0 - y2), abs=0.5)  # y grows upwards
    mark = re.search(r'<line class="mark" x1="([\d.]+)" x2="([\d.]+)"', svg)
    assert float(mark[1]) == float(mark[2]) == pytest.approx(x2, abs=0.06)


def test_scatter_compresses_an_axis_that_few_values_stretch():
    x = [*np.linspace(-0.01, 0.01, 40), 100.0]
    svg = charts.scatter("t", [points(x, np.arange(41.0))], x_title="nats", y_title="y")
    assert "nats (arsinh scale)" in svg
    places = [place for place, _ in circles(svg)]
    assert places == sorted(places)
    width = float(np.median(np.abs(x)))
    shares = [(place - places[0]) / (places[-1] - places[0]) for place in places]
    bent = np.arcsinh(np.array(x) / width)
    assert shares == pytest.approx(((bent - bent[0]) / (bent[-1] - bent[0])).tolist(), abs=2e-3)
    assert charts.linear_width(np.linspace(-1, 1, 50)) is None
    assert charts.linear_width(np.zeros(4)) is None


def test_scatter_writes_small_numbers_short():
    svg = charts.scatter("t", [points([-0.0015, 0, 0.0005], [0.5, 1, 2])], x_title="nats", y_title="U")
    assert "nats (× 10⁻³)" in svg
    ticks = [float(tick) for tick in re.findall(r'text-anchor="middle">(-?[\d.]+)</text>', svg)]
    assert ticks == [-1.5, -1, -0.5, 0, 0.5]
    assert ">U</text>" in svg


def test_scatter_tells_groups_apart_by_shape():
    svg = charts.scatter(
        "t", [points([1], [1]), points([2, 3], [2, 3], "square"), points([4], [4], "triangle")], x_title="x", y_title="y"
    ).partition("</svg>")[0]
    assert [len(re.findall(f'<{tag} class="point"', svg)) for tag in ("circle", "rect", "path")] == [1, 2, 1]
    assert len(set(re.findall(r'class="point" style="fill:(var\(--s\d\))"', svg))) == 3


def test_interval_dots_cut_at_the_range_and_say_what_is_not_defined():
    rows = [charts.DotRow("a", 0.5, -3.0, 0.75, [0.25], 0.1), charts.DotRow("b", None)]
    svg = charts.interval_dots("t", rows, low=-1, high=1, x_title="rho", limit=("study", 0.5))
    whisker = re.search(r'class="whisker" x1="([\d.]+)" x2="([\d.]+)"', svg)
    value = float(re.search(r'class="value" cx="([\d.]+)"', svg)[1])
    limit = float(re.search(r'class="mark" x1="([\d.]+)"', svg)[1])
    single = float(re.search(r'class="single" cx="([\d.]+)"', svg)[1])
    left, right = float(whisker[1]), float(whisker[2])
    assert value == limit
    assert (value - left) / (right - left) == pytest.approx(1.5 / 1.75, abs=0.01)
    assert (single - left) / (right - left) == pytest.approx(1.25 / 1.75, abs=0.01)
    assert svg.count("not defined") == 1


def test_the_limit_is_drawn_at_judged_rows_alone():
    rows = [charts.DotRow("a", 0.5), charts.DotRow("b", 0.1, judged=False), charts.DotRow("c", 0.2)]
    svg = charts.interval_dots("t", rows, low=-1, high=1, x_title="rho", limit=("study", 0.5))
    spans = [tuple(map(float, span)) for span in re.findall(r'class="mark" [^>]*y1="([\d.]+)" y2="([\d.]+)"', svg)]
    heights = [float(height) for height in re.findall(r'class="value" cx="[\d.]+" cy="([\d.]+)"', svg)]
    assert [any(top < height < bottom for top, bottom in spans) for height in heights] == [True, False, True]


def test_the_gradient_is_not_judged_by_the_expectations(make_run, parse, monkeypatch):
    for seed in (0, 1):
        folder, _ = make_run(seed)
    drawn = []
    monkeypatch.setattr(head_figures, "save_figure", lambda figure, path: drawn.append((path.name, figure)))
    written = write_plasticity_page(folder)
    (figure,) = (figure for name, figure in drawn if name == "fig_stats.png")
    for axes, limit in zip(figure.axes, (0.5, 0.3), strict=True):
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        crossed = [segment for lines in axes.collections for segment in lines.get_segments()]
        assert all((segment[:, 0] == limit).all() for segment in crossed)
        reached = {name for place, name in enumerate(names) if any(low < place < high for (_, low), (_, high) in crossed)}
        assert reached == {"I_pre, U", "I_pre, Urel"}
        assert limit not in [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) > 1]
    aggregate(folder.parent)
    for page in (written, write_plasticity_aggregate(folder.parent)):
        text = parse(page.html).text
        assert (
            "The expectations judge (I_pre, U) and (I_pre, Urel), and the numbers of cases; (I_pre, G_pre) is shown but not judged." in text
        )


def test_scale_of_negative_values_spans_them():
    scale = choose_scale(np.array([[-5.0, -1.0]]), "none", "nats", signed=False)
    assert (scale.kind, scale.log, scale.low, scale.high) == ("sequential", False, -5.0, -1.0)
    mixed = choose_scale(np.array([[-5.0, 0.001, 3.0]]), "none", "nats", signed=False)
    assert (mixed.log, mixed.low, mixed.high) == (False, -5.0, 3.0)
    assert math.isfinite(choose_scale(np.full((1, 2), np.nan), "none", "nats", signed=False).high)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_pages_draw_every_map_without_a_message(width, scheme, make_scores, make_run, browser):
    for seed in (0, 1):
        folder, _ = make_run(seed)
    aggregate(folder.parent)
    pages = [
        (write_scores_page(make_scores(30, 9)[0], figures_too=False), 4, 270),
        (write_plasticity_page(folder, figures_too=False), 4, 40),
        (write_plasticity_aggregate(folder.parent), 6, 40),
    ]
    for written, maps, cells in pages:
        browser.open(written.html, width=width, scheme=scheme)
        assert browser.console() == []
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.run("return Object.values(heatMaps).map(map => +map.canvas.dataset.cells)") == [cells] * maps
        assert browser.run("return [...document.querySelectorAll('svg.chart')].every(svg => svg.getBoundingClientRect().width > 100)")


@pytest.mark.parametrize("width", [1400, 1300])
def test_no_table_is_cut_on_a_desktop(width, make_scores, make_run, browser):
    for seed in range(10):
        folder, _ = make_run(seed, I_pre=np.linspace(-1, 1, 40).reshape(4, 10) * 1.23456e-3, Urel=np.linspace(1, -1, 40).reshape(4, 10))
    aggregate(folder.parent)
    cut = "return [...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).map(box => box.ariaLabel)"
    for written in (
        write_plasticity_page(folder, figures_too=False),
        write_plasticity_aggregate(folder.parent),
        write_scores_page(make_scores(30, 9)[0], figures_too=False),
    ):
        browser.open(written.html, width=width)
        assert browser.run(cut) == []


def test_views_switch_the_score_maps_but_not_their_fusion(make_scores, browser):
    browser.open(write_scores_page(make_scores()[0], figures_too=False).html)
    read = "return Object.values(heatMaps).map(map => map.view.unit)"
    assert browser.run(read) == ["standard deviations of the layer"] * 3 + ["weighted sum of ranks"]
    browser.run("document.querySelector('input[name=normalise][value=none]').click()")
    units = ["norm of the head's output", "negative entropy, nats", "share of attention", "weighted sum of ranks"]
    assert browser.run(read) == units
