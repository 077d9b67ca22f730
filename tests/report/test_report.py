"""The page of one scan: its numbers are those of the file, and it is one safe, offline document."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import zscore

from tinyonn.errors import InputError
from tinyonn.mscan import MscanReader, MscanWriter, SequenceRecord
from tinyonn.report import write_report
from tinyonn.report.scan.grid import build_grid, short_names

ATTACKS = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!--<script>",
    '"&lt;b&gt;\u2028\u2029\u202e\x00\x07',
    "${document.title='owned'}",
]


def expected_cells(scan, values: np.ndarray, *, total: bool = False) -> dict[tuple[str, str], float]:
    """Token-weighted mean, or sum, over the blocks of each (layer, module), from the layout's names alone."""
    count = (~np.isnan(np.concatenate(scan.sps))).sum(axis=0)
    sums: dict[tuple[str, str], list[float]] = {}
    for entry in scan.layout:
        parts = entry.name.removesuffix(".weight").split(".")
        inside = parts[0] == "model"
        key = (parts[2], ".".join(part for part in parts[3:] if not part.isdigit())) if inside else (parts[0], "outside layers")
        blocks = slice(entry.base, entry.base + entry.blocks)
        cell = sums.setdefault(key, [0.0, 0.0])
        cell[0] += np.nansum(values[blocks] * (1 if total else count[blocks]))
        cell[1] += count[blocks].sum()
    return {key: top if total else top / bottom for key, (top, bottom) in sums.items()}


def shown_cells(heat_map: dict, view: str | None = None) -> dict[tuple[str, str], float]:
    values = heat_map["values"] if view is None else heat_map["views"][view]["values"]
    return {
        (row, column): values[i][j]
        for i, row in enumerate(heat_map["rows"])
        for j, column in enumerate(heat_map["columns"])
        if values[i][j] is not None
    }


def test_maps_hold_the_numbers_of_the_file(make_scan, parse, tmp_path):
    scan = make_scan()
    result = write_report(scan.path, tmp_path / "r.html", figures_too=False)
    maps = {heat_map["key"]: heat_map for heat_map in parse(result.html).data["maps-data"]}
    count = (~np.isnan(np.concatenate(scan.sps))).sum(axis=0)
    for key, values, total in [
        ("activation", scan.mean(scan.activation), False),
        ("gradient", scan.mean(scan.gradient), False),
        ("sps", scan.integral / count, False),
        ("integral", scan.integral, True),
    ]:
        wanted = expected_cells(scan, values, total=total)
        shown = shown_cells(maps[key])
        assert shown.keys() == wanted.keys()
        for cell, value in wanted.items():
            assert shown[cell] == pytest.approx(value, rel=1e-5, abs=1e-9), (key, cell)


@pytest.mark.parametrize(("head", "said"), [("lm_head", "here lm_head. Each"), (None, None)], ids=["head", "none"])
def test_weights_outside_the_layers_are_explained(head, said, make_scan, parse, tmp_path):
    sizes = {
        "model.layers.0.mlp.up_proj.weight": 300,
        "model.layers.1.mlp.up_proj.weight": 300,
        **({"lm_head.weight": 500} if head else {}),
    }
    page = parse(write_report(make_scan("plain", sizes=sizes).path, tmp_path / "r.html", figures_too=False).html)
    assert ("outside layers" in page.data["maps-data"][0]["columns"]) == bool(head)
    assert ("outside layers: weights that belong to no layer" in page.text) == bool(head)
    assert said is None or said in page.text


