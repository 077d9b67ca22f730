"""The PNGs of the head laboratory, drawn and measured: labels that can be read apart, titles that name model and data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tinyonn.report import write_plasticity_page, write_scores_page
from tinyonn.report.heads import figures as head_figures


@pytest.fixture
def drawn(monkeypatch):
    """Figures by file name, drawn as they are saved."""
    figures = {}

    def keep(figure, path):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(figure).draw()
        figures[path.name] = figure

    monkeypatch.setattr(head_figures, "save_figure", keep)
    return figures


def boxes(axis):
    """Where the labels of the ticks that are in sight are, in pixels."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()]
    return [tick.label1.get_window_extent() for tick in ticks]


def apart(a, b, gap):
    return a.x1 + gap <= b.x0 or b.x1 + gap <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0


SPREADS = {
    "small negative": np.linspace(-0.00236, 0.00145, 40),
    "large": np.linspace(-2.0e6, 1.5e6, 40),
    "few far away": np.array([*np.linspace(-0.001, 0.001, 36), -3.0, 4.0, 0.2, -0.05]),
    "one side": np.linspace(0.12345, 0.12346, 40),
    "ordinary": np.linspace(-0.4, 0.9, 40),
}


@pytest.mark.parametrize("values", SPREADS.values(), ids=SPREADS)
def test_labels_of_a_scatter_stand_apart(values, make_run, drawn):
    columns = {"U": 0.0055 + 1e-4 * np.abs(values).reshape(4, 10), "Urel": values.reshape(4, 10)[::-1], "G_pre": values.reshape(4, 10)}
    write_plasticity_page(make_run(I_pre=values.reshape(4, 10), **columns)[0])
    for name in ("fig_I_vs_U.png", "fig_I_vs_G.png"):
        for axes in drawn[name].axes:
            for axis in (axes.xaxis, axes.yaxis):
                placed = boxes(axis)
                assert len(placed) >= 3
                assert all(apart(a, b, 6.0) for a, b in itertools.combinations(placed, 2))
                assert len({tick.label1.get_text() for tick in axis.get_major_ticks()}) >= len(placed)


def test_labels_of_small_numbers_tell_their_power_of_ten(make_run, drawn):
    write_plasticity_page(make_run(I_pre=np.linspace(-0.0024, 0.0014, 40).reshape(4, 10))[0])
    axes = drawn["fig_I_vs_U.png"].axes[0]
    power = axes.get_xlabel().partition("10^{")[2].partition("}")[0].replace("\\mathdefault", "").replace("−", "-").strip("{}")
    for tick in axes.xaxis.get_major_ticks():
        if tick.label1.get_text():
            shown = float(tick.label1.get_text().replace("$\\mathdefault{", "").replace("}$", "").replace("−", "-"))
            assert shown * 10.0 ** int(power) == pytest.approx(tick.get_loc(), abs=1e-9)


def test_labels_of_two_panels_stand_apart(make_run, drawn):
    write_plasticity_page(make_run()[0])
    left, right = drawn["fig_stats.png"].axes
    assert all(apart(a, b, 15.0) for a, b in itertools.product(boxes(left.xaxis), boxes(right.xaxis)))


def test_score_maps_name_their_model_and_data(make_scores, drawn):
    folder = make_scores()[0]
    (folder / "summary.json").write_text('{"model": "org/tiny", "data": "/some/where/CommonsenseQA/validation.jsonl"}')
    write_scores_page(folder)
    assert len(drawn) == 4
    for figure in drawn.values():
        title = figure.axes[0].title
        assert "tiny on CommonsenseQA/validation.jsonl" in title.get_text()
        box = title.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_a_long_title_stays_inside_its_map(make_scores, drawn):
    folder = make_scores(layers=4, heads=3)[0]
    (folder / "summary.json").write_text(
        '{"model": "org/a-model-with-a-rather-long-name-instruct-v0.2", "data": "a_rather_long_name_of_data/rows.jsonl"}'
    )
    write_scores_page(folder)
    for figure in drawn.values():
        box = figure.axes[0].title.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
