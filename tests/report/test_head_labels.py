"""What the page of a score run says of itself: counts, options, the model."""

from __future__ import annotations

import json

import pytest
import yaml

from tinyonn.errors import InputError
from tinyonn.heads.plasticity.seeds import aggregate
from tinyonn.report import write_plasticity_aggregate, write_plasticity_page, write_scores_page


def test_the_output_norm_is_described_as_the_run_took_it(make_scores, parse):
    folder = make_scores()[0]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    legends = []
    for projected in (False, True):
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"out_projection": projected}))
        legends.append(parse(write_scores_page(folder, figures_too=False).html).text)
    before, after = "its slice of the input of the output projection", "its slice after the output projection"
    assert [(before in text, after in text) for text in legends] == [(True, False), (False, True)]


def test_the_combined_score_is_described_by_its_weights(make_scores, parse):
    text = parse(write_scores_page(make_scores(extra=True)[0], figures_too=False).html).text
    assert "rank(out) + 0.5·rank(ent) + 1·rank(task) + 0.25·rank(peak): weighted sum of a head's ranks within its layer" in text
    assert "agree" not in text


def test_options_that_a_page_needs_are_asked_for_by_name(make_scores):
    folder = make_scores()[0]
    (folder / "config.yaml").write_text("norm_mode: zscore\nlambda_ent: 0.5\n")
    with pytest.raises(InputError, match=r"config\.yaml has no out_projection, extra_weights, lambda_task; run"):
        write_scores_page(folder, figures_too=False)


def test_counts_of_a_score_run_say_what_they_count(make_scores, parse):
    folder = make_scores()[0]
    (folder / "summary.json").write_text(json.dumps({"model": "tiny", "rows": 1221, "samples": 32, "answered": 31, "spans_lost": 2}))
    text = parse(write_scores_page(folder, figures_too=False).html).text
    assert "of these, with an answer key31" in text
    assert "prompts without their whole question2" in text


@pytest.mark.parametrize(
    ("model", "path", "title"),
    [
        ("ckpt_final", "study/boolq/seed42/ckpt_final", "boolq/seed42/ckpt_final"),
        ("checkpoint-500", "/runs/qwen/checkpoint-500", "runs/qwen/checkpoint-500"),
        ("ckpt_init", "ckpt_init", "ckpt_init"),
        ("org/model-7b", "org/model-7b", "model-7b"),
        ("all-MiniLM-L6-v2", "/models/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
    ],
)
def test_a_checkpoint_is_titled_by_more_than_its_last_folder(model, path, title, make_scores, parse):
    folder = make_scores()[0]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"model_path": path}))
    (folder / "summary.json").write_text(json.dumps({"model": model}))
    page = write_scores_page(folder, figures_too=False).html.read_text(encoding="utf-8")
    assert f"<h1>Attention heads of {title}</h1>" in page


def test_numbers_before_and_after_have_the_same_digits(make_run, parse):
    folder, _ = make_run()
    measured = json.loads((folder / "measure.json").read_text())
    losses = {"base_loss_pre": 0.69401089, "base_loss_post": 0.69385837}
    (folder / "measure.json").write_text(json.dumps(measured | losses))
    assert "0.6940 → 0.6939" in parse(write_plasticity_page(folder, figures_too=False).html).text


def test_plasticity_of_a_checkpoint_names_what_it_is_of(make_run, parse):
    folder, _ = make_run()
    path = "study/boolq/seed1/ckpt_final"
    for name in ("stats.json", "train.json"):
        content = json.loads((folder / name).read_text())
        content["options"]["model_path"] = path
        (folder / name).write_text(json.dumps(content | ({"model": "ckpt_final"} if name == "stats.json" else {})))
    aggregate(folder.parent)
    for written in (write_plasticity_page(folder, figures_too=False), write_plasticity_aggregate(folder.parent)):
        assert "boolq/seed1/ckpt_final, " in parse(written.html).text
