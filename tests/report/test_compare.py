"""Comparing two scans: what differs is found, chance is not, and files that cannot be compared are refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from tinyonn.errors import InputError
from tinyonn.mscan import MscanReader, MscanWriter, SequenceRecord
from tinyonn.report import write_comparison
from tinyonn.report.scan.samples import read_sample
from tinyonn.report.scan.statistics import compare_blocks, rank_correlation, split_half_correlation


def correlated(rng: np.random.Generator, sequences: int, blocks: int = 200) -> np.ndarray:
    """Mean SPS of one corpus: what a text is about moves many blocks together, the rest is skewed noise. Unit variance."""
    mixing = np.random.default_rng(0).normal(size=(5, blocks))
    mixing *= np.sqrt(0.5) / np.linalg.norm(mixing, axis=0)
    return rng.normal(size=(sequences, 5)) @ mixing + (rng.exponential(size=(sequences, blocks)) - 1) * np.sqrt(0.5)


@pytest.mark.parametrize("sequences", [16, 40, 120])
def test_halves_of_one_corpus_show_no_specific_block(sequences):
    splits, rng = 100, np.random.default_rng(sequences)
    wrong = 0
    for seed in range(splits):
        values = correlated(rng, sequences)
        wrong += compare_blocks(values[::2], values[1::2], resamples=200, confidence=0.95, seed=seed).specific.any()
    # At a true rate of 5 %, more than 11 of 100 happen once in two hundred runs.
    assert wrong <= 11


def test_intervals_hold_for_all_blocks_at_once_under_unequal_spread():
    rng, held, rounds = np.random.default_rng(3), 0, 100
    for seed in range(rounds):
        a, b = correlated(rng, 15), 2 * correlated(rng, 40) + 1
        found = compare_blocks(a, b, resamples=200, confidence=0.9, seed=seed)
        held += bool(np.all((found.low <= -1) & (found.high >= -1)))
    assert held >= 0.82 * rounds  # 90 % less what chance takes from 100 rounds, once in a hundred runs


def test_planted_differences_are_found():
    rng, found, wrong = np.random.default_rng(5), [], 0
    for seed in range(10):
        a, b = correlated(rng, 60), correlated(rng, 60)
        a[:, :12] += 1.5
        b[:, 12:20] += 1.5
        result = compare_blocks(a, b, resamples=400, confidence=0.95, seed=seed)
        found.append(result.specific[:20].mean())
        wrong += result.specific[20:].any()
        assert (result.difference[:12] > 0).all()
        assert (result.difference[12:20] < 0).all()
        assert (result.p_value[result.specific] <= 0.05 + 1e-9).all()
    assert np.mean(found) > 0.95
    assert wrong <= 3


def test_statistics_are_welch_and_repeatable():
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(0)
    a, b = correlated(rng, 20), correlated(rng, 31)
    found = compare_blocks(a, b, resamples=250, confidence=0.95, seed=4)
    np.testing.assert_allclose(found.statistic, ttest_ind(a, b, equal_var=False).statistic, rtol=1e-9)
    np.testing.assert_allclose(found.difference, a.mean(axis=0) - b.mean(axis=0), atol=1e-12)
    again = compare_blocks(a, b, resamples=250, confidence=0.95, seed=4)
    np.testing.assert_array_equal(found.low, again.low)
    assert compare_blocks(a, b, resamples=250, confidence=0.95, seed=5).critical != found.critical


def test_bootstrap_maximum_equals_a_plain_loop():
    from tinyonn.report.scan.statistics import _largest_statistics

    rng = np.random.default_rng(1)
    a, b = correlated(rng, 12, 30), correlated(rng, 9, 30)
    a[rng.random(a.shape) < 0.1] = np.nan
    mean_a, mean_b = np.nanmean(a, axis=0), b.mean(axis=0)
    se = np.ones(30)
    found = _largest_statistics(a, b, np.arange(30), mean_a, mean_b, se, 50, np.random.default_rng(2))
    draws = np.random.default_rng(2)
    weights = [draws.multinomial(len(side), np.full(len(side), 1 / len(side)), 50) for side in (a, b)]
    for draw in range(50):
        largest = 0.0
        for block in range(30):
            moved, error = 0.0, 0.0
            for side, weight, mean, sign in ((a, weights[0], mean_a, 1), (b, weights[1], mean_b, -1)):
                drawn = np.repeat(side[:, block], weight[draw])
                drawn = drawn[~np.isnan(drawn)]
                moved += sign * (drawn.mean() - mean[block])
                error += drawn.var(ddof=1) / len(drawn)
            largest = max(largest, abs(moved) / np.sqrt(error))
        assert found[draw] == pytest.approx(largest, rel=1e-4)


def test_blocks_of_few_sequences_and_constant_blocks_are_not_tested():
    rng = np.random.default_rng(0)
    a, b = correlated(rng, 12, 6), correlated(rng, 12, 6)
    a[:5, 0] = np.nan  # 7 sequences left
    a[:4, 1] = np.nan  # 8 left
    a[:, 2] = b[:, 2] = 0.0
    b[:, 3] = np.nan
    found = compare_blocks(a, b, resamples=200, confidence=0.95, seed=0)
    assert found.tested.tolist() == [False, True, False, False, True, True]
    assert not found.specific[[0, 2, 3]].any()
    assert np.isnan(found.low[0])
    assert found.p_value[3] == 1


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_rank_correlation_is_spearman(ties):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, 200).astype(float) if ties else rng.normal(size=200)
    y = x + rng.normal(size=200)
    x[3], y[9] = np.nan, np.inf
    both = np.isfinite(x) & np.isfinite(y)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x[both], y[both]).statistic, abs=1e-12)
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5.0)))


def test_halves_of_a_clear_corpus_agree_and_of_noise_do_not():
    rng = np.random.default_rng(0)
    clear = rng.normal(size=300) + 0.1 * rng.normal(size=(20, 300))
    assert split_half_correlation(clear, splits=5, seed=0) > 0.95
    assert abs(split_half_correlation(rng.normal(size=(20, 300)), splits=5, seed=0)) < 0.2


def test_comparison_finds_the_shifted_blocks_of_two_files(make_scan, parse, tmp_path):
    a = make_scan("python", sequences=14, seed=1)
    shift = np.zeros(sum(entry.blocks for entry in a.layout))
    shift[[3, 20]] = 2.5
    b = make_scan(
        "finance", sequences=11, tokens=20, seed=2, shift=shift, metadata={"model": "tiny-model", "topic": "finance", "credit": "full"}
    )
    result = write_comparison(a.path, b.path, tmp_path / "c.html", resamples=400)
    assert {3, 20} <= {block.block for block in result.specific_blocks}
    page = parse(result.html)
    assert f"{len(result.specific_blocks):,} of {result.tested_blocks:,} blocks" in page.text
    sides = [np.stack([np.nanmean(sps[:-1], axis=0) for sps in scan.sps]) for scan in (a, b)]
    first = result.specific_blocks[0]
    assert first.mean_a == pytest.approx(sides[0][:, first.block].mean(), rel=1e-5)
    assert first.mean_b == pytest.approx(sides[1][:, first.block].mean(), rel=1e-5)
    assert result.rank_correlation == pytest.approx(spearmanr(sides[0].mean(axis=0), sides[1].mean(axis=0)).statistic, abs=1e-3)
    assert page.tables[0][1:] == [
        ["A", "python", a.path.name, "14", str(14 * a.sps[0].shape[0])],
        ["B", "finance", b.path.name, "11", "220"],
    ]
    row = page.tables[1][1]
    assert [float(cell) for cell in row[4:7]] == pytest.approx([first.mean_a, first.mean_b, first.difference], rel=1e-3)
    assert [float(cell) for cell in row[7:9]] == pytest.approx([first.low, first.high], rel=1e-3)
    difference = sides[0].mean(axis=0) - sides[1].mean(axis=0)
    shown = page.data["maps-data"][0]
    column = shown["columns"].index("self_attn.q_proj")
    assert shown["values"][0][column] == pytest.approx(difference[:4].mean(), rel=1e-4)
    for term in ("topic-specific", "bootstrap draws", "interval", "rank correlation", "halves of A, of B", "low, high", "outside layers"):
        assert f"{term}: " in page.text
    assert "python minus finance" in page.text
    assert len(page.data["points-data"]["a"]) == result.tested_blocks
    assert [png.name for png in result.pngs] == ["c-difference.png", "c-blocks.png", "c-scatter.png"]


def test_one_corpus_split_in_two_files_shows_nothing(make_scan, parse, tmp_path):
    whole = make_scan("whole", sequences=40, seed=11)
    halves = [tmp_path / "one.mscan", tmp_path / "two.mscan"]
    with MscanReader(whole.path) as reader:
        for side, path in enumerate(halves):
            with MscanWriter(path, reader.metadata, reader.layout) as writer:
                for sequence in list(reader.sequences)[side::2]:
                    integral = reader.sequence_integral(sequence.ordinal)
                    writer.append(SequenceRecord(sequence.sequence_id, sequence.token_ids, sequence.loss, integral=integral))
    result = write_comparison(*halves, tmp_path / "c.html", resamples=1000, figures_too=False)
    assert result.specific_blocks == ()
    text = parse(result.html).text
    assert "No block is topic-specific" in text
    assert "none beyond chance" in text
    assert result.rank_correlation == pytest.approx(1, abs=0.1)


def test_planes_without_integrals_give_the_same_sample(make_scan, tmp_path):
    scan = make_scan(sequences=9)
    bare = tmp_path / "bare.mscan"
    with MscanReader(scan.path) as reader:
        with MscanWriter(bare, reader.metadata, reader.layout, codec="f32") as writer:
            for sequence in reader.sequences:
                writer.append(SequenceRecord(sequence.sequence_id, sequence.token_ids, sequence.loss, *reader.planes(sequence.ordinal)))
        stored = read_sample(reader, "stored")
    with MscanReader(bare) as reader:
        np.testing.assert_allclose(read_sample(reader, "bare").sps, stored.sps, rtol=1e-5, atol=1e-6)


def test_many_sequences_are_sampled_evenly(make_scan, monkeypatch):
    monkeypatch.setattr("tinyonn.report.scan.samples.MAX_SEQUENCES", 10)
    with MscanReader(make_scan(sequences=25).path) as reader:
        sample = read_sample(reader, "s.mscan")
    assert sample.sps.shape[0] == 10
    assert sample.notes == ["s.mscan: 10 of 25 sequences are compared, evenly spaced."]


def test_shared_texts_and_other_settings_are_said(make_scan, parse, tmp_path):
    a = make_scan("a", sequences=9, seed=1, metadata={"model": "m", "credit": "full", "max_length": 64, "topic": "t"})
    b = make_scan("b", sequences=9, seed=1, metadata={"model": "m", "credit": "full", "max_length": 32, "topic": "t"})
    text = parse(write_comparison(a.path, b.path, tmp_path / "c.html", resamples=200, figures_too=False).html).text
    assert "9 sequences occur on both sides" in text
    assert "The scans differ in max_length: 64 and 32." in text
    assert "t (a.mscan) against t (b.mscan)" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"model": "other", "credit": "full"}}, "must be scans of one model, got model tiny-model and other"),
        ({"metadata": {"model": "tiny-model", "credit": "local"}}, "must have the same credit, got full and local"),
        ({"sizes": {"model.layers.0.self_attn.q_proj.weight": 256}}, r"must have one layout, got 22 and 1 weights"),
        ({"sizes": {"model.layers.0.self_attn.q_proj.weight": 128}}, r"q_proj.weight with 256 features in 4 blocks and with 128 in 2"),
        ({"sizes": {"model.layers.0.mlp.weight": 128}}, r"q_proj.weight and model.layers.0.mlp.weight at the same place"),
        ({"sequences": 7}, "b.mscan must hold at least 8 sequences with SPS, got 7"),
    ],
    ids=["model", "credit", "fewer-weights", "other-size", "other-name", "few"],
)
def test_files_that_cannot_be_compared_are_refused(change, message, make_scan, tmp_path):
    a, b = make_scan("a", sequences=8), make_scan("b", **{"sequences": 8, "seed": 3, **change})
    with pytest.raises(InputError, match=message) as raised:
        write_comparison(a.path, b.path, tmp_path / "c.html")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "c.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top must be at least 1"),
        ({"resamples": 100}, "resamples must be at least 200, got 100"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"confidence": 1.0}, "confidence must be at least 0.5 and below 1"),
        ({"confidence": 0.999, "resamples": 500}, "resamples must be at least 999 for confidence 0.999, got 500"),
    ],
    ids=["top", "resamples", "seed", "confidence", "too-few-for-confidence"],
)
def test_bad_options_are_named(options, message, make_scan, tmp_path):
    a, b = make_scan("a", sequences=8), make_scan("b", sequences=8)
    with pytest.raises(InputError, match=message):
        write_comparison(a.path, b.path, tmp_path / "c.html", **options)


def test_a_file_is_not_compared_with_itself(make_scan, tmp_path):
    a = make_scan("a", sequences=8)
    with pytest.raises(InputError, match="a and b must be different files"):
        write_comparison(a.path, a.path, tmp_path / "c.html")


def test_a_tied_head_of_an_earlier_version_is_said(make_scan, parse, tmp_path):
    ours = {"config_hash": "x", "reduction": "sum"}
    a = make_scan("a", sequences=8, metadata={**ours, "tied_head": "product and look-up"})
    b = make_scan("b", sequences=8, seed=2, metadata=ours)
    c = make_scan("c", sequences=8, seed=3, metadata=ours)
    words = "gradients of a tied output head lack the part of the embedding"
    for one, other, told in ((a, b, True), (c, b, False)):
        page = parse(write_comparison(one.path, other.path, tmp_path / "c.html", resamples=200, figures_too=False).html)
        assert (words in page.text) == told


def test_hostile_topics_stay_text(make_scan, parse, tmp_path):
    attack = "</script><img src=x onerror=alert(1)>$x^2$"
    a = make_scan("a", sequences=8, metadata={"topic": attack})
    b = make_scan("b", sequences=8, seed=2, metadata={"topic": "plain"})
    page = parse(write_comparison(a.path, b.path, tmp_path / "c.html", resamples=200).html)
    assert "img" not in page.tags
    assert page.data["points-data"]["topics"] == [attack, "plain"]