def test_normalised_maps_follow_their_definition(make_scan, parse, tmp_path):
    scan = make_scan()
    maps = {
        heat_map["key"]: heat_map
        for heat_map in parse(write_report(scan.path, tmp_path / "r.html", figures_too=False).html).data["maps-data"]
    }
    raw = np.array(maps["activation"]["values"], dtype=float)
    by_layer = np.array(maps["activation"]["views"]["layer"]["values"], dtype=float)
    np.testing.assert_allclose(by_layer[:3], zscore(raw[:3], axis=1, nan_policy="omit"), atol=1e-4)
    np.testing.assert_allclose(
        np.array(maps["activation"]["views"]["global"]["values"], dtype=float), zscore(raw, axis=None, nan_policy="omit"), atol=1e-4
    )
    sps = np.array(maps["sps"]["values"], dtype=float)[:3, :-1]
    np.testing.assert_allclose(
        np.array(maps["sps"]["views"]["layer"]["values"], dtype=float)[:3, :-1],
        sps / np.sqrt((sps**2).mean(axis=1, keepdims=True)),
        atol=1e-4,
    )
    # One module alone in its row has no pattern, and SPS of a whole layer is 0 up to rounding.
    assert by_layer[3, -1] == 0
    assert maps["sps"]["views"]["layer"]["values"][3][-1] == 0


def test_top_blocks_are_those_of_the_integral(make_scan, parse, tmp_path):
    scan = make_scan()
    page = parse(write_report(scan.path, tmp_path / "r.html", top=5, figures_too=False).html)
    count = (~np.isnan(np.concatenate(scan.sps))).sum(axis=0)
    for rows, order in ((page.tables[0], np.argsort(-scan.integral)), (page.tables[1], np.argsort(scan.integral))):
        assert len(rows) == 6
        for row, block in zip(rows[1:], order, strict=False):
            entry = next(entry for entry in scan.layout if entry.base <= block < entry.base + entry.blocks)
            first = 64 * (block - entry.base)
            assert row[3] == f"{first}–{min(first + 64, entry.out_features) - 1}"
            assert entry.name.removesuffix(".weight").endswith(row[2])
            assert row[1] in entry.name
            assert float(row[4].replace(",", "")) == pytest.approx(scan.integral[block], rel=1e-3)
            assert float(row[5]) == pytest.approx(scan.integral[block] / count[block], rel=1e-3)
            assert int(row[8]) == count[block]


@pytest.mark.parametrize("width", [64, 128, 32, 80])
def test_heads_share_out_their_blocks(width, make_scan, parse, tmp_path):
    heads, groups = 4, 2
    sizes = {f"model.layers.0.self_attn.{part}_proj.weight": width * n for part, n in (("q", heads), ("k", groups), ("v", groups))}
    sizes["model.layers.0.self_attn.o_proj.weight"] = 256
    scan = make_scan(sizes=sizes, metadata={"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": width})
    page = parse(write_report(scan.path, tmp_path / "r.html", figures_too=False).html)
    heat_map = next(heat_map for heat_map in page.data["maps-data"] if heat_map["key"] == "heads")
    wanted = np.zeros(heads)
    for entry in scan.layout[:3]:
        for head in range(heads):
            owner = head if entry.out_features == width * heads else head // 2
            for feature in range(owner * width, (owner + 1) * width):
                block = feature // 64
                in_block = min(64, entry.out_features - 64 * block)
                wanted[head] += scan.integral[entry.base + block] / in_block / (1 if entry.out_features == width * heads else 2)
    np.testing.assert_allclose(heat_map["values"][0], wanted, rtol=1e-4)
    assert "o_proj is not included" in page.text


def test_fused_projection_is_split_into_heads(make_scan, parse, tmp_path):
    scan = make_scan(sizes={"transformer.h.0.attn.c_attn.weight": 3 * 256}, metadata={"num_attention_heads": 4, "head_dim": 64})
    page = parse(write_report(scan.path, tmp_path / "r.html", figures_too=False).html)
    heat_map = next(heat_map for heat_map in page.data["maps-data"] if heat_map["key"] == "heads")
    np.testing.assert_allclose(heat_map["values"][0], scan.integral.reshape(3, 4).sum(axis=0), rtol=1e-4)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"model": "m"}, "has no num_attention_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2, "head_dim": 64}, "cannot share 2"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 64}, "7 and 7 heads of 64 features"),
    ],
    ids=["unknown", "uneven", "other-size"],
)
def test_heads_that_cannot_be_known_are_explained(metadata, reason, make_scan, parse, tmp_path):
    page = parse(write_report(make_scan(metadata=metadata).path, tmp_path / "r.html", figures_too=False).html)
    assert reason in page.text
    assert all(heat_map["key"] != "heads" for heat_map in page.data["maps-data"])


