"""The timeline shows what the records of lives say, however few, many or hostile they are."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest

from tinyonn.errors import InputError
from tinyonn.report.html.charts import Band, bands, line_chart, step_chart
from tinyonn.report.life import LifeLine, write_timeline_page

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\x00\"'&"


def record(number, event, step, second=0, **fields):
    return {
        "number": number,
        "time": f"2025-03-01T10:{second // 60:02}:{second % 60:02}.000000+00:00",
        "event": event,
        "step": step,
        **fields,
    }


PARENT = LifeLine(
    "oak", "life-1", None,
    [
        record(1, "begin", 0, life="life-1", parent=None),
        record(2, "stretch", 0, 0, data="books", data_hash="ab" * 32, objective="next token", device="cpu"),
        record(3, "metrics", 10, 20, loss=4.5, pi=0.5, live_experts=28),
        record(4, "birth", 12, 25, layer="a", expert=3, share=0.1, age=0),
        record(5, "save", 20, 30, bytes=4_000_000),
        record(6, "restore", 20, 300),
        record(7, "stretch", 20, 400, data="talks", data_hash="short", objective="recall", device="cuda:0"),
        record(8, "metrics", 30, 410, loss=3.25, pi=0.25, live_experts=29),
        record(9, "evaluation", 30, 415, eval_loss=3.5),
        record(10, "recycling", 35, 420, layer="a", expert=1, share=0.001, age=30),
        record(11, "save", 40, 470, bytes=1_000_000),
        record(12, "stop", 40, 475, reason="SIGTERM"),
        record(13, "fork", 20, 900, child="life-2"),
        record(14, "compact", 40, 901),
    ],
    kept_steps=[20, 40], stored_bytes=5_000_000, notes=["Kept well."],
)  # fmt: skip
CHILD = LifeLine(
    "acorn", "life-2", {"life": "life-1", "step": 20},
    [
        record(1, "begin", 20, life="life-2", parent={"life": "life-1", "step": 20}),
        record(2, "stretch", 20, 0, data="poems"),
        record(3, "metrics", 50, 9, loss=2.0),
    ],
)  # fmt: skip


def facts_of(source: str) -> list[dict[str, str]]:
    lists = re.findall(r'<dl class="facts">(.*?)</dl>', source, re.DOTALL)
    return [{name: html.unescape(value) for name, value in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", found)} for found in lists]


def told(source: str) -> list[str]:
    """Descriptions of the points, bars and marks of all charts."""
    return [html.unescape(found) for found in re.findall(r"<(?:circle|rect|path)\b[^>]*><title>(.*?)</title>", source)]


def test_one_life_is_told_by_its_records(parse, tmp_path):
    target = write_timeline_page(tmp_path / "timeline.html", [PARENT])
    page, source = parse(target), target.read_text(encoding="utf-8")
    assert facts_of(source) == [
        {
            "identity": "life-1", "parent": "–", "forked at step": "–", "steps": "40", "loss": "3.25", "held-out loss": "3.5", "PI": "0.25",
            "live experts": "29", "births": "1", "recyclings": "1", "stretches": "2", "stops": "1", "killed": "1", "restored": "1",
            "kept steps": "2: 20, 40", "stored": "5.0 MB",
        }
    ]  # fmt: skip
    (stretches,) = page.tables
    assert stretches == [
        ["from step", "to step", "began (UTC)", "lasted", "data", "hash", "objective", "device", "ended by"],
        ["20", "40", "2025-03-01 10:06:40", "1:15", "talks", "short", "recall", "cuda:0", "SIGTERM"],
        ["0", "20", "2025-03-01 10:00:00", "30 s", "books", "abababababab…", "next token", "cpu", "killed"],
    ]
    assert "Kept well." in page.text
    assert "Timeline of oak" in page.text
    assert "40 steps." in page.text
    points = told(source)
    assert {"training loss, step 10: 4.5", "training loss, step 30: 3.25", "held-out loss, step 30: 3.5"} <= set(points)
    assert {"predictive integrity, step 30: 0.25", "live experts, step 10: 28", "a save, step 20: 4", "a save, step 40: 1"} <= set(points)
    counts = dict(re.findall(r"births, step (\d+): (\d+)", "\n".join(points)))
    assert [counts[step] for step in ("0", "11", "12", "40")] == ["0", "0", "1", "1"]
    assert "oak, steps 0 to 20, 30 s: killed" in points
    assert {"killed at step 20", "restored to 20", "stopped at step 40: SIGTERM", "forked at step 20: life-2"} <= set(points)


def test_several_lives_share_charts_and_have_a_family(parse, tmp_path):
    target = write_timeline_page(tmp_path / "timeline.html", [PARENT, CHILD])
    page, source = parse(target), target.read_text(encoding="utf-8")
    family, stretches = page.tables
    assert family == [
        ["life", "identity", "parent", "forked at step", "steps", "last loss", "last held-out loss"],
        ["oak", "life-1", "–", "–", "40", "3.25", "3.5"],
        ["acorn", "life-2", "oak", "20", "50", "2", "–"],
    ]
    assert [(row[0], row[1], row[2], row[-1]) for row in stretches[1:]] == [
        ("oak", "20", "40", "SIGTERM"),
        ("oak", "0", "20", "killed"),
        ("acorn", "20", "50", "running, or killed"),
    ]
    assert [one["parent"] for one in facts_of(source)] == ["–", "oak"]
    assert {"oak, step 30: 3.25", "acorn, step 50: 2"} <= set(told(source))
    assert "oak: Kept well." in page.text
    for title in ("Training loss", "Held-out loss", "Predictive integrity", "Live experts", "Births", "Recyclings", "Size of saves"):
        assert f"<h3>{title}</h3>" in source
    assert source.count(">acorn departs</text>") == 5  # held-out loss has only a step after it
    unknowing = LifeLine("oak", "life-1", None, [one for one in PARENT.records if one["event"] != "fork"])
    assert "forked at step 20: acorn" in told(write_timeline_page(target, [unknowing, CHILD]).read_text(encoding="utf-8"))
    alone = write_timeline_page(tmp_path / "alone.html", [CHILD]).read_text(encoding="utf-8")
    assert "departs" not in alone
    assert facts_of(alone)[0]["parent"] == "life-1"


def test_stretches_of_a_fork_show_what_it_changed(parse, tmp_path):
    records = [record(1, "begin", 20), record(2, "stretch", 20, changed={"schedule": ["constant", "linear"], "w_ce": [0.0, 0.5]})]
    fork = LifeLine("acorn", "life-2", {"life": "life-1", "step": 20}, records)
    _, stretches = parse(write_timeline_page(tmp_path / "timeline.html", [PARENT, fork])).tables
    assert stretches[0][-2:] == ["changed", "ended by"]
    assert [row[-2] for row in stretches[1:]] == ["–", "–", "schedule constant → linear, w_ce 0.0 → 0.5"]
    records[1]["changed"] = {"schedule": "linear"}
    _, stretches = parse(write_timeline_page(tmp_path / "timeline.html", [PARENT, fork])).tables
    assert stretches[-1][-2] == ""


def test_a_restored_life_has_no_births_after_its_step(tmp_path):
    records = [record(1, "stretch", 0), record(2, "birth", 5), record(3, "stop", 40), record(4, "restore", 20)]
    source = write_timeline_page(tmp_path / "timeline.html", [LifeLine("oak", "life-1", None, records)]).read_text(encoding="utf-8")
    steps = [int(step) for step in re.findall(r"births, step (\d+):", "\n".join(told(source)))]
    assert (min(steps), max(steps)) == (0, 20)


def test_a_line_that_does_not_change_is_not_at_the_edge():
    drawn = step_chart("t", [("a", np.arange(2.0), np.full(2, 84.0))], y_title="y")
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    assert all(80 < height < 160 for height in heights)
    assert ">90<" in drawn
    assert ">100<" not in drawn


def test_a_point_beside_missing_values_is_drawn():
    nan = np.nan
    drawn = line_chart("t", ["1", "2", "3", "4"], [("a", np.array([1.0, 2.0, nan, 3.0]))], x_title="x", y_title="y")
    assert re.findall(r'class="(dot[^"]*)"', drawn) == ["dot", "dot", "dot seen"]


@pytest.mark.parametrize(
    "records",
    [
        [],
        PARENT.records[:1],
        PARENT.records[1:2],
        PARENT.records[2:3],
        PARENT.records[5:6],
        PARENT.records[11:12],
        [{"event": "metrics"}, {}],
    ],
    ids=["none", "begin", "stretch", "metrics", "restore", "stop", "no step"],
)
def test_a_life_of_few_records_has_a_page(records, parse, tmp_path):
    for others in ([], [CHILD]):
        page = parse(write_timeline_page(tmp_path / "timeline.html", [LifeLine("oak", "life-1", None, records), *others]))
        assert "nan" not in page.text.lower()
        assert "Size of saves" in page.text


def test_no_life_has_a_page(parse, tmp_path):
    assert "No step yet." in parse(write_timeline_page(tmp_path / "timeline.html", [])).text


def test_missing_metrics_are_left_out(parse, tmp_path):
    records = [
        record(1, "metrics", 1, loss=None, pi="high"),
        record(2, "metrics", 2, loss=float("nan"), live_experts=True),
        record(3, "metrics", 3, loss=2.5),
        record(4, "evaluation", 3, eval_loss=float("inf")),
        record(5, "save", 3, bytes=[1]),
        record(6, "metrics", 10**400, loss=1.0),
    ]
    target = write_timeline_page(tmp_path / "timeline.html", [LifeLine("oak", "life-1", None, records)])
    found = facts_of(target.read_text(encoding="utf-8"))[0]
    assert (found["loss"], found["PI"], found["held-out loss"], found["live experts"]) == ("2.5", "–", "–", "–")
    assert "training loss, step 3: 2.5" in told(target.read_text(encoding="utf-8"))


def test_a_long_life_is_thinned_to_means(tmp_path):
    rng = np.random.default_rng(0)
    losses = 5 - np.arange(100_000) / 50_000 + rng.normal(size=100_000) * 0.1
    records = [record(1, "stretch", 0)]
    records += [record(step + 2, "metrics", step + 1, loss=loss, pi=0.5) for step, loss in enumerate(losses.tolist())]
    target = write_timeline_page(tmp_path / "timeline.html", [LifeLine("oak", "life-1", None, records)])
    source = target.read_text(encoding="utf-8")
    assert len(source) < 400_000
    points = [float(value) for value in re.findall(r"training loss, step [\d,]+: ([\d.]+)", source)]
    assert 100 < len(points) <= 160
    group = -(-100_000 // 160)
    np.testing.assert_allclose(points, [losses[begin : begin + group].mean() for begin in range(0, 100_000, group)], rtol=2e-3)


def test_many_stretches_are_limited(parse, tmp_path):
    records = []
    for number in range(1000):
        records += [
            record(3 * number, "stretch", number),
            record(3 * number + 1, "restore", number),
            record(3 * number + 2, "fork", number),
        ]
    page = parse(write_timeline_page(tmp_path / "timeline.html", [LifeLine("oak", "life-1", None, records)]))
    (stretches,) = page.tables
    assert (len(stretches), stretches[1][0]) == (301, "999")
    assert "300 of 1,000" in page.text
    assert page.tags.count("title") <= 1 + 4 * 300 + 2 * 160  # of the page, bars and marks, and points of two charts


def test_a_clock_that_went_back_shortens_nothing_below_zero(parse, tmp_path):
    records = [
        record(1, "stretch", 0, 3000),
        record(2, "metrics", 5, 3010),
        record(3, "metrics", 10, 0),
        record(4, "stop", 12, 5, reason="done"),
    ]
    (stretches,) = parse(write_timeline_page(tmp_path / "timeline.html", [LifeLine("oak", "life-1", None, records)])).tables
    assert stretches[1][3] == "15 s"
    records[0]["time"] = "yesterday"
    (stretches,) = parse(write_timeline_page(tmp_path / "timeline.html", [LifeLine("oak", "life-1", None, records)])).tables
    assert stretches[1][2:4] == ["–", "5.0 s"]


def test_hostile_text_stays_text(parse, tmp_path):
    records = [
        record(1, "stretch", 0, data=HOSTILE, data_hash=HOSTILE, objective=[HOSTILE], device={HOSTILE: 1}),
        record(2, "metrics", 5, loss=1.0),
        record(3, "stop", 5, reason=HOSTILE),
        record(4, "fork", 5, child=HOSTILE),
    ]
    lives = [LifeLine(HOSTILE, f"{number}{HOSTILE}", {"life": HOSTILE, "step": HOSTILE}, records, notes=[HOSTILE]) for number in range(2)]
    for some in (lives[:1], lives):
        target = write_timeline_page(tmp_path / "timeline.html", some)
        page = parse(target)
        assert "img" not in page.tags
        assert page.tags.count("script") == 3  # palette; core, map
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        assert not set(target.read_text(encoding="utf-8")) & {"\x00", "\u202e"}
        assert page.text.count("<img src=x onerror=alert(1)>") >= 6


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^output must be in a folder that can be written, got [^\n]*\.$"):
        write_timeline_page(Path(tmp_path / "none" / "timeline.html"), [PARENT])


def places(source: str, pattern: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, source)]


def test_lines_lie_at_their_own_steps():
    lines = [("a", np.array([0.0, 10.0, 100.0]), np.array([1.0, np.nan, 3.0])), ("b", np.array([50.0]), np.array([2.0]))]
    drawn = step_chart("t", lines, y_title="y")
    low, high, middle = places(drawn, r'<circle[^>]* cx="([\d.]+)"')
    assert middle == pytest.approx((low + high) / 2, abs=0.1)
    assert re.findall(r"<title>(.*?)</title>", drawn) == ["a, step 0: 1", "a, step 100: 3", "b, step 50: 2"]
    assert drawn.count('class="dot seen"') == 1  # a line of one point shows it
    assert "No measured value" in step_chart("t", [("a", np.zeros(2), np.full(2, np.nan))], y_title="y")
    assert "No measured value" in step_chart("t", [("a", np.zeros(1), np.zeros(1))], y_title="y", log=True)


def test_spans_and_marks_lie_at_their_steps():
    rows = [Band("a", [(0, 50, "first"), (50, 200, "second")], [("stopped", 50, "here")])]
    drawn = bands("t", rows, [("killed", "square", 0), ("stopped", "circle", 0)])
    (first, begin), (second, end) = zip(
        places(drawn, r'<rect[^>]* x="([\d.]+)"'), places(drawn, r'<rect[^>]* width="([\d.]+)"'), strict=True
    )
    assert first + begin == pytest.approx(second, abs=0.11)
    assert end == pytest.approx(3 * begin, abs=0.4)
    assert places(drawn, r'<circle[^>]* cx="([\d.]+)"')[0] == pytest.approx(second, abs=0.11)
    assert "stopped" in drawn
    assert "killed" not in drawn  # no mark of the kind, no entry in the legend
    assert "No measured value" in bands("t", [Band("a", [])], [])
