"""The pages in a real browser: no console message, maps that are drawn, and controls that work by keyboard."""

from __future__ import annotations

import numpy as np
import pytest

from tinyonn.report import write_comparison, write_report

COLOURS = """
const canvas = document.querySelector('figure[data-map="KEY"] canvas, figure[data-points="KEY"] canvas');
const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, seen = new Set();
for (let at = 0; at < pixels.length; at += 4) if (pixels[at + 3] > 0) seen.add(pixels[at] << 16 | pixels[at + 1] << 8 | pixels[at + 2]);
return seen.size;
"""


@pytest.fixture
def page(make_scan, tmp_path):
    scan = make_scan(sequences=3, texts=["a </script><img src=x onerror=alert(1)>"] * 3)
    return scan, write_report(scan.path, tmp_path / "r.html", replay_order="first", figures_too=False).html


def fits(browser) -> bool:
    return browser.run("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 800])
def test_report_draws_every_map_without_a_message(width, scheme, page, browser):
    browser.open(page[1], width=width, scheme=scheme)
    assert browser.console() == []
    assert fits(browser)
    cells = browser.run("return Object.fromEntries(Object.entries(heatMaps).map(([key, map]) => [key, +map.canvas.dataset.cells]))")
    assert cells == {"activation": 22, "gradient": 22, "sps": 22, "integral": 22, "heads": 12}
    for key in cells:
        assert browser.run(COLOURS.replace("KEY", key)) > 20
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert browser.run("return document.querySelectorAll('img').length") == 0


def test_normalisation_switches_every_map(page, browser):
    browser.open(page[1])
    read = "return Object.values(heatMaps).map(map => map.view.unit)"
    assert browser.run(read) == ["standard deviations of the layer"] * 5
    before = browser.run("return document.querySelector('figure[data-map=activation] canvas').toDataURL()")
    browser.run("document.querySelector('input[name=normalise][value=none]').click()")
    assert browser.run(read)[:2] == ["norm of the output", "loss per weight"]
    assert browser.run("return document.querySelector('figure[data-map=activation] canvas').toDataURL()") != before
    browser.run("document.querySelector('input[name=normalise][value=global]').click()")
    assert browser.run(read) == ["standard deviations of the map"] * 5


def test_arrow_keys_read_the_cells_of_a_map(page, browser):
    scan, html = page
    browser.open(html)
    browser.run("document.querySelector('figure[data-map=activation] canvas').focus()")
    browser.press("ArrowDown", "ArrowDown", "ArrowRight")
    said = browser.run("return document.querySelector('figure[data-map=activation] .readout').textContent")
    value = scan.mean(scan.activation)[scan.offsets[1] + 4 : scan.offsets[1] + 6].mean()  # k_proj of layer 1: blocks 4 and 5
    assert said.startswith("layer 1, self_attn.k_proj")
    assert float(said.split(" · ")[1].split(" ")[0]) == pytest.approx(value, rel=1e-3)


def test_replay_steps_by_keyboard_and_shows_the_tokens_numbers(page, browser):
    scan, html = page
    browser.open(html)
    browser.run("document.querySelector('[data-replay=tokens]').focus()")
    browser.press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft")
    facts = browser.run("return [...document.querySelectorAll('[data-replay=facts] dd')].map(d => d.textContent)")
    assert facts[1] == "3 of 12"
    assert float(facts[2].split()[0]) == pytest.approx(scan.loss[0][1], rel=1e-3)
    assert float(facts[3].split()[0]) == pytest.approx(scan.loss[0][2], rel=1e-3)
    assert browser.run("return document.querySelector('.current').textContent") == str(scan.token_ids[0][2])
    browser.press("End")
    facts = browser.run("return [...document.querySelectorAll('[data-replay=facts] dd')].map(d => d.textContent)")
    assert facts[3] == "nothing to predict"
    assert browser.console() == []


def test_replay_colours_tokens_by_sps_of_a_module(page, browser):
    scan, html = page
    browser.open(html)
    choose = (
        "const choice = document.querySelector('[data-replay=NAME]'); choice.value = 'VALUE'; choice.dispatchEvent(new Event('change'));"
    )
    for name, value in (("colour", "sps"), ("layer", "1"), ("module", "4")):
        browser.run(choose.replace("NAME", name).replace("VALUE", value))
    colours = browser.run("return [...document.querySelectorAll('[data-replay=tokens] span')].map(s => s.style.backgroundColor)")
    gate = slice(scan.offsets[1] + 12, scan.offsets[1] + 17)
    means = scan.sps[0][:-1, gate].mean(axis=1)
    assert colours[-1] == ""  # no gradient, no SPS
    channels = np.array([[int(part) for part in colour[4:-1].split(",")] for colour in colours[:-1]])
    # Red above 0, blue below.
    strong = np.abs(means) > 0.05
    assert strong.sum() > 3
    assert ((channels[:, 0] > channels[:, 2]) == (means > 0))[strong].all()
    browser.run(choose.replace("NAME", "sequence").replace("VALUE", "1"))
    assert browser.run("return document.querySelector('[data-replay=tokens]').firstChild.textContent") == str(scan.token_ids[1][0])


def test_replay_plays_and_stops(page, browser):
    browser.open(page[1])
    browser.run("document.querySelector('[data-replay=play]').click()")
    body = {
        "script": "const done = arguments[0]; setTimeout(() => done(document.querySelector('[data-replay=slider]').value), 700);",
        "args": [],
    }
    assert int(browser._call("POST", f"{browser._session}/execute/async", body)) >= 1
    browser.run("document.querySelector('[data-replay=play]').click()")
    assert browser.run("return document.querySelector('[data-replay=play]').textContent") == "Play"


def test_values_open_as_a_table(page, browser):
    browser.open(page[1])
    browser.run("document.querySelector('figure[data-map=sps] details').open = true")
    browser.settle()
    assert browser.run("return document.querySelectorAll('figure[data-map=sps] table tbody tr').length") == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 800])
def test_comparison_draws_maps_and_points_without_a_message(width, scheme, make_scan, browser, tmp_path):
    a = make_scan("a", sequences=9, seed=1)
    shift = np.where(np.arange(sum(entry.blocks for entry in a.layout)) % 9 == 0, 3.0, 0.0)
    b = make_scan("b", sequences=9, seed=2, shift=shift, metadata={"model": "tiny-model", "topic": "finance", "credit": "full"})
    result = write_comparison(a.path, b.path, tmp_path / "c.html", resamples=200, figures_too=False)
    browser.open(result.html, width=width, scheme=scheme)
    assert browser.console() == []
    assert fits(browser)
    drawn = browser.run("return [...document.querySelectorAll('figure[data-points] canvas')].map(canvas => +canvas.dataset.cells)")
    assert drawn == [result.tested_blocks] * 2
    for key in ("difference", "share", "scatter", "volcano"):
        assert browser.run(COLOURS.replace("KEY", key)) > 3