def replay_values(payload: dict, number: int) -> np.ndarray:
    sequence = payload["sequences"][number]
    codes = np.frombuffer(base64.b64decode(sequence["packed"]), dtype="<i2").astype(float)
    codes[codes == -32768] = np.nan
    return codes.reshape(len(sequence["ids"]), -1) * float(sequence["scale"])


def test_replay_holds_losses_and_sps_of_each_token(make_scan, parse, tmp_path):
    scan = make_scan(sequences=3)
    payload = parse(write_report(scan.path, tmp_path / "r.html", replay_order="first", figures_too=False).html).data["replay-data"]
    grid = build_grid(scan.layout)
    for number in range(3):
        sequence = payload["sequences"][number]
        assert sequence["ids"] == scan.token_ids[number].tolist()
        np.testing.assert_allclose(np.array(sequence["loss"], dtype=float), scan.loss[number], rtol=1e-5)
        values, sps = replay_values(payload, number), scan.sps[number]
        largest = np.nanmax(np.abs(values))
        for place, (row, column) in enumerate(payload["cells"]):
            blocks = grid.cell == row * len(payload["columns"]) + column
            np.testing.assert_allclose(values[:-1, place], sps[:-1, blocks].mean(axis=1), atol=largest / 60_000)
        for row in range(len(payload["rows"])):
            layer = sps[:-1, scan.offsets[row] : scan.offsets[row + 1]]
            np.testing.assert_allclose(values[:-1, len(payload["cells"]) + row], np.sqrt((layer**2).mean(axis=1)), atol=largest / 60_000)
        assert np.isnan(values[-1]).all()  # the last token has no gradient


def test_replay_takes_the_most_surprising_and_says_so(make_scan, parse, tmp_path):
    scan = make_scan(sequences=9)
    page = parse(write_report(scan.path, tmp_path / "r.html", replay=2, figures_too=False).html)
    order = np.argsort([-np.nanmean(loss) for loss in scan.loss])[:2]
    assert [sequence["ids"] for sequence in page.data["replay-data"]["sequences"]] == [scan.token_ids[i].tolist() for i in order]
    assert "2 of 9 sequences are shown: those with the highest mean loss" in page.text


def test_replay_can_be_left_out(make_scan, parse, tmp_path):
    page = parse(write_report(make_scan().path, tmp_path / "r.html", replay=0, figures_too=False).html)
    assert "replay-data" not in page.data


def test_integral_store_keeps_text_and_loss(make_scan, parse, tmp_path):
    full, lean = make_scan("full"), make_scan("lean", store="integral")
    pages = [parse(write_report(scan.path, tmp_path / f"{scan.path.stem}.html", figures_too=False).html) for scan in (full, lean)]
    assert pages[0].data["maps-data"] == pages[1].data["maps-data"]
    sequence = pages[1].data["replay-data"]["sequences"][0]
    assert sequence["packed"] is None
    assert sequence["text"] == "some text"
    assert sequence["loss"][:-1] == pages[0].data["replay-data"]["sequences"][0]["loss"][:-1]


def test_planes_without_integrals_give_the_same_page(make_scan, parse, tmp_path):
    scan = make_scan()
    bare = tmp_path / "bare.mscan"
    with MscanReader(scan.path) as reader, MscanWriter(bare, reader.metadata, reader.layout, codec="f32") as writer:
        for sequence in reader.sequences:
            activation, gradient = reader.planes(sequence.ordinal)
            writer.append(SequenceRecord(sequence.sequence_id, sequence.token_ids, sequence.loss, activation, gradient, text=sequence.text))
    pages = [parse(write_report(path, tmp_path / f"{path.stem}.html", figures_too=False).html) for path in (scan.path, bare)]
    for one, other in zip(pages[0].data["maps-data"], pages[1].data["maps-data"], strict=True):
        np.testing.assert_allclose(np.array(one["values"], dtype=float), np.array(other["values"], dtype=float), rtol=1e-4, atol=1e-6)


def test_experts_share_a_cell_and_unrouted_ones_stay_blank(make_scan, parse, tmp_path):
    sizes = {"model.layers.0.self_attn.q_proj.weight": 256}
    sizes |= {f"model.layers.0.mlp.experts.{part}.{expert}": 128 for part in ("gate_up_proj", "down_proj") for expert in range(6)}
    scan = make_scan(sizes=sizes, routed=0.15, sequences=2, tokens=6)
    page = parse(write_report(scan.path, tmp_path / "r.html", figures_too=False).html)
    heat_map = page.data["maps-data"][0]
    assert heat_map["columns"] == ["self_attn.q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wanted = expected_cells(scan, scan.mean(scan.activation))
    assert shown_cells(heat_map) == pytest.approx(wanted, rel=1e-4)
    never = int((~np.isnan(np.concatenate(scan.sps))).sum(axis=0).min() == 0)
    assert ("were never recorded" in page.text) == bool(never)


def test_missing_gradients_are_no_measurement(make_scan, parse, tmp_path):
    page = parse(write_report(make_scan(gradient=False).path, tmp_path / "r.html", figures_too=False).html)
    assert "its writer measured none" in page.text
    assert all(value is None for row in page.data["maps-data"][1]["values"] for value in row)
    assert any(value is not None for row in page.data["maps-data"][2]["values"] for value in row)


def test_file_without_sequences_makes_a_page(make_scan, parse, tmp_path):
    page = parse(write_report(make_scan(sequences=0).path, tmp_path / "r.html", figures_too=False).html)
    assert "The file holds no complete sequence." in page.text


def test_what_recovery_left_out_is_said(make_scan, parse, tmp_path):
    scan = make_scan(sequences=3)
    whole = scan.path.read_bytes()
    scan.path.write_bytes(whole[: len(whole) * 4 // 5])
    page = parse(write_report(scan.path, tmp_path / "r.html", figures_too=False).html)
    assert "The file is damaged: bytes" in page.text
    assert len(page.data["replay-data"]["sequences"]) < 3


def test_loss_distribution_names_mean_and_perplexity(make_scan, parse, tmp_path):
    scan = make_scan()
    losses = np.concatenate(scan.loss)
    mean = np.nanmean(losses.astype(float))
    page = parse(write_report(scan.path, tmp_path / "r.html", figures_too=False).html)
    assert f"Mean {mean:.4g} nats a token over {np.isfinite(losses).sum():,} tokens: perplexity {np.exp(mean):.4g}." in page.text


def test_page_requests_nothing_and_hostile_text_stays_text(make_scan, parse, tmp_path):
    metadata = {
        "model": ATTACKS[0],
        "topic": ATTACKS[1],
        "note": ATTACKS[2],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    scan = make_scan(sequences=5, metadata=metadata, texts=ATTACKS, ids=ATTACKS)
    result = write_report(scan.path, tmp_path / "r.html", replay_order="first", figures_too=False)
    page = parse(result.html)  # every element is closed where it should be
    assert page.tags.count("script") == 3 + 3  # palette, maps, replay; core, map, replay
    assert "img" not in page.tags
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "action", "data"):
            assert value == "data:,", (tag, name, value)
    source = result.html.read_text(encoding="utf-8")
    assert "http://" not in source.replace("http-equiv", "")
    assert "https://" not in source
    assert [sequence["text"] for sequence in page.data["replay-data"]["sequences"]] == ATTACKS
    assert page.text.count(ATTACKS[0]) >= 2  # title and table, letter by letter


def test_hostile_names_of_weights_stay_text(make_scan, parse, tmp_path):
    sizes = {"model.layers.0.</script><b>.weight": 128, "model.layers.0.$x^2$ & co.weight": 128, "<i>head</i>.weight": 70}
    page = parse(
        write_report(make_scan(sizes=sizes, metadata={"model": r"$\frac{"}).path, tmp_path / "r.html").html
    )  # PNGs too: no formula
    assert "i" not in page.tags
    assert page.data["maps-data"][0]["columns"][0] == "</script><b>"


def test_pngs_are_pictures_of_the_maps(make_scan, tmp_path):
    from matplotlib.image import imread

    result = write_report(make_scan().path, tmp_path / "page.html", normalise="none")
    assert [png.name for png in result.pngs] == ["page-maps.png", "page-profiles.png"]
    for png in result.pngs:
        pixels = (imread(png)[..., :3] * 255).astype(int).reshape(-1, 3)
        assert len(np.unique(pixels @ [65536, 256, 1])) > 100
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".mscan") == [
        "page-maps.png",
        "page-profiles.png",
        "page.html",
    ]


def test_only_the_page_is_written_without_figures(make_scan, tmp_path):
    result = write_report(make_scan().path, tmp_path / "page.html", figures_too=False)
    assert result.pngs == ()
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".mscan"] == ["page.html"]


def test_missing_matplotlib_is_asked_for_by_name(make_scan, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^drawing PNGs needs matplotlib: pip install matplotlib, or use figures_too=False\.$"):
        write_report(make_scan().path, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "row"}, "normalise must be one of layer, global, none, got 'row'"),
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"replay": -1}, "replay must be at least 0, got -1"),
        ({"replay_order": "last"}, "replay_order must be one of surprising, first, got 'last'"),
        ({"tokenizer": "nowhere"}, "tokenizer must be a folder with a tokenizer, such as tokenizer.json, got nowhere"),
        ({"output": "page.txt"}, "output must end in .html"),
        ({"output": "gone/page.html"}, "output must be in a folder that exists"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(options, message, make_scan, tmp_path):
    output = tmp_path / options.pop("output", "page.html")
    with pytest.raises(InputError, match=message):
        write_report(make_scan().path, output, **options, figures_too=False)
    assert not output.exists()


def test_failed_report_leaves_the_old_page(make_scan, tmp_path, monkeypatch):
    output = tmp_path / "page.html"
    output.write_text("old")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(InputError, match=r"output .*page\.html cannot be written: disk full\."):
        write_report(make_scan().path, output, figures_too=False)
    assert output.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".mscan"] == ["page.html"]


def test_tokens_are_shown_as_text_where_the_tokenizer_fits(make_scan, parse, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path / "model"
    folder.mkdir()
    own.save(str(folder / "tokenizer.json"))
    from tinyonn._io.folders import tokenizer_hash

    text = "a é 漢 😀\nb"
    ids = own.encode(text).ids
    path = tmp_path / "t.mscan"
    scan = make_scan()
    with MscanWriter(path, {"model": "m", "tokenizer_sha256": tokenizer_hash(folder)}, scan.layout) as writer:
        writer.append(SequenceRecord("one", ids, np.ones(len(ids), np.float32), text=text))
    page = parse(write_report(path, tmp_path / "r.html", tokenizer=folder, figures_too=False).html)
    pieces = page.data["replay-data"]["sequences"][0]["pieces"]
    assert "".join(pieces) == text
    assert len(pieces) == len(ids)
    assert pieces[-1] == "b"
    assert pieces[ids.index(own.encode("é").ids[0]) + 1] == "é"  # a character of two tokens stands at the last

    (folder / "vocab.txt").write_text("another tokenizer")
    with pytest.raises(InputError, match="tokenizer must be the one that the scan used"):
        write_report(path, tmp_path / "r.html", tokenizer=folder, figures_too=False)
    page = parse(write_report(path, tmp_path / "r.html", figures_too=False).html)
    assert page.data["replay-data"]["sequences"][0]["pieces"] is None
    assert "The scan's tokenizer was not found" in page.text


def test_tokenizer_of_a_cached_model_is_found(make_scan, tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models

    from tinyonn._io.folders import tokenizer_hash
    from tinyonn.report.scan.token_text import find_tokenizer

    folder = tmp_path / "cache" / "tiny"
    folder.mkdir(parents=True)
    Tokenizer(models.WordLevel({"yes": 0, "no": 1}, unk_token="no")).save(str(folder / "tokenizer.json"))
    monkeypatch.setenv("TINYONN_CACHE", str(tmp_path / "cache"))
    found = find_tokenizer({"model": "tiny", "tokenizer_sha256": tokenizer_hash(folder)})
    assert found is not None
    assert found.decode([0]) == "yes"
    assert find_tokenizer({"model": "tiny", "tokenizer_sha256": "0" * 64}) is None
    assert find_tokenizer({"model": "tiny"}) is None
    monkeypatch.delenv("TINYONN_CACHE")
    elsewhere = {"model": "unknown", "model_path": str(folder), "tokenizer_sha256": tokenizer_hash(folder)}
    assert find_tokenizer(elsewhere) is not None
    assert find_tokenizer({**elsewhere, "model_path": str(tmp_path / "moved")}) is None


def test_huge_layout_stays_one_small_page(make_scan, parse, tmp_path):
    sizes = {f"model.layers.{layer}.mlp.part_{part}.weight": 64 for layer in range(120) for part in range(24)}
    result = write_report(make_scan(sizes=sizes, sequences=2, tokens=4).path, tmp_path / "r.html", figures_too=False)
    assert len(parse(result.html).data["maps-data"][0]["rows"]) == 120
    assert result.html.stat().st_size < 2_000_000


def test_thousands_of_sequences_are_sampled_for_losses(make_scan, parse, tmp_path, monkeypatch):
    monkeypatch.setattr("tinyonn.report.scan.data.LOSS_SEQUENCES", 4)
    page = parse(write_report(make_scan(sequences=9).path, tmp_path / "r.html", figures_too=False).html)
    assert "Losses are those of 4 sequences, evenly spaced among 9." in page.text


def test_heavy_replay_keeps_text_and_says_so(make_scan, parse, tmp_path, monkeypatch):
    monkeypatch.setattr("tinyonn.report.scan.replay.MAX_VALUES", 500)
    monkeypatch.setattr("tinyonn.report.scan.replay.MAX_TOKENS", 10)
    payload = parse(write_report(make_scan().path, tmp_path / "r.html", figures_too=False).html).data["replay-data"]
    assert [sequence["packed"] is None for sequence in payload["sequences"]] == [False, True, True, True]
    assert "too large" in payload["sequences"][1]["note"]
    assert all(len(sequence["ids"]) == 10 for sequence in payload["sequences"])


def test_short_names_keep_what_tells_them_apart():
    assert short_names(["self_attn.q_proj", "mlp.up_proj"]) == ["q_proj", "up_proj"]
    assert short_names(["self_attn.q_proj", "cross_attn.q_proj", "up"]) == ["self_attn.q_proj", "cross_attn.q_proj", "up"]


def test_several_stacks_keep_their_names(make_scan, parse, tmp_path):
    sizes = {f"{stack}.layers.{layer}.fc.weight": 128 for stack in ("encoder", "decoder") for layer in range(2)}
    page = parse(write_report(make_scan(sizes=sizes).path, tmp_path / "r.html", figures_too=False).html)
    assert page.data["maps-data"][0]["rows"] == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]


SAMPLE = Path(__file__).parents[2].parent / "shared" / "data" / "v1-sample.mscan"


@pytest.mark.skipif(not SAMPLE.is_file(), reason="the sample of version 1 is not here")
def test_version_one_file_makes_a_page(parse, tmp_path):
    page = parse(write_report(SAMPLE, tmp_path / "r.html", figures_too=False).html)
    assert "its writer measured none" in page.text
    assert len(page.data["maps-data"][0]["rows"]) == 28
    assert json.dumps(page.data["maps-data"][1]["values"]).count("null") == 28 * 7


@pytest.mark.parametrize("most", [1, 2, 3, 7, 40])
def test_an_axis_of_counts_has_whole_numbers(most):
    from tinyonn.report.html.charts import histogram

    drawn = histogram("t", np.array([1.0] * most + [3.0]), x_title="x", y_title="y", bins=10)
    heights = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', drawn)
    assert heights
    assert all(float(height.replace(",", "")).is_integer() for height in heights), heights
    assert max(float(height) for height in heights) >= 0.8 * most
